//! This node, as the API knows it.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::IpNet;
use k8s_openapi::api::core::v1 as core;

use super::{
    defect::{Defect, ObjectReference, Problem},
    sloppy,
};

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
    /// All its addresses that the API knows.
    pub addresses: BTreeSet<IpAddr>,
    /// Where its pods' addresses are taken from.
    pub pod_cidrs: Vec<IpNet>,
    /// It is being deleted, or about to be.
    pub is_leaving: bool,
}

impl Node {
    /// The first `InternalIP` of each family is the primary address; where there is none, the first `ExternalIP`.
    pub fn parse(object: &core::Node, defects: &mut Vec<Defect>) -> Self {
        let zone = object.metadata.labels.as_ref().and_then(|labels| labels.get(ZONE)).cloned();
        let mut node = Self { zone, is_leaving: is_leaving(object), ..Self::default() };
        let mut tell =
            |problem| defects.push(Defect { object: ObjectReference::of("Node", &object.metadata), problem });
        let addresses = object.status.iter().filter_map(|status| status.addresses.as_ref()).flatten();
        for kind in ["InternalIP", "ExternalIP"] {
            for address in addresses.clone().filter(|address| address.type_ == kind) {
                match sloppy::address(&address.address) {
                    Some(parsed) => node.add_address(parsed),
                    None => tell(Problem::address("status.addresses", &address.address)),
                }
            }
        }
        for text in pod_cidrs(object) {
            match text.parse() {
                Ok(range) => node.pod_cidrs.push(range),
                Err(_) => tell(Problem::cidr("spec.podCIDRs", text)),
            }
        }
        node
    }

    fn add_address(&mut self, address: IpAddr) {
        self.addresses.insert(address);
        match address {
            IpAddr::V4(v4) => drop(self.ipv4.get_or_insert(v4)),
            IpAddr::V6(v6) => drop(self.ipv6.get_or_insert(v6)),
        }
    }
}

/// Objects written before dual-stack have the one field only.
fn pod_cidrs(object: &core::Node) -> &[String] {
    let Some(spec) = &object.spec else { return &[] };
    spec.pod_cidrs.as_deref().filter(|all| !all.is_empty()).unwrap_or(spec.pod_cidr.as_slice())
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
    fn addresses_and_ranges_of_pods_are_read_and_what_is_none_is_told() {
        let address = |kind: &str, address: &str| json!({"type": kind, "address": address});
        let object = json!({
            "metadata": {"name": "here"},
            "spec": {"podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24", "fd00:1::/64", "nonsense"]},
            "status": {"addresses": [
                address("Hostname", "here"), address("ExternalIP", "203.0.113.9"), address("ExternalIP", "2001:db8::9"), address("InternalIP", "192.0.2.9"),
                address("InternalIP", "192.0.2.10"), address("InternalIP", "nowhere"),
            ]},
        });
        let mut defects = Vec::new();
        let node = Node::parse(&serde_json::from_value(object).unwrap(), &mut defects);
        assert_eq!((node.ipv4, node.ipv6), ("192.0.2.9".parse().ok(), "2001:db8::9".parse().ok()));
        assert_eq!((node.addresses.len(), node.pod_cidrs.len(), defects.len()), (4, 2, 2), "{defects:?}");
        let old = json!({"metadata": {"name": "here"}, "spec": {"podCIDR": "10.244.1.0/24"}});
        assert_eq!(Node::parse(&serde_json::from_value(old).unwrap(), &mut defects).pod_cidrs.len(), 1);
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
