//! What becomes of a Service's fields.

use serde_json::{Value, json};

use super::{Service, TrafficPolicy};

fn parse(spec: &Value) -> (Option<Service>, Vec<String>) {
    parse_object(json!({"metadata": {"namespace": "test", "name": "web"}, "spec": spec}))
}

fn parse_object(object: Value) -> (Option<Service>, Vec<String>) {
    let mut defects = Vec::new();
    let service = Service::parse(&serde_json::from_value(object).unwrap(), &mut defects);
    (service, defects.iter().map(ToString::to_string).collect())
}

#[test]
fn what_this_proxy_does_not_serve_is_nothing_and_no_defect() {
    let label = |value| json!({"service.kubernetes.io/service-proxy-name": value});
    let cases = [
        ("headless", json!({"spec": {"clusterIP": "None", "clusterIPs": ["None"]}})),
        ("an external name", json!({"spec": {"type": "ExternalName", "externalName": "example.invalid"}})),
        ("not yet allocated", json!({"spec": {"clusterIP": ""}})),
        ("without a spec", json!({})),
        ("another proxy's", json!({"metadata": {"labels": label("other")}, "spec": {"clusterIP": "10.96.0.1"}})),
        ("another proxy's, unnamed", json!({"metadata": {"labels": label("")}, "spec": {"clusterIP": "10.96.0.1"}})),
    ];
    for (name, mut object) in cases {
        object["metadata"]["name"] = json!("web");
        assert_eq!(parse_object(object), (None, vec![]), "{name}");
    }
}

#[test]
fn a_service_that_is_labelled_headless_but_has_an_address_is_served() {
    let labels = json!({"service.kubernetes.io/headless": ""});
    let metadata = json!({"name": "web", "labels": labels});
    let (service, _) = parse_object(json!({"metadata": metadata, "spec": {"clusterIP": "10.96.0.1"}}));
    assert!(service.is_some());
}

#[test]
fn what_is_wrong_is_left_out_and_named_and_the_rest_is_served() {
    let spec = json!({
        "clusterIPs": ["10.96.0.1", "not an address"],
        "externalIPs": ["203.0.113.1", "127.0.0.1", "169.254.169.254", "224.0.0.1", "0.0.0.0", "fe80::1"],
        "internalTrafficPolicy": "Nearby",
        "ports": [
            {"name": "good", "port": 80, "nodePort": 30080},
            {"name": "again", "port": 80},
            {"name": "same", "port": 81, "nodePort": 30080},
            {"name": "large", "port": 65536},
            {"name": "negative", "port": 82, "nodePort": -1},
            {"name": "strange", "port": 83, "protocol": "ICMP"},
            {"name": "udp", "port": 80, "protocol": "UDP", "nodePort": 30080},
        ],
    });
    let (service, defects) = parse(&spec);
    let service = service.unwrap();
    let ports: Vec<_> = service.ports.iter().map(|port| port.name.port.as_str()).collect();
    assert_eq!(ports, ["good", "udp"]);
    assert_eq!(service.internal_policy, TrafficPolicy::Cluster);
    assert_eq!(service.external_ips.len(), 1);
    assert_eq!(defects.len(), 12, "{defects:#?}");
    assert!(defects.iter().all(|defect| defect.starts_with("Service test/web: ")), "{defects:#?}");
}

#[test]
fn a_balancer_that_must_see_the_packets_itself_is_no_frontend() {
    let object = json!({
        "metadata": {"name": "web"},
        "spec": {"clusterIP": "10.96.0.1", "type": "LoadBalancer"},
        "status": {"loadBalancer": {"ingress": [
            {"ip": "203.0.113.1"},
            {"ip": "203.0.113.2", "ipMode": "VIP"},
            {"ip": "203.0.113.3", "ipMode": "Proxy"},
            {"hostname": "balancer.example"},
            {"ip": "2001:db8::1"},
        ]}},
    });
    let (service, defects) = parse_object(object);
    let addresses: Vec<String> = service.unwrap().balancer_ips.iter().map(ToString::to_string).collect();
    assert_eq!((addresses, defects), (vec!["203.0.113.1".to_owned(), "203.0.113.2".into()], vec![]));
}

#[test]
fn affinity_lasts_as_long_as_the_object_says_within_reason() {
    let config = |seconds: Value| json!({"clientIP": {"timeoutSeconds": seconds}});
    let cases = [
        ("nothing said", json!({}), None, 0),
        ("none", json!({"sessionAffinity": "None", "sessionAffinityConfig": config(json!(7))}), None, 0),
        ("no time", json!({"sessionAffinity": "ClientIP"}), Some(10_800), 0),
        ("an empty config", json!({"sessionAffinity": "ClientIP", "sessionAffinityConfig": {}}), Some(10_800), 0),
        ("shortest", json!({"sessionAffinity": "ClientIP", "sessionAffinityConfig": config(json!(1))}), Some(1), 0),
        (
            "a day",
            json!({"sessionAffinity": "ClientIP", "sessionAffinityConfig": config(json!(86_400))}),
            Some(86_400),
            0,
        ),
        (
            "longer",
            json!({"sessionAffinity": "ClientIP", "sessionAffinityConfig": config(json!(86_401))}),
            Some(10_800),
            1,
        ),
        ("zero", json!({"sessionAffinity": "ClientIP", "sessionAffinityConfig": config(json!(0))}), Some(10_800), 1),
        (
            "negative",
            json!({"sessionAffinity": "ClientIP", "sessionAffinityConfig": config(json!(-1))}),
            Some(10_800),
            1,
        ),
        ("unknown", json!({"sessionAffinity": "Cookie"}), None, 1),
    ];
    for (name, mut spec, seconds, count) in cases {
        spec["clusterIP"] = json!("10.96.0.1");
        let (service, defects) = parse(&spec);
        let found = service.unwrap().affinity_seconds.map(std::num::NonZeroU32::get);
        assert_eq!((found, defects.len()), (seconds, count), "{name}: {defects:?}");
    }
}

#[test]
fn a_health_check_port_is_for_balancers_that_care_which_node_they_send_to() {
    let cases = [
        ("a balancer, Local", "LoadBalancer", "Local", json!(32_000), Some(32_000), 0),
        ("a balancer, Cluster", "LoadBalancer", "Cluster", json!(32_000), None, 0),
        ("no balancer", "NodePort", "Local", json!(32_000), None, 0),
        ("not allocated", "LoadBalancer", "Local", json!(0), None, 0),
        ("nonsense", "LoadBalancer", "Local", json!(70_000), None, 1),
    ];
    for (name, kind, policy, port, expected, count) in cases {
        let (service, defects) = parse(&json!({
            "clusterIP": "10.96.0.1", "type": kind, "externalTrafficPolicy": policy, "healthCheckNodePort": port,
        }));
        let found = service.unwrap().health_check_node_port.map(std::num::NonZeroU16::get);
        assert_eq!((found, defects.len()), (expected, count), "{name}: {defects:?}");
    }
}

#[test]
fn text_out_of_an_object_is_cut_and_its_control_characters_are_escaped() {
    let object = json!({
        "metadata": {"name": "web\u{1b}[2J", "namespace": "a\nb"},
        "spec": {"clusterIPs": ["10.96.0.1", "\u{1b}]0;title\u{7}", "x".repeat(10_000_000)]},
    });
    let (service, defects) = parse_object(object);
    assert!(service.is_some());
    assert_eq!(defects.len(), 2);
    for defect in defects {
        assert!(defect.len() < 200 && !defect.contains(char::is_control), "{defect:?}");
    }
}
