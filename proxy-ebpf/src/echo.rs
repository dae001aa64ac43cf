//! Pings of Services. No host has a Service's address, so that the echo request is made its own reply here and goes back out
//! of the device it came by. An address that the node has as well is left to the kernel, one that no Service has to nobody.

use core::{ffi::c_void, mem};

use proxy_common::{
    addr::Address as _,
    outcome::{Hook, Outcome},
};

use crate::{
    checksum,
    counters::count,
    event,
    family::Family,
    host::GROUP,
    output::Verdict,
    packet::Packet,
    parse::{Ethernet, IcmpHeader},
    service,
};

/// Answers an echo request, or passes it on. Out of line, as everything rare.
#[inline(never)]
pub(crate) fn answer<P: Packet, F: Family>(hook: Hook, context: *mut c_void) -> Verdict {
    let mut packet = P::from_context(context);
    let Some(ip) = packet.at::<F::Header>(P::NETWORK) else { return Verdict::PASS };
    let Some(icmp) = packet.at::<IcmpHeader>(P::NETWORK + size_of::<F::Header>()) else { return Verdict::PASS };
    let (client, frontend) = F::addresses(ip);
    let is_asked = icmp.code == 0 && client.is_one_host();
    if !is_asked || !service::is_virtual::<F>(&frontend) {
        return Verdict::PASS;
    }
    if P::NETWORK != 0 {
        let Some(ethernet) = packet.at::<Ethernet>(0) else { return Verdict::PASS };
        if ethernet.dmac.octets[0] & GROUP != 0 {
            return Verdict::PASS;
        }
        mem::swap(&mut ethernet.dmac, &mut ethernet.smac);
    }
    event::packet::<P>(hook, Outcome::Echoed, context);
    // What is swapped sums up to the same.
    F::set_addresses(ip, frontend, client, 0);
    let change = F::renew_hop_limit(ip);
    let word = |kind| u32::from(u16::from_ne_bytes([kind, 0]));
    icmp.kind = F::ECHO.1;
    icmp.csum = checksum::update(icmp.csum, u32::from(checksum::delta(word(F::ECHO.0), word(F::ECHO.1))));
    if F::IS_V6 {
        packet.account(change);
    }
    count(hook, Outcome::Echoed);
    Verdict::redirect(packet.ifindex())
}
