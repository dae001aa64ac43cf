//! Session affinity: a client stays with its backend from one connection to the next, while the backend is one that this
//! traffic may have. Refreshed by new connections only.

use core::ffi::c_void;

use aya_ebpf::{bindings::BPF_ANY, helpers::generated as helpers};
use proxy_common::{
    backend::{Backend, BackendId},
    service::{Affinity, Client, Range, Service},
    tuple::Tuple,
};

use crate::{clock::silence, family::Family, kernel, maps::SLOTS, pick, service};

/// The slot for a new flow: that of the backend the client has, else one picked and remembered. The range must not be empty.
/// In line, and its steps are not: so they share one place on the stack.
#[inline(always)]
pub(crate) fn slot<F: Family>(service: &Service, range: Range, key: &Tuple<F::Addr>) -> u32 {
    let known = recall::<F>(service, range, &key.saddr);
    let slot = if known == NONE { pick::slot::<F>(service, range, key) } else { known };
    remember::<F>(service, slot, &key.saddr);
    slot
}

/// No slot has this number.
const NONE: u32 = u32::MAX;

/// The slot in the range that holds the backend the client has, or [`NONE`].
#[inline(never)]
fn recall<F: Family>(service: &Service, range: Range, client: &F::Addr) -> u32 {
    let Some(node) = service::node() else { return NONE };
    // SAFETY: an entry may be given to another client after an eviction, not one looked up a moment ago.
    let Some(known) = (unsafe { F::affinities().get(&Client { addr: *client, service: service.index, pad: 0 }) })
    else {
        return NONE;
    };
    if silence(kernel::jiffies(), known.last_used) > service.affinity_seconds.saturating_mul(node.jiffies_per_second) {
        return NONE;
    }
    let is_same = |backend: &Backend<F::Addr>| backend.generation == known.backend_generation;
    if !F::backends().get(known.backend).is_some_and(is_same) {
        return NONE;
    }
    if known.slot.wrapping_sub(range.first) < range.count && SLOTS.get(known.slot) == Some(&known.backend) {
        return known.slot;
    }
    seek(known.backend, range)
}

/// A search in progress, as the loop hands it to each step.
struct Search {
    backend: BackendId,
    first: u32,
    found: u32,
}

/// The first slot of the range that holds the backend, or [`NONE`].
#[inline(always)]
fn seek(backend: BackendId, range: Range) -> u32 {
    let mut search = Search { backend, first: range.first, found: NONE };
    let step: unsafe extern "C" fn(u64, *mut Search) -> i64 = step;
    // SAFETY: the callback has the signature the helper asks for, and the search outlives the call.
    unsafe { helpers::bpf_loop(range.count, step as *mut c_void, (&raw mut search).cast(), 0) };
    search.found
}

/// Looks at one slot. 1 ends the loop.
unsafe extern "C" fn step(index: u64, search: *mut Search) -> i64 {
    // SAFETY: this is what `seek` put on its stack, and nobody else looks at it during the loop.
    let search = unsafe { &mut *search };
    let slot = search.first.wrapping_add(index as u32);
    if SLOTS.get(slot) != Some(&search.backend) {
        return 0;
    }
    search.found = slot;
    1
}

/// Keeps the client with the backend of a slot, from now.
#[inline(never)]
fn remember<F: Family>(service: &Service, slot: u32, client: &F::Addr) {
    let Some(&backend) = SLOTS.get(slot) else { return };
    let Some(target) = F::backends().get(backend) else { return };
    let affinity = Affinity { backend, backend_generation: target.generation, slot, last_used: kernel::jiffies() };
    let client = Client { addr: *client, service: service.index, pad: 0 };
    let _ = F::affinities().insert(&client, &affinity, u64::from(BPF_ANY));
}
