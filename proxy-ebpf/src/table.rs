//! The two tiers of the flow table, as maps: looking up, entering, leaving. What enters and leaves is counted, because the
//! kernel does not tell what it evicts: that is what has entered, has not left, and is not there.

use aya_ebpf::bindings::{BPF_ANY, BPF_NOEXIST};
use proxy_common::{
    flow::{Flow, Tier, Turnover},
    tuple::Tuple,
};

use crate::{family::Family, flow::Entry, maps::TURNOVER, once::tally};

/// An entry of a tier.
#[inline(always)]
pub(crate) fn find<F: Family>(tier: Tier, key: &Tuple<F::Addr>) -> Option<Entry<F::Addr>> {
    match tier {
        Tier::Embryos => F::embryos().get_ptr_mut(key),
        Tier::Flows => F::flows().get_ptr_mut(key),
    }
    .map(Entry::at)
}

/// Enters an entry under a key that has none. `false` when it has one, or there is no room.
#[inline(always)]
pub(crate) fn claim<F: Family>(tier: Tier, key: &Tuple<F::Addr>, flow: &Flow<F::Addr>) -> bool {
    let is_entered = insert::<F>(tier, key, flow, BPF_NOEXIST);
    if is_entered {
        tally(Turnover::index(tier, F::IS_V6), 0);
    }
    is_entered
}

/// Enters an entry, in the place of that which may be there. `false` when there is no room.
#[inline(always)]
pub(crate) fn enter<F: Family>(tier: Tier, key: &Tuple<F::Addr>, flow: &Flow<F::Addr>) -> bool {
    claim::<F>(tier, key, flow) || insert::<F>(tier, key, flow, BPF_ANY)
}

/// Takes an entry out, if there is one.
#[inline(always)]
pub(crate) fn leave<F: Family>(tier: Tier, key: &Tuple<F::Addr>) {
    let has_left = match tier {
        Tier::Embryos => F::embryos().remove(key),
        Tier::Flows => F::flows().remove(key),
    };
    if has_left.is_ok() {
        tally(Turnover::index(tier, F::IS_V6), 1);
    }
}

#[inline(always)]
fn insert<F: Family>(tier: Tier, key: &Tuple<F::Addr>, flow: &Flow<F::Addr>, flags: u32) -> bool {
    match tier {
        Tier::Embryos => F::embryos().insert(key, flow, u64::from(flags)),
        Tier::Flows => F::flows().insert(key, flow, u64::from(flags)),
    }
    .is_ok()
}

/// Counts one that has entered, or one that has left.
#[inline(always)]
pub(crate) fn count_turnover(index: u32, is_leaving: u32) {
    let Some(turnover) = TURNOVER.get_ptr_mut(index) else { return };
    // SAFETY: the pointer is to this CPU's own value, which stays as long as the map.
    let turnover = unsafe { &mut *turnover };
    if is_leaving == 0 {
        turnover.entered += 1;
    } else {
        turnover.left += 1;
    }
}
