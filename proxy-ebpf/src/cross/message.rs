//! ICMP errors: those about packets between the families, which become errors of the other one, and those that are made here,
//! of a packet that is too long for its way or at the end of its life.

use core::ffi::c_void;

use proxy_common::{
    addr::{Address as _, Ipv6, Protocol},
    flow::Flow,
    outcome::{Hook, Outcome},
    tuple::{Stage, Tuple},
};

use super::{
    Answer, PASS, Skb, header, next_hop,
    wire::{Message, Wire},
};
use crate::{
    checksum::{self, fold, half},
    counters::count,
    datapath::{TCP, UDP},
    event,
    family::{Family, V6},
    flow::{self, Entry},
    packet::{ETHERNET, Packet},
    parse::{Ethernet, IcmpHeader, Summed, UdpHeader},
    service,
};

/// What is quoted of a transport header: the ports, and what identifies the packet.
const QUOTED: usize = size_of::<UdpHeader>();

/// Where a message of a family begins.
#[inline(always)]
const fn start<F: Family>() -> usize {
    ETHERNET + size_of::<F::Header>()
}

/// Where the packet it quotes begins.
#[inline(always)]
const fn quote<F: Family>() -> usize {
    start::<F>() + size_of::<IcmpHeader>()
}

/// Where the quoted transport header begins.
#[inline(always)]
const fn quoted_transport<F: Family>() -> usize {
    quote::<F>() + size_of::<F::Header>()
}

/// Turns an error about a packet of a known flow into one of the other family; all else goes on as it is.
#[inline(always)]
pub(super) fn relate<F: Wire>(hook: Hook, packet: &mut Skb) -> Answer {
    packet.linearize(quoted_transport::<F>() + QUOTED);
    let flow = look_up::<F>(packet.context());
    if flow.is_null() {
        return PASS;
    }
    let entry = Entry::at(flow);
    let Some(node) = service::node() else { return PASS };
    // Of the one protocol and of the other the way is the same.
    if !next_hop::is_known(packet, Protocol::Udp, entry, node) {
        return Err(Outcome::DropNotCrossed);
    }
    event::packet::<Skb>(hook, Outcome::Related, packet.context());
    if !translate::<F>(packet.context(), flow) {
        return Err(Outcome::DropNotWritable);
    }
    count(hook, Outcome::Related);
    next_hop::leave::<F::Other>(packet, &entry.flow().next_hop)
}

/// What an error says, in the words of the other family.
#[inline(always)]
fn said<F: Wire>(packet: &Skb) -> Option<Message> {
    let IcmpHeader { kind, code, rest, .. } = *packet.at::<IcmpHeader>(start::<F>())?;
    F::translated(Message { kind, code, rest })
}

/// The flow whose packets go where the error is for, if its packet was sent by whom it is addressed to. The quote has source and
/// destination the other way round.
#[inline(never)]
fn look_up<F: Wire>(context: *mut c_void) -> *mut Flow<Ipv6> {
    let packet = Skb::from_context(context);
    find::<F>(&packet).map_or(core::ptr::null_mut(), Entry::address)
}

#[inline(always)]
fn find<F: Wire>(packet: &Skb) -> Option<Entry<Ipv6>> {
    said::<F>(packet)?;
    let ip = packet.at::<F::Header>(ETHERNET)?;
    let length = F::payload(ip).ok()?.length;
    let quoted = packet.at::<F::Header>(quote::<F>())?;
    let proto = match F::payload(quoted).ok()?.protocol {
        TCP => Protocol::Tcp,
        UDP => Protocol::Udp,
        _ => return None,
    };
    let ports = packet.at::<UdpHeader>(quoted_transport::<F>())?;
    let (sender, receiver) = F::addresses(quoted);
    let (sender, receiver) = (F::mixed(sender), F::mixed(receiver));
    let is_whole = usize::from(length) >= size_of::<IcmpHeader>() + size_of::<F::Header>() + QUOTED;
    if !is_whole || F::mixed(F::addresses(ip).1).words() != sender.words() {
        return None;
    }
    flow::half::<V6>(&Tuple::new(receiver, sender, ports.dport, ports.sport, proto, Stage::Cross))
}

/// Builds the error anew: it quotes the packet that was sent, as far as it is known by its ports and the four bytes after them.
#[inline(never)]
fn translate<F: Wire>(context: *mut c_void, flow: *mut Flow<Ipv6>) -> bool {
    let mut packet = Skb::from_context(context);
    let Some(message) = said::<F>(&packet) else { return false };
    let Some(quoted) = packet.at::<F::Header>(quote::<F>()) else { return false };
    let mut carried = F::carried(quoted);
    carried.keep_hop_limit();
    let Some(ports) = packet.at::<UdpHeader>(quoted_transport::<F>()) else { return false };
    let rest = [ports.length, ports.csum];
    // What was summed up over the whole packet is forgotten when it grows.
    if !header::change::<F::Other>(context)
        || !packet.cut(start::<F::Other>())
        || !packet.cut(quoted_transport::<F::Other>() + QUOTED)
    {
        return false;
    }
    let to = &Entry::at(flow).flow().rewrite;
    let Some(ip) = packet.at::<<F::Other as Family>::Header>(ETHERNET) else { return false };
    let Some(icmp) = packet.at::<IcmpHeader>(start::<F::Other>()) else { return false };
    let Some(quoted) = packet.at::<<F::Other as Family>::Header>(quote::<F::Other>()) else { return false };
    let Some(ports) = packet.at::<UdpHeader>(quoted_transport::<F::Other>()) else { return false };
    let (saddr, daddr) = (F::Other::wire(&to.saddr), F::Other::wire(&to.daddr));
    let length = (quoted_transport::<F::Other>() + QUOTED - start::<F::Other>()) as u16;
    F::Other::compose(ip, saddr, daddr, F::Other::ICMP, length);
    *quoted = F::Other::carry(&carried, &to.daddr, &to.saddr);
    *ports = UdpHeader { sport: to.dport, dport: to.sport, length: rest[0], csum: rest[1] };
    let sum = u32::from(ports.sport.word()) + u32::from(ports.dport.word()) + u32::from(rest[0]) + u32::from(rest[1]);
    finish::<F::Other>(icmp, message, &to.saddr, &to.daddr, length, F::Other::sum(quoted) + sum);
    true
}

/// Writes an error's own header. `sum` is that of what it quotes.
#[inline(always)]
fn finish<F: Wire>(icmp: &mut IcmpHeader, message: Message, saddr: &Ipv6, daddr: &Ipv6, length: u16, sum: u32) {
    let Message { kind, code, rest } = message;
    (icmp.kind, icmp.code, icmp.rest) = (kind, code, rest);
    let pseudo = if F::IS_V6 {
        saddr.sum() + daddr.sum() + u32::from(u16::from(F::ICMP).to_be()) + u32::from(length.to_be())
    } else {
        0
    };
    let said = u32::from(u16::from_ne_bytes([kind, code])) + u32::from(rest[0]) + u32::from(rest[1]);
    icmp.csum = !fold(pseudo + said + sum);
}

/// Answers a packet with an ICMP error about itself, as its receiver.
#[inline(always)]
pub(super) fn tell<F: Wire, L: Summed>(hook: Hook, context: *mut c_void, message: Message) -> Answer {
    let packet = Skb::from_context(context);
    event::packet::<Skb>(hook, Outcome::Returned, context);
    if !answer::<F, L>(context, message.word(), u32::from(message.rest[1])) {
        return Err(Outcome::DropNotWritable);
    }
    count(hook, Outcome::Returned);
    Ok(next_hop::redirect(packet.ifindex()))
}

/// Makes a packet the error about itself, which quotes its IP and transport headers. As in [`crate::reject`], the quoted checksum is
/// what it becomes when the kernel completes it: half of the rest's sum.
#[inline(never)]
fn answer<F: Wire, L: Summed>(context: *mut c_void, what: u32, mtu: u32) -> bool {
    let mut packet = Skb::from_context(context);
    let header = size_of::<F::Header>();
    let quote = header + size_of::<L::Header>();
    let Some(ethernet) = packet.at::<Ethernet>(0) else { return false };
    let (dmac, smac) = (ethernet.smac, ethernet.dmac);
    if !packet.cut(ETHERNET + quote) || !packet.make_room(start::<F>() + size_of::<IcmpHeader>() - ETHERNET) {
        return false;
    }
    let Some(ethernet) = packet.at::<Ethernet>(0) else { return false };
    *ethernet = Ethernet { dmac, smac, ethertype: F::ETHERTYPE };
    let Some(ip) = packet.at::<F::Header>(ETHERNET) else { return false };
    let Some(icmp) = packet.at::<IcmpHeader>(start::<F>()) else { return false };
    let Some(quoted) = packet.at::<F::Header>(self::quote::<F>()) else { return false };
    let Some(transport) = packet.at::<L::Header>(quoted_transport::<F>()) else { return false };
    let (client, frontend) = F::addresses(quoted);
    let length = (size_of::<IcmpHeader>() + quote) as u16;
    F::compose(ip, frontend, client, F::ICMP, length);
    *L::fields(transport).2 = 0;
    let sum = sum_of(transport);
    let completed = !half(fold(sum));
    *L::fields(transport).2 = completed;
    let message = Message::from_words(what, mtu);
    let sum = F::sum(quoted) + sum + u32::from(completed);
    finish::<F>(icmp, message, &F::mixed(frontend), &F::mixed(client), length, sum);
    true
}

/// The sum of a transport header without options.
#[inline(always)]
fn sum_of<H>(header: &H) -> u32 {
    const { assert!(size_of::<H>() == 20 || size_of::<H>() == 8) };
    let words = core::ptr::from_ref(header);
    if size_of::<H>() == 20 {
        // SAFETY: the header is twenty bytes of plain data.
        checksum::sum::<5>(unsafe { &*words.cast() })
    } else {
        // SAFETY: the header is eight bytes of plain data.
        checksum::sum::<2>(unsafe { &*words.cast() })
    }
}
