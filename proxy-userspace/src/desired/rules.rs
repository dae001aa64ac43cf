//! Which external addresses a Service may have. What is the node's, a pod's or the API server's own must not be taken
//! over by whoever may write a Service (CVE-2020-8554).

use std::{
    collections::BTreeSet,
    fmt,
    net::{IpAddr, SocketAddr},
    ops::RangeInclusive,
    str::FromStr,
};

use ipnet::IpNet;
use proxy_common::addr::Protocol;

use crate::model::{self, Model, ObjectName, Problem, ServicePort, Taken};

/// Which addresses Services may name in `spec.externalIPs`, whose author need not be anybody the address belongs to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum ExternalIps {
    /// Any, as with kube-proxy.
    #[default]
    Allow,
    /// None.
    Deny,
    /// Those in these networks.
    Within(Vec<IpNet>),
}

impl ExternalIps {
    fn allows(&self, address: IpAddr) -> bool {
        match self {
            Self::Allow => true,
            Self::Deny => false,
            Self::Within(networks) => networks.iter().any(|network| network.contains(&address)),
        }
    }
}

impl FromStr for ExternalIps {
    type Err = ipnet::AddrParseError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "allow" => Ok(Self::Allow),
            "deny" => Ok(Self::Deny),
            networks => Ok(Self::Within(networks.split(',').map(str::parse).collect::<Result<_, _>>()?)),
        }
    }
}

impl fmt::Display for ExternalIps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Allow => f.write_str("allow"),
            Self::Deny => f.write_str("deny"),
            Self::Within(networks) => {
                let texts: Vec<String> = networks.iter().map(ToString::to_string).collect();
                f.write_str(&texts.join(","))
            }
        }
    }
}

/// A port somebody of the node listens on; at any address, if that is unspecified.
pub type Listener = (Protocol, SocketAddr);

/// Whose addresses are whose.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    /// What the operator says of external IPs.
    pub external_ips: ExternalIps,
    /// Of this node's pods.
    pub pod_cidrs: Vec<IpNet>,
    /// Where the API server itself listens.
    pub api_servers: BTreeSet<SocketAddr>,
    /// Of the node itself. Addresses that wander from node to node, as those of some load balancers do, are not among them.
    pub node_addresses: BTreeSet<IpAddr>,
    /// Who listened on the node when this was looked at last.
    pub listeners: BTreeSet<Listener>,
    /// What the node's devices have, of whatever kind. A ClusterIP among them is the node's own there, as that of a DNS cache is
    /// which takes its clients' packets itself (node-local-dns).
    pub on_devices: BTreeSet<IpAddr>,
    /// Where the programs look for NodePorts; everywhere, if nobody says.
    pub node_ports: Option<RangeInclusive<u16>>,
}

impl Rules {
    /// What the objects say.
    pub fn of(model: &Model, external_ips: ExternalIps) -> Self {
        let node = model.node();
        let api_servers = model::endpoints(model.slices(&ObjectName::of_api_server()), |_| true);
        Self {
            external_ips,
            pod_cidrs: node.map(|node| node.pod_cidrs.clone()).unwrap_or_default(),
            node_addresses: node.map(|node| node.addresses.clone()).unwrap_or_default(),
            api_servers: api_servers.into_iter().map(|(address, _)| address).collect(),
            ..Self::default()
        }
    }

    /// Judges a NodePort.
    pub(super) fn check_node_port(&self, number: u16) -> Result<(), Problem> {
        match &self.node_ports {
            Some(range) if !range.contains(&number) => {
                Err(Problem::NodePort { number, first: *range.start(), last: *range.end() })
            }
            _ => Ok(()),
        }
    }

    /// Whether the judgement of a Service depends on who listens on the node.
    pub fn asks_for_listeners(&self, service: &model::Service) -> bool {
        service.external_ips.iter().chain(&service.balancer_ips).any(|address| self.node_addresses.contains(address))
    }

    /// Judges an external IP.
    pub(super) fn check_external_ip(&self, address: IpAddr, port: &ServicePort) -> Result<(), Problem> {
        if !self.external_ips.allows(address) {
            return Err(Problem::Taken { address, by: Taken::Operator });
        }
        self.check(address, port)
    }

    /// Judges an address of a load balancer.
    pub(super) fn check(&self, address: IpAddr, port: &ServicePort) -> Result<(), Problem> {
        let socket = SocketAddr::new(address, port.port.get());
        if self.pod_cidrs.iter().any(|network| network.contains(&address)) {
            return Err(Problem::Taken { address, by: Taken::Pods });
        }
        if self.api_servers.contains(&socket) {
            return Err(Problem::Taken { address, by: Taken::ApiServer(port.port.get()) });
        }
        if self.node_addresses.contains(&address) && self.has_listener(port.name.protocol, socket) {
            return Err(Problem::Taken { address, by: Taken::Listener(port.port.get(), port.name.protocol) });
        }
        Ok(())
    }

    fn has_listener(&self, protocol: Protocol, socket: SocketAddr) -> bool {
        let anywhere: [IpAddr; 2] = [[0; 4].into(), [0; 16].into()];
        let mut places = anywhere.into_iter().chain([socket.ip()]);
        places.any(|address| self.listeners.contains(&(protocol, SocketAddr::new(address, socket.port()))))
    }
}
