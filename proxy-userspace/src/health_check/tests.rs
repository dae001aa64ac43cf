use std::net::IpAddr;

use proxy_common::node::local::NODE_PORTS;
use serde_json::{Value, json};

use super::HealthChecks;
use crate::{
    model::{Model, ObjectName},
    source::{Change, Event},
};

const V4: &str = "192.0.2.9";
const V6: &str = "2001:db8::9";

fn service(name: &str, cluster_ips: &[&str], port: u16) -> Value {
    json!({
        "metadata": {"namespace": "test", "name": name, "uid": name},
        "spec": {
            "type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": port,
            "clusterIP": cluster_ips[0], "clusterIPs": cluster_ips, "ports": [{"name": "http", "port": 80}],
        },
    })
}

fn slice(name: &str, family: &str, endpoints: &Value) -> Value {
    json!({
        "metadata": {"namespace": "test", "name": name, "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": family, "endpoints": endpoints,
        "ports": [{"name": "http", "port": 8080}, {"name": "metrics", "port": 9090}],
    })
}

fn endpoint(address: &str, node: &str, conditions: &Value) -> Value {
    json!({"addresses": [address], "nodeName": node, "conditions": conditions})
}

fn apply_service(model: &mut Model, object: Value) {
    model.absorb(Event::Services(Change::Apply(Box::new(serde_json::from_value(object).unwrap()))));
}

fn apply_slice(model: &mut Model, object: Value) {
    model.absorb(Event::EndpointSlices(Change::Apply(Box::new(serde_json::from_value(object).unwrap()))));
}

fn name(name: &str) -> ObjectName {
    ObjectName { namespace: "test".into(), name: name.into() }
}

/// At addresses of both families, one of which serves no NodePorts.
fn health_checks() -> HealthChecks {
    let mut checks = HealthChecks::default();
    let address = |text: &str| text.parse::<IpAddr>().unwrap();
    checks
        .update_addresses(&[(address(V4), NODE_PORTS), (address(V6), NODE_PORTS), (address("198.51.100.9"), 0)].into());
    checks
}

/// Where what is answered, as text.
fn answers(checks: &mut HealthChecks) -> Vec<String> {
    let subjects = checks.take_changed().expect("nothing has changed");
    let text = |(place, subjects): (_, &Vec<super::Subject>)| {
        let told = subjects.iter().map(|subject| format!("{}={}", subject.service.name.name, subject.local_endpoints));
        format!("{place} {}", told.collect::<Vec<_>>().join(" "))
    };
    subjects.iter().map(text).collect()
}

#[test]
fn ready_endpoints_of_this_node_count_once_each_for_their_family() {
    let ready = json!({});
    let cases = [
        ("none", json!([]), 0),
        ("one with two ports", json!([endpoint("10.0.0.1", "here", &ready)]), 1),
        ("elsewhere", json!([endpoint("10.0.0.1", "there", &ready)]), 0),
        ("not ready", json!([endpoint("10.0.0.1", "here", &json!({"ready": false}))]), 0),
        (
            "draining",
            json!([endpoint("10.0.0.1", "here", &json!({"ready": false, "serving": true, "terminating": true}))]),
            0,
        ),
        ("two", json!([endpoint("10.0.0.1", "here", &ready), endpoint("10.0.0.2", "here", &ready)]), 2),
        ("twice", json!([endpoint("10.0.0.1", "here", &ready), endpoint("10.0.0.1", "here", &ready)]), 1),
    ];
    for (case, endpoints, expected) in cases {
        let (mut model, mut checks) = (Model::new("here".into()), health_checks());
        apply_service(&mut model, service("web", &["10.96.0.1", "fd00::1"], 30100));
        apply_slice(&mut model, slice("web-1", "IPv4", &endpoints));
        apply_slice(&mut model, slice("web-2", "IPv6", &json!([endpoint("fd00:1::1", "here", &ready)])));
        checks.update(&name("web"), &model);
        let expected = [format!("{V4}:30100 web={expected}"), format!("[{V6}]:30100 web=1")];
        assert_eq!(answers(&mut checks), expected, "{case}");
    }
}

#[test]
fn only_where_the_policy_makes_a_difference_and_only_in_its_families_is_a_service_asked_about() {
    let (mut model, mut checks) = (Model::new("here".into()), health_checks());
    apply_service(&mut model, service("single", &["10.96.0.1"], 30100));
    let mut cluster = service("cluster", &["10.96.0.2"], 30101);
    cluster["spec"]["externalTrafficPolicy"] = json!("Cluster");
    apply_service(&mut model, cluster);
    let mut node_port = service("node-port", &["10.96.0.3"], 30102);
    node_port["spec"]["type"] = json!("NodePort");
    apply_service(&mut model, node_port);
    for service in ["single", "cluster", "node-port", "missing"] {
        checks.update(&name(service), &model);
    }
    assert_eq!(answers(&mut checks), [format!("{V4}:30100 single=0")]);
    assert_eq!(checks.take_changed(), None);
    checks.update(&name("single"), &model);
    assert_eq!(checks.take_changed(), None, "nothing is new about it");
    checks.update_addresses(&[].into());
    assert!(answers(&mut checks).is_empty());
}

#[test]
fn of_two_services_with_one_port_the_older_one_is_answered_for() {
    let (mut model, mut checks) = (Model::new("here".into()), health_checks());
    for (service_name, created) in [("a", "2026-01-02T00:00:00Z"), ("b", "2026-01-01T00:00:00Z")] {
        let mut object = service(service_name, &["10.96.0.1"], 30100);
        object["metadata"]["creationTimestamp"] = json!(created);
        apply_service(&mut model, object);
        checks.update(&name(service_name), &model);
    }
    assert_eq!(answers(&mut checks), [format!("{V4}:30100 b=0 a=0")]);
}
