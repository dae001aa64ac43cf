//! The programs on the real verifier with real maps, run packet by packet by `BPF_PROG_TEST_RUN` in a namespace of their
//! own: an uplink with a router and another node behind it, and no agent.

mod clients;
mod events;
mod here;
mod objects;
mod peers;

use std::{borrow::Cow, env, fs, net::IpAddr, sync::OnceLock, thread, time::Duration};

use anyhow::{Context as _, Result, ensure};
use aya::{
    Pod, TestRun as _, TestRunOptions,
    maps::{Array, HashMap, MapData, PerCpuArray},
    programs::{ProgramError, SchedClassifier, Xdp},
};
use nix::sched::{CloneFlags, setns};
use proxy_common::{
    addr::{Ipv4, Ipv6, Mac, Port, Protocol},
    backend::{Backend, BackendState},
    filter::Filter,
    flow::{Flow, Tier, Turnover},
    node::{LAYOUT, Node, Vlan, local},
    outcome::{self, Hook, Outcome},
    service::{Frontend, Range, Service},
    stats::Stats,
    tuple::Tuple,
};
use proxy_userspace::dataplane::OBJECT;

use objects::Lent;

pub use self::{events::told, here::Runner, peers::Kind};
use crate::{
    frame::{Frame, Host, MACS},
    netns::Namespace,
};

/// A client beyond the router.
pub const CLIENT: Host = host([198, 51, 100, 7], [0xfe01, 7]);
/// The node itself.
pub const NODE: Host = host([192, 0, 2, 1], [0x1, 1]);
/// A ClusterIP.
pub const SERVICE: Host = host([10, 96, 0, 10], [0x96, 10]);
/// Another ClusterIP.
pub const OTHER_SERVICE: Host = host([10, 96, 0, 11], [0x96, 11]);
/// A pod of this node.
pub const POD: Host = host([10, 244, 1, 5], [0x2441, 5]);
/// Another pod of this node.
pub const POD2: Host = host([10, 244, 1, 6], [0x2441, 6]);
/// A pod of another node, whose neighbour entry is known.
pub const REMOTE: Host = host([10, 244, 2, 5], [0x2442, 5]);
/// A pod of another node, whose neighbour entry is not known.
pub const UNRESOLVED: Host = host([10, 244, 3, 5], [0x2443, 5]);
/// Port of Services.
pub const PORT: u16 = 80;
/// The NodePort.
pub const NODE_PORT: u16 = 30_080;
/// Port of backends.
pub const TARGET: u16 = 8_080;
/// MAC of the uplink.
pub const UPLINK_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// MAC of the other node.
pub const OTHER_NODE_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];
/// MAC of the router.
pub const ROUTER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0xfe];
/// Source ports of masqueraded flows.
pub const SOURCE_PORTS: (u16, u16) = (10_000, 29_999);
/// Those of flows between the families.
pub const CROSS_PORTS: (u16, u16) = (9_000, 9_999);

const fn host(v4: [u8; 4], v6: [u16; 2]) -> Host {
    Host {
        v4: std::net::Ipv4Addr::new(v4[0], v4[1], v4[2], v4[3]),
        v6: std::net::Ipv6Addr::new(0x2001, 0xdb8, v6[0], 0, 0, 0, 0, v6[1]),
    }
}

/// What a program said and left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ran {
    /// Return value of the program.
    pub action: i32,
    /// The packet after it.
    pub bytes: Vec<u8>,
}

/// Return values.
pub mod action {
    /// TC: whoever comes next decides.
    pub const TC_NEXT: i32 = -1;
    /// TC: dropped.
    pub const TC_DROP: i32 = 2;
    /// TC: sent elsewhere.
    pub const TC_REDIRECT: i32 = 7;
    /// XDP: dropped.
    pub const XDP_DROP: i32 = 1;
    /// XDP: up the stack.
    pub const XDP_PASS: i32 = 2;
    /// XDP: out of the same device.
    pub const XDP_TX: i32 = 3;
    /// XDP: out of another device.
    pub const XDP_REDIRECT: i32 = 4;
}

/// What a packet may be besides its bytes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Nature {
    /// TC: how many bytes behind the headers each segment has that the packet will be cut into; 0 for a plain packet.
    pub segment: u32,
    /// XDP: bytes of metadata in front of the packet, which take room from what could be put before it.
    pub metadata: usize,
}

/// Programs, maps, and a place to run them in.
pub struct Testbed {
    object: Lent,
    namespace: Namespace,
    uplink: u32,
    inbound: Box<Filter>,
    outbound: Box<Filter>,
    node: Node,
    backends: u32,
    slots: u32,
}

/// The agent's programs, or those in the file that `SLUICE_BPF_OBJECT` names.
fn programs() -> Result<Cow<'static, [u8]>> {
    let Some(path) = env::var_os("SLUICE_BPF_OBJECT") else { return Ok(OBJECT.into()) };
    Ok(fs::read(&path).with_context(|| format!("no programs at {}", path.display()))?.into())
}

impl Testbed {
    /// Makes the namespace and the maps.
    pub fn new() -> Result<Self> {
        Self::with_entries(&[])
    }

    /// The same with maps of other sizes.
    pub fn with_entries(entries: &[(&str, u32)]) -> Result<Self> {
        let namespace = Namespace::new("testbed")?;
        namespace.sysctl("net/ipv4/ip_forward", "1")?;
        namespace.sysctl("net/ipv6/conf/all/forwarding", "1")?;
        namespace.ip("link add uplink address 02:00:00:00:00:01 type veth peer name wire
             link set uplink up
             link set wire up
             addr add 192.0.2.1/24 dev uplink
             addr add 2001:db8:1::1/64 dev uplink nodad
             neigh add 192.0.2.2 lladdr 02:00:00:00:00:02 dev uplink
             neigh add 2001:db8:1::2 lladdr 02:00:00:00:00:02 dev uplink
             neigh add 192.0.2.254 lladdr 02:00:00:00:00:fe dev uplink
             neigh add 2001:db8:1::fe lladdr 02:00:00:00:00:fe dev uplink
             route add default via 192.0.2.254
             route add default via 2001:db8:1::fe
             route add 10.244.2.0/24 via 192.0.2.2
             route add 2001:db8:2442::/64 via 2001:db8:1::2
             route add 10.244.3.0/24 via 192.0.2.3
             route add 2001:db8:2443::/64 via 2001:db8:1::3")?;
        let uplink = namespace.device_index("uplink")?;
        let entries = entries.iter().map(|(map, count)| ((*map).to_owned(), *count)).collect();
        let mut testbed = Self {
            object: Lent::new(entries)?,
            namespace,
            uplink,
            inbound: Box::new(Filter::EMPTY),
            outbound: Box::new(Filter::EMPTY),
            node: Node::default(),
            backends: 0,
            slots: 0,
        };
        testbed.describe_node()?;
        for octets in [MACS.0, UPLINK_MAC] {
            testbed.hash("LOCAL_MACS")?.insert(Mac { octets }, 1_u32, 0)?;
        }
        Ok(testbed)
    }

    fn describe_node(&mut self) -> Result<()> {
        self.set_node(|node| {
            node.layout = LAYOUT;
            node.route_generation = 1;
            node.masquerade_v4 = NODE.v4.into();
            node.masquerade_v6 = NODE.v6.into();
            node.node_port_first = Port::new(30_000);
            node.node_port_last = Port::new(32_767);
            node.source_port_first = Port::new(SOURCE_PORTS.0);
            node.source_port_last = Port::new(SOURCE_PORTS.1);
            node.cross_port_first = Port::new(CROSS_PORTS.0);
            node.cross_port_last = Port::new(CROSS_PORTS.1);
            node.jiffies_per_second = 0;
        })?;
        let hz = self.hz()?;
        self.set_node(|node| node.jiffies_per_second = hz)?;
        self.add_local_addr(NODE.v4.into())?;
        self.add_local_addr(NODE.v6.into())
    }

    /// Serves NodePorts on an address.
    pub fn add_local_addr(&mut self, address: IpAddr) -> Result<()> {
        match address {
            IpAddr::V4(address) => {
                self.hash::<Ipv4, u32>("LOCAL_ADDRS_V4")?.insert(Ipv4::from(address), local::NODE_PORTS, 0)?;
            }
            IpAddr::V6(address) => {
                self.hash::<Ipv6, u32>("LOCAL_ADDRS_V6")?.insert(Ipv6::from(address), local::NODE_PORTS, 0)?;
            }
        }
        self.let_in(address)
    }

    /// Measured once for all tests of a process.
    fn hz(&mut self) -> Result<u32> {
        static HZ: OnceLock<u32> = OnceLock::new();
        if let Some(hz) = HZ.get() {
            return Ok(*hz);
        }
        let before = self.jiffies()?;
        thread::sleep(Duration::from_millis(200));
        let passed = self.jiffies()?.wrapping_sub(before) * 5;
        let hz = [100_u32, 250, 300, 1000].into_iter().min_by_key(|hz| hz.abs_diff(passed)).context("no HZ")?;
        Ok(*HZ.get_or_init(|| hz))
    }

    /// The kernel's clock, as the programs see it.
    pub fn jiffies(&mut self) -> Result<u32> {
        let program: &mut Xdp = self.object.program_mut("jiffies").context("no program jiffies")?.try_into()?;
        load_once(program.load())?;
        let data = [0_u8; 64];
        Ok(program.test_run(TestRunOptions { data_in: Some(&data), ..TestRunOptions::new() })?.return_value)
    }

    /// How long a second is.
    pub fn jiffies_per_second(&self) -> u32 {
        self.node.jiffies_per_second
    }

    /// Changes the namespace, in the language of `ip`.
    pub fn ip(&self, lines: &str) -> Result<()> {
        self.namespace.ip(lines)
    }

    /// Where it is.
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// Index of the uplink.
    pub fn uplink(&self) -> u32 {
        self.uplink
    }

    /// Changes what the programs know of the node.
    pub fn set_node(&mut self, change: impl FnOnce(&mut Node)) -> Result<()> {
        change(&mut self.node);
        let node = self.node;
        Array::<_, Node>::try_from(self.map("NODE")?)?.set(0, node, 0)?;
        Ok(())
    }

    pub(crate) fn map(&mut self, name: &str) -> Result<&mut aya::maps::Map> {
        self.object.map_mut(name).with_context(|| format!("no map {name}"))
    }

    pub(crate) fn hash<K: Pod, V: Pod>(&mut self, name: &str) -> Result<HashMap<&mut MapData, K, V>> {
        Ok(HashMap::try_from(self.map(name)?)?)
    }

    fn let_in(&mut self, address: IpAddr) -> Result<()> {
        match address {
            IpAddr::V4(address) => self.inbound.add(&Ipv4::from(address)),
            IpAddr::V6(address) => self.inbound.add(&Ipv6::from(address)),
        }
        let filter = *self.inbound;
        Array::<_, Filter>::try_from(self.map("INBOUND")?)?.set(0, filter, 0)?;
        Ok(())
    }

    /// Adds a backend and returns its id.
    pub fn add_backend(&mut self, address: IpAddr, is_local: bool) -> Result<u32> {
        self.backends += 1;
        let id = self.backends;
        self.set_backend(id, address, is_local, BackendState::Serving, 1)?;
        Ok(id)
    }

    /// Writes a backend.
    pub fn set_backend(
        &mut self,
        id: u32,
        address: IpAddr,
        is_local: bool,
        state: BackendState,
        generation: u32,
    ) -> Result<()> {
        let (port, is_local) = (Port::new(TARGET), u8::from(is_local));
        match address {
            IpAddr::V4(address) => {
                let addr = Ipv4::from(address);
                self.outbound.add(&addr);
                let backend = Backend { addr, node: Ipv4::default(), port, state, is_local, generation };
                Array::try_from(self.map("BACKENDS_V4")?)?.set(id, backend, 0)?;
            }
            IpAddr::V6(address) => {
                let addr = Ipv6::from(address);
                self.outbound.add(&addr);
                let backend = Backend { addr, node: Ipv6::default(), port, state, is_local, generation };
                Array::try_from(self.map("BACKENDS_V6")?)?.set(id, backend, 0)?;
            }
        }
        let filter = *self.outbound;
        Array::<_, Filter>::try_from(self.map("OUTBOUND")?)?.set(0, filter, 0)?;
        Ok(())
    }

    /// Makes a frontend lead to backends, for all clients alike.
    pub fn add_service(&mut self, address: IpAddr, port: u16, proto: Protocol, backends: &[u32]) -> Result<()> {
        let range = self.add_slots(backends)?;
        let service = Service { index: 1, internal: range, external: range, ..Service::default() };
        self.set_service(address, port, proto, service)
    }

    /// Writes slots.
    pub fn add_slots(&mut self, backends: &[u32]) -> Result<Range> {
        let first = self.slots;
        let mut slots = Array::<_, u32>::try_from(self.map("SLOTS")?)?;
        for (index, id) in (first..).zip(backends) {
            slots.set(index, id, 0)?;
        }
        let count = u32::try_from(backends.len())?;
        self.slots += count;
        Ok(Range { first, count })
    }

    /// Writes a frontend.
    pub fn set_service(&mut self, address: IpAddr, port: u16, proto: Protocol, service: Service) -> Result<()> {
        let port = Port::new(port);
        match address {
            IpAddr::V4(address) => {
                self.hash("SERVICES_V4")?.insert(Frontend::new(Ipv4::from(address), port, proto), service, 0)?;
            }
            IpAddr::V6(address) => {
                self.hash("SERVICES_V6")?.insert(Frontend::new(Ipv6::from(address), port, proto), service, 0)?;
            }
        }
        self.let_in(address)
    }

    /// Makes a tag on a device lead to another one.
    pub fn add_vlan(&mut self, parent: u32, protocol: u16, number: u16, device: u32) -> Result<()> {
        let vlan = Vlan { parent, protocol: protocol.to_be(), number };
        Ok(self.hash("VLANS")?.insert(vlan, device, 0)?)
    }

    /// Takes a frontend away.
    pub fn remove_service(&mut self, address: IpAddr, port: u16, proto: Protocol) -> Result<()> {
        let port = Port::new(port);
        match address {
            IpAddr::V4(address) => {
                self.hash::<_, Service>("SERVICES_V4")?.remove(&Frontend::new(Ipv4::from(address), port, proto))?;
            }
            IpAddr::V6(address) => {
                self.hash::<_, Service>("SERVICES_V6")?.remove(&Frontend::new(Ipv6::from(address), port, proto))?;
            }
        }
        Ok(())
    }

    /// Runs the program of a hook over bytes that came in by (or leave by) the uplink.
    pub fn run_bytes(&mut self, hook: Hook, bytes: &[u8]) -> Result<Ran> {
        self.run_as(hook, bytes, Nature::default())
    }

    /// The same for a packet of another nature.
    pub fn run_as(&mut self, hook: Hook, bytes: &[u8], nature: Nature) -> Result<Ran> {
        self.run_program_as(program(hook)?, bytes, nature)
    }

    /// Runs a program by its name.
    pub fn run_program(&mut self, name: &str, bytes: &[u8]) -> Result<Ran> {
        self.run_program_as(name, bytes, Nature::default())
    }

    fn run_program_as(&mut self, name: &str, bytes: &[u8], nature: Nature) -> Result<Ran> {
        let uplink = self.uplink;
        let handle = self.namespace.path();
        let program = self.object.program_mut(name).with_context(|| format!("no program {name}"))?;
        thread::scope(|scope| {
            scope
                .spawn(|| {
                    // FIB look-ups are made where the caller is.
                    setns(std::fs::File::open(handle)?, CloneFlags::CLONE_NEWNET)?;
                    let mut out = vec![0; bytes.len() + 256];
                    let result = match program {
                        aya::programs::Program::Xdp(program) => {
                            load_once(program.load())?;
                            run_xdp(program, bytes, &mut out, uplink, nature.metadata)?
                        }
                        aya::programs::Program::SchedClassifier(program) => {
                            load_once(program.load())?;
                            run_tc(program, bytes, &mut out, uplink, nature.segment)?
                        }
                        _ => anyhow::bail!("{name} is of another kind"),
                    };
                    out.truncate(result.1 as usize);
                    Ok(Ran { action: result.0.cast_signed(), bytes: out })
                })
                .join()
                .map_err(|panic| std::panic::resume_unwind(panic))
                .unwrap_or_else(|()| unreachable!())
        })
    }

    /// Runs the program of a hook over a packet.
    pub fn run(&mut self, hook: Hook, frame: &Frame) -> Result<Ran> {
        self.run_bytes(hook, &frame.bytes())
    }

    /// Runs a packet that must leave as one, and reads it.
    pub fn expect(&mut self, hook: Hook, frame: &Frame, action: i32) -> Result<Frame> {
        let ran = self.run(hook, frame)?;
        ensure!(ran.action == action, "{hook:?} answered {} and not {action} to {frame:?}", ran.action);
        Ok(Frame::read(&ran.bytes))
    }

    /// How often something was counted, over all CPUs.
    pub fn counter(&mut self, hook: Hook, outcome: Outcome) -> Result<u64> {
        let counters = PerCpuArray::<_, u64>::try_from(self.map("COUNTERS")?)?;
        Ok(counters.get(&outcome::counter(hook, outcome), 0)?.iter().sum())
    }

    /// Everything that was counted.
    pub fn counters(&mut self) -> Result<Vec<(Hook, Outcome, u64)>> {
        let mut seen = Vec::new();
        for hook in Hook::ALL {
            for outcome in Outcome::ALL {
                let count = self.counter(hook, outcome)?;
                if count > 0 {
                    seen.push((hook, outcome, count));
                }
            }
        }
        Ok(seen)
    }

    /// What has entered a tier of the IPv4 flow table and left it, over all CPUs.
    pub fn turnover(&mut self, tier: Tier) -> Result<Turnover> {
        let turnover =
            PerCpuArray::<_, Turnover>::try_from(self.map("TURNOVER")?)?.get(&Turnover::index(tier, false), 0)?;
        Ok(turnover.iter().fold(Turnover::default(), |sum, cpu| Turnover {
            entered: sum.entered + cpu.entered,
            left: sum.left + cpu.left,
        }))
    }

    /// What was counted under an index: `SERVICE_STATS_4` and `_6`, `BACKEND_STATS_4` and `_6`.
    pub fn stats(&mut self, map: &str, index: u32) -> Result<Stats> {
        Ok(Array::<_, Stats>::try_from(self.map(map)?)?.get(&index, 0)?)
    }

    /// The IPv4 flows of a tier: `FLOWS_V4` or `EMBRYOS_V4`.
    pub fn flows(&mut self, map: &str) -> Result<Vec<(Tuple<Ipv4>, Flow<Ipv4>)>> {
        Ok(self.hash::<Tuple<Ipv4>, Flow<Ipv4>>(map)?.iter().collect::<Result<_, _>>()?)
    }

    /// The IPv6 flows of a tier: `FLOWS_V6` or `EMBRYOS_V6`.
    pub fn flows_v6(&mut self, map: &str) -> Result<Vec<(Tuple<Ipv6>, Flow<Ipv6>)>> {
        Ok(self.hash::<Tuple<Ipv6>, Flow<Ipv6>>(map)?.iter().collect::<Result<_, _>>()?)
    }

    /// Lets seconds pass for every IPv4 flow.
    pub fn age_flows(&mut self, seconds: u32) -> Result<()> {
        let jiffies = seconds * self.jiffies_per_second();
        for map in ["FLOWS_V4", "EMBRYOS_V4"] {
            self.change_flows(map, |_, mut flow| {
                flow.last_seen = flow.last_seen.wrapping_sub(jiffies);
                Some(flow)
            })?;
        }
        Ok(())
    }

    /// Changes every IPv4 flow of a tier; `None` removes it.
    pub fn change_flows(
        &mut self,
        map: &str,
        change: impl Fn(&Tuple<Ipv4>, Flow<Ipv4>) -> Option<Flow<Ipv4>>,
    ) -> Result<()> {
        for (key, flow) in self.flows(map)? {
            let mut table = self.hash::<Tuple<Ipv4>, Flow<Ipv4>>(map)?;
            match change(&key, flow) {
                Some(flow) => table.insert(key, flow, 0)?,
                None => table.remove(&key)?,
            }
        }
        Ok(())
    }
}

/// The name of a hook's program.
fn program(hook: Hook) -> Result<&'static str> {
    Ok(match hook {
        Hook::UplinkXdp => "uplink_xdp",
        Hook::UplinkIn => "uplink_in",
        Hook::UplinkOut => "uplink_out",
        Hook::PodIn => "pod_in",
        Hook::PodOut => "pod_out",
        Hook::CrossUplinkIn => "cross_uplink_in",
        Hook::CrossPodIn => "cross_pod_in",
        _ => anyhow::bail!("{hook:?} sees no packets"),
    })
}

/// A program is verified when it is first run; that takes time, so that a test should pay for those it uses only.
pub(crate) fn load_once(result: Result<(), ProgramError>) -> Result<(), ProgramError> {
    match result {
        Err(ProgramError::AlreadyLoaded) => Ok(()),
        other => other,
    }
}

pub(crate) fn run_xdp(
    program: &Xdp,
    bytes: &[u8],
    out: &mut [u8],
    ifindex: u32,
    metadata: usize,
) -> Result<(u32, u32), ProgramError> {
    let bytes = &[&vec![0; metadata], bytes].concat();
    // struct xdp_md: data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex.
    let mut context = [0_u8; 24];
    context[0..4].copy_from_slice(&(metadata as u32).to_ne_bytes());
    context[4..8].copy_from_slice(&(bytes.len() as u32).to_ne_bytes());
    context[12..16].copy_from_slice(&ifindex.to_ne_bytes());
    let options =
        TestRunOptions { data_in: Some(bytes), data_out: Some(out), ctx_in: Some(&context), ..TestRunOptions::new() };
    program.test_run(options).map(|result| (result.return_value, result.data_size_out))
}

pub(crate) fn run_tc(
    program: &SchedClassifier,
    bytes: &[u8],
    out: &mut [u8],
    ifindex: u32,
    segment: u32,
) -> Result<(u32, u32), ProgramError> {
    // struct __sk_buff, of which the kernel takes ifindex from offset 40, gso_segs from 164, gso_size from 176.
    let mut context = [0_u8; 192];
    context[40..44].copy_from_slice(&ifindex.to_ne_bytes());
    if segment != 0 {
        context[164..168].copy_from_slice(&2_u32.to_ne_bytes());
        context[176..180].copy_from_slice(&segment.to_ne_bytes());
    }
    let options =
        TestRunOptions { data_in: Some(bytes), data_out: Some(out), ctx_in: Some(&context), ..TestRunOptions::new() };
    program.test_run(options).map(|result| (result.return_value, result.data_size_out))
}
