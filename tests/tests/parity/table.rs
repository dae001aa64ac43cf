//! The rows of the specification as cases: Services of every kind, who asks them, and what the oracle expects.

use tests::{
    lab::{address::Family, agent::SocketLb},
    traffic::Protocol,
};

use crate::{
    case::Case,
    fixture::{Destination, Endpoint, Fixture, IpMode, Policy, RangeScope, State},
    oracle::{Client, Settings, Situation},
};

/// As the agent comes.
pub(crate) const USUAL: Settings = Settings {
    name: "",
    socket_lb: SocketLb::All,
    masquerade_all: false,
    masquerade_local_backends: false,
    every_address: false,
};

/// Whatever a pod sends to a `ClusterIP` goes by the node's address.
pub(crate) const MASQUERADE_ALL: Settings = Settings { name: "masquerade-all", masquerade_all: true, ..USUAL };

/// As kube-proxy masquerades, with no pod's socket translated.
pub(crate) const LOCAL_BACKENDS: Settings = Settings {
    name: "masquerade-local-backends",
    socket_lb: SocketLb::Host,
    masquerade_local_backends: true,
    every_address: true,
    ..USUAL
};

/// In the order in which agents are started with them.
pub(crate) const SETTINGS: [Settings; 3] = [USUAL, MASQUERADE_ALL, LOCAL_BACKENDS];

/// Services with one endpoint on each node at most, in every pair of states that the rules tell apart.
fn states() -> [Vec<Endpoint>; 11] {
    use State::{Draining, Ending, NotReady, Ready};
    let pair = |a, b| vec![Endpoint::new("a1", a), Endpoint::new("b1", b)];
    [
        vec![Endpoint::ready("a1")],
        vec![Endpoint::ready("b1")],
        pair(Ready, Ready),
        pair(NotReady, Ready),
        pair(Draining, Ready),
        pair(Ready, Draining),
        // Trap 6: the last endpoints there are have begun to terminate, and go on serving.
        pair(Draining, Draining),
        pair(NotReady, Draining),
        pair(Ending, Ending),
        pair(NotReady, NotReady),
        vec![],
    ]
}

const FIRST_OF_CLUSTER: u8 = 10;
const FIRST_OF_LOCAL: u8 = 30;
const BOTH_READY: usize = 2;

fn by_state(policy: Policy) -> Vec<Fixture> {
    let first = if policy == Policy::Cluster { FIRST_OF_CLUSTER } else { FIRST_OF_LOCAL };
    (first..).zip(states()).map(|(number, endpoints)| Fixture::new(number, policy, &endpoints)).collect()
}

/// Policies that differ.
fn mixed() -> [Fixture; 2] {
    let endpoints = [Endpoint::new("a1", State::NotReady), Endpoint::ready("b1")];
    [(50, Policy::Cluster, Policy::Local), (51, Policy::Local, Policy::Cluster)].map(|(number, internal, external)| {
        let fixture = Fixture::new(number, internal, &endpoints);
        let label = format!("{} with the other policy {}", fixture.label, external.name());
        Fixture { label, external, ..fixture }
    })
}

/// Trap 25: backends in the nodes' own networks.
fn host_network() -> [Fixture; 2] {
    let endpoints = [Endpoint::ready("node-a"), Endpoint::ready("node-b")];
    [(60, Policy::Cluster), (61, Policy::Local)].map(|(number, policy)| Fixture::new(number, policy, &endpoints))
}

/// Hints, and what becomes of them.
fn hinted() -> Vec<Fixture> {
    const A: &[&str] = &["node-a"];
    const B: &[&str] = &["node-b"];
    const ELSEWHERE: &[&str] = &["elsewhere"];
    const ZONE_A: &[&str] = &["zone-a"];
    const ZONE_B: &[&str] = &["zone-b"];
    const BOTH_ZONES: &[&str] = &["zone-a", "zone-b"];
    let [a1, a2, b1, b2] = ["a1", "a2", "b1", "b2"].map(Endpoint::ready);
    let cluster: [(&str, Vec<Endpoint>); 9] = [
        ("every endpoint for a node", vec![a1.for_nodes(A), b1.for_nodes(B)]),
        ("every endpoint for the other node", vec![a1.for_nodes(B), b1.for_nodes(A)]),
        ("one endpoint of three for no node", vec![a1.for_nodes(A), a2, b1.for_nodes(B)]),
        (
            "nodes elsewhere and zones here",
            vec![a1.for_nodes(ELSEWHERE).for_zones(ZONE_A), b1.for_nodes(ELSEWHERE).for_zones(ZONE_B)],
        ),
        ("nodes before zones", vec![a1.for_nodes(A).for_zones(ZONE_B), b1.for_nodes(B).for_zones(ZONE_A)]),
        ("every endpoint for a zone", vec![a1.for_zones(ZONE_A), a2.for_zones(BOTH_ZONES), b1.for_zones(ZONE_B)]),
        ("one endpoint of two for no zone", vec![a1.for_zones(ZONE_B), b1]),
        ("every endpoint for zones elsewhere", vec![a1.for_zones(ELSEWHERE), b1.for_zones(ELSEWHERE)]),
        (
            "hints of endpoints that are not ready",
            vec![a1.for_zones(ZONE_B), b2.for_zones(ZONE_A), Endpoint::new("b1", State::Draining)],
        ),
    ];
    let draining = |pod| Endpoint::new(pod, State::Draining);
    let others = [
        // Hints never touch the local list, nor endpoints that are used because none is ready.
        (Policy::Local, "local endpoints for the other node", vec![a1.for_nodes(B), b1.for_nodes(A)]),
        (
            Policy::Cluster,
            "draining endpoints for the other node",
            vec![draining("a1").for_nodes(B), draining("b1").for_nodes(A)],
        ),
    ];
    let cluster = cluster.into_iter().map(|(label, endpoints)| (Policy::Cluster, label, endpoints));
    let numbered = (70..).zip(cluster.chain(others));
    numbered.map(|(number, (policy, label, endpoints))| Fixture::new(number, policy, &endpoints).label(label)).collect()
}

/// Whom source ranges let in.
fn restricted() -> Vec<Fixture> {
    let rows: [(&str, RangeScope, Vec<&'static str>); 7] = [
        ("ranges of one client", RangeScope::Balancer, vec!["192.0.2.100/32", " 2001:db8::100/128 "]),
        ("ranges of one client for all", RangeScope::All, vec!["192.0.2.100/32", " 2001:db8::100/128 "]),
        ("ranges of IPv4 alone", RangeScope::Balancer, vec!["192.0.2.100/32"]),
        ("ranges of IPv6 alone for all", RangeScope::All, vec!["2001:db8::100/128"]),
        ("ranges that hold all", RangeScope::All, vec!["0.0.0.0/0", "::/0"]),
        ("ranges of the pods of node-a", RangeScope::All, vec!["10.244.1.0/24", "fd00:10:244:1::/64"]),
        ("ranges of the nodes", RangeScope::Balancer, vec!["192.0.2.8/29", "2001:db8::10/124"]),
    ];
    let numbered = (85..).zip(rows);
    let restrict = |(number, (label, range_scope, source_ranges)): (u8, (&str, _, _))| {
        let fixture = Fixture::new(number, Policy::Cluster, &[Endpoint::ready("a1"), Endpoint::ready("b1")]);
        Fixture { source_ranges, range_scope, ..fixture.label(label) }
    };
    numbered.map(restrict).collect()
}

/// Trap 21: one endpoint in two slices that disagree.
fn in_two_slices() -> Vec<Fixture> {
    use State::{Draining, NotReady, Ready};
    let rows = [(Draining, Ready), (Ready, Draining), (NotReady, Ready), (Ready, NotReady), (Draining, NotReady)];
    let rows = (95..).zip(rows);
    rows.map(|(number, (first, second))| {
        let fixture = Fixture::new(number, Policy::Cluster, &[Endpoint::new("a1", first)]);
        let more_endpoints = vec![Endpoint::new("a1", second)];
        let label = format!("{} and {} in another slice", fixture.label, second.name());
        Fixture { label, more_endpoints, ..fixture }
    })
    .collect()
}

/// Trap 18: the address of a balancer that wants to see the packets itself.
fn proxied() -> Fixture {
    let fixture = Fixture::new(105, Policy::Cluster, &[Endpoint::ready("a1")]).label("ipMode=Proxy");
    Fixture { ip_mode: IpMode::Proxy, ..fixture }
}

/// Every Service that stands still while cases are asked.
pub(crate) fn fixtures() -> Vec<Fixture> {
    let policies = [Policy::Cluster, Policy::Local].into_iter().flat_map(by_state);
    let others = [hinted(), restricted(), in_two_slices(), vec![proxied()]].concat();
    policies.chain(mixed()).chain(host_network()).chain(others).collect()
}

/// A client and what it names.
pub(crate) type Way = (Client, Destination);

const POD_A: Client = Client::Pod("client-a");
const POD_B: Client = Client::Pod("client-b");
const NODE_A: Client = Client::Node("node-a");
const NODE_B: Client = Client::Node("node-b");
const OUTSIDE_A: Client = Client::Outside("node-a");
const OUTSIDE_B: Client = Client::Outside("node-b");
const AT_A: Destination = Destination::NodePort("node-a");
const AT_B: Destination = Destination::NodePort("node-b");

/// Everything node-a decides: about clients on it, outside of it, and on the other node.
fn ways_of_node_a() -> Vec<Way> {
    let everywhere = [Destination::ClusterIp, AT_A, Destination::Balancer, Destination::External];
    let ways = [POD_A, NODE_A, OUTSIDE_A].into_iter().flat_map(|client| everywhere.map(|to| (client, to)));
    ways.chain([POD_B, NODE_B].map(|client| (client, AT_A))).collect()
}

/// The same by node-b, where pods hang on a bridge and the uplink on TC.
fn ways_of_node_b() -> Vec<Way> {
    let everywhere = [Destination::ClusterIp, AT_B, Destination::Balancer, Destination::External];
    let ways = [POD_B, NODE_B, OUTSIDE_B].into_iter().flat_map(|client| everywhere.map(|to| (client, to)));
    ways.chain([POD_A, NODE_A].map(|client| (client, AT_B))).collect()
}

pub(crate) const ALL: [(Family, Protocol); 4] = [
    (Family::V4, Protocol::Tcp),
    (Family::V4, Protocol::Udp),
    (Family::V6, Protocol::Tcp),
    (Family::V6, Protocol::Udp),
];
/// Each family and each protocol once.
const SOME: [(Family, Protocol); 2] = [(Family::V4, Protocol::Tcp), (Family::V6, Protocol::Udp)];

fn cross(settings: Settings, services: &[Fixture], ways: &[Way], transports: &[(Family, Protocol)]) -> Vec<Case> {
    let mut cases = Vec::new();
    for service in services {
        for &(client, destination) in ways {
            for &(family, protocol) in transports {
                cases.push(Case::of(&Situation { client, destination, service, family, protocol, settings }));
            }
        }
    }
    cases
}

/// Every case, those of one setting after the other's.
pub(crate) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    cases.extend(policies_and_states());
    cases.extend(nowhere_to_send());
    cases.extend(hints());
    cases.extend(source_ranges());
    cases.extend(slices_and_modes());
    cases.extend(picking_oneself());
    cases.extend(masquerading());
    cases.extend(loopback());
    cases
}

/// Sections 4 to 7. Trap 16: clients in the cluster that use an external address of a Service with
/// externalTrafficPolicy Local get the cluster's endpoints.
fn policies_and_states() -> Vec<Case> {
    let services = [by_state(Policy::Cluster), by_state(Policy::Local), mixed().to_vec(), host_network().to_vec()];
    let services = services.concat();
    let at_a = cross(USUAL, &services, &ways_of_node_a(), &ALL);
    [at_a, cross(USUAL, &services, &ways_of_node_b(), &SOME)].concat()
}

/// Section 6. Trap 22: an address that no Service has is not let out.
fn nowhere_to_send() -> Vec<Case> {
    let services = &by_state(Policy::Cluster)[BOTH_READY..=BOTH_READY];
    let clients = [POD_A, NODE_A, OUTSIDE_A, POD_B, NODE_B, OUTSIDE_B];
    let destinations = [Destination::UndefinedPort, Destination::Unallocated];
    let ways: Vec<_> = clients.into_iter().flat_map(|client| destinations.map(|to| (client, to))).collect();
    cross(USUAL, services, &ways, &ALL)
}

/// Section 4, topology.
fn hints() -> Vec<Case> {
    let services = hinted();
    let ways = [
        (POD_A, Destination::ClusterIp),
        (POD_B, Destination::ClusterIp),
        (NODE_A, Destination::Balancer),
        (OUTSIDE_A, AT_A),
        (OUTSIDE_B, Destination::External),
    ];
    cross(USUAL, &services, &ways, &SOME)
}

/// Section 8.
fn source_ranges() -> Vec<Case> {
    let services = restricted();
    let destinations = [Destination::ClusterIp, AT_A, Destination::Balancer, Destination::External];
    let clients = [POD_A, NODE_A, OUTSIDE_A];
    let mut ways: Vec<_> = clients.into_iter().flat_map(|client| destinations.map(|to| (client, to))).collect();
    ways.extend([
        (OUTSIDE_B, AT_A),
        (OUTSIDE_B, AT_B),
        (OUTSIDE_B, Destination::Balancer),
        (POD_B, Destination::Balancer),
    ]);
    cross(USUAL, &services, &ways, &ALL)
}

/// Sections 2 and 3.
fn slices_and_modes() -> Vec<Case> {
    let slices = cross(USUAL, &in_two_slices(), &[(POD_A, Destination::ClusterIp), (OUTSIDE_B, AT_B)], &SOME);
    let ways = [Destination::ClusterIp, AT_A, Destination::Balancer, Destination::External].map(|to| (POD_A, to));
    let ways = [ways.to_vec(), vec![(NODE_A, Destination::Balancer), (OUTSIDE_A, Destination::Balancer)]].concat();
    [slices, cross(USUAL, &[proxied()], &ways, &ALL)].concat()
}

/// Section 7, hairpin. Trap 15: a pod that picks itself, over both families.
fn picking_oneself() -> Vec<Case> {
    let services = [by_state(Policy::Cluster)[BOTH_READY].clone(), by_state(Policy::Local)[0].clone()];
    let ways = |pod, node| {
        let destinations = [Destination::ClusterIp, node, Destination::Balancer, Destination::External];
        destinations.map(|to| (Client::Pod(pod), to))
    };
    let mut cases = Vec::new();
    for settings in SETTINGS {
        cases.extend(cross(settings, &services, &ways("a1", AT_A), &ALL));
        cases.extend(cross(settings, &services[..1], &ways("b1", AT_B), &ALL));
    }
    cases
}

/// Section 7, the switches.
fn masquerading() -> Vec<Case> {
    let services = [by_state(Policy::Cluster)[BOTH_READY].clone(), by_state(Policy::Local)[BOTH_READY].clone()];
    let services = [services.as_slice(), &host_network()].concat();
    let mut cases = Vec::new();
    for settings in [MASQUERADE_ALL, LOCAL_BACKENDS] {
        cases.extend(cross(settings, &services, &ways_of_node_a(), &ALL));
        cases.extend(cross(settings, &services, &ways_of_node_b(), &SOME));
    }
    cases
}

/// Section 10. Trap 25: node ports at the loopback address, from the node itself.
fn loopback() -> Vec<Case> {
    let services = [by_state(Policy::Cluster), by_state(Policy::Local), host_network().to_vec()].concat();
    cross(LOCAL_BACKENDS, &services, &[(NODE_A, Destination::Localhost), (NODE_B, Destination::Localhost)], &ALL)
}
