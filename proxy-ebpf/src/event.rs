//! Tells whoever watches what happens. In: what a rare way has come to, and the packet, flow or socket it came with. Out: while
//! somebody watches, a record in `EVENTS`; else nothing, for a look at `WATCH`. Nothing here is on the way of an established flow.
//!
//! Records are written where they are to stand: none of them needs room on the stack. What is told of a packet is read of it
//! as it is at that moment, so that it has to be told before it is rewritten.

use core::ffi::c_void;

use aya_ebpf::helpers::generated as helpers;
use proxy_common::{
    addr::{Ipv4, Ipv6, Port, Protocol},
    event::{Event, watch},
    flow::Flow,
    lifetime::is_to_come,
    outcome::{Hook, Outcome},
    socket::{SocketOrigin, SocketTarget},
    tuple::Tuple,
};

use crate::{
    counters::count,
    datapath::{SCTP, TCP, UDP},
    family::{Family, V4, V6},
    kernel,
    maps::{EVENTS, WATCH},
    once::Once as _,
    packet::Packet,
    parse::{Payload, UdpHeader},
};

/// Tells of a packet. One that stands behind tags is not read: it is told of without addresses.
#[inline(never)]
pub fn packet<P: Packet>(hook: Hook, outcome: Outcome, context: *mut c_void) {
    if !is_watched() {
        return;
    }
    let packet = P::from_context(context);
    tell(hook, outcome, |event| {
        event.ifindex = packet.ifindex();
        match packet.at::<u8>(P::NETWORK).map_or(0, |first| *first >> 4) {
            4 => describe::<P, V4>(&packet, event),
            6 => describe::<P, V6>(&packet, event),
            _ => {}
        }
    });
}

/// Counts what has become of the drafted flow, and tells of it, under the tuple of the packet that it was drafted for.
#[inline(always)]
pub(crate) fn drafted<F: Family>(hook: Hook, outcome: Outcome, key: &Tuple<F::Addr>, ifindex: u32) {
    count(hook, outcome);
    if let Some(draft) = crate::flow::draft::<F>() {
        flow::<F>(hook, outcome, key, &draft.flow, ifindex);
    }
}

/// Tells of a flow, under the tuple of the packet that something happened to it with.
#[inline(always)]
pub(crate) fn flow<F: Family>(hook: Hook, outcome: Outcome, key: &Tuple<F::Addr>, flow: &Flow<F::Addr>, ifindex: u32) {
    F::Addr::tell(hook, outcome, key, flow, ifindex);
}

/// What [`flow`] does.
#[inline(always)]
pub(crate) fn tell_flow<F: Family>(
    hook: Hook,
    outcome: Outcome,
    key: &Tuple<F::Addr>,
    flow: &Flow<F::Addr>,
    ifindex: u32,
) {
    if !is_watched() {
        return;
    }
    tell(hook, outcome, |event| {
        event.family = family::<F>();
        event.ifindex = ifindex;
        event.saddr = mixed::<F>(key.saddr);
        event.daddr = mixed::<F>(key.daddr);
        event.sport = key.sport;
        event.dport = key.dport;
        event.proto = key.proto as u8;
        event.service = flow.service;
        event.backend = flow.backend;
        event.backend_generation = flow.backend_generation;
    });
}

/// Tells of a socket that names a frontend, with the backend it was given, or none.
#[inline(never)]
pub(crate) fn socket<F: Family>(hook: Hook, outcome: Outcome, frontend: &SocketTarget<F::Addr>) {
    if !is_watched() {
        return;
    }
    tell(hook, outcome, |event| {
        event.family = family::<F>();
        event.daddr = mixed::<F>(frontend.addr);
        event.dport = frontend.port;
        event.proto = frontend.proto as u8;
        event.service = frontend.service;
        event.backend = frontend.backend;
        event.backend_generation = frontend.backend_generation;
    });
}

/// Tells of a socket that was given no backend.
#[inline(always)]
pub(crate) fn unserved<F: Family>(hook: Hook, outcome: Outcome, addr: F::Addr, port: Port, proto: Protocol) {
    let nobody = SocketTarget {
        addr,
        port,
        proto,
        origin: SocketOrigin::Connected,
        backend: 0,
        backend_generation: 0,
        service: 0,
        netns: [0; 2],
    };
    socket::<F>(hook, outcome, &nobody);
}

#[inline(always)]
fn is_watched() -> bool {
    WATCH.get(watch::UNTIL).is_some_and(|until| *until != 0 && is_to_come(kernel::jiffies(), *until))
}

/// Enters a record, or counts it as lost.
#[inline(always)]
fn tell(hook: Hook, outcome: Outcome, fill: impl FnOnce(&mut Event)) {
    let Some(mut record) = EVENTS.reserve(0) else {
        if let Some(lost) = WATCH.get_ptr_mut(watch::LOST) {
            kernel::add(lost, 1);
        }
        return;
    };
    let event = record.write(Event { hook: hook as u8, outcome: outcome as u8, ..Event::default() });
    // SAFETY: takes no argument.
    event.at = unsafe { helpers::bpf_ktime_get_boot_ns() };
    fill(event);
    record.submit(0);
}

/// Who a packet is from and for. Ports are told of where they follow a plain IP header.
#[inline(always)]
fn describe<P: Packet, F: Family>(packet: &P, event: &mut Event) {
    let Some(header) = packet.at::<F::Header>(P::NETWORK) else { return };
    let (saddr, daddr) = F::addresses(header);
    event.family = family::<F>();
    event.saddr = mixed::<F>(saddr);
    event.daddr = mixed::<F>(daddr);
    event.proto = F::protocol(header);
    let Ok(Payload { protocol: TCP | UDP | SCTP, .. }) = F::payload(header) else { return };
    let Some(ports) = packet.at::<UdpHeader>(P::NETWORK + size_of::<F::Header>()) else { return };
    event.sport = ports.sport;
    event.dport = ports.dport;
}

#[inline(always)]
const fn family<F: Family>() -> u8 {
    if F::IS_V6 { 6 } else { 4 }
}

/// An address as records have it.
#[inline(always)]
fn mixed<F: Family>(address: F::Addr) -> Ipv6 {
    let words @ [first, ..] = F::words(address);
    if F::IS_V6 { Ipv6::from_words(words) } else { Ipv6::mapped(Ipv4 { octets: first.to_ne_bytes() }) }
}
