//! The course: the agent's programs and the floor with the same Services, and for each case the same packets.

use std::{
    net::{IpAddr, Ipv4Addr},
    time::Duration,
};

use anyhow::{Result, ensure};
use bench_ebpf::contract::Ends;
use proxy_common::{
    addr::{Port, Protocol},
    flow::{Direction, Flow},
    outcome::Hook,
    service::Service,
    tuple::Tuple,
};

use super::{
    case::{Case, Kind},
    restored::{Runs, Traffic},
    yardstick::{NextHop, Place, Role, Yardstick, wide},
};
use crate::{
    frame::{Family, Flags, Frame, Host, Transport},
    testbed::{NODE, OTHER_NODE_MAC, OTHER_SERVICE, PORT, SERVICE, TARGET, Testbed, UPLINK_MAC, action},
};

/// Clients whose flows are known, from the first one on.
const CLIENTS: Host = host([100, 128, 0, 0], 0xfe03);
/// Those whose flows never are. Their addresses end in zeros, and their first port does.
pub const STRANGERS: Host = host([100, 64, 0, 0], 0xfe02);
const STRANGE_PORT: u16 = 0xc000;
/// The first port of a client, and how many each has.
const CLIENT_PORT: u16 = 20_000;
const PORTS: u32 = 1_000;
/// Flows opened together: the table of those not yet confirmed must have room for all of them.
const AT_ONCE: usize = 8_000;
/// The first of the Services that are there to be many.
const MORE_SERVICES: Ipv4Addr = Ipv4Addr::new(10, 100, 0, 0);
/// The first backend.
const BACKENDS: Host = host([10, 244, 2, 16], 0x2442);
/// Of each family.
const BACKEND_COUNT: u32 = 64;
/// A prime number of slots above a hundred for each backend, as Maglev's authors advise.
const SLOTS: u32 = 6_451;
/// Entries of a flow table, by default on a node of some size.
const FLOWS: u32 = 262_144;
const EMBRYOS: u32 = 65_536;

const fn host(v4: [u8; 4], v6: u16) -> Host {
    Host {
        v4: Ipv4Addr::new(v4[0], v4[1], v4[2], v4[3]),
        v6: std::net::Ipv6Addr::new(0x2001, 0xdb8, v6, 0, 0, 0, 0, if v4[3] == 0 { 0 } else { v4[3] as u16 }),
    }
}

/// Who runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Contestant {
    /// A program that does nothing: what restoring and calling cost.
    Null,
    /// The smallest honest balancer.
    Floor,
    /// The agent's program.
    Sluice,
}

impl Contestant {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Null, Self::Floor, Self::Sluice];
}

/// What tells a packet's flow from others.
pub fn ends(frame: &Frame) -> Ends {
    pair(frame.source, frame.destination)
}

fn pair(from: (IpAddr, u16), to: (IpAddr, u16)) -> Ends {
    Ends { saddr: wide(from.0), daddr: wide(to.0), sport: Port::new(from.1), dport: Port::new(to.1), pad: 0 }
}

/// The contestants, with everything they were told. Lives in the namespace of its test bed.
pub struct Course<'a> {
    bed: &'a mut Testbed,
    yardstick: Yardstick,
    /// Ids of the backends by family.
    backends: [Vec<u32>; 2],
    /// The same in the floor.
    floor_backends: [Vec<u32>; 2],
    /// How many Services there are.
    services: [u32; 2],
    /// Traffic that is there already.
    made: Vec<(Case, Contestant, Traffic)>,
}

/// Which map sizes a test bed for a course has.
pub const ENTRIES: [(&str, u32); 8] = [
    ("FLOWS_V4", FLOWS),
    ("FLOWS_V6", FLOWS),
    ("EMBRYOS_V4", EMBRYOS),
    ("EMBRYOS_V6", EMBRYOS),
    ("SLOTS", 1_048_576),
    ("SERVICE_STATS_4", 131_072),
    ("SERVICE_STATS_6", 131_072),
    ("AFFINITY_V4", 4_096),
];

impl<'a> Course<'a> {
    /// One Service with TCP and UDP in both families, and its backends.
    pub fn new(bed: &'a mut Testbed) -> Result<Self> {
        let yardstick = Yardstick::new(NODE, FLOWS)?;
        let (backends, floor_backends) = ([vec![], vec![]], [vec![], vec![]]);
        let mut course = Self { bed, yardstick, backends, floor_backends, services: [0, 0], made: vec![] };
        for family in Family::BOTH {
            for number in 0..BACKEND_COUNT {
                course.add_backend(family, nth(BACKENDS.address(family), number))?;
            }
            for proto in [Protocol::Tcp, Protocol::Udp] {
                course.add_service(family, SERVICE.address(family), proto)?;
            }
        }
        Ok(course)
    }

    fn add_backend(&mut self, family: Family, address: IpAddr) -> Result<()> {
        let next_hop = NextHop { dmac: OTHER_NODE_MAC, smac: UPLINK_MAC };
        self.backends[family as usize].push(self.bed.add_backend(address, false)?);
        self.floor_backends[family as usize].push(self.yardstick.add_backend(address, TARGET, next_hop)?);
        Ok(())
    }

    fn add_service(&mut self, family: Family, address: IpAddr, proto: Protocol) -> Result<()> {
        let index = &mut self.services[family as usize];
        *index += 1;
        let range = self.bed.add_slots(&self.backends[family as usize])?;
        let service = Service { index: *index, internal: range, external: range, ..Service::default() };
        self.bed.set_service(address, PORT, proto, service)?;
        let backends = &self.floor_backends[family as usize];
        self.yardstick.add_service((address, PORT), proto as u8, backends, SLOTS)?;
        Ok(())
    }

    /// The packets of a case for a contestant, all of whose flows are known to it unless they are to be new.
    pub fn traffic(&mut self, case: Case, contestant: Contestant) -> Result<Traffic> {
        // Where a flow began does not matter, nor how many others there might have been.
        let anywhere = Case { place: Place::Xdp, services: 0, ..case };
        let made = self.made.iter().find(|(case, who, _)| (*case, *who) == (anywhere, contestant));
        if let Some((_, _, traffic)) = made {
            return Ok(traffic.clone());
        }
        let mut ends = match case.kind {
            Kind::Pass => vec![pair((client(case, 0), CLIENT_PORT), (OTHER_SERVICE.address(case.family), PORT))],
            Kind::New => vec![pair((STRANGERS.address(case.family), STRANGE_PORT), service(case))],
            _ if contestant == Contestant::Null => requests(case),
            Kind::Established => self.open(anywhere, contestant)?.0,
            Kind::Reply => self.open(anywhere, contestant)?.1,
        };
        ensure!(ends.len() == case.flows as usize, "{contestant:?} knows {} flows of {case}", ends.len());
        shuffle(&mut ends);
        let flags = if case.kind == Kind::New { Flags::SYN } else { Flags::ACK };
        let traffic = self.yardstick.traffic(&template(case, flags), &ends)?;
        let traffic = Traffic { is_new: case.kind == Kind::New, ..traffic };
        self.made.push((anywhere, contestant, traffic.clone()));
        Ok(traffic)
    }

    /// Has the flows of a case go through their beginning. Returns what their packets are sent from and to, and their
    /// replies.
    fn open(&mut self, case: Case, contestant: Contestant) -> Result<(Vec<Ends>, Vec<Ends>)> {
        let (requests, mut replies) = (requests(case), Vec::new());
        for some in requests.chunks(AT_ONCE) {
            self.send(case, contestant, Flags::SYN, some)?;
            let answers = if contestant == Contestant::Sluice {
                waiting(self.bed, case)?
            } else {
                let clients = some.iter().map(|ends| ends.saddr).collect();
                self.yardstick.replies(case.family, case.proto as u32, &clients)?
            };
            ensure!(answers.len() == some.len(), "{} of {} flows were opened", answers.len(), some.len());
            self.send(case, contestant, Flags::SYN_ACK, &answers)?;
            self.send(case, contestant, Flags::ACK, some)?;
            replies.extend(answers);
        }
        Ok((requests, replies))
    }

    /// Lets a contestant have one packet of each flow.
    fn send(&mut self, case: Case, contestant: Contestant, flags: Flags, ends: &[Ends]) -> Result<()> {
        let traffic = self.yardstick.scratch(&template(case, flags), ends)?;
        self.repeat(case, contestant, &traffic, ends.len().try_into()?)?;
        Ok(())
    }

    /// Lets a contestant have so many packets, and sees that it did what the case is about.
    pub fn repeat(&mut self, case: Case, contestant: Contestant, traffic: &Traffic, count: u32) -> Result<Runs> {
        let program = match contestant {
            Contestant::Null => self.yardstick.descriptor(Role::Null, case.place)?,
            Contestant::Floor => self.yardstick.descriptor(Role::Floor, case.place)?,
            Contestant::Sluice => self.bed.descriptor(case.place.hook())?,
        };
        self.yardstick.call(case.place, &program)?;
        let runs = self.yardstick.repeat(case.place, traffic, self.bed.uplink(), count)?;
        let is_passed = case.kind == Kind::Pass || contestant == Contestant::Null;
        let expected = if is_passed { case.place.passed() } else { case.place.sent() };
        ensure!(
            runs.last.action == expected,
            "{contestant:?} answered {} and not {expected} in the case {case}",
            runs.last.action
        );
        Ok(runs)
    }

    /// Sends so many frames through a contestant's program; returns how long that took.
    pub fn inject(&mut self, contestant: Contestant, traffic: &Traffic, count: u32) -> Result<Duration> {
        let program = match contestant {
            Contestant::Null => self.yardstick.descriptor(Role::Null, Place::Xdp)?,
            Contestant::Floor => self.yardstick.descriptor(Role::Floor, Place::Xdp)?,
            Contestant::Sluice => self.bed.descriptor(Place::Xdp.hook())?,
        };
        self.yardstick.call(Place::Xdp, &program)?;
        self.yardstick.inject(traffic, self.bed.uplink(), count)
    }

    /// Tells the agent's programs, and not the floor, of so many Services in all, of which this course uses the first alone.
    pub fn set_services(&mut self, count: u32) -> Result<()> {
        while self.services[0] < count {
            let number = self.services[0];
            let range = self.bed.add_slots(&self.backends[0][..3])?;
            let service = Service { index: number, internal: range, external: range, ..Service::default() };
            let address = nth(MORE_SERVICES.into(), number);
            self.bed.set_service(address, PORT, Protocol::Tcp, service)?;
            self.services[0] += 1;
        }
        Ok(())
    }
}

/// What follows an address.
fn nth(address: IpAddr, number: u32) -> IpAddr {
    match address {
        IpAddr::V4(address) => IpAddr::V4((u32::from(address) + number).into()),
        IpAddr::V6(address) => IpAddr::V6((u128::from(address) + u128::from(number)).into()),
    }
}

/// Who asks in a case: others in each, so that every flow is opened once.
fn client(case: Case, number: u32) -> IpAddr {
    let others = (case.kind as u32) << 18 | case.flows.ilog2() << 12;
    nth(CLIENTS.address(case.family), others + number / PORTS)
}

fn service(case: Case) -> (IpAddr, u16) {
    (SERVICE.address(case.family), PORT)
}

/// What the flows of a case are sent from and to.
fn requests(case: Case) -> Vec<Ends> {
    let port = |number: u32| CLIENT_PORT + (number % PORTS) as u16;
    (0..case.flows).map(|number| pair((client(case, number), port(number)), service(case))).collect()
}

/// A packet of a case, long enough to be restored. Its ends are another flow's.
fn template(case: Case, flags: Flags) -> Frame {
    let transport = if case.proto == Protocol::Udp { Transport::Udp } else { Transport::Tcp(flags) };
    let frame = Frame::new((client(case, 0), CLIENT_PORT), service(case), transport);
    Frame { payload: vec![b'x'; 64], ..frame }
}

/// What answers the connections have that the agent's programs have heard one packet of.
fn waiting(bed: &mut Testbed, case: Case) -> Result<Vec<Ends>> {
    Ok(match case.family {
        Family::V4 => bed.flows("EMBRYOS_V4")?.iter().filter_map(|(key, flow)| reply(case, key, flow)).collect(),
        Family::V6 => bed.flows_v6("EMBRYOS_V6")?.iter().filter_map(|(key, flow)| reply(case, key, flow)).collect(),
    })
}

fn reply<A: Copy + Into<IpAddr>>(case: Case, key: &Tuple<A>, flow: &Flow<A>) -> Option<Ends> {
    let (from, to) = ((key.saddr.into(), key.sport.number()), (key.daddr.into(), key.dport.number()));
    (flow.direction == Direction::Reply && key.proto == case.proto).then(|| pair(from, to))
}

/// In an order that has nothing to do with that in which the flows were opened, which is that of their entries in memory.
fn shuffle(ends: &mut [Ends]) {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for last in (1..ends.len()).rev() {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ends.swap(last, (state >> 33) as usize % (last + 1));
    }
}

impl Place {
    /// The program of the agent's.
    fn hook(self) -> Hook {
        match self {
            Self::Xdp => Hook::UplinkXdp,
            Self::Tc => Hook::UplinkIn,
        }
    }

    /// What a program answers that sends a packet back.
    pub fn sent(self) -> i32 {
        if self == Self::Xdp { action::XDP_TX } else { action::TC_REDIRECT }
    }

    /// What it answers that passes one on.
    pub fn passed(self) -> i32 {
        if self == Self::Xdp { action::XDP_PASS } else { action::TC_NEXT }
    }
}
