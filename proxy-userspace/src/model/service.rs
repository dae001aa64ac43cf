//! A Service: its addresses, its ports and which endpoints its clients get.

use std::{collections::BTreeSet, net::IpAddr, num::NonZeroU16};

use ipnet::IpNet;
use k8s_openapi::api::core::v1 as core;
use proxy_common::addr::Protocol;

use super::{
    ObjectName, ServicePortName,
    defect::{Defect, Problem},
};

/// Another proxy serves a Service that bears this label, whatever its value.
const OTHER_PROXY: &str = "service.kubernetes.io/service-proxy-name";

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
    /// External IPs and load balancer addresses, of the families that are served.
    pub external_ips: BTreeSet<IpAddr>,
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
    pub name: ServicePortName,
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
        let mut parser = Parser { name: ObjectName::of(&object.metadata), defects };
        if parser.name.name.is_empty() {
            parser.note(Problem::Nameless);
            return None;
        }
        let cluster_ips = parser.cluster_ips(spec);
        if cluster_ips.is_empty() {
            return None;
        }
        if spec.session_affinity.as_deref() == Some("ClientIP") {
            parser.note(Problem::Affinity);
        }
        Some(Self {
            created: object.metadata.creation_timestamp.as_ref().map_or(0, |time| time.0.as_second()),
            uid: object.metadata.uid.clone().unwrap_or_default(),
            external_ips: parser.external_ips(object, spec, &cluster_ips),
            cluster_ips,
            internal_policy: parser.policy("spec.internalTrafficPolicy", spec.internal_traffic_policy.as_deref()),
            external_policy: parser.policy("spec.externalTrafficPolicy", spec.external_traffic_policy.as_deref()),
            ports: parser.ports(spec),
            name: parser.name,
        })
    }

    /// Whether a port of it can be reached by anything but its ClusterIP.
    pub fn is_externally_accessible(&self, port: &ServicePort) -> bool {
        port.node_port.is_some() || !self.external_ips.is_empty()
    }
}

fn is_headless(spec: &core::ServiceSpec) -> bool {
    spec.cluster_ip.as_deref() == Some("None")
}

struct Parser<'a> {
    name: ObjectName,
    defects: &'a mut Vec<Defect>,
}

impl Parser<'_> {
    fn note(&mut self, problem: Problem) {
        self.defects.push(Defect { kind: "Service", object: self.name.clone(), problem });
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
        addresses
    }

    fn external_ips(
        &mut self,
        object: &core::Service,
        spec: &core::ServiceSpec,
        cluster_ips: &[IpAddr],
    ) -> BTreeSet<IpAddr> {
        let mut addresses = BTreeSet::new();
        for text in spec.external_ips.iter().flatten() {
            addresses.extend(self.address("spec.externalIPs", text));
        }
        for address in self.load_balancer_ips(object) {
            if is_restricted(spec, address) {
                self.note(Problem::SourceRanges(address));
            } else {
                addresses.insert(address);
            }
        }
        addresses.retain(|address| cluster_ips.iter().any(|other| other.is_ipv4() == address.is_ipv4()));
        addresses
    }

    fn load_balancer_ips(&mut self, object: &core::Service) -> Vec<IpAddr> {
        let ingress = object.status.iter().filter_map(|status| status.load_balancer.as_ref());
        let ingress = ingress.filter_map(|balancer| balancer.ingress.as_ref()).flatten();
        // With `Proxy` the balancer itself must see the packet.
        let served = ingress.filter(|ingress| ingress.ip_mode.as_deref().is_none_or(|mode| mode == "VIP"));
        let written = served.filter_map(|ingress| ingress.ip.as_deref()).filter(|text| !text.is_empty());
        written.filter_map(|text| self.address("status.loadBalancer.ingress.ip", text)).collect()
    }

    fn address(&mut self, field: &'static str, text: &str) -> Option<IpAddr> {
        parse_address(field, text).map_err(|problem| self.note(problem)).ok()
    }

    fn policy(&mut self, field: &'static str, text: Option<&str>) -> TrafficPolicy {
        match text {
            Some("Local") => TrafficPolicy::Local,
            None | Some("" | "Cluster") => TrafficPolicy::Cluster,
            Some(value) => {
                self.note(Problem::Policy { field, value: value.into() });
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
        ports
    }

    fn port(&self, port: &core::ServicePort) -> Result<ServicePort, Problem> {
        let protocol = parse_protocol("spec.ports.protocol", port.protocol.as_deref())?;
        let node_port = port.node_port.filter(|number| *number != 0);
        Ok(ServicePort {
            name: ServicePortName { service: self.name.clone(), port: port.name.clone().unwrap_or_default(), protocol },
            port: parse_port("spec.ports.port", port.port)?,
            node_port: node_port.map(|number| parse_port("spec.ports.nodePort", number)).transpose()?,
        })
    }
}

/// Whether sources are restricted in the family of an address. An all-zero range is no restriction; one that cannot be
/// read is, in both families.
fn is_restricted(spec: &core::ServiceSpec, address: IpAddr) -> bool {
    let ranges = spec.load_balancer_source_ranges.iter().flatten().map(|range| range.trim().parse::<IpNet>().ok());
    let mut of_family =
        ranges.filter(|range| range.is_none_or(|range| range.addr().is_ipv4() == address.is_ipv4())).peekable();
    of_family.peek().is_some() && of_family.all(|range| range.is_none_or(|range| range.prefix_len() != 0))
}

/// An address that a frontend or an endpoint may have. Loopback, link-local and multicast addresses mean something of
/// their own on each node, and translating to or from them opens it (CVE-2021-25737).
pub(super) fn parse_address(field: &'static str, text: &str) -> Result<IpAddr, Problem> {
    let Ok(address) = text.parse::<IpAddr>() else {
        return Err(Problem::Address { field, value: text.into() });
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
        Some(other) => Err(Problem::Protocol { field, value: other.into() }),
    }
}

#[cfg(test)]
mod tests {
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
            (
                "another proxy's, unnamed",
                json!({"metadata": {"labels": label("")}, "spec": {"clusterIP": "10.96.0.1"}}),
            ),
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
        let addresses: Vec<String> = service.unwrap().external_ips.iter().map(ToString::to_string).collect();
        assert_eq!((addresses, defects), (vec!["203.0.113.1".to_owned(), "203.0.113.2".into()], vec![]));
    }

    #[test]
    fn an_address_that_only_some_may_reach_is_not_opened_to_all() {
        let served = |ranges: Value| {
            let object = json!({
                "metadata": {"name": "web"},
                "spec": {"clusterIPs": ["10.96.0.1", "fd00::1"], "loadBalancerSourceRanges": ranges},
                "status": {"loadBalancer": {"ingress": [{"ip": "203.0.113.1"}, {"ip": "2001:db8::1"}]}},
            });
            parse_object(object).0.unwrap().external_ips.len()
        };
        assert_eq!(served(json!([])), 2);
        assert_eq!(served(json!([" 192.0.2.0/24 "])), 1, "the other family is open");
        assert_eq!(served(json!(["192.0.2.0/24", "0.0.0.0/0"])), 2, "everybody may");
        assert_eq!(served(json!(["192.0.2.0/24", "2001:db8::/32"])), 0);
        assert_eq!(served(json!(["nonsense"])), 0, "nobody knows who may");
    }
}
