//! From where the restricted frontends of a Service may be used.

use std::{collections::BTreeSet, sync::Arc};

use ipnet::IpNet;

use super::{Family, Prefix};
use crate::{model, topology::Place};

/// Ranges of addresses, in order, each once.
pub type Sources<A> = Arc<[Prefix<A>]>;

/// None when everybody may. A node that may can bear the load balancer's address itself, and its processes then use the
/// address as their own: it may, too (kube-proxy's pkg/proxy/nftables/proxier.go says the same of its firewall chains).
pub(super) fn sources<A: Family>(service: &model::Service, place: &Place, is_ipv4: bool) -> Option<Sources<A>> {
    let model::SourceRanges { v4, v6, .. } = &service.source_ranges;
    let ranges = if is_ipv4 { v4 } else { v6 }.as_ref()?;
    let mut prefixes: BTreeSet<Prefix<A>> = ranges.iter().filter_map(|range| Prefix::mixed(*range)).collect();
    // Frontends of both families stand in one table, and share what restricts either.
    let others = if is_ipv4 { v6 } else { v4 }.iter().flatten().filter(|_| service.crosses);
    prefixes.extend(others.filter_map(|range| Prefix::mixed(*range)));
    let has_node = place.addresses.iter().any(|address| ranges.iter().any(|range| range.contains(address)));
    if has_node {
        prefixes.extend(service.balancer_ips.iter().filter_map(|address| Prefix::mixed(IpNet::from(*address))));
    }
    Some(prefixes.into_iter().collect())
}
