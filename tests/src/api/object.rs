//! Plain objects to begin with; a test changes what it is about.

use serde_json::{Value, json};

/// The node agents of scenarios run on.
pub const NODE: &str = "here";

/// A Service in namespace `test` with TCP port 80.
pub fn service(name: &str, cluster_ip: &str) -> Value {
    json!({
        "kind": "Service",
        "metadata": {"namespace": "test", "name": name},
        "spec": {
            "type": "ClusterIP", "clusterIP": cluster_ip, "clusterIPs": [cluster_ip],
            "ports": [{"port": 80, "protocol": "TCP"}],
        },
    })
}

/// The only slice of a Service: ready endpoints at port 8080, all of one family.
pub fn slice(service: &str, addresses: &[&str]) -> Value {
    let endpoints: Vec<Value> = addresses.iter().map(|address| json!({"addresses": [address]})).collect();
    let family = if addresses.iter().any(|address| address.contains(':')) { "IPv6" } else { "IPv4" };
    json!({
        "kind": "EndpointSlice",
        "metadata": {
            "namespace": "test", "name": format!("{service}-1"),
            "labels": {"kubernetes.io/service-name": service},
        },
        "addressType": family,
        "endpoints": endpoints,
        "ports": [{"name": "", "port": 8080, "protocol": "TCP"}],
    })
}

/// The agent's own Node.
pub fn node() -> Value {
    json!({"kind": "Node", "metadata": {"name": NODE}, "spec": {}, "status": {}})
}
