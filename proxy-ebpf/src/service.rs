//! From a destination to a Service, and what is known of its backends.

use proxy_common::{
    addr::{Address as _, Port, Protocol},
    backend::{Backend, BackendId, BackendState},
    node::{Node, local},
    outcome::Outcome,
    service::{Frontend, Service},
};

use crate::{family::Family, maps::NODE};

/// What the agent told of the node.
#[inline(always)]
pub(crate) fn node() -> Option<&'static Node> {
    NODE.get(0)
}

/// The Service a destination belongs to: by its own address, else as a NodePort of one of the node's addresses.
#[inline(always)]
pub(crate) fn find<F: Family>(daddr: F::Addr, dport: Port, proto: Protocol) -> Option<&'static Service> {
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
    unsafe { F::services().get(Frontend::new(F::Addr::ANY, dport, proto)) }
}

/// Why a packet to a destination that no Service has goes no further, if it does not: its address is a ClusterIP, and the
/// port is none of its Service's.
#[inline(always)]
pub(crate) fn refusal<F: Family>(daddr: F::Addr) -> Option<Outcome> {
    // SAFETY: as in `find`.
    unsafe { F::services().get(Frontend::whole(daddr)) }.map(|_| Outcome::RejectNoPort)
}

/// Whether a port is in the range that NodePorts are taken from.
#[inline(always)]
pub(crate) fn may_be_node_port(node: &Node, port: Port) -> bool {
    (node.node_port_first.number()..=node.node_port_last.number()).contains(&port.number())
}

/// Whether a backend runs on this node. Slices made by hand name no node, and then its address tells, if it is the node's.
#[inline(always)]
pub(crate) fn is_local<F: Family>(backend: &Backend<F::Addr>) -> bool {
    // SAFETY: as in `find`.
    backend.is_local != 0 || unsafe { F::local_addrs().get(&backend.addr) }.is_some()
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
