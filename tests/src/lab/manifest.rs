//! Kubernetes objects of the lab: read, to know what there is to reach, and written, to change it under the agent's eyes.

use std::{
    collections::BTreeSet,
    fs,
    net::{IpAddr, SocketAddr},
    path::Path,
};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::address::{self, Addresses, Family};
use crate::traffic::{Protocol, Target};

/// A Service of both families with endpoints that are pods of the lab. Its ports are named `tcp` and
/// `udp`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Its name, in namespace `lab`.
    pub name: String,
    /// Its `clusterIPs`.
    pub cluster_ips: Addresses,
    /// Its port, in TCP and UDP.
    pub port: u16,
    /// Its `NodePort`, in TCP and UDP.
    pub node_port: u16,
    /// The port of its pods, in TCP and UDP.
    pub target_port: u16,
    /// Names of the pods behind it.
    pub pods: Vec<&'static str>,
    /// Names of pods that are leaving: they serve what they have and take nothing new.
    pub terminating: Vec<&'static str>,
}

impl Service {
    /// Port 80 at the Service address with that last part, node port 30000 plus the same, port 8080 of the pods.
    pub fn new(name: &str, host: u8, pods: &[&'static str]) -> Self {
        let (name, cluster_ips, pods) = (name.to_owned(), address::of_service(host), pods.to_vec());
        Self {
            name,
            cluster_ips,
            port: 80,
            node_port: 30_000 + u16::from(host),
            target_port: 8080,
            pods,
            terminating: Vec::new(),
        }
    }

    /// Address and port in the cluster.
    pub fn cluster(&self, family: Family, protocol: Protocol) -> Target {
        Target { address: SocketAddr::new(self.cluster_ips.of(family), self.port), protocol }
    }

    /// The node port at a node.
    pub fn at_node(&self, node: Addresses, family: Family, protocol: Protocol) -> Target {
        Target { address: SocketAddr::new(node.of(family), self.node_port), protocol }
    }

    /// The same with other pods behind it.
    #[must_use]
    pub fn with_pods(&self, pods: &[&'static str]) -> Self {
        Self { pods: pods.to_vec(), ..self.clone() }
    }

    /// The same with other pods that are leaving.
    #[must_use]
    pub fn terminating(&self, pods: &[&'static str]) -> Self {
        Self { terminating: pods.to_vec(), ..self.clone() }
    }

    /// As Kubernetes objects: the Service and an `EndpointSlice` per family.
    pub fn documents(&self) -> Vec<Value> {
        let slices = Family::ALL.map(|family| self.slice(family));
        std::iter::once(self.service()).chain(slices).collect()
    }

    /// Writes `<name>.yaml` into a directory that an agent watches. The agent never sees half a file.
    pub fn write(&self, directory: &Path) -> Result<()> {
        write_documents(directory, &format!("{}.yaml", self.name), &self.documents())
    }

    fn service(&self) -> Value {
        let ports = Protocol::ALL.map(|protocol| {
            json!({
                "name": port_name(protocol), "protocol": protocol.to_string(), "port": self.port,
                "targetPort": self.target_port, "nodePort": self.node_port,
            })
        });
        json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": { "namespace": "lab", "name": self.name, "uid": format!("service-{}", self.name) },
            "spec": {
                "type": "NodePort", "clusterIP": self.cluster_ips.v4,
                "clusterIPs": [self.cluster_ips.v4, self.cluster_ips.v6],
                "ipFamilies": ["IPv4", "IPv6"], "ipFamilyPolicy": "RequireDualStack",
                "internalTrafficPolicy": "Cluster", "externalTrafficPolicy": "Cluster", "sessionAffinity": "None",
                "ports": ports,
            },
            "status": { "loadBalancer": {} },
        })
    }

    fn slice(&self, family: Family) -> Value {
        let staying = self.pods.iter().filter_map(|pod| endpoint(pod, family, false));
        let leaving = self.terminating.iter().filter_map(|pod| endpoint(pod, family, true));
        let endpoints: Vec<_> = staying.chain(leaving).collect();
        let ports = Protocol::ALL.map(|protocol| {
            json!({ "name": port_name(protocol), "protocol": protocol.to_string(), "port": self.target_port })
        });
        let name = format!("{}-{}", self.name, family.name().to_lowercase());
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": family.name(),
            "metadata": {
                "namespace": "lab", "name": name, "uid": format!("slice-{name}"),
                "labels": { "kubernetes.io/service-name": self.name },
            },
            "endpoints": endpoints, "ports": ports,
        })
    }
}

fn endpoint(pod: &str, family: Family, is_leaving: bool) -> Option<Value> {
    let (node, addresses) = address::pod(pod)?;
    Some(json!({
        "addresses": [addresses.of(family)], "nodeName": node.name,
        "conditions": { "ready": !is_leaving, "serving": true, "terminating": is_leaving },
        "targetRef": { "kind": "Pod", "namespace": "lab", "name": pod },
    }))
}

fn port_name(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
    }
}

/// The Node objects of the lab, in `nodes.yaml`.
pub fn write_nodes(directory: &Path) -> Result<()> {
    let nodes = address::NODES.map(|plan| {
        let (own, pods) = (address::on_wire(plan.host), address::of_pod(plan.number, 0));
        let pod_cidrs = [format!("{}/24", pods.v4), format!("{}/64", pods.v6)];
        json!({
            "apiVersion": "v1", "kind": "Node",
            "metadata": {
                "name": plan.name, "uid": plan.name, "labels": { "topology.kubernetes.io/zone": plan.zone },
            },
            "spec": { "podCIDR": pod_cidrs[0], "podCIDRs": pod_cidrs },
            "status": { "addresses": [
                { "type": "InternalIP", "address": own.v4 },
                { "type": "InternalIP", "address": own.v6 },
                { "type": "Hostname", "address": plan.name },
            ] },
        })
    });
    write_documents(directory, "nodes.yaml", &nodes)
}

/// Writes objects into one file of a directory that an agent watches. JSON is YAML, too. Replaced by renaming, as every
/// careful writer does.
pub fn write_documents(directory: &Path, file: &str, documents: &[Value]) -> Result<()> {
    let texts: Vec<_> = documents.iter().map(|document| format!("{document:#}\n")).collect();
    let hidden = directory.join(format!(".{file}.new"));
    fs::write(&hidden, texts.join("---\n")).with_context(|| format!("cannot write {}", hidden.display()))?;
    fs::rename(&hidden, directory.join(file)).with_context(|| format!("cannot replace {file}"))
}

/// A port of a Service as found in a directory of objects, for one family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Published {
    /// `name` of the Service.
    pub service: String,
    /// Address and port in the cluster.
    pub cluster: Target,
    /// The node port, if it has one.
    pub node_port: Option<u16>,
    /// Names of the pods behind it.
    pub pods: BTreeSet<String>,
}

impl Published {
    /// The family of its cluster address.
    pub fn family(&self) -> Family {
        Family::of(self.cluster.address.ip())
    }
}

/// Reads every Service port there is in a directory of YAML files, with the pods that its slices name.
pub fn read(directory: &Path) -> Result<Vec<Published>> {
    let mut documents = Vec::new();
    for entry in fs::read_dir(directory).with_context(|| format!("cannot read {}", directory.display()))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "yaml") {
            let text = fs::read_to_string(&path)?;
            let found: Vec<Value> =
                serde_saphyr::from_multiple(&text).with_context(|| format!("{} is not YAML", path.display()))?;
            documents.extend(found);
        }
    }
    let services = documents.iter().filter(|document| document["kind"] == "Service");
    let mut published: Vec<_> = services.flat_map(|service| published(service, &documents)).collect();
    published.sort_by(|a, b| (&a.service, a.cluster.address).cmp(&(&b.service, b.cluster.address)));
    Ok(published)
}

fn published(service: &Value, documents: &[Value]) -> Vec<Published> {
    let mut found = Vec::new();
    for address in items(&service["spec"]["clusterIPs"]).filter_map(address_of) {
        for port in items(&service["spec"]["ports"]) {
            let protocol = if port["protocol"] == "UDP" { Protocol::Udp } else { Protocol::Tcp };
            let cluster = Target { address: SocketAddr::new(address, number(&port["port"])), protocol };
            let node_port = Some(number(&port["nodePort"])).filter(|&port| port != 0);
            let name = service["metadata"]["name"].as_str().unwrap_or_default().to_owned();
            let pods = pods_behind(&name, Family::of(address), &port["name"], documents);
            found.push(Published { service: name, cluster, node_port, pods });
        }
    }
    found
}

/// Pods in the slices of a Service that have the port.
fn pods_behind(service: &str, family: Family, port: &Value, documents: &[Value]) -> BTreeSet<String> {
    let slices = documents.iter().filter(|document| {
        document["metadata"]["labels"]["kubernetes.io/service-name"] == service
            && document["addressType"] == family.name()
            && items(&document["ports"]).any(|found| &found["name"] == port)
    });
    let endpoints = slices.flat_map(|slice| items(&slice["endpoints"]));
    endpoints
        .filter_map(|endpoint| address_of(&endpoint["addresses"][0]))
        .filter_map(address::pod_at)
        .map(Into::into)
        .collect()
}

fn items(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn address_of(value: &Value) -> Option<IpAddr> {
    value.as_str()?.parse().ok()
}

fn number(value: &Value) -> u16 {
    value.as_u64().and_then(|number| number.try_into().ok()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::{Service, read};

    #[test]
    fn what_is_written_is_read_again() {
        let directory = tempfile::tempdir().unwrap();
        let service = Service::new("web", 80, &["a1", "b1"]);
        service.write(directory.path()).unwrap();
        let published = read(directory.path()).unwrap();
        assert_eq!(published.len(), 4, "two families, two protocols");
        for port in published {
            assert_eq!(port.cluster, service.cluster(port.family(), port.cluster.protocol));
            assert_eq!(port.node_port, Some(30080));
            assert!(port.pods.iter().eq(["a1", "b1"]), "{:?}", port.pods);
        }
    }
}
