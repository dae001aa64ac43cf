//! From a range of slots to one of them, in the way the Service asks for. What the slots hold is the agent's affair.

use proxy_common::{
    service::{Pick, Range, Service, flag},
    tuple::Tuple,
};

use crate::{
    active,
    family::Family,
    hash::{Hash, scale},
    kernel,
    maps::SLOTS,
};

/// The slot for a new flow. The range must not be empty.
#[inline(never)]
pub(crate) fn slot<F: Family>(service: &Service, range: Range, key: &Tuple<F::Addr>) -> u32 {
    let index = match service.pick {
        Pick::Random => scale(kernel::random(), range.count),
        Pick::Hash if service.flags & flag::AFFINITY == 0 => scale(flow_hash::<F>(key), range.count),
        Pick::Hash | Pick::SourceHash => scale(client_hash::<F>(key), range.count),
        Pick::RoundRobin => turn::<F>(service.index, range.count),
        Pick::LeastConnections => lesser::<F>(range),
    };
    range.first.wrapping_add(index)
}

#[inline(always)]
fn client_hash<F: Family>(key: &Tuple<F::Addr>) -> u32 {
    Hash::EMPTY.words(F::words(key.saddr)).finish()
}

/// Of all that a flow is known by.
#[inline(always)]
pub(crate) fn flow_hash<F: Family>(key: &Tuple<F::Addr>) -> u32 {
    let ports = u32::from(key.sport.word()) << 16 | u32::from(key.dport.word());
    Hash::EMPTY.words(F::words(key.saddr)).words(F::words(key.daddr)).word(ports).word(key.proto as u32).finish()
}

/// One after the other, whichever CPU a flow comes by. The turn is kept by Service and not by range, so that a Service that
/// is used by two ranges at once takes turns over both less evenly.
#[inline(always)]
fn turn<F: Family>(service: u32, count: u32) -> u32 {
    F::turns().get_ptr_mut(service).map_or(0, |place| (kernel::next(place) % u64::from(count)) as u32)
}

/// The one with fewer active flows of two different ones: nearly as good as looking at all of them, and no herd runs to the
/// one that has just come.
#[inline(always)]
fn lesser<F: Family>(range: Range) -> u32 {
    let one = scale(kernel::random(), range.count);
    if range.count < 2 {
        return one;
    }
    let behind = one + 1 + scale(kernel::random(), range.count - 1);
    let other = if behind < range.count { behind } else { behind - range.count };
    if load::<F>(range.first.wrapping_add(other)) < load::<F>(range.first.wrapping_add(one)) { other } else { one }
}

#[inline(always)]
fn load<F: Family>(slot: u32) -> u32 {
    SLOTS.get(slot).map_or(u32::MAX, |id| active::count::<F>(*id))
}
