//! Counts what happened, per hook and per CPU.

use proxy_common::outcome::{self, Hook, Outcome};

use crate::maps::COUNTERS;

/// Adds one. Out of line: it is called from many places, none of them on the way of an established flow.
#[inline(never)]
pub fn count(hook: Hook, outcome: Outcome) {
    if let Some(counter) = COUNTERS.get_ptr_mut(outcome::counter(hook, outcome)) {
        // SAFETY: the pointer is to this CPU's own value, which stays as long as the map.
        unsafe { *counter += 1 };
    }
}
