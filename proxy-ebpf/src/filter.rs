//! "Could this packet be ours?", in a few instructions, before anything else is asked.

use proxy_common::{
    filter::{Hashed, WORDS},
    tuple::Stage,
};

use crate::{
    kernel,
    maps::{INBOUND, MASKED, OUTBOUND},
};

/// On the way in the destination decides: a frontend or an address of the node. On the way out the source does: a backend,
/// or a client that is masqueraded there; at the uplink the destination does, too, because whatever took the way through the
/// kernel to a backend elsewhere is masqueraded there.
#[inline(always)]
pub(crate) fn may_be_ours<A: Hashed>(stage: Stage, saddr: &A, daddr: &A) -> bool {
    match stage {
        Stage::FromPod | Stage::UplinkIn | Stage::Cross => {
            INBOUND.get(0).is_some_and(|filter| filter.may_have(daddr.bit()))
        }
        Stage::ToPod => {
            let bit = saddr.bit();
            OUTBOUND.get(0).is_some_and(|filter| filter.may_have(bit))
                || MASKED.get(0).is_some_and(|filter| filter.may_have(bit))
        }
        Stage::UplinkOut => {
            OUTBOUND.get(0).is_some_and(|filter| filter.may_have(saddr.bit()) || filter.may_have(daddr.bit()))
        }
    }
}

/// Whether a packet on its way out may come from a backend.
#[inline(always)]
pub(crate) fn may_be_reply<A: Hashed>(saddr: &A) -> bool {
    OUTBOUND.get(0).is_some_and(|filter| filter.may_have(saddr.bit()))
}

/// From now on, packets from this address to pods may be ours. Bits are never taken back: they are few, and one too many costs
/// a look-up.
#[inline(always)]
pub(crate) fn let_through<A: Hashed>(saddr: &A) {
    let bit = saddr.bit();
    let Some(filter) = MASKED.get_ptr_mut(0) else { return };
    // SAFETY: map memory outlives the program's run.
    if unsafe { (*filter).may_have(bit) } {
        return;
    }
    // SAFETY: only the place of the field is taken.
    let words = unsafe { &raw mut (*filter).words }.cast::<u64>();
    kernel::or(words.wrapping_add((bit >> 6) as usize & (WORDS - 1)), 1 << (bit & 63));
}
