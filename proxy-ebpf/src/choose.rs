//! From a Service to a backend, for a new flow of a client.

use proxy_common::{
    backend::{Backend, BackendId, BackendState},
    outcome::Outcome,
    service::{Service, WhenEmpty, flag},
    tuple::{Stage, Tuple},
};

use crate::{affinity, family::Family, maps::SLOTS, pick, source};

/// Whether the client is a pod or process of this node; others are beyond an uplink.
#[inline(always)]
pub(crate) fn is_internal<A>(key: &Tuple<A>) -> bool {
    !matches!(key.stage, Stage::UplinkIn)
}

/// Chooses a backend for a new flow, or says why it gets none.
#[inline(always)]
pub(crate) fn choose<F: Family>(
    service: &Service,
    key: &Tuple<F::Addr>,
) -> Result<(BackendId, &'static Backend<F::Addr>), Outcome> {
    backend::<F>(slot::<F>(service, key)?)
}

/// Chooses a slot for a new flow, or says why it gets none.
#[inline(always)]
pub(crate) fn slot<F: Family>(service: &Service, key: &Tuple<F::Addr>) -> Result<u32, Outcome> {
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
    Ok(if service.flags & flag::AFFINITY == 0 {
        pick::slot::<F>(service, range, key)
    } else {
        affinity::slot::<F>(service, range, key)
    })
}

/// The backend in a slot.
#[inline(always)]
pub(crate) fn backend<F: Family>(slot: u32) -> Result<(BackendId, &'static Backend<F::Addr>), Outcome> {
    let id = *SLOTS.get(slot).ok_or(Outcome::DropNoBackend)?;
    let backend = F::backends().get(id).ok_or(Outcome::DropNoBackend)?;
    // One that has left stands only in the range of a frontend that could not be changed, for want of room.
    if matches!(backend.state, BackendState::Gone | BackendState::Free) {
        return Err(Outcome::DropNoBackend);
    }
    Ok((id, backend))
}
