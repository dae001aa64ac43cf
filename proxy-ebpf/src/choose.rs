//! From a Service to a backend, for a new flow of a client.

use proxy_common::{
    backend::{Backend, BackendId, BackendState},
    outcome::Outcome,
    service::{Service, WhenEmpty, flag},
    tuple::{Stage, Tuple},
};

use crate::{affinity, family::Family, maps::SLOTS, pick, source};

/// A backend that was chosen.
pub(crate) struct Chosen<A: 'static> {
    pub(crate) id: BackendId,
    pub(crate) backend: &'static Backend<A>,
}

/// Whether the client is a pod or process of this node; others are beyond an uplink.
#[inline(always)]
pub(crate) fn is_internal<A>(key: &Tuple<A>) -> bool {
    !matches!(key.stage, Stage::UplinkIn)
}

/// Chooses a backend for a new flow, or says why it gets none.
#[inline(always)]
pub(crate) fn choose<F: Family>(service: &'static Service, key: &Tuple<F::Addr>) -> Result<Chosen<F::Addr>, Outcome> {
    if service.flags & flag::SOURCE_RANGES != 0 && !source::is_allowed::<F>(service.index, key) {
        return Err(Outcome::DropSource);
    }
    let (range, empty) = if is_internal(key) {
        (service.internal, service.internal_empty)
    } else {
        (service.external, service.external_empty)
    };
    if range.count == 0 {
        return Err(match empty {
            WhenEmpty::Reject => Outcome::RejectNoEndpoint,
            WhenEmpty::Drop => Outcome::DropNoLocalEndpoint,
        });
    }
    let slot = if service.flags & flag::AFFINITY == 0 {
        pick::slot::<F>(service, range, key)
    } else {
        affinity::slot::<F>(service, range, key)
    };
    let id = *SLOTS.get(slot).ok_or(Outcome::DropNoBackend)?;
    let backend = F::backends().get(id).ok_or(Outcome::DropNoBackend)?;
    if backend.state == BackendState::Free {
        return Err(Outcome::DropNoBackend);
    }
    Ok(Chosen { id, backend })
}
