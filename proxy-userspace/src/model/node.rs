//! This node, as the API knows it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use k8s_openapi::api::core::v1 as core;

use super::defect::{Defect, ObjectReference, Problem};

/// Names the zone a node stands in.
const ZONE: &str = "topology.kubernetes.io/zone";

/// This node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Node {
    /// Where it stands.
    pub zone: Option<String>,
    /// Its primary IPv4 address.
    pub ipv4: Option<Ipv4Addr>,
    /// Its primary IPv6 address.
    pub ipv6: Option<Ipv6Addr>,
}

impl Node {
    /// The first `InternalIP` of each family is the primary address.
    pub fn parse(object: &core::Node, defects: &mut Vec<Defect>) -> Self {
        let zone = object.metadata.labels.as_ref().and_then(|labels| labels.get(ZONE)).cloned();
        let mut node = Self { zone, ..Self::default() };
        let addresses = object.status.iter().filter_map(|status| status.addresses.as_ref()).flatten();
        for address in addresses.filter(|address| address.type_ == "InternalIP") {
            match address.address.parse() {
                Ok(IpAddr::V4(v4)) => drop(node.ipv4.get_or_insert(v4)),
                Ok(IpAddr::V6(v6)) => drop(node.ipv6.get_or_insert(v6)),
                Err(_) => defects.push(Defect {
                    object: ObjectReference::of("Node", &object.metadata),
                    problem: Problem::address("status.addresses", &address.address),
                }),
            }
        }
        node
    }
}
