//! From where the restricted frontends of a Service may be used.

use std::{collections::BTreeSet, net::IpAddr, sync::Arc};

use ipnet::IpNet;

use super::{Family, Prefix};
use crate::{model, topology::Place};

/// Ranges of addresses, in order, each once.
pub type Sources<A> = Arc<[Prefix<A>]>;

/// None when everybody may. A node that may can bear the load balancer's address itself, and its processes then use the
/// address as their own: it may, too (kube-proxy's pkg/proxy/nftables/proxier.go says the same of its firewall chains).
pub(super) fn sources<A: Family>(service: &model::Service, place: &Place) -> Option<Sources<A>> {
    let ranges =
        if A::of(IpAddr::from([0; 4])).is_some() { &service.source_ranges.v4 } else { &service.source_ranges.v6 };
    let ranges = ranges.as_ref()?;
    let mut prefixes: BTreeSet<Prefix<A>> = ranges.iter().filter_map(|range| Prefix::of(*range)).collect();
    let has_node = place.addresses.iter().any(|address| ranges.iter().any(|range| range.contains(address)));
    if has_node {
        prefixes.extend(service.balancer_ips.iter().filter_map(|address| Prefix::of(IpNet::from(*address))));
    }
    Some(prefixes.into_iter().collect())
}
