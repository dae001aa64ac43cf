//! Services whose packets go to other nodes as they are: who asks for it, what the kernel is told, and what of other nodes is
//! known for it.

use std::collections::BTreeSet;

use proxy_common::{
    addr::{Ipv4, Protocol},
    service::flag::DISPATCHED,
};

use super::*;
use crate::node_port_mode::NodePortMode;

fn node(name: &str, address: &str) -> Node {
    object(json!({
        "metadata": {"name": name},
        "status": {"addresses": [{"type": "InternalIP", "address": address}, {"type": "ExternalIP", "address": "203.0.113.9"}]},
    }))
}

fn peers(nodes: &[(&str, &str)]) -> Event {
    Event::Peers(Change::Replace(nodes.iter().map(|(name, address)| node(name, address)).collect()))
}

/// A Service with a NodePort for TCP and for UDP, an endpoint here and one there.
fn started(mode: NodePortMode, annotations: &Value, policy: &str) -> (Reconciler, Vec<String>) {
    let settings = Settings { name: "here".into(), node_port_mode: mode, ..Settings::default() };
    let mut reconciler = Reconciler::new(settings, SMALL);
    reconciler.adopt(KernelState::default(), Instant::now());
    reconciler.absorb_network(NodeNetwork::default());
    let service: Service = object(json!({
        "metadata": {"namespace": "test", "name": "web", "uid": "web", "annotations": annotations},
        "spec": {
            "clusterIP": "10.96.0.1", "externalTrafficPolicy": policy, "externalIPs": ["198.51.100.1"],
            "ports": [
                {"name": "tcp", "port": 80, "nodePort": 30080},
                {"name": "udp", "port": 80, "nodePort": 30080, "protocol": "UDP"},
            ],
        },
    }));
    let slice: EndpointSlice = object(json!({
        "metadata": {"namespace": "test", "name": "web-1", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4",
        "ports": [{"name": "tcp", "port": 8080}, {"name": "udp", "port": 8080, "protocol": "UDP"}],
        "endpoints": [
            {"addresses": ["10.0.0.1"], "nodeName": "here"}, {"addresses": ["10.0.0.2"], "nodeName": "there"},
            {"addresses": ["10.0.0.3"]},
        ],
    }));
    let mut defects = Vec::new();
    for event in lists(vec![service], vec![slice]) {
        defects.extend(reconciler.absorb(event).iter().map(ToString::to_string));
    }
    (reconciler, defects)
}

/// Frontends that are dispatched, by protocol and without the ClusterIP's; and whether one has local endpoints aside.
fn dispatched(reconciler: &mut Reconciler) -> [usize; 2] {
    let mut kernel = KernelState::default();
    settle(reconciler, &mut kernel, Instant::now());
    let of = |proto| {
        let services = kernel.v4.services.iter().filter(|(frontend, _)| frontend.proto == proto);
        let (asked, plain): (Vec<_>, Vec<_>) = services.partition(|(_, service)| service.flags & DISPATCHED != 0);
        assert!(asked.iter().all(|(_, service)| (service.external.count, service.local.count) == (3, 1)));
        assert!(plain.iter().all(|(_, service)| service.local.count == 0));
        asked.len()
    };
    [of(Protocol::Tcp), of(Protocol::Udp)]
}

#[test]
fn a_service_is_dispatched_by_its_own_word_or_by_that_of_the_node() {
    let named = |mode: &str| json!({"service.sluice.dev/nodeport-mode": mode});
    let cases = [
        ("by nobody's", NodePortMode::Snat, json!({}), "Cluster", [0, 0]),
        ("by the node's", NodePortMode::Dsr, json!({}), "Cluster", [2, 2]),
        ("by the node's, half", NodePortMode::Hybrid, json!({}), "Cluster", [2, 0]),
        ("by its own", NodePortMode::Snat, named("dsr"), "Cluster", [2, 2]),
        ("by its own, half", NodePortMode::Snat, named(" hybrid "), "Cluster", [2, 0]),
        ("not, by its own", NodePortMode::Dsr, named("snat"), "Cluster", [0, 0]),
        ("not where every endpoint is here", NodePortMode::Dsr, json!({}), "Local", [0, 0]),
    ];
    for (name, mode, annotations, policy, expected) in cases {
        let (mut reconciler, defects) = started(mode, &annotations, policy);
        assert_eq!((dispatched(&mut reconciler), defects), (expected, vec![]), "{name}");
    }
}

#[test]
fn an_unknown_mode_is_told_and_the_nodes_counts() {
    let annotations = json!({"service.sluice.dev/nodeport-mode": "DSR"});
    let (mut reconciler, defects) = started(NodePortMode::Hybrid, &annotations, "Cluster");
    assert_eq!(dispatched(&mut reconciler), [2, 0]);
    assert!(
        matches!(&defects[..], [defect] if defect.contains("Service test/web") && defect.contains("nodeport-mode") && defect.contains("DSR")),
        "{defects:?}"
    );
}

/// The address of the node of each endpoint, in the endpoints' order.
fn nodes(reconciler: &Reconciler) -> Vec<String> {
    reconciler.tables().v4.backends.values().map(|backend| backend.node.to_string()).collect()
}

#[test]
fn other_nodes_are_known_where_they_matter_and_followed() {
    let unknown = Ipv4::default().to_string();
    let all = [("here", "192.0.2.1"), ("there", "192.0.2.2")];
    let (mut plain, _) = started(NodePortMode::Snat, &json!({}), "Cluster");
    tell(&mut plain, [peers(&all), Event::Nodes(Change::Replace(vec![]))]);
    plain.plan(Instant::now());
    assert!(!plain.wants_peers() && plain.knows_nodes());
    assert_eq!((nodes(&plain), plain.take_peers()), (vec![unknown.clone(); 3], Some(BTreeSet::new())));

    let (mut reconciler, _) = started(NodePortMode::Dsr, &json!({}), "Cluster");
    tell(&mut reconciler, [Event::Nodes(Change::Replace(vec![node("here", "192.0.2.1")]))]);
    assert!(reconciler.wants_peers() && !reconciler.knows_nodes(), "the others are waited for");
    let mut kernel = KernelState::default();
    tell(&mut reconciler, [peers(&all)]);
    assert!(reconciler.knows_nodes());
    settle(&mut reconciler, &mut kernel, Instant::now());
    assert_equal(&kernel, reconciler.tables());
    assert_eq!(nodes(&reconciler), [&unknown, "192.0.2.2", &unknown], "not of a local one, nor of one on no node");
    // The address that both have is this node's, too.
    assert_eq!(reconciler.take_peers(), Some(["192.0.2.2".parse().unwrap()].into()));

    tell(&mut reconciler, [Event::Peers(Change::Apply(Box::new(node("there", "192.0.2.7"))))]);
    settle(&mut reconciler, &mut kernel, Instant::now());
    assert_equal(&kernel, reconciler.tables());
    assert_eq!(nodes(&reconciler)[1], "192.0.2.7");
    assert!(reconciler.take_peers().is_some());
    // A heartbeat.
    tell(&mut reconciler, [Event::Peers(Change::Apply(Box::new(node("there", "192.0.2.7"))))]);
    assert_eq!(settle(&mut reconciler, &mut kernel, Instant::now()), Plan::default());
    assert_eq!(reconciler.take_peers(), None);

    tell(&mut reconciler, [Event::Peers(Change::Delete(ObjectName { namespace: "".into(), name: "there".into() }))]);
    settle(&mut reconciler, &mut kernel, Instant::now());
    assert_eq!((nodes(&reconciler), reconciler.take_peers()), (vec![unknown; 3], Some(BTreeSet::new())));
}

#[test]
fn a_service_that_asks_makes_other_nodes_matter_from_then_on() {
    let (mut reconciler, _) = started(NodePortMode::Snat, &json!({}), "Cluster");
    tell(&mut reconciler, [peers(&[("there", "192.0.2.2")])]);
    reconciler.plan(Instant::now());
    assert!(!reconciler.wants_peers());
    let annotated: Service = object(json!({
        "metadata": {"namespace": "test", "name": "other", "annotations": {"service.sluice.dev/nodeport-mode": "dsr"}},
        "spec": {"clusterIP": "10.96.0.2", "ports": [{"port": 80}]},
    }));
    tell(&mut reconciler, [Event::Services(Change::Apply(Box::new(annotated)))]);
    reconciler.plan(Instant::now());
    assert!(reconciler.wants_peers());
    assert_eq!(nodes(&reconciler)[1], "192.0.2.2", "of every Service's endpoints");
    assert_eq!(reconciler.take_peers().map(|peers| peers.len()), Some(2));
}
