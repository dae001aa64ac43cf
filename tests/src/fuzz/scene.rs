//! A node at random: few addresses and few Services, so that packets meet them often.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use proxy_common::{
    addr::{Port, Protocol},
    backend::BackendState,
    filter::Filter,
    node::{LAYOUT, Node, local, masquerade},
    service::{Pick, Range, Service, WhenEmpty, flag},
};

use super::chance::Chance;
use crate::{
    frame::{Family, Host, MACS},
    model::{Hop, Target, World, address_v4, address_v6},
    testbed::{
        CLIENT, NODE, NODE_PORT, OTHER_NODE_MAC, OTHER_SERVICE, POD, POD2, PORT, REMOTE, ROUTER_MAC, SERVICE, TARGET,
        UNRESOLVED, UPLINK_MAC,
    },
};

/// Jiffies of a second of the programs: so many that none goes by while a packet is looked at.
pub const SECOND: u32 = 10_000;

/// Backends of each family have ids from 1 to this.
pub const BACKENDS: u32 = 8;

/// An address of a load balancer.
pub const BALANCER: Host =
    Host { v4: Ipv4Addr::new(203, 0, 113, 10), v6: Ipv6Addr::new(0x2001, 0xdb8, 0xba1, 0, 0, 0, 0, 10) };
/// An address of a ServiceCIDR that no Service has.
pub const UNALLOCATED: Host =
    Host { v4: Ipv4Addr::new(10, 96, 0, 99), v6: Ipv6Addr::new(0x2001, 0xdb8, 0x96, 0, 0, 0, 0, 99) };
/// Another client beyond the router.
pub const CLIENT2: Host =
    Host { v4: Ipv4Addr::new(198, 51, 100, 8), v6: Ipv6Addr::new(0x2001, 0xdb8, 0xfe01, 0, 0, 0, 0, 8) };
/// Another pod of the other node.
pub const REMOTE2: Host =
    Host { v4: Ipv4Addr::new(10, 244, 2, 6), v6: Ipv6Addr::new(0x2001, 0xdb8, 0x2442, 0, 0, 0, 0, 6) };
/// This host, to itself.
pub const LOOPBACK: Host = Host { v4: Ipv4Addr::LOCALHOST, v6: Ipv6Addr::LOCALHOST };

/// The unspecified address.
pub fn any(family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::UNSPECIFIED.into(),
        Family::V6 => Ipv6Addr::UNSPECIFIED.into(),
    }
}

/// Lets packets with an address through a filter.
pub fn let_through(filter: &mut Filter, address: IpAddr) {
    match address {
        IpAddr::V4(address) => filter.add(&address_v4(address)),
        IpAddr::V6(address) => filter.add(&address_v6(address)),
    }
}

/// A node and its Services.
pub fn world(chance: &mut Chance) -> World {
    let mut world = World {
        node: node(chance),
        services: BTreeMap::new(),
        slots: Vec::new(),
        backends: BTreeMap::new(),
        local: BTreeMap::new(),
        service_cidrs: BTreeSet::new(),
        sources: BTreeSet::new(),
        inbound: Box::new(Filter::EMPTY),
        outbound: Box::new(Filter::EMPTY),
        routes: routes(),
        macs: vec![MACS.0, UPLINK_MAC],
        uplink_mac: UPLINK_MAC,
    };
    for family in Family::BOTH {
        let node = NODE.address(family);
        world.local.insert(node, if chance.percent(90) { local::NODE_PORTS } else { 0 });
        let_through(&mut world.inbound, node);
        if chance.percent(50) {
            let bits = if family == Family::V4 { 24 } else { 64 };
            let first = match SERVICE.address(family) {
                IpAddr::V4(address) => Ipv4Addr::from(address.to_bits() & 0xffff_ff00).into(),
                IpAddr::V6(address) => Ipv6Addr::from(address.to_bits() >> 64 << 64).into(),
            };
            world.service_cidrs.insert((first, bits));
        }
        for id in 1..=BACKENDS {
            set_backend(&mut world, chance, family, id, 1);
        }
    }
    let mut index = 0;
    for family in Family::BOTH {
        for (host, flags) in [(SERVICE, 0), (OTHER_SERVICE, 0), (BALANCER, flag::EXTERNAL), (NODE, flag::EXTERNAL)] {
            let is_seldom = host == NODE;
            if chance.percent(if is_seldom { 10 } else { 80 }) {
                set_whole(&mut world, host.address(family), flags);
            }
        }
        for frontend in frontends(family) {
            if chance.percent(75) {
                index += 1;
                let service = service(&mut world, chance, family, frontend, index);
                set_service(&mut world, frontend, service);
            }
        }
    }
    world
}

/// Where Services may be.
pub fn frontends(family: Family) -> Vec<(IpAddr, u16, Protocol)> {
    let mut frontends = Vec::new();
    for proto in [Protocol::Tcp, Protocol::Udp] {
        frontends.extend([
            (SERVICE.address(family), PORT, proto),
            (SERVICE.address(family), PORT + 1, proto),
            (OTHER_SERVICE.address(family), PORT, proto),
            (BALANCER.address(family), PORT, proto),
            (any(family), NODE_PORT, proto),
            (any(family), NODE_PORT + 1, proto),
        ]);
    }
    frontends
}

fn node(chance: &mut Chance) -> Node {
    let mut flags = 0;
    for flag in [masquerade::ALL, masquerade::LOCAL_BACKENDS] {
        if chance.percent(30) {
            flags |= flag;
        }
    }
    let has_name = chance.percent(88);
    // So few ports that they run out, now and then.
    let last = if chance.percent(15) { 10_002 } else { 29_999 };
    Node {
        layout: LAYOUT,
        route_generation: 1,
        masquerade_v4: if has_name { NODE.v4.into() } else { Ipv4Addr::UNSPECIFIED.into() },
        masquerade_v6: if has_name { NODE.v6.into() } else { Ipv6Addr::UNSPECIFIED.into() },
        node_port_first: Port::new(30_000),
        node_port_last: Port::new(32_767),
        source_port_first: Port::new(10_000),
        source_port_last: Port::new(last),
        jiffies_per_second: SECOND,
        flags,
        ..Node::default()
    }
}

/// The longest packet that may go to the pod behind a narrow link. In IPv6 there are none narrower.
pub fn narrow_mtu(family: Family) -> u16 {
    if family == Family::V4 { 70 } else { 1_280 }
}

/// What has to be done in the namespace for [`World::routes`] to be so.
pub const NARROW_ROUTES: &str = "route add 10.244.2.6/32 via 192.0.2.2 mtu lock 70
             route add 2001:db8:2442::6/128 via 2001:db8:1::2 mtu lock 1280";

fn routes() -> Vec<(IpAddr, u32, Option<Hop>)> {
    let router = Some(Hop { mac: ROUTER_MAC, mtu: 1_500 });
    let prefix = |host: Host, family: Family, bits: (u32, u32), hop| {
        (host.address(family), if family == Family::V4 { bits.0 } else { bits.1 }, hop)
    };
    Family::BOTH
        .into_iter()
        .flat_map(|family| {
            [
                prefix(NODE, family, (32, 128), None),
                prefix(REMOTE2, family, (32, 128), Some(Hop { mac: OTHER_NODE_MAC, mtu: narrow_mtu(family) })),
                prefix(REMOTE, family, (24, 64), Some(Hop { mac: OTHER_NODE_MAC, mtu: 1_500 })),
                prefix(UNRESOLVED, family, (24, 64), None),
                prefix(CLIENT, family, (24, 64), router),
                prefix(POD, family, (24, 64), router),
                prefix(SERVICE, family, (24, 64), router),
            ]
        })
        .collect()
}

/// Gives an id to a backend at random.
pub fn set_backend(world: &mut World, chance: &mut Chance, family: Family, id: u32, generation: u32) {
    let hosts = [(POD, 4), (POD2, 4), (REMOTE, 4), (REMOTE2, 4), (UNRESOLVED, 2), (NODE, 1), (CLIENT, 1)];
    let host = chance.weighted(&hosts);
    let address = host.address(family);
    let port = TARGET + chance.below(3) as u16;
    let is_local = host == POD || host == POD2 || host == NODE;
    let state = state(chance);
    let_through(&mut world.outbound, address);
    world.backends.insert((family == Family::V4, id), Target { address, port, state, is_local, generation });
}

/// What may be sent to a backend.
pub fn state(chance: &mut Chance) -> BackendState {
    use BackendState::{Free, Gone, NotServing, Serving};
    chance.weighted(&[(Serving, 90), (NotServing, 5), (Gone, 4), (Free, 1)])
}

/// A Service at random.
pub fn service(
    world: &mut World,
    chance: &mut Chance,
    family: Family,
    frontend: (IpAddr, u16, Protocol),
    index: u32,
) -> Service {
    let mut flags = 0;
    let is_external = frontend.0 == any(family) || frontend.0 == BALANCER.address(family);
    if is_external {
        flags |= flag::EXTERNAL;
        if chance.percent(30) {
            flags |= flag::SOURCE_KEPT;
        }
    }
    if chance.percent(20) {
        flags |= flag::AFFINITY;
    }
    if chance.percent(15) {
        flags |= flag::SOURCE_RANGES;
        let hosts = [CLIENT, CLIENT2, POD, POD2, NODE];
        for _ in 0..2 {
            let (address, bits) = (chance.of(&hosts).address(family), if family == Family::V4 { 32 } else { 128 });
            world.sources.insert((index, address, bits));
        }
    }
    let picks =
        [(Pick::Random, 3), (Pick::Hash, 2), (Pick::SourceHash, 1), (Pick::RoundRobin, 2), (Pick::LeastConnections, 2)];
    let pick = chance.weighted(&picks);
    let empty = |chance: &mut Chance| if chance.percent(50) { WhenEmpty::Reject } else { WhenEmpty::Drop };
    Service {
        index,
        pick,
        internal_empty: empty(chance),
        external_empty: empty(chance),
        flags,
        affinity_seconds: 10,
        internal: range(world, chance),
        external: range(world, chance),
        local: Range::default(),
    }
}

fn range(world: &mut World, chance: &mut Chance) -> Range {
    let first = world.slots.len() as u32;
    let count = chance.weighted(&[(0, 1), (1, 3), (2, 3), (3, 2), (5, 1)]);
    for _ in 0..count {
        let id = 1 + chance.below(BACKENDS as usize) as u32;
        world.slots.push(id);
    }
    Range { first, count }
}

/// Makes an address one whose Services define all ports there are, or an external one.
fn set_whole(world: &mut World, address: IpAddr, flags: u8) {
    let_through(&mut world.inbound, address);
    world.services.insert((address, 0, Protocol::Any), Service { flags, ..Service::default() });
}

/// Puts a Service at a frontend.
pub fn set_service(world: &mut World, frontend: (IpAddr, u16, Protocol), service: Service) {
    if !frontend.0.is_unspecified() {
        let_through(&mut world.inbound, frontend.0);
    }
    world.services.insert(frontend, service);
}
