//! "Could this packet be ours?", in a few instructions, before anything else is asked.

use proxy_common::{filter::Hashed, tuple::Stage};

use crate::maps::{INBOUND, OUTBOUND};

/// On the way in the destination decides: a frontend or an address of the node. On the way out the source does: a backend;
/// at the uplink also the destination, because a flow that took the way through the kernel is masqueraded there.
#[inline(always)]
pub(crate) fn may_be_ours<A: Hashed>(stage: Stage, saddr: &A, daddr: &A) -> bool {
    match stage {
        Stage::FromPod | Stage::UplinkIn => INBOUND.get(0).is_some_and(|filter| filter.may_have(daddr.bit())),
        Stage::ToPod => OUTBOUND.get(0).is_some_and(|filter| filter.may_have(saddr.bit())),
        Stage::UplinkOut => {
            OUTBOUND.get(0).is_some_and(|filter| filter.may_have(saddr.bit()) || filter.may_have(daddr.bit()))
        }
    }
}
