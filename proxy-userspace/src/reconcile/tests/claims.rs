//! Which addresses a Service gets: those of others it does not, and of several that want one the oldest has it. And the
//! API server's own Service, which never loses what it has.

use proxy_common::addr::Protocol::{Tcp, Udp};

use super::*;
use crate::desired::ExternalIps;

/// A Service with an external IP and an address of a load balancer, created on a day of January.
fn claimant(name: &str, day: u8, external_ip: &str, balancer_ip: &str) -> Service {
    let host = name.bytes().next().unwrap_or_default();
    object(json!({
        "metadata": {"namespace": "test", "name": name, "uid": name, "creationTimestamp": format!("2026-01-{day:02}T00:00:00Z")},
        "spec": {"clusterIP": format!("10.96.0.{host}"), "ports": [{"port": 80}], "externalIPs": [external_ip]},
        "status": {"loadBalancer": {"ingress": [{"ip": balancer_ip}]}},
    }))
}

fn node() -> Event {
    let node = object(json!({
        "metadata": {"name": "here"},
        "spec": {"podCIDRs": ["10.244.1.0/24"]},
        "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.9"}]},
    }));
    Event::Nodes(Change::Replace(vec![node]))
}

/// The endpoints of the API server.
fn api_server(addresses: &[&str]) -> EndpointSlice {
    let endpoints = json!(addresses.iter().map(|address| ready(address)).collect::<Vec<_>>());
    let mut object = slice("kubernetes", "kubernetes", &endpoints);
    object.metadata.namespace = Some("default".into());
    object
}

fn applied(service: Service) -> Event {
    Event::Services(Change::Apply(Box::new(service)))
}

/// What the next plan complains of.
fn complaints(reconciler: &mut Reconciler) -> Vec<String> {
    reconciler.plan(Instant::now());
    reconciler.take_defects().iter().map(ToString::to_string).collect()
}

/// External frontends: address and port.
fn external(reconciler: &Reconciler) -> Vec<String> {
    let frontends = reconciler.tables().v4.services.keys();
    let external = frontends.filter(|frontend| frontend.addr.octets[0] != 10 && frontend.port.number() != 0);
    external.map(|frontend| format!("{}:{}", frontend.addr, frontend.port)).collect()
}

#[test]
fn the_loser_of_an_address_is_told_once_and_takes_over_in_silence() {
    let mut reconciler = reconciler(&KernelState::default(), SMALL);
    let lost = |loser: &str, winner: &str| {
        format!(
            "Service test/{loser}: 203.0.113.1 port 80/TCP is not served: it belongs to test/{winner}, whose claim is older"
        )
    };
    let services = |names: &[(&str, u8)]| -> Vec<Service> {
        names.iter().map(|(name, day)| claimant(name, *day, "203.0.113.1", &format!("203.0.113.1{day}"))).collect()
    };
    // Of three that come at once, in any order, both losers lose to the oldest.
    tell(&mut reconciler, lists(services(&[("a", 3), ("b", 2), ("c", 1)]), vec![]));
    assert_eq!(complaints(&mut reconciler), [lost("b", "c"), lost("a", "c")]);
    tell(&mut reconciler, lists(services(&[("a", 3), ("b", 2), ("c", 1)]), vec![]));
    assert!(complaints(&mut reconciler).is_empty(), "a relist is no news");
    // Then the oldest leaves.
    tell(&mut reconciler, lists(services(&[("a", 3), ("b", 2)]), vec![]));
    assert_eq!(complaints(&mut reconciler), [lost("a", "b")]);
    tell(&mut reconciler, lists(services(&[("a", 3)]), vec![]));
    assert!(complaints(&mut reconciler).is_empty());
    // And an even older one comes.
    reconciler.absorb(applied(services(&[("d", 1)]).remove(0)));
    assert_eq!(complaints(&mut reconciler), [lost("a", "d")]);
}

#[test]
fn of_two_services_as_old_as_each_other_the_smaller_uid_wins_a_node_port() {
    let mut reconciler = reconciler(&KernelState::default(), SMALL);
    let with_port = |name: &str, host: u8| {
        service(name, json!({"clusterIP": format!("10.96.0.{host}"), "ports": [{"port": 80, "nodePort": 30_080}]}))
    };
    tell(&mut reconciler, lists(vec![with_port("b", 2), with_port("a", 1)], vec![]));
    let expected = "Service test/b: node port 30080/TCP is not served: it belongs to test/a, whose claim is older";
    let complaints = complaints(&mut reconciler);
    assert_eq!(complaints[0], expected);
}

#[test]
fn an_address_of_somebody_else_is_refused_and_the_others_are_served() {
    type Case = (&'static str, &'static str, ExternalIps, Vec<&'static str>, Option<&'static str>);
    let within = |network: &str| network.parse::<ExternalIps>().unwrap();
    let cases: Vec<Case> = vec![
        ("free", "203.0.113.1", ExternalIps::Allow, vec!["203.0.113.1:80", "203.0.113.2:80"], None),
        ("a pod's", "10.244.1.7", ExternalIps::Allow, vec!["203.0.113.2:80"], Some("an address of pods")),
        ("the API server's", "198.51.100.1", ExternalIps::Allow, vec!["203.0.113.2:80"], Some("the API server")),
        ("the node's, at a port in use", "192.0.2.9", ExternalIps::Allow, vec!["203.0.113.2:80"], Some("port 80/TCP")),
        ("denied", "203.0.113.1", ExternalIps::Deny, vec!["203.0.113.2:80"], Some("--external-ips")),
        ("not within", "203.0.113.1", within("198.51.100.0/24"), vec!["203.0.113.2:80"], Some("--external-ips")),
        ("within", "203.0.113.1", within("203.0.113.0/24"), vec!["203.0.113.1:80", "203.0.113.2:80"], None),
    ];
    for (name, address, external_ips, expected, complaint) in cases {
        let settings = Settings { name: "here".into(), external_ips, ..Settings::default() };
        let mut reconciler = Reconciler::new(settings, SMALL);
        reconciler.adopt(KernelState::default(), Instant::now());
        reconciler.absorb_network(NodeNetwork::default());
        let mut api_server = api_server(&["198.51.100.1"]);
        api_server.ports.as_mut().unwrap()[0].port = Some(80);
        tell(&mut reconciler, lists(vec![claimant("web", 1, address, "203.0.113.2")], vec![api_server]));
        reconciler.absorb(node());
        reconciler.absorb_listeners([(Tcp, "0.0.0.0:80".parse().unwrap())].into());
        let complaints = complaints(&mut reconciler);
        assert_eq!(external(&reconciler), expected, "{name}");
        assert_eq!(complaints.len(), usize::from(complaint.is_some()), "{name}: {complaints:?}");
        assert!(complaint.is_none_or(|part| complaints[0].contains(part)), "{name}: {complaints:?}");
    }
}

#[test]
fn an_address_of_the_node_is_served_at_ports_nobody_listens_on() {
    let cases = [
        ("at any address", Tcp, "0.0.0.0:80", false),
        ("at any address of both families", Tcp, "[::]:80", false),
        ("at that address", Tcp, "192.0.2.9:80", false),
        ("at another address", Tcp, "127.0.0.1:80", true),
        ("at another port", Tcp, "0.0.0.0:81", true),
        ("by another protocol", Udp, "0.0.0.0:80", true),
    ];
    for (name, protocol, listener, is_served) in cases {
        let mut reconciler = reconciler(&KernelState::default(), SMALL);
        tell(&mut reconciler, lists(vec![claimant("web", 1, "203.0.113.1", "192.0.2.9")], vec![]));
        reconciler.absorb(node());
        assert!(reconciler.asks_for_listeners());
        reconciler.absorb_listeners([(protocol, listener.parse().unwrap())].into());
        reconciler.plan(Instant::now());
        assert_eq!(external(&reconciler).contains(&"192.0.2.9:80".into()), is_served, "{name}");
        assert!(!reconciler.asks_for_listeners(), "nothing has changed");
        // Elsewhere nobody listens any more, and this Service changes.
        reconciler.absorb(applied(claimant("web", 2, "203.0.113.1", "192.0.2.9")));
        assert!(reconciler.asks_for_listeners());
        reconciler.absorb_listeners([].into());
        reconciler.plan(Instant::now());
        assert!(external(&reconciler).contains(&"192.0.2.9:80".into()), "{name}");
    }
}

#[test]
fn listeners_are_of_no_interest_where_no_service_wants_an_address_of_the_node() {
    let mut reconciler = reconciler(&KernelState::default(), SMALL);
    tell(&mut reconciler, lists(vec![], vec![]));
    reconciler.absorb(node());
    assert!(!reconciler.asks_for_listeners(), "the node's addresses are new, and nobody wants them");
    reconciler.plan(Instant::now());
    reconciler.absorb(applied(claimant("web", 1, "203.0.113.1", "203.0.113.2")));
    assert!(!reconciler.asks_for_listeners());
    reconciler.plan(Instant::now());
    reconciler.absorb(applied(claimant("api", 1, "192.0.2.9", "203.0.113.2")));
    assert!(reconciler.asks_for_listeners());
}

#[test]
fn listeners_are_of_interest_when_the_node_gets_an_address_that_a_service_has() {
    let mut reconciler = reconciler(&KernelState::default(), SMALL);
    tell(&mut reconciler, lists(vec![], vec![]));
    reconciler.absorb(applied(claimant("web", 1, "192.0.2.9", "203.0.113.2")));
    assert!(!reconciler.asks_for_listeners());
    reconciler.plan(Instant::now());
    reconciler.absorb(node());
    assert!(reconciler.asks_for_listeners());
}

#[test]
fn the_api_server_keeps_its_endpoints_over_a_restart_of_the_agent() {
    let mut kubernetes = service("kubernetes", json!({"clusterIP": "10.96.0.1"}));
    kubernetes.metadata.namespace = Some("default".into());
    let web = service("web", json!({"clusterIP": "10.96.0.2"}));
    let services = vec![kubernetes, web];
    let mut kernel = KernelState::default();
    let mut first = reconciler(&kernel, SMALL);
    let of_web = slice("web", "web", &json!([ready("10.0.0.9")]));
    tell(&mut first, lists(services.clone(), vec![api_server(&["10.0.0.1", "10.0.0.2"]), of_web]));
    settle(&mut first, &mut kernel, Instant::now());
    let hosts = |kernel: &KernelState| -> Vec<Vec<u8>> {
        let services = ports(&kernel.v4);
        let hosts =
            |range| backends(&kernel.v4, &kernel.slots, range).iter().map(|backend| backend.addr.octets[3]).collect();
        services.iter().map(|service| hosts(service.internal)).collect()
    };
    assert_eq!(hosts(&kernel), [vec![1, 2], vec![9]]);

    let mut second = reconciler(&kernel, SMALL);
    tell(&mut second, lists(services.clone(), vec![]));
    settle(&mut second, &mut kernel, Instant::now());
    assert_eq!(hosts(&kernel), [vec![1, 2], vec![]], "the other Service is empty");
    tell(&mut second, lists(services.clone(), vec![]));
    settle(&mut second, &mut kernel, Instant::now());
    assert_eq!(hosts(&kernel), [vec![1, 2], vec![]], "another list without them");
    second.absorb(Event::EndpointSlices(Change::Apply(Box::new(api_server(&["10.0.0.3"])))));
    settle(&mut second, &mut kernel, Instant::now());
    assert_eq!(hosts(&kernel), [vec![3], vec![]], "until there are others");
    assert_equal(&kernel, second.tables());

    let mut third = reconciler(&kernel, SMALL);
    tell(&mut third, lists(services, vec![api_server(&["10.0.0.4"])]));
    settle(&mut third, &mut kernel, Instant::now());
    assert_eq!(hosts(&kernel), [vec![4], vec![]], "what the server says counts");
}
