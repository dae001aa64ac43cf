//! The only module that talks to the kernel: loads and attaches the programs, reads and writes the maps. What it has put
//! into the kernel stays there when the agent ends; [`cleanup()`] is the way out.

mod address_filter;
mod attach;
mod attached;
mod cleanup;
mod clsact;
mod datagrams;
mod devices;
mod error;
mod events;
mod examination;
mod family;
mod flow_table;
mod foreign;
mod layout;
mod links;
mod listeners;
mod load;
mod migration;
mod namespaces;
pub mod netlink;
mod observer;
mod options;
mod pair;
mod pinned;
mod preflight;
mod presence;
mod program;
mod raw;
mod reader;
mod rehearsal;
mod reserved_ports;
mod restore;
mod select;
mod sockets;
mod syscall;
mod table;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io,
    net::IpAddr,
    ops::RangeInclusive,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use aya::Ebpf;
use proxy_common::{
    addr::{Address as _, Ipv4, Ipv6, Mac, Port},
    backend::BackendId,
    filter::Filter,
    names::ServiceName,
    node::{FURTHER, LAYOUT, Node, ServiceCidrs, TUNNELS, Vlan, masquerade, newcomers},
};

#[cfg(test)]
pub(crate) use self::preflight::CAPABILITIES;
use self::{
    address_filter::AddressFilter,
    attach::Attacher,
    family::FamilyMaps,
    foreign::Foreign,
    netlink::{LinkLayerAddress, NodeNetwork, conntrack::TranslatedConnection},
    reserved_ports::Reservation,
    sockets::Sweeper,
    table::Table,
};
pub use self::{
    attach::{AttachProblem, AttachReport, Attachment, Mechanism},
    attached::{Attached, attached},
    cleanup::{Cleaned, Kept, Removed, cleanup, find},
    clsact::Side,
    devices::device_name,
    error::{Error, OpenError},
    events::{Watch, WatchError},
    examination::{Finding, Verdict, examine},
    flow_table::{FlowTableSize, goes_on, jiffies, silence},
    foreign::Unfound,
    links::{PinnedLink, pinned_links},
    listeners::listeners,
    load::{OBJECT, maps_directory, pinned_layout},
    observer::{Active, FamilyObserver, Fill, KnownBackend, Observer, Survey},
    options::{ClassifierMode, DevicePattern, Options, PatternError, SocketLb, UplinkMode},
    pinned::{Unfiltered, read_pinned, unfiltered},
    preflight::{mount_bpf_file_system, pin_root},
    presence::{Presence, seconds_since_boot},
    program::ProgramName,
    reader::{FamilyReader, FlowVisitor},
    rehearsal::{
        Action, AnyCall, Call, Moment, Place, Rehearsal, SeenAffinity, SeenBackend, SeenFlow, SeenService, rehearse,
    },
    sockets::Swept,
};
use crate::diff::{FamilyState, KernelState, Plan};

impl std::fmt::Debug for Dataplane {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Dataplane").field("attacher", &self.attacher).field("node", &self.node).finish_non_exhaustive()
    }
}

/// How long an agent waits for its predecessor to leave the pin path.
const PATIENCE: Duration = Duration::from_secs(5);

/// What the agent decides about the node itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeSettings {
    /// Source address of masqueraded IPv4 flows; unspecified when the node has none.
    pub masquerade_v4: Ipv4,
    /// Source address of masqueraded IPv6 flows; unspecified when the node has none.
    pub masquerade_v6: Ipv6,
    /// Addresses that masqueraded flows bear when the ports of the first run out; as many of each family as there is room for.
    pub further: Vec<IpAddr>,
    /// Ports that may be NodePorts.
    pub node_ports: RangeInclusive<u16>,
    /// Source ports given to masqueraded flows.
    pub source_ports: RangeInclusive<u16>,
    /// Those given to flows between the families, which must not be others'.
    pub cross_ports: RangeInclusive<u16>,
    /// Whatever goes to a ClusterIP bears the node's address.
    pub masquerade_all: bool,
    /// What goes to a NodePort or an external address bears it also when its backend is on this node.
    pub masquerade_local_backends: bool,
}

impl NodeSettings {
    fn flags(&self) -> u32 {
        let bit = |is_set: bool, bit: u32| if is_set { bit } else { 0 };
        bit(self.masquerade_all, masquerade::ALL) | bit(self.masquerade_local_backends, masquerade::LOCAL_BACKENDS)
    }
}

/// The programs and maps of one agent. Dropping it leaves everything in the kernel.
pub struct Dataplane {
    object: Ebpf,
    attacher: Attacher,
    v4: FamilyMaps<Ipv4>,
    v6: FamilyMaps<Ipv6>,
    slots: Table<u32, BackendId>,
    uplinks: Table<u32, u32>,
    vlans: Table<Vlan, u32>,
    peers: Table<Mac, u32>,
    peer_addresses: BTreeSet<IpAddr>,
    local_macs: Table<Mac, u32>,
    service_cidrs: Table<u32, ServiceCidrs>,
    foreign: Foreign,
    inbound: AddressFilter,
    outbound: AddressFilter,
    node_map: Table<u32, Node>,
    node: Node,
    sweeper: Sweeper,
    reservation: Reservation,
    pin_path: PathBuf,
    has_tunnels: bool,
    /// What was last said of pins that are gone, so that it is said once.
    complaint: Option<String>,
    /// Locked for as long as this agent lives.
    lock: File,
}

impl Dataplane {
    /// Checks the node, adopts or makes the maps, and loads the programs. Programs of a predecessor go on running until
    /// [`Self::attach`] puts these in their place.
    pub fn open(options: &Options) -> Result<Self, OpenError> {
        let cgroup = preflight::check(options)?;
        let lock = prepare(&options.pin_path)?;
        let object = migration::open(options)?;
        let attacher = Attacher::new(options, cgroup.as_deref())?;
        let node_map: Table<u32, Node> = family::table(&object, "NODE")?;
        let mut dataplane = Self {
            v4: FamilyMaps::new(&object, &family::V4)?,
            v6: FamilyMaps::new(&object, &family::V6)?,
            slots: family::table(&object, "SLOTS")?,
            uplinks: family::table(&object, "UPLINKS")?,
            vlans: family::table(&object, "VLANS")?,
            peers: family::table(&object, "PEERS")?,
            peer_addresses: BTreeSet::new(),
            local_macs: family::table(&object, "LOCAL_MACS")?,
            service_cidrs: family::table(&object, "SERVICE_CIDRS")?,
            foreign: Foreign::new(&object)?,
            inbound: AddressFilter::adopt(family::table(&object, "INBOUND")?)?,
            outbound: AddressFilter::adopt(family::table(&object, "OUTBOUND")?)?,
            node: node_map.read(&0)?,
            node_map,
            attacher,
            sweeper: Sweeper::start(&object)?,
            reservation: Reservation::default(),
            pin_path: options.pin_path.clone(),
            has_tunnels: options.tunnels,
            complaint: None,
            object,
            lock,
        };
        let found = dataplane.node;
        // Stays until an agent has come so far: this one may end before.
        let undecided = if found.layout == 0 { newcomers::UNDECIDED } else { 0 };
        let (flags, jiffies_per_second) = (found.flags | undecided, load::jiffies_per_second());
        dataplane.write_node(Node { layout: LAYOUT, jiffies_per_second, flags, ..found })?;
        dataplane.begin_service_cidrs()?;
        Ok(dataplane)
    }

    /// An entry nobody has written yet is all zeros, which would hold every address.
    fn begin_service_cidrs(&self) -> Result<(), Error> {
        let cidrs = self.service_cidrs.read(&0)?;
        let is_unwritten = cidrs.v4.iter().any(|cidr| cidr.mask == Ipv4::ANY);
        if is_unwritten { self.service_cidrs.put(&0, &ServiceCidrs::NONE) } else { Ok(()) }
    }

    /// Tells somebody of each look at the sockets whose backends may have gone. The first listener stays.
    pub fn tell_sweeps(&self, listener: impl Fn(Swept) + Send + Sync + 'static) {
        self.sweeper.tell(listener);
    }

    /// What the kernel holds.
    pub fn read(&self) -> Result<KernelState, Error> {
        state(self.v4.read()?, self.v6.read()?, &self.slots, &self.service_cidrs)
    }

    /// Carries out a plan, in order. After an error some of it is done: read again before the next. Where there is nothing to write,
    /// it may still say that a Service port has lost a backend.
    pub fn apply(&mut self, plan: &Plan) -> Result<(), Error> {
        self.sweeper.expect(plan);
        let result = self.write(plan);
        // Nobody chooses whom a Service port has lost from here on. After an error somebody may, and the next plan tells of all ports.
        let has_lost = result.is_ok() && self.sweeper.follow(plan);
        // Also after an error: what was written does not stand in the next plan.
        if has_lost || sockets::may_lose(&plan.v4) || sockets::may_lose(&plan.v6) {
            self.sweeper.wake();
        }
        result
    }

    fn write(&mut self, plan: &Plan) -> Result<(), Error> {
        family::add_steps(&plan.v4, &mut self.inbound, &mut self.outbound);
        family::add_steps(&plan.v6, &mut self.inbound, &mut self.outbound);
        self.inbound.flush()?;
        self.outbound.flush()?;
        // What goes wrong in one family is nothing the other need wait for.
        let v4 = self.v4.apply(&self.slots, &plan.v4);
        let v6 = self.v6.apply(&self.slots, &plan.v6);
        v4.and(v6)?;
        plan.service_cidrs.map_or(Ok(()), |cidrs| self.service_cidrs.put(&0, &cidrs))
    }

    /// Says what Service ports of IPv4 and of IPv6 are called, by index.
    pub fn put_names(&self, v4: &[(u32, ServiceName)], v6: &[(u32, ServiceName)]) -> Result<(), Error> {
        self.v4.put_names(v4)?;
        self.v6.put_names(v6)
    }

    /// Tells the programs about the node.
    pub fn put_node(&mut self, settings: &NodeSettings) -> Result<(), Error> {
        let node = Node {
            masquerade_v4: settings.masquerade_v4,
            masquerade_v6: settings.masquerade_v6,
            further_v4: first_ones(settings.further.iter().filter_map(as_v4)),
            further_v6: first_ones(settings.further.iter().filter_map(as_v6)),
            node_port_first: Port::new(*settings.node_ports.start()),
            node_port_last: Port::new(*settings.node_ports.end()),
            source_port_first: Port::new(*settings.source_ports.start()),
            source_port_last: Port::new(*settings.source_ports.end()),
            cross_port_first: Port::new(*settings.cross_ports.start()),
            cross_port_last: Port::new(*settings.cross_ports.end()),
            flags: settings.flags() | if self.has_tunnels { TUNNELS } else { 0 } | self.newcomers(),
            ..self.node
        };
        self.add_masquerade(&node);
        self.inbound.flush()?;
        self.write_node(node)
    }

    /// What becomes of packets that no flow knows: bits of [`newcomers`].
    pub fn newcomers(&self) -> u32 {
        self.node.flags & newcomers::ALL
    }

    /// Says what becomes of packets that no flow knows.
    pub fn put_newcomers(&mut self, bits: u32) -> Result<(), Error> {
        self.write_node(Node { flags: self.node.flags & !newcomers::ALL | bits, ..self.node })
    }

    /// How many connections of another proxy the programs know of, those included that they are noting at the moment.
    pub fn count_foreign(&self) -> Result<usize, Error> {
        if let Err(source) = syscall::bytes::wait_for_programs() {
            tracing::debug!("programs that run cannot be waited for: {source}");
        }
        self.foreign.count()
    }

    /// Tells the programs which connections another proxy of this node translates, whose addresses are `own`. Returns how many they
    /// know of now.
    pub fn put_foreign(
        &self,
        found: &BTreeSet<TranslatedConnection>,
        own: &BTreeSet<IpAddr>,
        unfound: Unfound,
    ) -> Result<usize, Error> {
        self.foreign.follow(found, own, unfound)
    }

    /// Keeps the source ports of masqueraded flows from the node's own sockets. Cheap when they are kept already, so that it
    /// can be asked for now and then: what stands in the way is logged once, and stops nothing.
    pub fn reserve_ports(&mut self, source_ports: &RangeInclusive<u16>) {
        self.reservation.hold(&self.pin_path, source_ports);
    }

    /// Has every flow look up its next hop anew, at its next packet.
    pub fn bump_routes(&mut self) -> Result<(), Error> {
        self.write_node(Node { route_generation: self.node.route_generation.wrapping_add(1), ..self.node })
    }

    /// Makes what is attached, and what is pinned, equal to what the options and the devices that exist ask for. New problems are
    /// logged; an error means that nothing was attached.
    pub fn attach(&mut self, network: &NodeNetwork) -> Result<AttachReport, Error> {
        self.restore_pins()?;
        // Before the programs see the first frame.
        self.put_vlans(network)?;
        self.put_local_macs(network)?;
        let report = self.attacher.attach(&mut self.object, network)?;
        let xdp = report.attachments.iter().filter(|attachment| attachment.program == ProgramName::UplinkXdp);
        self.put_uplinks(&xdp.filter_map(|attachment| attachment.ifindex).collect())?;
        Ok(report)
    }

    /// Pins again what somebody has unpinned. As long as that cannot be, everything goes on without pins.
    fn restore_pins(&mut self) -> Result<(), Error> {
        let complaint = match restore::restore(&self.object, &self.pin_path, &mut self.lock) {
            Ok(()) => None,
            Err(wiped @ Error::Wiped { .. }) => Some(wiped.to_string()),
            Err(error) => return Err(error),
        };
        if let Some(complaint) = complaint.as_ref().filter(|_| complaint != self.complaint) {
            tracing::error!("{complaint}");
        }
        self.complaint = complaint;
        Ok(())
    }

    /// Tells the programs which devices take frames from XDP: those whose driver has been made ready by a program of
    /// its own.
    fn put_uplinks(&mut self, wanted: &BTreeSet<u32>) -> Result<(), Error> {
        let found: BTreeSet<u32> = self.uplinks.entries()?.into_iter().map(|(ifindex, _)| ifindex).collect();
        if found == *wanted {
            return Ok(());
        }
        self.uplinks.remove_all(&found.difference(wanted).copied().collect::<Vec<_>>())?;
        let added: Vec<u32> = wanted.difference(&found).copied().collect();
        self.uplinks.put_all(&added, &vec![1; added.len()])?;
        self.bump_routes()
    }

    /// Tells the programs which tags lead to which devices.
    fn put_vlans(&mut self, network: &NodeNetwork) -> Result<(), Error> {
        let wanted: BTreeMap<Vlan, u32> =
            network.links.iter().filter_map(|link| Some((link.vlan?, link.ifindex))).collect();
        let found: BTreeMap<Vlan, u32> = self.vlans.entries()?.into_iter().collect();
        let gone: Vec<Vlan> = found.keys().filter(|vlan| !wanted.contains_key(vlan)).copied().collect();
        self.vlans.remove_all(&gone)?;
        let (vlans, devices): (Vec<Vlan>, Vec<u32>) =
            wanted.into_iter().filter(|(vlan, device)| found.get(vlan) != Some(device)).unzip();
        self.vlans.put_all(&vlans, &devices)
    }

    /// Tells the programs of the addresses of other nodes, beyond which are Services that they may have dispatched here.
    pub fn put_peer_addresses(&mut self, addresses: &BTreeSet<IpAddr>) -> Result<(), Error> {
        self.peer_addresses.clone_from(addresses);
        self.add_peers();
        self.inbound.flush()?;
        self.v4.put_peers(&addresses.iter().filter_map(as_v4).collect())?;
        self.v6.put_peers(&addresses.iter().filter_map(as_v6).collect())
    }

    /// Tells the programs where other nodes are on the links of this one.
    pub fn put_peers(&mut self, addresses: &BTreeSet<LinkLayerAddress>) -> Result<(), Error> {
        put_macs(&self.peers, &addresses.iter().map(|octets| Mac { octets: *octets }).collect())
    }

    fn add_peers(&mut self) {
        for address in &self.peer_addresses {
            match address {
                IpAddr::V4(v4) => self.inbound.add(&Ipv4::from(*v4)),
                IpAddr::V6(v6) => self.inbound.add(&Ipv6::from(*v6)),
            }
        }
    }

    /// Tells the programs which frames are for this node.
    fn put_local_macs(&self, network: &NodeNetwork) -> Result<(), Error> {
        let macs = network.links.iter().filter(|link| link.has_ethernet).filter_map(|link| link.mac);
        put_macs(&self.local_macs, &macs.map(|octets| Mac { octets }).collect())
    }

    /// Clears the bits of the address filters that neither an entry nor a flow needs any more.
    pub fn prune_filters(&mut self) -> Result<(), Error> {
        let (mut inbound, mut outbound) = (Box::new(Filter::EMPTY), Box::new(Filter::EMPTY));
        let state = self.read()?;
        family::add_state(&state.v4, &mut inbound, &mut outbound);
        family::add_state(&state.v6, &mut inbound, &mut outbound);
        self.v4.add_flows(&mut inbound, &mut outbound)?;
        self.v6.add_flows(&mut inbound, &mut outbound)?;
        self.inbound.replace(inbound);
        self.outbound.replace(outbound);
        self.add_peers();
        let node = self.node;
        self.add_masquerade(&node);
        self.inbound.flush()?;
        self.outbound.flush()
    }

    fn add_masquerade(&mut self, node: &Node) {
        for v4 in std::iter::once(&node.masquerade_v4).chain(&node.further_v4).filter(|v4| **v4 != Ipv4::ANY) {
            self.inbound.add(v4);
        }
        for v6 in std::iter::once(&node.masquerade_v6).chain(&node.further_v6).filter(|v6| **v6 != Ipv6::ANY) {
            self.inbound.add(v6);
        }
    }

    fn write_node(&mut self, node: Node) -> Result<(), Error> {
        if node != self.node {
            self.node_map.put(&0, &node)?;
            self.node = node;
        }
        Ok(())
    }
}

/// What maps hold, wherever they are: those of the families, and what both share.
fn state(
    v4: FamilyState<Ipv4>,
    v6: FamilyState<Ipv6>,
    slots: &Table<u32, BackendId>,
    service_cidrs: &Table<u32, ServiceCidrs>,
) -> Result<KernelState, Error> {
    let services = v4.services.values().chain(v6.services.values());
    let ranges = services.flat_map(|service| [service.internal, service.external, service.local]);
    let end = ranges.map(|range| range.first.saturating_add(range.count)).max().unwrap_or(0);
    Ok(KernelState { slots: slots.values(end as usize)?, v4, v6, service_cidrs: service_cidrs.read(&0)? })
}

/// Makes the keys of a map these. New ones come first, so that who gets another address is known all the time.
fn put_macs(table: &Table<Mac, u32>, wanted: &BTreeSet<Mac>) -> Result<(), Error> {
    let found: BTreeSet<Mac> = table.entries()?.into_iter().map(|(mac, _)| mac).collect();
    let added: Vec<Mac> = wanted.difference(&found).copied().collect();
    table.put_all(&added, &vec![1; added.len()])?;
    table.remove_all(&found.difference(wanted).copied().collect::<Vec<_>>())
}

/// As many as there is room for, and the unspecified address in the rest.
fn first_ones<A: Copy + Default>(addresses: impl Iterator<Item = A>) -> [A; FURTHER] {
    let mut room = [A::default(); FURTHER];
    room.iter_mut().zip(addresses).for_each(|(place, address)| *place = address);
    room
}

fn as_v4(address: &IpAddr) -> Option<Ipv4> {
    match address {
        IpAddr::V4(v4) => Some((*v4).into()),
        IpAddr::V6(_) => None,
    }
}

fn as_v6(address: &IpAddr) -> Option<Ipv6> {
    match address {
        IpAddr::V4(_) => None,
        IpAddr::V6(v6) => Some((*v6).into()),
    }
}

/// Whether an agent keeps what is pinned under a path. To find out, the lock is held for an instant, which a starting agent
/// waits out.
pub fn is_kept(pin_path: &Path) -> bool {
    File::open(pin_path).is_ok_and(|pins| matches!(pins.try_lock_shared(), Err(fs::TryLockError::WouldBlock)))
}

/// Has the allocator give back what is free. For the start of an agent, before it has other threads.
pub fn keep_little_free_memory() {
    syscall::keep_little_free_memory();
}

/// Makes the directories and locks them.
fn prepare(pin_path: &Path) -> Result<File, OpenError> {
    let error = |source| OpenError::PinPath { path: pin_path.into(), source };
    restore::make_directories(pin_path).map_err(error)?;
    close_to_others(pin_path).map_err(error)?;
    lock(pin_path)
}

/// A BPF file system may be mounted so that everybody may make directories in it.
fn close_to_others(pin_path: &Path) -> io::Result<()> {
    let found = fs::metadata(pin_path)?;
    let own = rustix::process::geteuid().as_raw();
    if found.uid() != own {
        return Err(io::Error::other(format!("it belongs to user {}, not to {own}: remove it", found.uid())));
    }
    if found.mode() & 0o077 != 0 {
        fs::set_permissions(pin_path, fs::Permissions::from_mode(0o700))?;
    }
    Ok(())
}

/// Locks the pins: two agents on the same maps would undo each other's work, and an agent whose pins are removed would go
/// on writing into maps that nobody reads. A predecessor that was killed may take a moment to go.
fn lock(pin_path: &Path) -> Result<File, OpenError> {
    let error = |path: &Path, source| OpenError::PinPath { path: path.into(), source };
    let lock = File::open(pin_path).map_err(|source| error(pin_path, source))?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        match lock.try_lock() {
            Ok(()) => return Ok(lock),
            Err(fs::TryLockError::WouldBlock) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(fs::TryLockError::WouldBlock) => return Err(OpenError::InUse { path: pin_path.into() }),
            Err(fs::TryLockError::Error(source)) => return Err(error(pin_path, source)),
        }
    }
}
