//! Restores the packet before the program under test gets it: a test run repeats a program over what it left of the packet,
//! which for a balancer is a packet of another kind.
//!
//! The next flow is read from a list that lies in the order of the runs, so that reading it costs the same few cycles in every
//! measurement, that of the null program included, and is not what is measured.

use aya_ebpf::programs::{TcContext, XdpContext};
use proxy_common::addr::{Ipv4, Ipv6};

use crate::{
    contract::{Ends, Plan, RESTORED},
    maps::{CLIENTS, PLAN, TC_TARGET, XDP_TARGET},
    packet::Packet,
    wire::{change, mend},
};

/// Where addresses and ports stand in a frame.
const V4: (usize, usize) = (26, 34);
const V6: (usize, usize) = (22, 54);

/// Where an IPv4 header in a frame has its checksum, which the kernel looks at.
const CSUM: usize = 24;

/// Source ports of flows never seen: the bits of a number that they take.
const PORT_BITS: u32 = 14;

#[repr(C)]
struct Addresses<A> {
    source: A,
    destination: A,
}

/// Writes the next packet over whatever is there. `false` when it is too short.
#[inline(always)]
pub fn restore<P: Packet>(packet: &P) -> bool {
    let Some(plan) = PLAN.get_ptr_mut(0) else { return false };
    // SAFETY: map memory outlives the program's run; one program runs at a time.
    let plan = unsafe { &mut *plan };
    let Some(bytes) = packet.at::<[u64; RESTORED / 8]>(0) else { return false };
    // SAFETY: as many bytes, of which any are such words; the plan lies at an address that is a multiple of eight.
    *bytes = unsafe { *(&raw const plan.bytes).cast() };
    if plan.first == plan.end { renew(packet, plan) } else { repeat(packet, plan) }
}

/// The next flow of the list.
#[inline(always)]
fn repeat<P: Packet>(packet: &P, plan: &mut Plan) -> bool {
    let Some(ends) = CLIENTS.get(plan.next) else { return false };
    let next = plan.next + 1;
    plan.next = if next >= plan.end { plan.first } else { next };
    write(packet, plan.is_v6, ends)
}

/// A flow that never was: the source address and port of the first one, and the bits of a number.
#[inline(always)]
fn renew<P: Packet>(packet: &P, plan: &mut Plan) -> bool {
    let Some(first) = CLIENTS.get(plan.first) else { return false };
    let mut ends = *first;
    let number = plan.fresh;
    plan.fresh = number.wrapping_add(1);
    let host = (number >> PORT_BITS).to_be();
    let place = if plan.is_v6 == 0 { 0 } else { 3 };
    add(&mut ends.saddr, place, host);
    let port = u16::from_be_bytes(ends.sport.octets) | (number as u16 & ((1 << PORT_BITS) - 1));
    ends.sport.octets = port.to_be_bytes();
    if plan.is_v6 == 0 {
        let Some(csum) = packet.at::<u16>(CSUM) else { return false };
        *csum = mend(*csum, change(0, host));
    }
    write(packet, plan.is_v6, &ends)
}

/// Sets bits of a word of an address, which has none of them.
#[inline(always)]
fn add(address: &mut Ipv6, place: usize, bits: u32) {
    let mut words = address.words();
    if let Some(word) = words.get_mut(place) {
        *word |= bits;
    }
    let [a, b, c, d] = words.map(u32::to_ne_bytes);
    for (to, from) in address.octets.iter_mut().zip([a, b, c, d].as_flattened()) {
        *to = *from;
    }
}

#[inline(always)]
fn write<P: Packet>(packet: &P, is_v6: u32, ends: &Ends) -> bool {
    if is_v6 == 0 {
        let Some(addresses) = packet.at::<Addresses<Ipv4>>(V4.0) else { return false };
        *addresses = Addresses { source: first(&ends.saddr), destination: first(&ends.daddr) };
        ports(packet, V4.1, ends)
    } else {
        let Some(addresses) = packet.at::<Addresses<Ipv6>>(V6.0) else { return false };
        *addresses = Addresses { source: ends.saddr, destination: ends.daddr };
        ports(packet, V6.1, ends)
    }
}

/// The IPv4 address in the place of one of IPv6.
#[inline(always)]
fn first(address: &Ipv6) -> Ipv4 {
    let [word, ..] = address.words();
    Ipv4 { octets: word.to_ne_bytes() }
}

#[inline(always)]
fn ports<P: Packet>(packet: &P, offset: usize, ends: &Ends) -> bool {
    let Some(ports) = packet.at::<crate::wire::Ports>(offset) else { return false };
    ports.sport = ends.sport;
    ports.dport = ends.dport;
    true
}

/// Calls the XDP program under test. Comes back only if there is none.
#[inline(always)]
pub fn call_xdp(context: &XdpContext) {
    // SAFETY: nothing here is to be dropped.
    unsafe { XDP_TARGET.tail_call(context, 0) };
}

/// Calls the classifier under test. Comes back only if there is none.
#[inline(always)]
pub fn call_tc(context: &TcContext) {
    // SAFETY: nothing here is to be dropped.
    unsafe { TC_TARGET.tail_call(context, 0) };
}
