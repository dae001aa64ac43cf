//! How many flows a backend has, by its id: raised when a flow is opened, lowered when it is first seen to close or is
//! forgotten, or when its socket is closed. Flows that end in silence are not seen here.

use proxy_common::backend::BackendId;

use crate::{family::Family, kernel};

/// How many there are.
#[inline(always)]
pub(crate) fn count<F: Family>(id: BackendId) -> u32 {
    F::active().get(id).copied().unwrap_or(0)
}

/// One more.
#[inline(always)]
pub(crate) fn raise<F: Family>(id: BackendId) {
    if let Some(place) = F::active().get_ptr_mut(id) {
        kernel::add(place, 1);
    }
}

/// One less. The agent may have counted anew meanwhile, so there may be none to take away; of several CPUs that find the last
/// one at the same instant, all but one are counted wrongly until it does so again.
#[inline(always)]
pub(crate) fn lower<F: Family>(id: BackendId) {
    if let Some(place) = F::active().get_ptr_mut(id)
        && count::<F>(id) > 0
    {
        kernel::add(place, u32::MAX);
    }
}
