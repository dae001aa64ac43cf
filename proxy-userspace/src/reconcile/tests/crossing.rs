//! Services of one family that clients of the other are served, too: who asks for it, and what the kernel is told.

use std::{collections::BTreeSet, net::Ipv6Addr};

use proxy_common::{
    addr::{Ipv6, Protocol},
    node::local,
    service::flag::{CROSS, DISPATCHED, EXTERNAL},
};

use super::*;
use crate::node_port_mode::NodePortMode;

const ASKED: &str = r#"{"service.sluice.dev/nat46x64": "true"}"#;

fn network() -> NodeNetwork {
    let address = |net: &str| LinkAddress {
        ifindex: 2,
        net: net.parse().unwrap(),
        is_global: true,
        is_secondary: false,
        is_usable: true,
        is_deprecated: false,
    };
    NodeNetwork {
        links: vec![Link { ifindex: 2, name: "eth0".into(), has_default_route: true, ..Link::default() }],
        addresses: vec![address("192.0.2.1/24"), address("2001:db8::1/64")],
    }
}

fn reconciler(crosses: bool) -> Reconciler {
    let settings = Settings { name: "here".into(), crosses, node_port_mode: NodePortMode::Dsr, ..Settings::default() };
    let mut reconciler = Reconciler::new(settings, SMALL);
    reconciler.adopt(KernelState::default(), Instant::now());
    reconciler.absorb_network(network());
    reconciler
}

/// A Service with a NodePort, an address of a load balancer of each family, and an endpoint.
fn web(cluster_ips: &[&str], annotations: &str) -> (Service, EndpointSlice) {
    let annotations: Value = serde_json::from_str(annotations).unwrap();
    let is_ipv4 = !cluster_ips[0].contains(':');
    let service = object(json!({
        "metadata": {"namespace": "test", "name": "web", "uid": "web", "annotations": annotations},
        "spec": {
            "clusterIPs": cluster_ips, "loadBalancerSourceRanges": ["198.51.100.0/24", "2001:db8:c::/48"],
            "ports": [{"name": "http", "port": 80, "nodePort": 30080}, {"name": "s", "port": 80, "protocol": "SCTP"}],
        },
        "status": {"loadBalancer": {"ingress": [{"ip": "203.0.113.1"}, {"ip": "2001:db8:b::1"}]}},
    }));
    let slice = object(json!({
        "metadata": {"namespace": "test", "name": "web-1", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": if is_ipv4 { "IPv4" } else { "IPv6" },
        "ports": [{"name": "http", "port": 8080}],
        "endpoints": [{"addresses": [if is_ipv4 { "10.0.0.1" } else { "2001:db8:f::1" }], "nodeName": "here"}],
    }));
    (service, slice)
}

/// What the kernel holds for a Service, and what was wrong with it.
fn started(crosses: bool, cluster_ips: &[&str], annotations: &str) -> (KernelState, Vec<String>) {
    let mut reconciler = reconciler(crosses);
    let (service, slice) = web(cluster_ips, annotations);
    let mut defects = Vec::new();
    for event in lists(vec![service], vec![slice]) {
        defects.extend(reconciler.absorb(event).iter().map(ToString::to_string));
    }
    let mut kernel = KernelState::default();
    settle(&mut reconciler, &mut kernel, Instant::now());
    defects.extend(reconciler.take_defects().iter().map(ToString::to_string));
    (kernel, defects)
}

fn v6(text: &str) -> Ipv6 {
    text.parse::<Ipv6Addr>().unwrap().into()
}

/// Frontends between the families, without those of whole addresses.
fn crossing(kernel: &KernelState) -> Vec<(Ipv6, u16)> {
    let services = kernel.v6.services.iter().filter(|(_, service)| service.flags & CROSS != 0);
    let mut found: Vec<_> = services
        .filter(|(frontend, _)| frontend.proto != Protocol::Any)
        .inspect(|(_, service)| {
            assert_eq!(service.flags & (EXTERNAL | DISPATCHED), EXTERNAL, "only this node can translate the replies");
            assert_eq!((service.internal.count, service.external.count, service.local.count), (1, 1, 0));
        })
        .map(|(frontend, _)| (frontend.addr, frontend.port.number()))
        .collect();
    found.sort_unstable();
    found
}

#[test]
fn a_service_of_ipv4_is_served_to_ipv6_by_its_external_addresses() {
    let (kernel, defects) = started(true, &["10.96.0.1"], ASKED);
    assert_eq!(crossing(&kernel), [(v6("::"), 30_080), (v6("2001:db8:b::1"), 80)]);
    assert!(kernel.v6.backends.iter().any(|backend| backend.addr == v6("::ffff:10.0.0.1")));
    assert_eq!(kernel.v6.local_addrs.get(&v6("::ffff:192.0.2.1")), Some(&local::NODE_PORTS));
    assert!(kernel.v4.services.values().all(|service| service.flags & CROSS == 0));
    assert_eq!(defects, Vec::<String>::new());
}

#[test]
fn a_service_of_ipv6_is_served_to_ipv4_under_mapped_addresses() {
    let (kernel, _) = started(true, &["2001:db8:96::1"], ASKED);
    assert_eq!(crossing(&kernel), [(v6("::ffff:0.0.0.0"), 30_080), (v6("::ffff:203.0.113.1"), 80)]);
    let native = kernel.v6.services.iter().find(|(frontend, _)| frontend.addr == v6("::")).unwrap().1;
    assert_eq!(native.flags & CROSS, 0, "IPv6 itself is served as ever");
    assert!(kernel.v4.services.is_empty() && kernel.v4.backends.is_empty());
    let ranges: BTreeSet<_> = kernel.v6.sources.iter().map(|(_, prefix)| (prefix.addr, prefix.bits)).collect();
    let both = BTreeSet::from([(v6("::ffff:198.51.100.0"), 96 + 24), (v6("2001:db8:c::"), 48)]);
    assert_eq!(ranges, both, "what restricts either family stands in one table");
}

#[test]
fn nobody_crosses_who_does_not_ask_or_has_both_families_or_is_not_let() {
    let none = Vec::<(Ipv6, u16)>::new();
    let (kernel, defects) = started(true, &["10.96.0.1"], "{}");
    assert_eq!((crossing(&kernel), defects.len()), (none.clone(), 0));
    assert!(kernel.v6.services.is_empty() && kernel.v6.backends.is_empty());
    let (kernel, defects) = started(true, &["10.96.0.1", "2001:db8:96::1"], ASKED);
    assert_eq!((crossing(&kernel), defects.len()), (none.clone(), 0));
    let (kernel, defects) = started(false, &["10.96.0.1"], ASKED);
    assert_eq!(crossing(&kernel), none);
    assert!(kernel.v6.local_addrs.keys().all(|address| !address.is_mapped()));
    assert_eq!(defects.len(), 1);
    assert!(defects[0].contains("test/web") && defects[0].contains("--nat46x64"), "{defects:?}");
}

#[test]
fn an_annotation_that_says_neither_yes_nor_no_is_told() {
    let (kernel, defects) = started(true, &["10.96.0.1"], r#"{"service.sluice.dev/nat46x64": "perhaps"}"#);
    assert!(crossing(&kernel).is_empty());
    assert!(defects.len() == 1 && defects[0].contains("perhaps"), "{defects:?}");
}

/// Of two Services that want one address, the one whose family it is has it, though the other is older.
#[test]
fn what_is_of_its_own_family_goes_before_what_crosses() {
    let mut reconciler = reconciler(true);
    let (older, slice) = web(&["10.96.0.1"], ASKED);
    let (mut younger, _) = web(&["2001:db8:96::1"], "{}");
    younger.metadata.name = Some("younger".into());
    younger.metadata.uid = Some("younger".into());
    younger.spec.as_mut().unwrap().ports.as_mut().unwrap()[0].node_port = Some(30_081);
    for event in lists(vec![older, younger], vec![slice]) {
        reconciler.absorb(event);
    }
    let mut kernel = KernelState::default();
    settle(&mut reconciler, &mut kernel, Instant::now());
    assert_eq!(crossing(&kernel), [(v6("::"), 30_080)]);
    let told: Vec<_> = reconciler.take_defects().iter().map(ToString::to_string).collect();
    assert!(told.iter().any(|defect| defect.contains("test/web:") && defect.contains("2001:db8:b::1")), "{told:?}");
}
