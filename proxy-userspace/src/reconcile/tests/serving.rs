//! Whom UDP Service ports have lost: by their own endpoints, whatever another Service thinks of these.

use proxy_common::addr::{Ipv4, Port, Protocol};

use super::*;

/// A Service with a port of UDP and one of TCP.
fn dns(name: &str, cluster_ip: &str) -> Service {
    let ports = json!([{"name": "udp", "port": 53, "protocol": "UDP", "nodePort": 30053}, {"name": "tcp", "port": 53}]);
    service(name, json!({"clusterIP": cluster_ip, "ports": ports}))
}

fn endpoints(service: &str, endpoints: &Value) -> EndpointSlice {
    let mut slice = slice(&format!("{service}-1"), service, endpoints);
    slice.ports = object(json!([
        {"name": "udp", "port": 5353, "protocol": "UDP"}, {"name": "tcp", "port": 5353, "protocol": "TCP"},
    ]));
    slice
}

fn endpoint(address: &str, is_ready: bool, is_serving: bool, is_terminating: bool) -> Value {
    json!({
        "addresses": [address],
        "conditions": {"ready": is_ready, "serving": is_serving, "terminating": is_terminating},
    })
}

/// The ports that have lost somebody, with the endpoints that answer now.
fn lost(plan: &Plan, kernel: &KernelState) -> BTreeMap<u32, Vec<String>> {
    let ports = plan.serving_v4.ports.iter().filter_map(|(index, change)| Some((*index, change.as_ref()?)));
    let address = |id: &BackendId| kernel.v4.backends[*id as usize].addr.to_string();
    let lost = ports.filter(|(_, serving)| serving.has_lost);
    lost.map(|(index, serving)| (index, serving.backends.iter().map(address).collect())).collect()
}

fn index(kernel: &KernelState, cluster_ip: [u8; 4], protocol: Protocol) -> u32 {
    kernel.v4.services[&service::Frontend::new(Ipv4 { octets: cluster_ip }, Port::new(53), protocol)].index
}

#[test]
fn a_udp_port_loses_an_endpoint_that_another_service_has_still() {
    const BLUE: &str = "10.0.0.1";
    const GREEN: &str = "10.0.0.2";
    let (mut kernel, now) = (KernelState::default(), Instant::now());
    let mut reconciler = reconciler(&kernel, SMALL);
    let services = vec![dns("dns", "10.96.0.1"), dns("dns-blue", "10.96.0.2")];
    let slices = vec![endpoints("dns", &json!([ready(BLUE)])), endpoints("dns-blue", &json!([ready(BLUE)]))];
    tell(&mut reconciler, lists(services, slices));
    let plan = settle(&mut reconciler, &mut kernel, now);
    let (own, other) = (index(&kernel, [10, 96, 0, 1], Protocol::Udp), index(&kernel, [10, 96, 0, 2], Protocol::Udp));
    assert!(plan.serving_v4.is_all && plan.serving_v4.ports.keys().eq([&own, &other]), "of TCP nothing is said");

    let cases = [
        ("another one comes", json!([ready(BLUE), ready(GREEN)]), None),
        ("it drains beside one that is ready", json!([endpoint(BLUE, false, true, true), ready(GREEN)]), None),
        ("it is not ready any more", json!([endpoint(BLUE, false, false, false), ready(GREEN)]), Some(vec![GREEN])),
        ("it is ready again", json!([ready(BLUE), ready(GREEN)]), None),
        ("the selector is another's", json!([ready(GREEN)]), Some(vec![GREEN])),
        ("and back", json!([ready(BLUE)]), Some(vec![BLUE])),
        ("it drains alone", json!([endpoint(BLUE, false, true, true)]), None),
        ("nobody is left", json!([]), Some(vec![])),
    ];
    for (name, slice, expected) in cases {
        reconciler.absorb(Event::EndpointSlices(Change::Apply(Box::new(endpoints("dns", &slice)))));
        let plan = settle(&mut reconciler, &mut kernel, now);
        let expected: BTreeMap<_, _> =
            expected.into_iter().map(|left| (own, left.into_iter().map(str::to_owned).collect())).collect();
        assert_eq!(lost(&plan, &kernel), expected, "{name}");
        assert_eq!(kernel.v4.backends[1].state, BackendState::Serving, "{name}: the other Service has it");
    }
}

/// What one node may use is no matter of who answers: flows stay where new ones would not go.
#[test]
fn a_policy_or_a_weight_loses_nobody() {
    let (mut kernel, now) = (KernelState::default(), Instant::now());
    let mut reconciler = reconciler(&kernel, SMALL);
    let both = json!([ready("10.0.0.1"), {"addresses": ["10.0.0.2"], "nodeName": "here"}]);
    tell(&mut reconciler, lists(vec![dns("dns", "10.96.0.1")], vec![endpoints("dns", &both)]));
    settle(&mut reconciler, &mut kernel, now);
    let mut local = dns("dns", "10.96.0.1");
    local.spec.as_mut().unwrap().internal_traffic_policy = Some("Local".into());
    let mut weighted = dns("dns", "10.96.0.1");
    weighted.metadata.annotations = Some(object(json!({"service.sluice.dev/weights": "10.0.0.1=0"})));
    for changed in [local, weighted] {
        reconciler.absorb(Event::Services(Change::Apply(Box::new(changed))));
        let plan = settle(&mut reconciler, &mut kernel, now);
        assert!(!plan.is_empty() && lost(&plan, &kernel).is_empty(), "{plan:?}");
    }
}

#[test]
fn an_agent_that_starts_suspects_every_udp_port_and_writes_nothing() {
    let (mut kernel, now) = (KernelState::default(), Instant::now());
    let told = || lists(vec![dns("dns", "10.96.0.1")], vec![endpoints("dns", &json!([ready("10.0.0.1")]))]);
    let mut first = reconciler(&kernel, SMALL);
    tell(&mut first, told());
    settle(&mut first, &mut kernel, now);
    let mut second = reconciler(&kernel, SMALL);
    tell(&mut second, told());
    let plan = settle(&mut second, &mut kernel, now);
    assert!(plan.is_empty() && plan.serving_v4.is_all);
    let own = index(&kernel, [10, 96, 0, 1], Protocol::Udp);
    assert_eq!(lost(&plan, &kernel), BTreeMap::from([(own, vec!["10.0.0.1".to_owned()])]));
    let gone = ObjectName { namespace: "test".into(), name: "dns".into() };
    second.absorb(Event::Services(Change::Delete(gone)));
    let plan = settle(&mut second, &mut kernel, now);
    assert_eq!(plan.serving_v4.ports, BTreeMap::from([(own, None)]));
}

/// Flows between the families stand in the maps of IPv6, and bear its indexes.
#[test]
fn a_service_that_crosses_loses_an_endpoint_in_both_families() {
    let (mut kernel, now) = (KernelState::default(), Instant::now());
    let settings = Settings { name: "here".into(), crosses: true, ..Settings::default() };
    let mut reconciler = Reconciler::new(settings, SMALL);
    reconciler.adopt(kernel.clone(), now);
    reconciler.absorb_network(NodeNetwork::default());
    let mut crossing = dns("dns", "10.96.0.1");
    crossing.metadata.annotations = Some(object(json!({"service.sluice.dev/nat46x64": "true"})));
    let both = json!([ready("10.0.0.1"), ready("10.0.0.2")]);
    let other = endpoints("other", &both);
    tell(&mut reconciler, lists(vec![crossing], vec![endpoints("dns", &both), other]));
    settle(&mut reconciler, &mut kernel, now);
    let left = endpoints("dns", &json!([ready("10.0.0.2")]));
    reconciler.absorb(Event::EndpointSlices(Change::Apply(Box::new(left))));
    let plan = settle(&mut reconciler, &mut kernel, now);
    for changes in [&plan.serving_v4, &plan.serving_v6] {
        let lost: Vec<_> = changes.ports.values().flatten().map(|port| (port.backends.len(), port.has_lost)).collect();
        assert_eq!(lost, [(1, true)], "{changes:?}");
    }
}
