//! A Service: its addresses, its ports and which endpoints its clients get.

use std::{
    collections::BTreeSet,
    net::IpAddr,
    num::{NonZeroU16, NonZeroU32},
    sync::Arc,
};

use k8s_openapi::api::core::v1 as core;
use proxy_common::addr::Protocol;

use super::{
    ObjectName, ServicePortName,
    annotation::{self, Spread},
    defect::{Defect, ObjectReference, Problem},
    sloppy,
    source_ranges::SourceRanges,
};
use crate::node_port_mode::NodePortMode;

/// Another proxy serves a Service that bears this label, whatever its value.
const OTHER_PROXY: &str = "service.kubernetes.io/service-proxy-name";

/// How long a client stays with its endpoint when nobody says how long, in seconds.
const AFFINITY_SECONDS: u32 = 10_800;
/// The longest it may stay.
const AFFINITY_SECONDS_MAX: u32 = 86_400;

/// Which endpoints clients may be sent to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TrafficPolicy {
    /// All of the cluster.
    #[default]
    Cluster,
    /// Those of the node the packet arrives at.
    Local,
}

/// A Service that has an address of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Its name.
    pub name: ObjectName,
    /// Seconds since 1970; decides, before `uid`, between Services that claim the same frontend.
    pub created: i64,
    /// Unique for all time.
    pub uid: String,
    /// At most one of each family. A family that has none is not served at all.
    pub cluster_ips: Vec<IpAddr>,
    /// It has addresses of one family, and wants clients of the other one served, too: by NodePorts and external addresses.
    pub crosses: bool,
    /// External IPs, of the families that are served.
    pub external_ips: BTreeSet<IpAddr>,
    /// Addresses of its load balancer that lead here, of the families that are served.
    pub balancer_ips: BTreeSet<IpAddr>,
    /// From where the load balancer's addresses may be used.
    pub source_ranges: SourceRanges,
    /// A client stays with its endpoint until it has opened no connection for so many seconds. None: it does not stay.
    pub affinity_seconds: Option<NonZeroU32>,
    /// How its connections are spread over its endpoints.
    pub spread: Spread,
    /// How packets from outside get to a backend on another node; none means the node's default.
    pub node_port_mode: Option<NodePortMode>,
    /// Where the load balancer asks this node for the health of the Service.
    pub health_check_node_port: Option<NonZeroU16>,
    /// For clients of the ClusterIP.
    pub internal_policy: TrafficPolicy,
    /// For clients of NodePorts and external addresses.
    pub external_policy: TrafficPolicy,
    /// In the order of the object.
    pub ports: Vec<ServicePort>,
}

/// One port of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// Its name; endpoints are joined by port name and protocol.
    pub name: Arc<ServicePortName>,
    /// On the Service's own addresses.
    pub port: NonZeroU16,
    /// On the node's addresses.
    pub node_port: Option<NonZeroU16>,
}

impl ServicePort {
    fn collides(&self, other: &Self) -> bool {
        self.name.protocol == other.name.protocol
            && (self.port == other.port || (self.node_port.is_some() && self.node_port == other.node_port))
    }
}

impl Service {
    /// None for a Service that this proxy does not serve: headless, an external name, another proxy's. What is wrong
    /// with one that it does is left out and told.
    pub fn parse(object: &core::Service, defects: &mut Vec<Defect>) -> Option<Self> {
        let spec = object.spec.as_ref()?;
        let has_other_proxy = object.metadata.labels.as_ref().is_some_and(|labels| labels.contains_key(OTHER_PROXY));
        if has_other_proxy || spec.type_.as_deref() == Some("ExternalName") || is_headless(spec) {
            return None;
        }
        let mut parser = Parser { object: ObjectReference::of("Service", &object.metadata), defects };
        if parser.object.name.name.is_empty() {
            parser.note(Problem::Nameless);
            return None;
        }
        let cluster_ips = parser.cluster_ips(spec);
        if cluster_ips.is_empty() {
            return None;
        }
        let annotations = object.metadata.annotations.as_ref();
        let crosses = annotation::crosses(annotations, &mut |problem| parser.note(problem)) && cluster_ips.len() == 1;
        let is_served =
            |address: &IpAddr| crosses || cluster_ips.iter().any(|other| other.is_ipv4() == address.is_ipv4());
        let mut external_ips = parser.external_ips(spec);
        external_ips.retain(is_served);
        let mut balancer_ips = parser.balancer_ips(object);
        balancer_ips.retain(is_served);
        let external_policy = parser.policy("spec.externalTrafficPolicy", spec.external_traffic_policy.as_deref());
        Some(Self {
            created: object.metadata.creation_timestamp.as_ref().map_or(0, |time| time.0.as_second()),
            external_ips,
            balancer_ips,
            source_ranges: SourceRanges::parse(object, |problem| parser.note(problem)),
            affinity_seconds: parser.affinity(spec),
            spread: Spread::parse(annotations, &mut |problem| parser.note(problem)),
            node_port_mode: annotation::node_port_mode(annotations, &mut |problem| parser.note(problem)),
            health_check_node_port: parser.health_check_node_port(spec, external_policy),
            cluster_ips,
            crosses,
            internal_policy: parser.policy("spec.internalTrafficPolicy", spec.internal_traffic_policy.as_deref()),
            external_policy,
            ports: parser.ports(spec),
            name: parser.object.name,
            uid: parser.object.uid,
        })
    }

    /// Whether it has addresses that are not the cluster's own.
    pub fn has_external_ips(&self) -> bool {
        !self.external_ips.is_empty() || !self.balancer_ips.is_empty()
    }

    /// Whether it has said itself that its packets go to other nodes as they are.
    pub fn dispatches(&self) -> bool {
        self.node_port_mode.is_some_and(|mode| mode != NodePortMode::Snat)
    }

    /// Whether a port of it can be reached by anything but its ClusterIP.
    pub fn is_externally_accessible(&self, port: &ServicePort) -> bool {
        port.node_port.is_some() || self.has_external_ips()
    }
}

fn is_headless(spec: &core::ServiceSpec) -> bool {
    spec.cluster_ip.as_deref() == Some("None")
}

struct Parser<'a> {
    object: ObjectReference,
    defects: &'a mut Vec<Defect>,
}

impl Parser<'_> {
    fn note(&mut self, problem: Problem) {
        self.defects.push(Defect { object: self.object.clone(), problem });
    }

    /// Objects written before dual-stack, and by hand, have the one field only.
    fn cluster_ips(&mut self, spec: &core::ServiceSpec) -> Vec<IpAddr> {
        let all = spec.cluster_ips.as_deref().filter(|all| !all.is_empty());
        let written = all.unwrap_or(spec.cluster_ip.as_slice());
        let mut addresses: Vec<IpAddr> = Vec::new();
        for text in written.iter().filter(|text| !text.is_empty()) {
            if let Some(address) = self.address("spec.clusterIPs", text)
                && !addresses.iter().any(|other| other.is_ipv4() == address.is_ipv4())
            {
                addresses.push(address);
            }
        }
        addresses.shrink_to_fit();
        addresses
    }

    fn external_ips(&mut self, spec: &core::ServiceSpec) -> BTreeSet<IpAddr> {
        let written = spec.external_ips.iter().flatten();
        written.filter_map(|text| self.address("spec.externalIPs", text)).collect()
    }

    fn balancer_ips(&mut self, object: &core::Service) -> BTreeSet<IpAddr> {
        let ingress = object.status.iter().filter_map(|status| status.load_balancer.as_ref());
        let ingress = ingress.filter_map(|balancer| balancer.ingress.as_ref()).flatten();
        // With `Proxy` the balancer itself must see the packet.
        let served = ingress.filter(|ingress| ingress.ip_mode.as_deref().is_none_or(|mode| mode == "VIP"));
        let written = served.filter_map(|ingress| ingress.ip.as_deref()).filter(|text| !text.is_empty());
        written.filter_map(|text| self.address("status.loadBalancer.ingress.ip", text)).collect()
    }

    fn affinity(&mut self, spec: &core::ServiceSpec) -> Option<NonZeroU32> {
        match spec.session_affinity.as_deref() {
            Some("ClientIP") => NonZeroU32::new(self.affinity_seconds(spec)),
            None | Some("" | "None") => None,
            Some(value) => {
                self.note(Problem::affinity(value));
                None
            }
        }
    }

    fn affinity_seconds(&mut self, spec: &core::ServiceSpec) -> u32 {
        let client_ip = spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref());
        let Some(written) = client_ip.and_then(|client_ip| client_ip.timeout_seconds) else { return AFFINITY_SECONDS };
        let seconds = u32::try_from(written).ok().filter(|seconds| (1..=AFFINITY_SECONDS_MAX).contains(seconds));
        if seconds.is_none() {
            self.note(Problem::AffinitySeconds(written));
        }
        seconds.unwrap_or(AFFINITY_SECONDS)
    }

    /// Only load balancers ask for it, and only where the node they send a packet to makes a difference.
    fn health_check_node_port(&mut self, spec: &core::ServiceSpec, policy: TrafficPolicy) -> Option<NonZeroU16> {
        let is_asked_for = spec.type_.as_deref() == Some("LoadBalancer") && policy == TrafficPolicy::Local;
        let written = spec.health_check_node_port.filter(|number| is_asked_for && *number != 0)?;
        parse_port("spec.healthCheckNodePort", written).map_err(|problem| self.note(problem)).ok()
    }

    fn address(&mut self, field: &'static str, text: &str) -> Option<IpAddr> {
        parse_address(field, text).map_err(|problem| self.note(problem)).ok()
    }

    fn policy(&mut self, field: &'static str, text: Option<&str>) -> TrafficPolicy {
        match text {
            Some("Local") => TrafficPolicy::Local,
            None | Some("" | "Cluster") => TrafficPolicy::Cluster,
            Some(value) => {
                self.note(Problem::policy(field, value));
                TrafficPolicy::Cluster
            }
        }
    }

    fn ports(&mut self, spec: &core::ServiceSpec) -> Vec<ServicePort> {
        let mut ports: Vec<ServicePort> = Vec::new();
        for written in spec.ports.iter().flatten() {
            match self.port(written) {
                Ok(port) if ports.iter().any(|other| other.collides(&port)) => {
                    self.note(Problem::Twice { port: port.port.get(), protocol: port.name.protocol });
                }
                Ok(port) => ports.push(port),
                Err(problem) => self.note(problem),
            }
        }
        ports.shrink_to_fit();
        ports
    }

    fn port(&self, port: &core::ServicePort) -> Result<ServicePort, Problem> {
        let protocol = parse_protocol("spec.ports.protocol", port.protocol.as_deref())?;
        let node_port = port.node_port.filter(|number| *number != 0);
        Ok(ServicePort {
            name: Arc::new(ServicePortName {
                service: self.object.name.clone(),
                port: port.name.clone().unwrap_or_default(),
                protocol,
            }),
            port: parse_port("spec.ports.port", port.port)?,
            node_port: node_port.map(|number| parse_port("spec.ports.nodePort", number)).transpose()?,
        })
    }
}

/// An address that a frontend or an endpoint may have. Loopback, link-local and multicast addresses mean something of
/// their own on each node, and translating to or from them opens it (CVE-2021-25737).
pub(super) fn parse_address(field: &'static str, text: &str) -> Result<IpAddr, Problem> {
    let Some(address) = sloppy::address(text) else {
        return Err(Problem::address(field, text));
    };
    let address = address.to_canonical();
    let is_refused = match address {
        IpAddr::V4(v4) => v4.is_link_local() || v4.is_broadcast() || v4.octets()[0] == 0,
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    if is_refused || address.is_loopback() || address.is_multicast() || address.is_unspecified() {
        return Err(Problem::Refused { field, address });
    }
    Ok(address)
}

pub(super) fn parse_port(field: &'static str, value: i32) -> Result<NonZeroU16, Problem> {
    let number = u16::try_from(value).ok().and_then(NonZeroU16::new);
    number.ok_or(Problem::Port { field, value })
}

/// A missing protocol is TCP.
pub(super) fn parse_protocol(field: &'static str, text: Option<&str>) -> Result<Protocol, Problem> {
    match text {
        None | Some("" | "TCP") => Ok(Protocol::Tcp),
        Some("UDP") => Ok(Protocol::Udp),
        Some("SCTP") => Ok(Protocol::Sctp),
        Some(other) => Err(Problem::protocol(field, other)),
    }
}

#[cfg(test)]
mod tests;
