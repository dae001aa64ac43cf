//! What can be wrong with an object. The part that is wrong becomes nothing, and a defect says so by name; other parts
//! and other objects are served.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
};

use ipnet::IpNet;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use proxy_common::addr::Protocol;

use super::ObjectName;

/// How much of a value that makes no sense is repeated.
const EXCERPT: usize = 80;
/// How much of what others say about an object is repeated.
const REASON: usize = 300;

/// Names an object so that an Event can be about it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectReference {
    /// `Service`, `EndpointSlice`, `Node` or `ServiceCIDR`.
    pub kind: &'static str,
    /// Namespace and name.
    pub name: ObjectName,
    /// Unique for all time; empty where the source knows none.
    pub uid: String,
}

impl ObjectReference {
    /// From an object's metadata.
    pub fn of(kind: &'static str, metadata: &ObjectMeta) -> Self {
        Self { kind, name: ObjectName::of(metadata), uid: metadata.uid.clone().unwrap_or_default() }
    }

    /// This agent's own Node. Events of kubelets are about one whose uid is its name, and people look for those.
    pub fn of_node(name: &str) -> Self {
        let name = ObjectName { namespace: "".into(), name: name.into() };
        Self { kind: "Node", uid: name.name.to_string(), name }
    }

    /// The API group and version of its kind.
    pub fn api_version(&self) -> &'static str {
        match self.kind {
            "EndpointSlice" => "discovery.k8s.io/v1",
            "ServiceCIDR" => "networking.k8s.io/v1",
            _ => "v1",
        }
    }
}

/// A part of an object that is left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Defect {
    /// The object.
    pub object: ObjectReference,
    /// The part and what is wrong with it.
    pub problem: Problem,
}

impl fmt::Display for Defect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}: {}", self.object.kind, self.object.name, self.problem)
    }
}

/// What is wrong with a part of an object. Text out of the object is an excerpt, and is shown with control characters
/// escaped.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// Neither an IPv4 nor an IPv6 address.
    #[error("{field}: {value:?} is not an IP address")]
    Address {
        /// Path of the field.
        field: &'static str,
        /// What stands there.
        value: String,
    },
    /// An address that must not be translated: it means something else on every node.
    #[error("{field}: {address} is an address no Service may have (loopback, link-local, multicast or unspecified)")]
    Refused {
        /// Path of the field.
        field: &'static str,
        /// The address.
        address: IpAddr,
    },
    /// Outside 1..=65535.
    #[error("{field}: {value} is not a port")]
    Port {
        /// Path of the field.
        field: &'static str,
        /// What stands there.
        value: i32,
    },
    /// No NodePort, by what the agent was told of them.
    #[error(
        "spec.ports.nodePort: {number} is not in {first}-{last} and not served: start the agent with the API server's \
         --service-node-port-range as --node-port-range"
    )]
    NodePort {
        /// What stands there.
        number: u16,
        /// The first there may be.
        first: u16,
        /// The last.
        last: u16,
    },
    /// Neither TCP nor UDP nor SCTP.
    #[error("{field}: protocol {value:?} is not known")]
    Protocol {
        /// Path of the field.
        field: &'static str,
        /// What stands there.
        value: String,
    },
    /// Not `Cluster` and not `Local`.
    #[error("{field}: {value:?} is not a traffic policy, Cluster is assumed")]
    Policy {
        /// Path of the field.
        field: &'static str,
        /// What stands there.
        value: String,
    },
    /// A slice of another address type than IPv4, IPv6 and FQDN.
    #[error("addressType: {0:?} is not known")]
    AddressType(String),
    /// Two ports of a Service that packets could not tell apart.
    #[error("spec.ports: port {port}/{protocol} is there twice, the first one is used")]
    Twice {
        /// The port.
        port: u16,
        /// Its protocol.
        protocol: Protocol,
    },
    /// Not a range of addresses. An open door is worse than a closed one: nobody is let in by it.
    #[error("spec.loadBalancerSourceRanges: {0:?} is not a range of addresses; the other ranges alone are let in")]
    SourceRange(String),
    /// Not a range of addresses, or one of all of them.
    #[error("{field}: {value:?} is not a range of addresses that can be used")]
    Cidr {
        /// Path of the field.
        field: &'static str,
        /// What stands there.
        value: String,
    },
    /// The datapath looks at few of them.
    #[error(
        "spec.cidrs: there are too many ServiceCIDRs for {0}; packets to addresses in it that no Service has are not dropped"
    )]
    TooManyCidrs(IpNet),
    /// Not `all` and not `load-balancer`.
    #[error("annotation service.sluice.dev/source-ranges-scope: {0:?} is not known, load-balancer is assumed")]
    SourceScope(String),
    /// An annotation of ours, or a part of one, that means nothing.
    #[error("annotation {name}: {value:?} means nothing and is left out")]
    Annotation {
        /// Its name.
        name: &'static str,
        /// What stands there.
        value: String,
    },
    /// The node does not translate between the families.
    #[error("annotation service.sluice.dev/nat46x64 has no effect: the node's agent runs without --nat46x64")]
    NotCrossed,
    /// Not `ClientIP` and not `None`.
    #[error("spec.sessionAffinity: {0:?} is not known, None is assumed")]
    Affinity(String),
    /// Outside 1..=86400.
    #[error("spec.sessionAffinityConfig.clientIP.timeoutSeconds: {0} is not in 1..=86400, 10800 is assumed")]
    AffinitySeconds(i32),
    /// An external address that is somebody else's.
    #[error("{address} is not served: {by}")]
    Taken {
        /// The address.
        address: IpAddr,
        /// Whose it is.
        by: Taken,
    },
    /// An older Service has the frontend.
    #[error("{frontend} is not served: it belongs to {winner}, whose claim is older")]
    Conflict {
        /// Address, port and protocol.
        frontend: String,
        /// The Service that has it.
        winner: ObjectName,
    },
    /// The rest of many.
    #[error("{0} more of its parts are left out")]
    More(usize),
    /// The object bears no name.
    #[error("metadata.name is missing")]
    Nameless,
    /// It does not have the shape of its kind.
    #[error("cannot be read and is left out: {0}")]
    Unreadable(String),
    /// The kernel's maps are full.
    #[error("{0}")]
    NoRoom(String),
    /// Load balancers cannot ask about it.
    #[error("health checks at {place} cannot be answered: {error}")]
    HealthCheck {
        /// An address of the node, and the port.
        place: SocketAddr,
        /// Why.
        error: String,
    },
    /// The API server refuses to tell of a kind of object.
    #[error("watching {kind}s: {error}; what is known is kept, trying again")]
    Watch {
        /// The kind.
        kind: String,
        /// What the server said.
        error: String,
    },
}

/// Whose an address is that a Service wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Taken {
    /// `--external-ips`
    #[error("external IPs are limited to others by --external-ips")]
    Operator,
    /// This node's pods.
    #[error("it is an address of pods")]
    Pods,
    /// The API server itself.
    #[error("the API server listens there at port {0}")]
    ApiServer(u16),
    /// A process of the node.
    #[error("it is the node's own, and a process of the node listens at port {0}/{1}")]
    Listener(u16, Protocol),
}

impl Problem {
    /// In one word, as Events give it.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Address { .. } => "InvalidAddress",
            Self::Refused { .. } | Self::Taken { .. } => "AddressRefused",
            Self::Port { .. } | Self::NodePort { .. } => "InvalidPort",
            Self::Protocol { .. } => "InvalidProtocol",
            Self::Policy { .. } => "InvalidTrafficPolicy",
            Self::AddressType(_) => "InvalidAddressType",
            Self::Twice { .. } => "DuplicatePort",
            Self::SourceRange(_) => "InvalidSourceRange",
            Self::Cidr { .. } => "InvalidCIDR",
            Self::TooManyCidrs(_) => "TooManyServiceCIDRs",
            Self::SourceScope(_) | Self::Annotation { .. } | Self::NotCrossed => "InvalidAnnotation",
            Self::Affinity(_) | Self::AffinitySeconds(_) => "InvalidSessionAffinity",
            Self::Conflict { .. } => "FrontendConflict",
            Self::More(_) => "MoreProblems",
            Self::Nameless | Self::Unreadable(_) => "Unreadable",
            Self::NoRoom(_) => "NoRoom",
            // The word of kube-proxy.
            Self::HealthCheck { .. } => "FailedToStartServiceHealthcheck",
            Self::Watch { .. } => "FailedToWatch",
        }
    }

    /// From what a parser said, which may repeat what it found.
    pub fn unreadable(reason: &str) -> Self {
        Self::Unreadable(escaped(&excerpt(reason, REASON)))
    }

    /// From what the API server said.
    pub fn watch(kind: &str, error: &str) -> Self {
        Self::Watch { kind: kind.to_owned(), error: escaped(&excerpt(error, REASON)) }
    }

    pub(super) fn address(field: &'static str, value: &str) -> Self {
        Self::Address { field, value: excerpt(value, EXCERPT) }
    }

    pub(super) fn protocol(field: &'static str, value: &str) -> Self {
        Self::Protocol { field, value: excerpt(value, EXCERPT) }
    }

    pub(super) fn policy(field: &'static str, value: &str) -> Self {
        Self::Policy { field, value: excerpt(value, EXCERPT) }
    }

    pub(super) fn address_type(value: &str) -> Self {
        Self::AddressType(excerpt(value, EXCERPT))
    }

    pub(super) fn cidr(field: &'static str, value: &str) -> Self {
        Self::Cidr { field, value: excerpt(value, EXCERPT) }
    }

    pub(super) fn source_range(value: &str) -> Self {
        Self::SourceRange(excerpt(value, EXCERPT))
    }

    pub(super) fn annotation(name: &'static str, value: &str) -> Self {
        Self::Annotation { name, value: excerpt(value, EXCERPT) }
    }

    pub(super) fn source_scope(value: &str) -> Self {
        Self::SourceScope(excerpt(value, EXCERPT))
    }

    pub(super) fn affinity(value: &str) -> Self {
        Self::Affinity(excerpt(value, EXCERPT))
    }
}

/// An object may hold megabytes where an address belongs.
fn excerpt(value: &str, length: usize) -> String {
    match value.char_indices().nth(length) {
        Some((end, _)) => format!("{}…", &value[..end]),
        None => value.to_owned(),
    }
}

/// With nothing in it that a terminal would obey.
pub fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for letter in text.chars() {
        if letter.is_control() {
            escaped.extend(letter.escape_default());
        } else {
            escaped.push(letter);
        }
    }
    escaped
}
