//! Counts per Service port and per backend. A packet of a known flow is noted in the flow's own entry, which it has in its
//! cache line anyway; about once a second what was noted is added to the arrays that all CPUs share, and packet by packet
//! where a flow may be over with each: before it is confirmed, in its beginning if it is UDP, and while it closes.
//!
//! What a flow has noted when it falls silent is added when it is heard again or forgotten, and lost if it is evicted.

use core::mem::offset_of;

use proxy_common::{
    backend::BackendId,
    flow::{Direction, Flow},
    stats::Stats,
};

use crate::{
    family::Family,
    flow::Entry,
    kernel,
    maps::{BACKEND_STATS_4, BACKEND_STATS_6, SERVICE_STATS_4, SERVICE_STATS_6},
    once::Once as _,
};

/// Notes a packet of a flow, whose bytes count from the IP header on. What is to be segmented later is one packet.
#[inline(always)]
pub(crate) fn note<F: Family>(entry: Entry<F::Addr>, bytes: u32) {
    if kernel::STATS.load() != 0 && entry.note(bytes) {
        add_up::<F>(entry);
    }
}

/// Notes a packet of a flow that may never have another.
#[inline(always)]
pub(crate) fn note_at_once<F: Family>(entry: Entry<F::Addr>, bytes: u32) {
    if kernel::STATS.load() != 0 {
        entry.note(bytes);
        add_up::<F>(entry);
    }
}

/// Adds to the arrays what a flow has noted.
#[inline(always)]
pub(crate) fn add_up<F: Family>(entry: Entry<F::Addr>) {
    if kernel::STATS.load() != 0 {
        // By its address, because an entry in a structure would be handed over by way of the stack.
        F::Addr::add_noted(entry.address());
    }
}

/// Counts a flow, or a socket, that was given a backend.
#[inline(never)]
pub(crate) fn opened<F: Family>(service: u32, backend: BackendId) {
    if kernel::STATS.load() != 0 {
        for stats in places::<F>(service, backend).into_iter().flatten() {
            // SAFETY: the pointer is to a value of a map, which stays as long as the map.
            add(unsafe { &raw mut (*stats).opened }, 1);
        }
    }
}

/// What [`add_up`] does.
#[inline(always)]
pub(crate) fn add_noted<F: Family>(flow: *mut Flow<F::Addr>) {
    let entry = Entry::at(flow);
    let flow = entry.flow();
    let (packets, bytes) = entry.take_noted();
    if packets == 0 || flow.is_mask() || matches!(flow.direction, Direction::Transit) {
        return;
    }
    let is_reply = matches!(flow.direction, Direction::Reply);
    for stats in places::<F>(flow.service, flow.backend).into_iter().flatten() {
        let (all_packets, all_bytes) = if is_reply {
            (offset_of!(Stats, reply_packets), offset_of!(Stats, reply_bytes))
        } else {
            (offset_of!(Stats, packets), offset_of!(Stats, bytes))
        };
        add(stats.wrapping_byte_add(all_packets).cast(), packets.into());
        add(stats.wrapping_byte_add(all_bytes).cast(), bytes.into());
    }
}

/// Where a Service and a backend are counted.
#[inline(always)]
fn places<F: Family>(service: u32, backend: BackendId) -> [Option<*mut Stats>; 2] {
    if F::IS_V6 {
        [SERVICE_STATS_6.get_ptr_mut(service), BACKEND_STATS_6.get_ptr_mut(backend)]
    } else {
        [SERVICE_STATS_4.get_ptr_mut(service), BACKEND_STATS_4.get_ptr_mut(backend)]
    }
}

/// Adds in one step: other CPUs add to the same number. The target has no atomic types to say it with.
#[inline(always)]
fn add(place: *mut u64, amount: u64) {
    #[cfg(target_arch = "bpf")]
    // SAFETY: the caller's pointer is to an aligned number in a map's value.
    unsafe {
        core::arch::asm!(
            "lock *(u64 *)({place} + 0) += {amount}",
            place = in(reg) place,
            amount = in(reg) amount,
            options(nostack, preserves_flags),
        );
    }
    // SAFETY: as above.
    #[cfg(not(target_arch = "bpf"))]
    unsafe {
        *place += amount;
    }
}
