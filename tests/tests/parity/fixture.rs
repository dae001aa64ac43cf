//! Services as data: what the oracle reasons about and, as Kubernetes objects, what the agent is given.

use std::{net::SocketAddr, path::Path};

use anyhow::Result;
use serde_json::{Value, json};
use tests::{
    lab::{
        address::{self, Addresses, Family},
        manifest::write_documents,
    },
    traffic::{Protocol, Target},
};

/// What the control plane says of an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    Ready,
    /// Terminating, and serving.
    Draining,
    /// Terminating, and no longer serving.
    Ending,
    /// Neither ready nor terminating.
    NotReady,
}

impl State {
    pub(crate) const fn is_terminating(self) -> bool {
        matches!(self, Self::Draining | Self::Ending)
    }

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Ready => "ready",
            Self::Draining => "draining",
            Self::Ending => "ending",
            Self::NotReady => "not ready",
        }
    }
}

/// An endpoint: a pod of the lab, or a process in the network of the node of that name.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Endpoint {
    pub(crate) pod: &'static str,
    pub(crate) state: State,
    pub(crate) for_nodes: &'static [&'static str],
    pub(crate) for_zones: &'static [&'static str],
}

impl Endpoint {
    pub(crate) const fn new(pod: &'static str, state: State) -> Self {
        Self { pod, state, for_nodes: &[], for_zones: &[] }
    }

    pub(crate) const fn ready(pod: &'static str) -> Self {
        Self::new(pod, State::Ready)
    }

    pub(crate) const fn for_nodes(self, for_nodes: &'static [&'static str]) -> Self {
        Self { for_nodes, ..self }
    }

    pub(crate) const fn for_zones(self, for_zones: &'static [&'static str]) -> Self {
        Self { for_zones, ..self }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Policy {
    #[default]
    Cluster,
    Local,
}

impl Policy {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Cluster => "Cluster",
            Self::Local => "Local",
        }
    }
}

/// How a Service's address is published by its load balancer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum IpMode {
    #[default]
    Vip,
    Proxy,
}

/// Which traffic the source ranges are for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum RangeScope {
    #[default]
    Balancer,
    /// By annotation: `NodePort`s and external addresses, too.
    All,
}

/// A dual-stack Service with a TCP and a UDP port, a `NodePort`, a load balancer's address and an external one.
#[derive(Clone, Debug, Default)]
pub(crate) struct Fixture {
    /// Chooses all its addresses and ports.
    pub(crate) number: u8,
    /// What is special about it, for the names of cases.
    pub(crate) label: String,
    pub(crate) internal: Policy,
    pub(crate) external: Policy,
    pub(crate) endpoints: Vec<Endpoint>,
    /// Endpoints in a second slice.
    pub(crate) more_endpoints: Vec<Endpoint>,
    pub(crate) source_ranges: Vec<&'static str>,
    pub(crate) range_scope: RangeScope,
    pub(crate) ip_mode: IpMode,
    /// Clients stay with their backend.
    pub(crate) has_affinity: bool,
    /// The Service does not exist.
    pub(crate) is_absent: bool,
}

pub(crate) const PORT: u16 = 80;
/// A port that no Service has.
pub(crate) const UNDEFINED_PORT: u16 = 81;
/// The last part of an address in the range of the Services that no Service has.
pub(crate) const UNALLOCATED: u8 = 250;
/// What backends listen on. Neighbours in number differ, so that an answer of another Service's backend shows.
pub(crate) const TARGET_PORTS: [u16; 3] = [7007, 8080, 9090];

impl Fixture {
    /// A Service whose cases are told by the state of its endpoints.
    pub(crate) fn new(number: u8, policy: Policy, endpoints: &[Endpoint]) -> Self {
        let states: Vec<_> =
            endpoints.iter().map(|endpoint| format!("{} {}", endpoint.pod, endpoint.state.name())).collect();
        let label = if states.is_empty() { "no endpoint".to_owned() } else { states.join(" and ") };
        let endpoints = endpoints.to_vec();
        Self { number, label, internal: policy, external: policy, endpoints, ..Self::default() }
    }

    #[must_use]
    pub(crate) fn label(self, label: &str) -> Self {
        Self { label: label.to_owned(), ..self }
    }

    pub(crate) fn name(&self) -> String {
        format!("service-{}", self.number)
    }

    pub(crate) fn target_port(&self) -> u16 {
        TARGET_PORTS[usize::from(self.number) % TARGET_PORTS.len()]
    }

    pub(crate) fn cluster_ips(&self) -> Addresses {
        address::of_service(self.number)
    }

    pub(crate) fn node_port(&self) -> u16 {
        30_000 + u16::from(self.number)
    }

    /// Writes `<name>.yaml` into a directory that agents watch, or removes it.
    pub(crate) fn write(&self, directory: &Path) -> Result<()> {
        let file = format!("{}.yaml", self.name());
        if self.is_absent {
            return write_documents(directory, &file, &[]);
        }
        let slices = [("one", &self.endpoints), ("two", &self.more_endpoints)];
        let slices = slices.iter().flat_map(|(name, endpoints)| {
            Family::ALL.map(|family| self.slice(&format!("{}-{name}", self.name()), family, endpoints))
        });
        let documents: Vec<_> = std::iter::once(self.service()).chain(slices).collect();
        write_documents(directory, &file, &documents)
    }

    fn service(&self) -> Value {
        let (cluster, balancer, external) =
            (self.cluster_ips(), address::of_balancer(self.number), address::external(self.number));
        let ports = Protocol::ALL.map(|protocol| {
            json!({
                "name": protocol.to_string().to_lowercase(), "protocol": protocol.to_string(), "port": PORT,
                "targetPort": self.target_port(), "nodePort": self.node_port(),
            })
        });
        let ip_mode = match self.ip_mode {
            IpMode::Vip => "VIP",
            IpMode::Proxy => "Proxy",
        };
        let scope = match self.range_scope {
            RangeScope::Balancer => json!({}),
            RangeScope::All => json!({ "service.sluice.dev/source-ranges-scope": "all" }),
        };
        json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {
                "namespace": "parity", "name": self.name(), "uid": self.name(), "annotations": scope,
            },
            "spec": {
                "type": "LoadBalancer", "clusterIP": cluster.v4, "clusterIPs": [cluster.v4, cluster.v6],
                "ipFamilies": ["IPv4", "IPv6"], "ipFamilyPolicy": "RequireDualStack",
                "internalTrafficPolicy": self.internal.name(), "externalTrafficPolicy": self.external.name(),
                "sessionAffinity": if self.has_affinity { "ClientIP" } else { "None" },
                "externalIPs": [external.v4, external.v6], "loadBalancerSourceRanges": self.source_ranges,
                "ports": ports,
            },
            "status": { "loadBalancer": { "ingress": [
                { "ip": balancer.v4, "ipMode": ip_mode }, { "ip": balancer.v6, "ipMode": ip_mode },
            ] } },
        })
    }

    fn slice(&self, name: &str, family: Family, endpoints: &[Endpoint]) -> Value {
        let endpoints: Vec<_> = endpoints.iter().filter_map(|endpoint| endpoint.document(family)).collect();
        let ports = Protocol::ALL.map(|protocol| {
            let name = protocol.to_string().to_lowercase();
            json!({ "name": name, "protocol": protocol.to_string(), "port": self.target_port() })
        });
        let name = format!("{name}-{}", family.name().to_lowercase());
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": family.name(),
            "metadata": {
                "namespace": "parity", "name": name, "uid": name,
                "labels": { "kubernetes.io/service-name": self.name() },
            },
            "endpoints": endpoints, "ports": ports,
        })
    }
}

impl Endpoint {
    fn document(&self, family: Family) -> Option<Value> {
        let (node, addresses) = address::pod(self.pod)?;
        let hints = |names: &[&str]| names.iter().map(|name| json!({ "name": name })).collect::<Vec<_>>();
        Some(json!({
            "addresses": [addresses.of(family)], "nodeName": node.name,
            "conditions": {
                "ready": self.state == State::Ready,
                "serving": matches!(self.state, State::Ready | State::Draining),
                "terminating": self.state.is_terminating(),
            },
            "hints": { "forNodes": hints(self.for_nodes), "forZones": hints(self.for_zones) },
        }))
    }
}

/// Where `ClusterIP`s are taken from, as an object in `cidrs.yaml`.
pub(crate) fn write_service_cidr(directory: &Path) -> Result<()> {
    let object = json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR", "metadata": { "name": "kubernetes" },
        "spec": { "cidrs": ["10.96.0.0/16", "fd00:10:96::/112"] },
    });
    write_documents(directory, "cidrs.yaml", &[object])
}

/// What a client names as the other end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Destination {
    ClusterIp,
    /// The node port at the address of the node of that name.
    NodePort(&'static str),
    Balancer,
    External,
    /// The node port at 127.0.0.1 or `::1`.
    Localhost,
    /// A port of the `ClusterIP` that the Service does not have.
    UndefinedPort,
    /// An address in the range of the `ClusterIP`s that no Service has.
    Unallocated,
}

impl Destination {
    pub(crate) fn name(self) -> String {
        match self {
            Self::ClusterIp => "ClusterIP".to_owned(),
            Self::NodePort(node) => format!("NodePort of {node}"),
            Self::Balancer => "LB VIP".to_owned(),
            Self::External => "externalIP".to_owned(),
            Self::Localhost => "localhost NodePort".to_owned(),
            Self::UndefinedPort => "undefined port of a ClusterIP".to_owned(),
            Self::Unallocated => "unallocated address".to_owned(),
        }
    }

    /// Whether the external policy is the one that counts.
    pub(crate) const fn is_external(self) -> bool {
        !matches!(self, Self::ClusterIp | Self::UndefinedPort | Self::Unallocated)
    }

    pub(crate) fn target(self, service: &Fixture, family: Family, protocol: Protocol) -> Target {
        let number = service.number;
        let (address, port) = match self {
            Self::ClusterIp => (service.cluster_ips().of(family), PORT),
            Self::UndefinedPort => (service.cluster_ips().of(family), UNDEFINED_PORT),
            Self::Unallocated => (address::of_service(UNALLOCATED).of(family), PORT),
            Self::Balancer => (address::of_balancer(number).of(family), PORT),
            Self::External => (address::external(number).of(family), PORT),
            Self::Localhost => (LOCALHOST.of(family), service.node_port()),
            Self::NodePort(node) => (node_addresses(node).of(family), service.node_port()),
        };
        Target { address: SocketAddr::new(address, port), protocol }
    }
}

const LOCALHOST: Addresses = Addresses { v4: std::net::Ipv4Addr::LOCALHOST, v6: std::net::Ipv6Addr::LOCALHOST };

/// A node's addresses on the wire. The names of nodes stand in these sources, not in input.
pub(crate) fn node_addresses(name: &str) -> Addresses {
    address::on_wire(address::node(name).expect("the name of a node of the lab").host)
}
