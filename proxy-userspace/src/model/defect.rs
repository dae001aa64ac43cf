//! What can be wrong with an object. The part that is wrong becomes nothing, and a defect says so by name; other parts
//! and other objects are served.

use std::fmt;

use super::ObjectName;

/// A part of an object that is left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Defect {
    /// `Service`, `EndpointSlice` or `Node`.
    pub kind: &'static str,
    /// The object.
    pub object: ObjectName,
    /// The part and what is wrong with it.
    pub problem: Problem,
}

impl fmt::Display for Defect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}: {}", self.kind, self.object, self.problem)
    }
}

/// What is wrong with a part of an object.
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
        address: std::net::IpAddr,
    },
    /// Outside 1..=65535.
    #[error("{field}: {value} is not a port")]
    Port {
        /// Path of the field.
        field: &'static str,
        /// What stands there.
        value: i32,
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
        protocol: proxy_common::addr::Protocol,
    },
    /// The datapath cannot check sources yet, and an open door is worse than a closed one.
    #[error("spec.loadBalancerSourceRanges is not supported yet: {0} is not served")]
    SourceRanges(std::net::IpAddr),
    /// The datapath cannot keep clients with their endpoints yet.
    #[error("spec.sessionAffinity is not supported yet: connections are spread at random")]
    Affinity,
    /// The object bears no name.
    #[error("metadata.name is missing")]
    Nameless,
}
