//! A cluster of many Services as an API server has it, with what real objects bear beside what the agent reads; and the
//! picture of it that the kernel should hold.

use std::net::Ipv4Addr;

use crate::picture::{Answers, Picture};
use proxy_common::{
    addr::{Ipv4, Port, Protocol},
    service::Frontend,
};
use serde_json::{Value, json};

/// The first of the Services' addresses, 10.96.0.1, and of the endpoints', 10.128.0.1 and (the later ones) 11.0.0.1.
const CLUSTER_IPS: u32 = 0x0a60_0001;
const ENDPOINTS: u32 = 0x0a80_0001;
const LATER_ENDPOINTS: u32 = 0x0b00_0001;

/// Every tenth Service has a NodePort, as far as these go.
const PER_NODE_PORT: u32 = 10;
const NODE_PORTS: u32 = 2_768;

/// How large it is.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    /// Services, each with a slice.
    pub services: u32,
    /// Endpoints of each.
    pub endpoints: u32,
    /// Their port.
    pub port: u16,
}

impl Size {
    /// All objects.
    pub fn objects(self) -> impl Iterator<Item = Value> {
        let services = (0..self.services).flat_map(move |number| [service(number), self.slice(number, 0)]);
        std::iter::once(node()).chain(services)
    }

    /// The slice of a Service. The first endpoint of every generation is another one.
    pub fn slice(self, number: u32, generation: u32) -> Value {
        let endpoints: Vec<Value> =
            (0..self.endpoints).map(|index| endpoint(number, index, self.address(number, index, generation))).collect();
        let mut metadata = metadata(number, "-x7k2p");
        metadata["labels"]["kubernetes.io/service-name"] = json!(format!("service-{number}"));
        metadata["labels"]["endpointslice.kubernetes.io/managed-by"] = json!("endpointslice-controller.k8s.io");
        metadata["ownerReferences"] = json!([{"apiVersion": "v1", "kind": "Service", "name": format!("service-{number}"),
            "uid": "00000000-0000-4000-8000-000000000000", "controller": true, "blockOwnerDeletion": true}]);
        json!({
            "kind": "EndpointSlice",
            "metadata": metadata,
            "addressType": "IPv4",
            "ports": [{"name": "http", "port": self.port, "protocol": "TCP"}],
            "endpoints": endpoints,
        })
    }

    /// An endpoint of a Service.
    pub fn address(self, number: u32, index: u32, generation: u32) -> Ipv4Addr {
        Ipv4Addr::from(match (index, generation) {
            (0, 1..) => LATER_ENDPOINTS + (number << 8) + generation,
            _ => ENDPOINTS + number * self.endpoints + index,
        })
    }

    /// What the kernel should hold when each Service has the generation that `generation` says.
    pub fn picture(self, generation: impl Fn(u32) -> u32) -> Picture {
        let mut picture = Picture::new();
        for number in 0..self.services {
            let endpoints = (0..self.endpoints).map(|index| self.address(number, index, generation(number)));
            let endpoints = endpoints.map(|address| format!("{address}:{}", self.port));
            let answers = Answers {
                internal: endpoints.clone().collect(),
                external: endpoints.collect(),
                otherwise: if self.endpoints > 0 { "drop" } else { "reject" },
            };
            if let Some(node_port) = node_port(number) {
                picture.insert(format!("0.0.0.0:{node_port}/TCP"), answers.clone());
            }
            picture.insert(format!("{}:80/TCP", cluster_ip(number)), answers);
        }
        picture
    }
}

/// The key of a Service's ClusterIP.
pub fn frontend(number: u32) -> Frontend<Ipv4> {
    Frontend::new(Ipv4::from(cluster_ip(number)), Port::new(80), Protocol::Tcp)
}

/// The address of a Service.
pub fn cluster_ip(number: u32) -> Ipv4Addr {
    Ipv4Addr::from(CLUSTER_IPS + number)
}

/// Its NodePort, if it has one.
pub fn node_port(number: u32) -> Option<u32> {
    let index = number / PER_NODE_PORT;
    (number.is_multiple_of(PER_NODE_PORT) && index < NODE_PORTS).then_some(30_000 + index)
}

fn node() -> Value {
    json!({
        "kind": "Node",
        "metadata": {"name": "here", "labels": {"topology.kubernetes.io/zone": "a"}},
        "spec": {},
        "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.1"}]},
    })
}

fn metadata(number: u32, suffix: &str) -> Value {
    let fields = json!({"f:metadata": {"f:labels": {".": {}, "f:app.kubernetes.io/name": {}}}, "f:spec": {"f:ports": {
        ".": {}, "k:{\"port\":80,\"protocol\":\"TCP\"}": {".": {}, "f:name": {}, "f:port": {}, "f:targetPort": {}}}}});
    json!({
        "namespace": format!("team-{}", number % 100),
        "name": format!("service-{number}{suffix}"),
        "labels": {"app.kubernetes.io/name": format!("service-{number}"), "app.kubernetes.io/managed-by": "Helm"},
        "annotations": {"meta.helm.sh/release-name": format!("release-{number}"),
            "endpoints.kubernetes.io/last-change-trigger-time": "2026-11-20T11:40:16Z"},
        "managedFields": [{"manager": "helm", "operation": "Update", "apiVersion": "v1", "fieldsType": "FieldsV1",
            "time": "2026-11-20T11:40:16Z", "fieldsV1": fields}],
    })
}

fn service(number: u32) -> Value {
    let ip = cluster_ip(number).to_string();
    let node_port = node_port(number);
    let mut port = json!({"name": "http", "port": 80, "protocol": "TCP", "targetPort": 8080});
    if let Some(node_port) = node_port {
        port["nodePort"] = json!(node_port);
    }
    json!({
        "kind": "Service",
        "metadata": metadata(number, ""),
        "spec": {"type": if node_port.is_some() { "NodePort" } else { "ClusterIP" }, "clusterIP": ip, "clusterIPs": [ip],
            "ipFamilies": ["IPv4"], "ports": [port], "ipFamilyPolicy": "SingleStack", "sessionAffinity": "None",
            "selector": {"app.kubernetes.io/name": format!("service-{number}")}, "internalTrafficPolicy": "Cluster"},
        "status": {"loadBalancer": {}},
    })
}

fn endpoint(number: u32, index: u32, address: Ipv4Addr) -> Value {
    json!({
        "addresses": [address.to_string()],
        "conditions": {"ready": true, "serving": true, "terminating": false},
        "nodeName": format!("node-{}", (number + index) % 100),
        "zone": if index.is_multiple_of(2) { "a" } else { "b" },
        "targetRef": {"kind": "Pod", "namespace": format!("team-{}", number % 100),
            "name": format!("service-{number}-7d9c5b8f6d-{index:05}"),
            "uid": format!("5f0c6d1e-0000-4000-8000-{number:06}{index:06}")},
    })
}
