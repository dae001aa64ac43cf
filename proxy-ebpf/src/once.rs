//! Functions that the verifier looks at once, and not again at every call: *global* ones, in the words of BTF. It checks such a
//! function by itself, for whatever it may be called with, and takes a call for granted that gives it what its types ask for. That costs
//! something, so that only those are here that are called from many places: numbers and memory of a known length go in, of which a null
//! pointer is part, and only a number comes out. A key that is to be looked up must be copied from such memory to the stack before
//! Linux 6.2.

use proxy_common::{
    addr::{Ipv4, Ipv6},
    flow::Flow,
    outcome::{Hook, Outcome},
    tuple::Tuple,
};

use crate::{
    embryo, event,
    family::{V4, V6},
    flow::{self, Advance, Entry},
    stats, table,
};

/// An address whose flows have such functions.
pub trait Once: Copy + 'static {
    /// [`flow::forget`].
    fn forget(key: &Tuple<Self>, flow: &Flow<Self>);
    /// [`flow::cut`].
    fn cut(key: &Tuple<Self>, flow: &Flow<Self>);
    /// [`embryo::hatch`].
    fn hatch(hook: Hook, key: &Tuple<Self>, entry: *mut Flow<Self>, flags: u8);
    /// What [`flow::advance`] does once a second.
    fn refresh(hook: Hook, key: &Tuple<Self>, entry: *mut Flow<Self>, silent: u32, second: u32) -> Advance;
    /// What [`flow::advance`] does with the flags of TCP.
    fn note_flags(key: &Tuple<Self>, entry: *mut Flow<Self>, flags: u8) -> bool;
    /// [`event::flow`].
    fn tell(hook: Hook, outcome: Outcome, key: &Tuple<Self>, flow: &Flow<Self>, ifindex: u32);
    /// [`stats::add_up`].
    fn add_noted(flow: *mut Flow<Self>);
}

/// An [`Advance`] as a number.
const KEEP: u32 = 0;
const AFRESH: u32 = 1;
const GONE: u32 = 2;

macro_rules! once {
    ($family:ty, $addr:ty, $forget:ident $cut:ident $hatch:ident $refresh:ident $note_flags:ident $tell:ident $add_noted:ident) => {
        impl Once for $addr {
            #[inline(always)]
            fn forget(key: &Tuple<$addr>, flow: &Flow<$addr>) {
                $forget(key, flow);
            }
            #[inline(always)]
            fn cut(key: &Tuple<$addr>, flow: &Flow<$addr>) {
                $cut(key, flow);
            }
            #[inline(always)]
            fn hatch(hook: Hook, key: &Tuple<$addr>, entry: *mut Flow<$addr>, flags: u8) {
                $hatch(hook, key, entry, flags);
            }
            #[inline(always)]
            fn refresh(hook: Hook, key: &Tuple<$addr>, entry: *mut Flow<$addr>, silent: u32, second: u32) -> Advance {
                match $refresh(hook, key, entry, silent, second) {
                    KEEP => Advance::Keep,
                    AFRESH => Advance::Afresh,
                    _ => Advance::Gone,
                }
            }
            #[inline(always)]
            fn note_flags(key: &Tuple<$addr>, entry: *mut Flow<$addr>, flags: u8) -> bool {
                $note_flags(key, entry, flags) != 0
            }
            #[inline(always)]
            fn tell(hook: Hook, outcome: Outcome, key: &Tuple<$addr>, flow: &Flow<$addr>, ifindex: u32) {
                $tell(hook, outcome, key, flow, ifindex);
            }
            #[inline(always)]
            fn add_noted(flow: *mut Flow<$addr>) {
                $add_noted(flow);
            }
        }

        #[cfg_attr(target_arch = "bpf", unsafe(no_mangle))]
        #[inline(never)]
        extern "C" fn $forget(key: *const Tuple<$addr>, flow: *const Flow<$addr>) -> u32 {
            // SAFETY: the callers' references, which the verifier has checked anew.
            if let (Some(key), Some(flow)) = unsafe { (key.as_ref(), flow.as_ref()) } {
                flow::forget_pair::<$family>(key, flow);
            }
            0
        }

        #[cfg_attr(target_arch = "bpf", unsafe(no_mangle))]
        #[inline(never)]
        extern "C" fn $cut(key: *const Tuple<$addr>, flow: *const Flow<$addr>) -> u32 {
            // SAFETY: as above.
            if let (Some(key), Some(flow)) = unsafe { (key.as_ref(), flow.as_ref()) } {
                flow::cut_in_two::<$family>(key, flow);
            }
            0
        }

        #[cfg_attr(target_arch = "bpf", unsafe(no_mangle))]
        #[inline(never)]
        extern "C" fn $hatch(hook: Hook, key: *const Tuple<$addr>, entry: *mut Flow<$addr>, flags: u8) -> u32 {
            // SAFETY: as above.
            if let Some(key) = unsafe { key.as_ref() }
                && !entry.is_null()
            {
                let key = *key;
                embryo::hatch_one::<$family>(hook, &key, Entry::at(entry), flags);
            }
            0
        }

        #[cfg_attr(target_arch = "bpf", unsafe(no_mangle))]
        #[inline(never)]
        extern "C" fn $refresh(
            hook: Hook,
            key: *const Tuple<$addr>,
            entry: *mut Flow<$addr>,
            silent: u32,
            second: u32,
        ) -> u32 {
            // SAFETY: as above.
            if let Some(key) = unsafe { key.as_ref() }
                && !entry.is_null()
            {
                match flow::refresh::<$family>(hook, key, Entry::at(entry), silent, second) {
                    Advance::Keep => KEEP,
                    Advance::Afresh => AFRESH,
                    Advance::Gone => GONE,
                }
            } else {
                KEEP
            }
        }

        #[cfg_attr(target_arch = "bpf", unsafe(no_mangle))]
        #[inline(never)]
        extern "C" fn $note_flags(key: *const Tuple<$addr>, entry: *mut Flow<$addr>, flags: u8) -> u32 {
            // SAFETY: as above.
            if let Some(key) = unsafe { key.as_ref() }
                && !entry.is_null()
            {
                u32::from(flow::note_flags::<$family>(key, Entry::at(entry), flags))
            } else {
                0
            }
        }

        #[cfg_attr(target_arch = "bpf", unsafe(no_mangle))]
        #[inline(never)]
        extern "C" fn $tell(
            hook: Hook,
            outcome: Outcome,
            key: *const Tuple<$addr>,
            flow: *const Flow<$addr>,
            ifindex: u32,
        ) -> u32 {
            // SAFETY: as above.
            if let (Some(key), Some(flow)) = unsafe { (key.as_ref(), flow.as_ref()) } {
                event::tell_flow::<$family>(hook, outcome, key, flow, ifindex);
            }
            0
        }

        #[cfg_attr(target_arch = "bpf", unsafe(no_mangle))]
        #[inline(never)]
        extern "C" fn $add_noted(flow: *mut Flow<$addr>) -> u32 {
            if !flow.is_null() {
                stats::add_noted::<$family>(flow);
            }
            0
        }
    };
}

once!(V4, Ipv4, forget_v4 cut_v4 hatch_v4 refresh_v4 note_flags_v4 tell_v4 add_noted_v4);
once!(V6, Ipv6, forget_v6 cut_v6 hatch_v6 refresh_v6 note_flags_v6 tell_v6 add_noted_v6);

/// Counts one that has entered a tier, or one that has left it: [`table::count_turnover`].
#[cfg_attr(target_arch = "bpf", unsafe(no_mangle))]
#[inline(never)]
pub(crate) extern "C" fn tally(index: u32, is_leaving: u32) -> u32 {
    table::count_turnover(index, is_leaving);
    0
}
