//! This node, as the API knows it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use k8s_openapi::api::core::v1 as core;

use super::defect::{Defect, ObjectReference, Problem};

/// The cluster autoscaler is about to delete a node that bears this taint.
const LEAVING: &str = "ToBeDeletedByClusterAutoscaler";
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
    /// It is being deleted, or about to be.
    pub is_leaving: bool,
}

impl Node {
    /// The first `InternalIP` of each family is the primary address.
    pub fn parse(object: &core::Node, defects: &mut Vec<Defect>) -> Self {
        let zone = object.metadata.labels.as_ref().and_then(|labels| labels.get(ZONE)).cloned();
        let mut node = Self { zone, is_leaving: is_leaving(object), ..Self::default() };
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

fn is_leaving(object: &core::Node) -> bool {
    let mut taints = object.spec.iter().filter_map(|spec| spec.taints.as_ref()).flatten();
    object.metadata.deletion_timestamp.is_some() || taints.any(|taint| taint.key == LEAVING)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::Node;

    fn is_leaving(metadata: &Value, taint: &str) -> bool {
        let object = json!({"metadata": metadata, "spec": {"taints": [{"key": taint, "effect": "NoSchedule"}]}});
        Node::parse(&serde_json::from_value(object).unwrap(), &mut Vec::new()).is_leaving
    }

    #[test]
    fn a_node_leaves_when_it_is_deleted_or_tainted_by_the_autoscaler() {
        let plain = json!({"name": "here"});
        assert!(!is_leaving(&plain, "node.kubernetes.io/unschedulable"));
        assert!(is_leaving(&plain, "ToBeDeletedByClusterAutoscaler"));
        let deleted = json!({"name": "here", "deletionTimestamp": "2026-11-20T11:40:16Z"});
        assert!(is_leaving(&deleted, "other"));
    }
}
