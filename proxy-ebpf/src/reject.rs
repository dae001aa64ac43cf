//! Answers in the place of nobody: TCP gets a RST, SCTP an ABORT, UDP an ICMP error. In comes the packet as the client sent it;
//! it is turned into its answer and goes back out of the device it came by.
//!
//! An skb's checksum may be partial: then whoever sends it sums up everything from the transport header that was there in
//! the beginning to the end, and writes the complement of that into the checksum field of that header, over what we
//! wrote. A program cannot see which skbs are like that. So the field holds what the kernel would compute: a number
//! that is right either way.

use core::{ffi::c_void, mem};

use proxy_common::{
    addr::{Address as _, Mac, Protocol},
    outcome::{Hook, Outcome},
};

use crate::{
    checksum::{self, fold, half},
    counters::count,
    datapath::{TCP, UDP},
    event,
    family::Family,
    output::Verdict,
    packet::Packet,
    parse::{Ethernet, IcmpHeader, TCP_CSUM, TcpHeader, Transport, UDP_CSUM, UdpHeader, tcp},
    sctp,
};

const TCP_WORDS: usize = size_of::<TcpHeader>() / size_of::<u32>();
const UDP_WORDS: usize = size_of::<UdpHeader>() / size_of::<u32>();

/// What becomes of a packet that is not served: an answer if the reason has one and the packet may get one, else nothing.
/// Out of line, as everything rare.
#[inline(never)]
pub(crate) fn refuse<P: Packet, F: Family, L: Transport>(
    hook: Hook,
    context: *mut c_void,
    flags: u8,
    reason: Outcome,
) -> Result<Verdict, Outcome> {
    let packet = P::from_context(context);
    if !is_told(reason) || !deserves_answer::<P, F>(&packet, flags) {
        return Err(reason);
    }
    // Before it becomes its own answer.
    event::packet::<P>(hook, reason, context);
    let is_built = match L::PROTOCOL {
        Protocol::Tcp => reset::<P, F>(context),
        Protocol::Sctp => sctp::abort::<P, F>(context),
        _ => quote::<P, F, UDP_WORDS>(context, F::PORT_UNREACHABLE, 0, UDP_CSUM),
    };
    if !is_built {
        return Err(Outcome::DropNotWritable);
    }
    count(hook, reason);
    Ok(Verdict::redirect(packet.ifindex()))
}

/// What becomes of a packet that is too long for its way: its sender is told of the path MTU, if that can be. Out of line, as
/// everything rare.
#[inline(never)]
pub(crate) fn too_long<P: Packet, F: Family>(context: *mut c_void, mtu: u16) -> Result<Verdict, Outcome> {
    const REASON: Outcome = Outcome::DropTooLong;
    let packet = P::from_context(context);
    let field = match packet.at::<F::Header>(P::NETWORK).map_or(0, |ip| F::protocol(ip)) {
        TCP => TCP_CSUM,
        UDP => UDP_CSUM,
        _ => return Err(REASON),
    };
    if !deserves_answer::<P, F>(&packet, 0) {
        return Err(REASON);
    }
    let hook = if P::IS_FRAME { Hook::UplinkXdp } else { Hook::UplinkIn };
    event::packet::<P>(hook, REASON, context);
    // What is too long has more than a TCP header.
    if !quote::<P, F, TCP_WORDS>(context, F::TOO_LONG, mtu, field) {
        return Err(REASON);
    }
    count(hook, REASON);
    Ok(Verdict::redirect(packet.ifindex()))
}

/// Whether the client is told, and not left to time out.
#[inline(always)]
fn is_told(reason: Outcome) -> bool {
    matches!(reason, Outcome::RejectNoEndpoint | Outcome::RejectNoPort | Outcome::ResetGone)
}

/// Neither a RST nor what many have got, or what names no sender, is answered (RFC 9293 §3.10.7.1, RFC 1122 §3.2.2,
/// RFC 4443 §2.4), nor a fragment, whose length nobody knows. Errors do not come here.
#[inline(always)]
fn deserves_answer<P: Packet, F: Family>(packet: &P, flags: u8) -> bool {
    const GROUP: u8 = 1;
    let Some(ip) = packet.at::<F::Header>(P::NETWORK) else { return false };
    flags & tcp::RST == 0
        && (P::NETWORK == 0 || packet.at::<Ethernet>(0).is_some_and(|ethernet| ethernet.dmac.octets[0] & GROUP == 0))
        && F::payload(ip).is_ok()
        && F::addresses(ip).0.is_one_host()
}

/// Makes a TCP segment its own RST.
///
/// The window means nothing in a RST, so it is what makes the checksum a number that completing does not change. With P
/// the sum of the pseudo-header, R that of the TCP header without window and checksum, and the window −2P − R: a checksum
/// of P is right, because P + R + window = −P; and completing gives the complement of R + window + P, which is P again.
#[inline(always)]
fn reset<P: Packet, F: Family>(context: *mut c_void) -> bool {
    const LENGTH: u16 = size_of::<TcpHeader>() as u16;
    let mut packet = P::from_context(context);
    let transport = P::NETWORK + size_of::<F::Header>();
    if !packet.cut(transport + size_of::<TcpHeader>()) {
        return false;
    }
    if !turn_link_round(&packet) {
        return false;
    }
    let Some(ip) = packet.at::<F::Header>(P::NETWORK) else { return false };
    let Some(segment) = packet.at::<TcpHeader>(transport) else { return false };
    // What the headers say is what it was before it was cut.
    let Ok(payload) = F::payload(ip) else { return false };
    let (client, frontend) = F::addresses(ip);
    F::compose(ip, frontend, client, Protocol::Tcp as u8, LENGTH);
    turn(segment, payload.length);
    let pseudo = u32::from(fold(pseudo_header::<F>(client, frontend, Protocol::Tcp as u8, LENGTH)));
    segment.csum = pseudo as u16;
    segment.window = !fold(2 * pseudo + tcp_sum(segment));
    true
}

/// Sends the frame back, if it is one: no other packet says where it came from on its link.
#[inline(always)]
pub(crate) fn turn_link_round<P: Packet>(packet: &P) -> bool {
    if P::NETWORK != 0 {
        let Some(ethernet) = packet.at::<Ethernet>(0) else { return false };
        mem::swap(&mut ethernet.dmac, &mut ethernet.smac);
    }
    true
}

/// RFC 9293 §3.10.7.1, "If the state is CLOSED". Window and urgent pointer are left 0.
#[inline(always)]
fn turn(segment: &mut TcpHeader, payload: u16) {
    mem::swap(&mut segment.sport, &mut segment.dport);
    if segment.flags & tcp::ACK != 0 {
        segment.sequence = segment.acknowledged;
        segment.acknowledged = 0;
        segment.flags = tcp::RST;
    } else {
        let text = u32::from(payload).wrapping_sub(u32::from(segment.data_offset >> 4) * 4);
        let marks = u32::from(segment.flags & tcp::SYN != 0) + u32::from(segment.flags & tcp::FIN != 0);
        let next = u32::from_be(segment.sequence).wrapping_add(text).wrapping_add(marks);
        segment.sequence = 0;
        segment.acknowledged = next.to_be();
        segment.flags = tcp::RST | tcp::ACK;
    }
    segment.data_offset = (size_of::<TcpHeader>() as u8 / 4) << 4;
    segment.window = 0;
    segment.urgent = 0;
}

/// The sum of a header whose window and urgent pointer are 0, without its checksum.
#[inline(always)]
fn tcp_sum(segment: &TcpHeader) -> u32 {
    let halves = |word: u32| (word & 0xffff) + (word >> 16);
    u32::from(segment.sport.word())
        + u32::from(segment.dport.word())
        + halves(segment.sequence)
        + halves(segment.acknowledged)
        + u32::from(u16::from_ne_bytes([segment.data_offset, segment.flags]))
}

/// Makes a packet the ICMP error about itself, which quotes its IP header and the first `WORDS` words behind it. In these is a
/// checksum, at `field`.
///
/// Completing would write into that, and nobody looks at it. With S the sum of what is quoted of the transport without it, it
/// is −S/2: completing gives the complement of S − S/2, which is the same.
#[inline(always)]
fn quote<P: Packet, F: Family, const WORDS: usize>(
    context: *mut c_void,
    (kind, code): (u8, u8),
    mtu: u16,
    field: usize,
) -> bool {
    let mut packet = P::from_context(context);
    let header = size_of::<F::Header>();
    let quote = header + size_of::<[u32; WORDS]>();
    let room = header + size_of::<IcmpHeader>();
    let macs = if P::NETWORK == 0 {
        (Mac::ZERO, Mac::ZERO)
    } else {
        let Some(ethernet) = packet.at::<Ethernet>(0) else { return false };
        (ethernet.smac, ethernet.dmac)
    };
    if !packet.cut(P::NETWORK + quote) || !packet.make_room(room) {
        return false;
    }
    if P::NETWORK != 0 {
        let Some(ethernet) = packet.at::<Ethernet>(0) else { return false };
        *ethernet = Ethernet { dmac: macs.0, smac: macs.1, ethertype: F::ETHERTYPE };
    }
    let transport = P::NETWORK + room + header;
    let Some(ip) = packet.at::<F::Header>(P::NETWORK) else { return false };
    let Some(icmp) = packet.at::<IcmpHeader>(P::NETWORK + header) else { return false };
    let Some(quoted) = packet.at::<F::Header>(P::NETWORK + room) else { return false };
    if !P::IS_FRAME {
        let Some(csum) = packet.at::<u16>(transport + field) else { return false };
        *csum = 0;
        let Some(words) = packet.at::<[u32; WORDS]>(transport) else { return false };
        *csum = !half(fold(checksum::sum(words)));
    }
    let Some(words) = packet.at::<[u32; WORDS]>(transport) else { return false };
    let (client, frontend) = F::addresses(quoted);
    let length = (size_of::<IcmpHeader>() + quote) as u16;
    F::compose(ip, frontend, client, F::ICMP, length);
    (icmp.kind, icmp.code) = (kind, code);
    icmp.rest = [0, mtu.to_be()];
    let pseudo = if F::IS_V6 { pseudo_header::<F>(client, frontend, F::ICMP, length) } else { 0 };
    let said = u32::from(u16::from_ne_bytes([icmp.kind, icmp.code])) + u32::from(mtu.to_be());
    icmp.csum = !fold(pseudo + said + F::sum(quoted) + checksum::sum(words));
    true
}

/// The sum of what a transport checksum takes from the IP header.
#[inline(always)]
fn pseudo_header<F: Family>(one: F::Addr, other: F::Addr, protocol: u8, length: u16) -> u32 {
    one.sum() + other.sum() + u32::from(u16::from(protocol).to_be()) + u32::from(length.to_be())
}
