//! What is left out where a program is loaded to be tried on one packet: all ways but that packet's. The verifier knows constants, looks at
//! no branch that they exclude, and takes it out, so that such a load takes a fraction of the time. No other load leaves anything out.

use aya_ebpf::Global;
use proxy_common::rehearsal::{EVERYTHING, one_way};

use crate::{family::Family, parse::Transport};

/// What this load is for: see [`proxy_common::rehearsal`].
#[unsafe(no_mangle)]
pub(crate) static REHEARSED: Global<u16> = Global::new(EVERYTHING);

/// Whether only one way is of interest, which is a plain packet's.
#[inline(always)]
pub(crate) fn is_on() -> bool {
    REHEARSED.load() != EVERYTHING
}

/// Whether packets of that kind are not what this load is for.
#[inline(always)]
pub(crate) fn leaves_out<F: Family, L: Transport>() -> bool {
    let rehearsed = REHEARSED.load();
    rehearsed != EVERYTHING && rehearsed != one_way(F::IS_V6, L::PROTOCOL)
}
