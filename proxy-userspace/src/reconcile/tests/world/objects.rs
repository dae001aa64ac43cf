//! Objects of a small world, in which everything meets everything: few names, few addresses, every field that counts.

use k8s_openapi::api::{
    core::v1::{Node, Service},
    discovery::v1::EndpointSlice,
    networking::v1::ServiceCIDR,
};
use proptest::{option, prelude::*, sample::select};
use serde_json::{Value, json};

use crate::reconcile::tests::object;

/// A strategy for one of these.
fn one_of(values: &[Value]) -> impl Strategy<Value = Value> + use<> {
    select(values.to_vec())
}

/// A Service with one of four names, on one of four ClusterIPs.
pub(super) fn service() -> impl Strategy<Value = Service> {
    let spec = (0..4_u8, 0..4_u8, families(), ports(), policies(), affinity());
    let outside = (addresses(), addresses(), ip_mode(), source_ranges());
    let metadata = (created(), annotations(), other_proxy());
    (spec, outside, metadata).prop_map(|(spec, outside, metadata)| {
        let (name, address, families, ports, (internal, external), affinity) = spec;
        let (external_ips, balancer_ips, ip_mode, source_ranges) = outside;
        let (created, annotations, labels) = metadata;
        let cluster_ips = [format!("10.96.0.{address}"), format!("fd00::{address}")];
        let ingress: Vec<Value> = balancer_ips.iter().map(|ip| json!({"ip": ip, "ipMode": ip_mode})).collect();
        let mut spec = json!({
            "clusterIPs": families.iter().map(|family| &cluster_ips[*family]).collect::<Vec<_>>(),
            "externalIPs": external_ips,
            "ports": ports,
            "internalTrafficPolicy": internal,
            "externalTrafficPolicy": external,
            "loadBalancerSourceRanges": source_ranges,
        });
        spec["sessionAffinity"] = affinity["sessionAffinity"].clone();
        spec["sessionAffinityConfig"] = affinity["sessionAffinityConfig"].clone();
        object(json!({
            "metadata": {
                "namespace": "test", "name": format!("s{name}"), "uid": format!("u{}", 9 - name),
                "creationTimestamp": created, "annotations": annotations, "labels": labels,
            },
            "spec": spec,
            "status": {"loadBalancer": {"ingress": ingress}},
        }))
    })
}

fn families() -> impl Strategy<Value = Vec<usize>> {
    select(vec![vec![0], vec![0], vec![1], vec![0, 1], vec![1, 0]])
}

fn ports() -> impl Strategy<Value = Value> {
    let node_port = || option::of(30_000..30_003);
    (0..6_u8, node_port(), node_port()).prop_map(|(shape, first, second)| {
        let port = |name: &str, port: u16, protocol: &str, node_port: Option<i32>| json!({"name": name, "port": port, "protocol": protocol, "nodePort": node_port});
        match shape {
            0..3 => json!([port("http", 80, "TCP", first)]),
            3 => json!([port("http", 80, "TCP", first), port("dns", 53, "UDP", second)]),
            4 => json!([port("dns", 53, "UDP", first), port("dns", 53, "TCP", second)]),
            _ => json!([]),
        }
    })
}

fn policies() -> impl Strategy<Value = (Value, Value)> {
    let policy = || one_of(&[json!("Cluster"), json!("Local"), json!(null)]);
    (policy(), policy())
}

fn affinity() -> impl Strategy<Value = Value> {
    let config = |seconds: i32| json!({"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": seconds}}});
    one_of(&[
        json!({"sessionAffinity": "None"}),
        json!({"sessionAffinity": null}),
        json!({"sessionAffinity": "ClientIP"}),
        config(60),
        config(-1),
    ])
}

/// Of nobody, of pods, of the node, of a process of the node, and of a kind no Service may have.
fn addresses() -> impl Strategy<Value = Vec<&'static str>> {
    let pool = ["203.0.113.1", "203.0.113.2", "2001:db8::1", "10.244.0.1", "192.0.2.1", "192.0.2.2", "127.0.0.1"];
    proptest::collection::vec(select(pool.to_vec()), 0..3)
}

fn ip_mode() -> impl Strategy<Value = Value> {
    one_of(&[json!(null), json!("VIP"), json!("Proxy")])
}

fn source_ranges() -> impl Strategy<Value = Value> {
    one_of(&[
        json!(null),
        json!(null),
        json!(["198.51.100.0/24"]),
        json!(["198.51.100.0/24", "192.0.2.0/24"]),
        json!(["2001:db8:1::/48"]),
        json!(["198.51.100.0/25", "2001:db8:1::/48"]),
        json!(["0.0.0.0/0"]),
        json!(["nonsense"]),
    ])
}

fn created() -> impl Strategy<Value = Value> {
    one_of(&[json!("2026-01-01T00:00:00Z"), json!("2026-01-02T00:00:00Z")])
}

fn annotations() -> impl Strategy<Value = Value> {
    let text = |values: &[&str]| option::of(select(values.iter().map(ToString::to_string).collect::<Vec<_>>()));
    let algorithms = ["random", "maglev", "source-hash", "round-robin", "least-connections", "quickest"];
    let weights = ["10.0.0.1=0", "p1=3,*=2", "p*=0", "10.0.0.0/30=2", "what"];
    (text(&algorithms), text(&weights), text(&["all", "load-balancer", "both"])).prop_map(
        |(algorithm, weights, scope)| {
            let mut annotations = json!({});
            let all = [("algorithm", algorithm), ("weights", weights), ("source-ranges-scope", scope)];
            for (name, value) in all.into_iter().filter_map(|(name, value)| Some((name, value?))) {
                annotations[format!("service.sluice.dev/{name}")] = json!(value);
            }
            annotations
        },
    )
}

fn other_proxy() -> impl Strategy<Value = Value> {
    let (nobody, other) = (json!({}), json!({"service.kubernetes.io/service-proxy-name": ""}));
    one_of(&[nobody.clone(), nobody.clone(), nobody.clone(), nobody, other])
}

/// A slice with one of five names, of one of four Services.
pub(super) fn slice() -> impl Strategy<Value = EndpointSlice> {
    let endpoints = proptest::collection::vec(endpoint(), 0..5);
    let family = select(vec!["IPv4", "IPv4", "IPv4", "IPv6", "IPv6", "FQDN"]);
    (0..5_u8, 0..4_u8, family, endpoints, slice_ports()).prop_map(|(name, of, family, endpoints, ports)| {
        let endpoints: Vec<Value> = endpoints.into_iter().map(|endpoint| addressed(endpoint, family)).collect();
        object(json!({
            "metadata": {
                "namespace": "test", "name": format!("e{name}"),
                "labels": {"kubernetes.io/service-name": format!("s{of}")},
            },
            "addressType": family, "ports": ports, "endpoints": endpoints,
        }))
    })
}

/// An endpoint with a number for an address.
fn endpoint() -> impl Strategy<Value = Value> {
    let condition = || one_of(&[json!(true), json!(true), json!(false), json!(null)]);
    let conditions = (condition(), condition(), one_of(&[json!(false), json!(false), json!(true), json!(null)]));
    let node = one_of(&[json!("here"), json!("there"), json!(null)]);
    let hints = one_of(&[
        json!(null),
        json!({"forZones": [{"name": "a"}]}),
        json!({"forZones": [{"name": "a"}, {"name": "b"}]}),
        json!({"forNodes": [{"name": "here"}]}),
    ]);
    (0..6_u8, conditions, node, hints).prop_map(|(host, (ready, serving, terminating), node, hints)| {
        json!({
            "addresses": [host],
            "conditions": {"ready": ready, "serving": serving, "terminating": terminating},
            "nodeName": node,
            "hints": hints,
            "targetRef": {"kind": "Pod", "name": format!("p{host}")},
        })
    })
}

fn addressed(mut endpoint: Value, family: &str) -> Value {
    let host = endpoint["addresses"][0].clone();
    endpoint["addresses"][0] = json!(match family {
        "IPv4" => format!("10.0.0.{host}"),
        "IPv6" => format!("fd00:10::{host}"),
        _ => format!("p{host}.example.com"),
    });
    endpoint
}

/// Both numbers lead to the same endpoints, so that one port's endpoint may be another's.
fn slice_ports() -> impl Strategy<Value = Value> {
    let http = |number: u16| json!({"name": "http", "port": number, "protocol": "TCP"});
    let dns = |protocol: &str| json!({"name": "dns", "port": 8080, "protocol": protocol});
    one_of(&[
        json!([http(8080)]),
        json!([http(8081)]),
        json!([http(8080), http(8081)]),
        json!([http(8080), dns("UDP")]),
        json!([dns("UDP"), dns("TCP")]),
        json!([{"name": "http"}]),
    ])
}

/// The own Node.
pub(super) fn node() -> impl Strategy<Value = Node> {
    let zone =
        one_of(&[json!({}), json!({"topology.kubernetes.io/zone": "a"}), json!({"topology.kubernetes.io/zone": "b"})]);
    let address = |text: &str| json!({"type": "InternalIP", "address": text});
    let addresses = one_of(&[
        json!([]),
        json!([address("192.0.2.1")]),
        json!([address("192.0.2.2"), address("2001:db8::9")]),
        json!([address("nowhere")]),
    ]);
    let pods = one_of(&[json!([]), json!(["10.244.0.0/24"]), json!(["10.245.0.0/24", "fd00:10::/64"])]);
    let taints =
        one_of(&[json!([]), json!([]), json!([{"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}])]);
    (zone, addresses, pods, taints).prop_map(|(labels, addresses, pods, taints)| {
        object(json!({
            "metadata": {"name": "here", "labels": labels},
            "spec": {"podCIDRs": pods, "taints": taints},
            "status": {"addresses": addresses},
        }))
    })
}

/// One of three `ServiceCIDRs`.
pub(super) fn service_cidr() -> impl Strategy<Value = ServiceCIDR> {
    let cidrs = one_of(&[
        json!(["10.96.0.0/24"]),
        json!(["10.96.0.0/16", "fd00::/112"]),
        json!(["10.97.0.0/16"]),
        json!(["0.0.0.0/0"]),
        json!([]),
    ]);
    (0..3_u8, cidrs, created()).prop_map(|(name, cidrs, created)| {
        object(json!({
            "metadata": {"name": format!("c{name}"), "creationTimestamp": created},
            "spec": {"cidrs": cidrs},
        }))
    })
}
