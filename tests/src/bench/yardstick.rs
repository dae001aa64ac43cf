//! The programs that the datapath is measured against, with their maps: told of Services, and run packet by packet.

use std::{collections::BTreeSet, net::IpAddr};

use anyhow::{Context as _, Result, bail};
use aya::{
    Ebpf, EbpfLoader, Pod,
    maps::{Array, HashMap, MapData, PerCpuArray},
    programs::Program,
};
use bench_ebpf::contract::{Backend, Count, Ends, Flow, Frontend, Node, Service, Tuple};
use proxy_common::addr::{Ipv4, Ipv6, Mac, Port};

use super::OBJECT;
use crate::{
    frame::{Family, Host},
    testbed::{Ran, load_once, run_tc, run_xdp},
};

/// Where a program sees packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In the driver.
    Xdp,
    /// At the ingress of traffic control.
    Tc,
}

impl Place {
    /// Both.
    pub const BOTH: [Self; 2] = [Self::Xdp, Self::Tc];

    /// The end of program names.
    fn suffix(self) -> &'static str {
        match self {
            Self::Xdp => "xdp",
            Self::Tc => "tc",
        }
    }
}

/// What a program is there for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Does nothing.
    Null,
    /// The least a balancer must do.
    Floor,
    /// Restores the packet and calls another.
    Restore,
    /// Counts and drops; in the driver only.
    Sink,
    /// Sends everything back; in the driver only.
    Send,
}

impl Role {
    /// The name of its program.
    pub(crate) fn program(self, place: Place) -> String {
        let role = match self {
            Self::Null => "null",
            Self::Floor => "floor",
            Self::Restore => "restore",
            Self::Sink => "sink",
            Self::Send => "send",
        };
        format!("{role}_{}", place.suffix())
    }
}

/// The way to a backend of the floor.
#[derive(Clone, Copy, Debug)]
pub struct NextHop {
    /// MAC of the next hop.
    pub dmac: [u8; 6],
    /// MAC of the device that leads there.
    pub smac: [u8; 6],
}

/// The programs of the bench and their maps.
pub struct Yardstick {
    object: Ebpf,
    backends: u32,
    slots: u32,
    services: u32,
    pub(super) ends: u32,
}

/// The reply half of a flow of one of these clients.
fn reply<A: Copy + PartialEq + Into<IpAddr>>(
    (key, flow): &(Tuple<A>, Flow<A>),
    proto: u32,
    clients: &BTreeSet<Ipv6>,
) -> Option<Ends> {
    let is_reply = key.saddr != flow.client && key.proto == proto && clients.contains(&wide(flow.client.into()));
    is_reply.then(|| Ends {
        saddr: wide(key.saddr.into()),
        daddr: wide(key.daddr.into()),
        sport: key.sport,
        dport: key.dport,
        pad: 0,
    })
}

/// An address in the room that all have; one of IPv4 lies in the first four bytes.
pub(super) fn wide(address: IpAddr) -> Ipv6 {
    match address {
        IpAddr::V4(address) => {
            let mut octets = [0; 16];
            octets[..4].copy_from_slice(&address.octets());
            Ipv6 { octets }
        }
        IpAddr::V6(address) => address.into(),
    }
}

impl Yardstick {
    /// Loads the maps, those of flows with so many entries; programs are verified when they are first used.
    pub fn new(node: Host, flows: u32) -> Result<Self> {
        crate::netns::require_root()?;
        let mut loader = EbpfLoader::new();
        loader.map_max_entries("FLOWS_V4", flows).map_max_entries("FLOWS_V6", flows);
        let mut yardstick = Self { object: loader.load(OBJECT)?, backends: 0, slots: 0, services: 0, ends: 0 };
        let node = Node { v4: node.v4.into(), v6: node.v6.into(), pad: 0 };
        Array::<_, Node>::try_from(yardstick.map("NODE")?)?.set(0, node, 0)?;
        Ok(yardstick)
    }

    pub(crate) fn map(&mut self, name: &str) -> Result<&mut aya::maps::Map> {
        self.object.map_mut(name).with_context(|| format!("no map {name}"))
    }

    fn hash<K: Pod, V: Pod>(&mut self, name: &str) -> Result<HashMap<&mut MapData, K, V>> {
        Ok(HashMap::try_from(self.map(name)?)?)
    }

    /// Adds a backend of the floor and returns its index.
    pub fn add_backend(&mut self, address: IpAddr, port: u16, next_hop: NextHop) -> Result<u32> {
        let index = self.backends;
        self.backends += 1;
        let (port, pad) = (Port::new(port), [0; 2]);
        let (dmac, smac) = (Mac { octets: next_hop.dmac }, Mac { octets: next_hop.smac });
        match address {
            IpAddr::V4(address) => {
                let backend = Backend { addr: Ipv4::from(address), port, dmac, smac, pad };
                Array::try_from(self.map("BACKENDS_V4")?)?.set(index, backend, 0)?;
            }
            IpAddr::V6(address) => {
                let backend = Backend { addr: Ipv6::from(address), port, dmac, smac, pad };
                Array::try_from(self.map("BACKENDS_V6")?)?.set(index, backend, 0)?;
            }
        }
        Ok(index)
    }

    /// Makes a frontend of the floor lead to backends by a table of so many slots; returns where it is counted.
    pub fn add_service(&mut self, frontend: (IpAddr, u16), proto: u8, backends: &[u32], slots: u32) -> Result<u32> {
        let service = Service { first: self.slots, count: slots, index: self.services };
        self.slots += slots;
        self.services += 1;
        let mut table = Array::<_, u32>::try_from(self.map("SLOTS")?)?;
        for (slot, backend) in (service.first..service.first + slots).zip(backends.iter().cycle()) {
            table.set(slot, backend, 0)?;
        }
        let (port, proto, pad) = (Port::new(frontend.1), proto.into(), 0);
        match frontend.0 {
            IpAddr::V4(address) => {
                let frontend = Frontend { addr: Ipv4::from(address), port, proto, pad };
                self.hash("SERVICES_V4")?.insert(frontend, service, 0)?;
            }
            IpAddr::V6(address) => {
                let frontend = Frontend { addr: Ipv6::from(address), port, proto, pad };
                self.hash("SERVICES_V6")?.insert(frontend, service, 0)?;
            }
        }
        Ok(service.index)
    }

    /// What was counted under an index, over all CPUs.
    pub fn counted(&mut self, index: u32) -> Result<Count> {
        let counts = PerCpuArray::<_, Count>::try_from(self.map("COUNTERS")?)?.get(&index, 0)?;
        Ok(counts.iter().fold(Count::default(), |sum, count| Count {
            packets: sum.packets + count.packets,
            bytes: sum.bytes + count.bytes,
        }))
    }

    /// How many entries the floor's flow table has.
    pub fn flows(&mut self, family: Family) -> Result<usize> {
        Ok(match family {
            Family::V4 => self.hash::<Tuple<Ipv4>, Flow<Ipv4>>("FLOWS_V4")?.keys().count(),
            Family::V6 => self.hash::<Tuple<Ipv6>, Flow<Ipv6>>("FLOWS_V6")?.keys().count(),
        })
    }

    /// What answers the flows of these clients have.
    pub(super) fn replies(&mut self, family: Family, proto: u32, clients: &BTreeSet<Ipv6>) -> Result<Vec<Ends>> {
        Ok(match family {
            Family::V4 => {
                self.entries::<Ipv4>("FLOWS_V4")?.iter().filter_map(|flow| reply(flow, proto, clients)).collect()
            }
            Family::V6 => {
                self.entries::<Ipv6>("FLOWS_V6")?.iter().filter_map(|flow| reply(flow, proto, clients)).collect()
            }
        })
    }

    fn entries<A>(&mut self, name: &str) -> Result<Vec<(Tuple<A>, Flow<A>)>>
    where
        Tuple<A>: Pod,
        Flow<A>: Pod,
    {
        Ok(self.hash(name)?.iter().collect::<Result<_, _>>()?)
    }

    /// A program, verified.
    pub(crate) fn program(&mut self, role: Role, place: Place) -> Result<&mut Program> {
        let name = role.program(place);
        let program = self.object.program_mut(&name).with_context(|| format!("no program {name}"))?;
        match program {
            Program::Xdp(program) => load_once(program.load())?,
            Program::SchedClassifier(program) => load_once(program.load())?,
            _ => bail!("{name} is of another kind"),
        }
        Ok(program)
    }

    /// Runs a program over a packet that came in by a device, which must be in the caller's namespace.
    pub fn run(&mut self, role: Role, place: Place, bytes: &[u8], ifindex: u32) -> Result<Ran> {
        let mut out = vec![0; bytes.len() + 256];
        let (action, length) = match self.program(role, place)? {
            Program::Xdp(program) => run_xdp(program, bytes, &mut out, ifindex, 0)?,
            Program::SchedClassifier(program) => run_tc(program, bytes, &mut out, ifindex, 0)?,
            _ => bail!("{role:?} is of another kind"),
        };
        out.truncate(length as usize);
        Ok(Ran { action: action.cast_signed(), bytes: out })
    }
}
