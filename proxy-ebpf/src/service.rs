//! From a destination to a Service, and what is known of its backends.

use proxy_common::{
    addr::{Address as _, Port, Protocol},
    backend::{BackendId, BackendState},
    node::{Node, local},
    outcome::Outcome,
    service::{Frontend, Service, flag},
};

use crate::{family::Family, maps::NODE, newcomer};

/// What the agent told of the node.
#[inline(always)]
pub(crate) fn node() -> Option<&'static Node> {
    NODE.get(0)
}

/// The Service a destination belongs to: by its own address, else as a NodePort of one of the node's addresses.
#[inline(always)]
pub(crate) fn find<F: Family>(daddr: F::Addr, dport: Port, proto: Protocol) -> Option<&'static Service> {
    find_as::<F>(daddr, F::Addr::ANY, dport, proto)
}

/// The same, with the address that NodePorts stand under.
#[inline(always)]
pub(crate) fn find_as<F: Family>(
    daddr: F::Addr,
    any: F::Addr,
    dport: Port,
    proto: Protocol,
) -> Option<&'static Service> {
    // In the table it stands for the addresses that serve NodePorts, which it is none of.
    if daddr == any {
        return None;
    }
    // SAFETY: entries are replaced, never written in place, and freed only after a grace period.
    if let Some(service) = unsafe { F::services().get(Frontend::new(daddr, dport, proto)) } {
        return Some(service);
    }
    if !may_be_node_port(node()?, dport) {
        return None;
    }
    // SAFETY: as above.
    let flags = unsafe { F::local_addrs().get(daddr) }?;
    if flags & local::NODE_PORTS == 0 {
        return None;
    }
    // SAFETY: as above.
    unsafe { F::services().get(Frontend::new(any, dport, proto)) }
}

/// Why a packet to a destination that no Service has goes no further, if it does not: its address is a ClusterIP, and the
/// port is none of its Service's; or it could be a ClusterIP, and is none, nor one of the node's own, as that of a DNS cache is.
#[inline(always)]
pub(crate) fn refusal<F: Family>(daddr: &F::Addr) -> Option<Outcome> {
    if is_cluster_ip::<F>(daddr) {
        Some(Outcome::RejectNoPort)
    } else if F::is_in_service_cidrs(daddr) && !is_of_node::<F>(daddr) {
        Some(Outcome::DropUnallocated)
    } else {
        None
    }
}

/// Whether an address could be a ClusterIP, and is none, for anybody.
#[inline(always)]
pub(crate) fn is_unallocated<F: Family>(daddr: &F::Addr) -> bool {
    F::is_in_service_cidrs(daddr)
        && !is_cluster_ip::<F>(daddr)
        && !is_of_node::<F>(daddr)
        && !newcomer::are_others_at_work()
}

#[inline(never)]
fn is_cluster_ip<F: Family>(addr: &F::Addr) -> bool {
    // SAFETY: as in `find`.
    unsafe { F::services().get(Frontend::whole(*addr)) }.is_some_and(|service| service.flags & flag::EXTERNAL == 0)
}

/// Whether an address is a Service's and not the node's, so that the kernel knows nothing of it.
#[inline(never)]
pub(crate) fn is_virtual<F: Family>(addr: &F::Addr) -> bool {
    // SAFETY: as in `find`.
    let is_frontend = unsafe { F::services().get(Frontend::whole(*addr)) }.is_some();
    is_frontend && !is_of_node::<F>(addr)
}

/// Whether an address is one of the node's own.
#[inline(always)]
pub(crate) fn is_of_node<F: Family>(addr: &F::Addr) -> bool {
    // SAFETY: as in `find`.
    unsafe { F::local_addrs().get(addr) }.is_some()
}

/// Whether nobody beyond an uplink can have an address: it is the node's, or a ClusterIP.
#[inline(always)]
pub(crate) fn is_of_this_side<F: Family>(addr: &F::Addr) -> bool {
    is_of_node::<F>(addr) || is_cluster_ip::<F>(addr)
}

/// Whether a port is in the range that NodePorts are taken from.
#[inline(always)]
pub(crate) fn may_be_node_port(node: &Node, port: Port) -> bool {
    (node.node_port_first.number()..=node.node_port_last.number()).contains(&port.number())
}

/// Whether a flow's backend may still get packets of flows that can choose again.
#[inline(always)]
pub(crate) fn still_serves<F: Family>(id: BackendId, generation: u32) -> bool {
    F::backends()
        .get(id)
        .is_some_and(|backend| backend.generation == generation && backend.state == BackendState::Serving)
}

/// Whether a flow's backend has left for good: the endpoint is in no slice any more, or its id is another's.
#[inline(always)]
pub(crate) fn is_gone<F: Family>(id: BackendId, generation: u32) -> bool {
    F::backends().get(id).is_none_or(|backend| {
        backend.generation != generation || matches!(backend.state, BackendState::Gone | BackendState::Free)
    })
}
