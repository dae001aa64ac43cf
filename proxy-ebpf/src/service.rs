//! From a destination to a Service, and from a Service to a backend.

use proxy_common::{
    addr::{Address as _, Port, Protocol},
    backend::{Backend, BackendId, BackendState},
    node::{Node, local},
    outcome::Outcome,
    service::{Frontend, Range, Service, WhenEmpty},
};

use crate::{
    family::Family,
    kernel,
    maps::{NODE, SLOTS},
};

/// A backend that was chosen.
pub(crate) struct Chosen<A: 'static> {
    pub(crate) id: BackendId,
    pub(crate) backend: &'static Backend<A>,
}

/// Whose traffic it is, which decides the range.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Client {
    /// A pod or process of this node.
    Internal,
    /// Beyond an uplink.
    External,
}

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

/// Chooses a backend for a new flow.
#[inline(always)]
pub(crate) fn choose<F: Family>(service: &Service, client: Client) -> Result<Chosen<F::Addr>, Outcome> {
    let (range, empty) = match client {
        Client::Internal => (service.internal, service.internal_empty),
        Client::External => (service.external, service.external_empty),
    };
    if range.count == 0 {
        return Err(match empty {
            WhenEmpty::Reject => Outcome::RejectNoEndpoint,
            WhenEmpty::Drop => Outcome::DropNoLocalEndpoint,
        });
    }
    let id = *SLOTS.get(range.first.wrapping_add(pick(range))).ok_or(Outcome::DropNoBackend)?;
    let backend = F::backends().get(id).ok_or(Outcome::DropNoBackend)?;
    if backend.state == BackendState::Free {
        return Err(Outcome::DropNoBackend);
    }
    Ok(Chosen { id, backend })
}

/// Whether a backend runs on this node. Slices made by hand name no node, and then its address tells, if it is the node's.
#[inline(always)]
pub(crate) fn is_local<F: Family>(backend: &Backend<F::Addr>) -> bool {
    // SAFETY: as in `find`.
    backend.is_local != 0 || unsafe { F::local_addrs().get(&backend.addr) }.is_some()
}

/// An index into the range: multiply and shift, which is even enough and never divides.
#[inline(always)]
fn pick(range: Range) -> u32 {
    ((u64::from(kernel::random()) * u64::from(range.count)) >> 32) as u32
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
