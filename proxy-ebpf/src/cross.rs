//! Between the families: packets for Services whose backends are of the other one. Behind the other programs, which pass on
//! what is not theirs: known flow or admission, as everywhere; then another IP header, and out at the next hop. Both ends see
//! this node alone: such a flow is masqueraded, and the kernel has no part in it, which would refuse its own address.
//!
//! Everything is kept in the maps of IPv6, where an IPv4 address stands as the mapped one. Its one's-complement sum is the
//! same, and so are the fields of the two pseudo-headers: a rewrite's deltas hold between the families, too.

mod admission;
mod header;
mod message;
mod next_hop;
mod wire;

use aya_ebpf::{
    bindings::{BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, TC_ACT_SHOT, TC_ACT_UNSPEC},
    helpers::generated as helpers,
};
use proxy_common::{
    addr::{Ipv6, Protocol},
    flow::Rewrite,
    node::Node,
    outcome::{Hook, Outcome},
    tuple::{Stage, Tuple},
};

use self::wire::Wire;
use crate::{
    admit::Admission,
    counters::count,
    datapath::{self, TCP, UDP},
    embryo, event,
    family::{Family, V4, V6},
    filter,
    flow::{self, Advance, Entry},
    host,
    packet::{ETHERNET, Packet, TcPacket},
    parse::{Ethernet, Ipv6Header, Summed, Tcp, TcpHeader, Udp, ethertype},
    reject, service, stats,
};

/// The packets that cross: skbs with a header of Ethernet.
pub(crate) type Skb = TcPacket<ETHERNET>;

/// The longest run of headers that is translated.
const HEADERS: usize = ETHERNET + size_of::<Ipv6Header>() + size_of::<TcpHeader>();

/// A classifier's answer.
pub(crate) type Answer = Result<i32, Outcome>;

/// For whoever comes next.
pub(crate) const PASS: Answer = Ok(TC_ACT_UNSPEC);

/// What becomes of a packet.
#[inline(always)]
pub fn run(hook: Hook, packet: &mut Skb) -> i32 {
    match link(hook, packet) {
        Ok(action) => action,
        Err(reason) => {
            count(hook, reason);
            event::packet::<Skb>(hook, reason, packet.context());
            TC_ACT_SHOT
        }
    }
}

#[inline(always)]
fn link(hook: Hook, packet: &mut Skb) -> Answer {
    packet.linearize(HEADERS);
    let Some(ethernet) = packet.at::<Ethernet>(0) else { return PASS };
    if packet.has_hidden_tag() {
        return PASS;
    }
    match ethernet.ethertype {
        ethertype::IPV4 => internet::<V4>(hook, packet),
        ethertype::IPV6 => internet::<V6>(hook, packet),
        _ => PASS,
    }
}

#[inline(always)]
fn internet<F: Wire>(hook: Hook, packet: &mut Skb) -> Answer {
    let Some(header) = packet.at::<F::Header>(ETHERNET) else { return PASS };
    let (saddr, daddr) = F::addresses(header);
    let (saddr, daddr) = (F::mixed(saddr), F::mixed(daddr));
    // On no wire an IPv4 address is mapped (RFC 4038 §4.2).
    if F::IS_V6 && (saddr.is_mapped() || daddr.is_mapped()) || !filter::may_be_ours(Stage::Cross, &saddr, &daddr) {
        return PASS;
    }
    if F::protocol(header) == F::ICMP {
        return message::relate::<F>(hook, packet);
    }
    let payload = match F::payload(header) {
        Ok(payload) if packet.holds(ETHERNET + size_of::<F::Header>() + usize::from(payload.length)) => payload,
        Ok(_) => return pass(hook, packet, Outcome::PassMalformed),
        Err(reason) => return pass(hook, packet, reason),
    };
    match payload.protocol {
        TCP => transport::<F, Tcp>(hook, packet, saddr, daddr, payload.length),
        UDP => transport::<F, Udp>(hook, packet, saddr, daddr, payload.length),
        _ => pass(hook, packet, Outcome::PassProtocol),
    }
}

#[inline(always)]
fn pass(hook: Hook, packet: &Skb, reason: Outcome) -> Answer {
    count(hook, reason);
    event::packet::<Skb>(hook, reason, packet.context());
    PASS
}

/// As in [`datapath`].
#[inline(always)]
fn transport<F: Wire, L: Summed>(hook: Hook, packet: &mut Skb, saddr: Ipv6, daddr: Ipv6, payload: u16) -> Answer {
    let offset = ETHERNET + size_of::<F::Header>();
    let Some(header) = packet.at::<L::Header>(offset) else { return pass(hook, packet, Outcome::PassMalformed) };
    if !L::is_sound(packet, header, offset, payload) {
        return pass(hook, packet, Outcome::PassMalformed);
    }
    let (sport, dport) = L::ports(header);
    let flags = L::flags(packet, header, offset);
    let key = Tuple::new(saddr, daddr, sport, dport, L::PROTOCOL, Stage::Cross);
    let Some(node) = service::node() else { return PASS };
    let bytes = size_of::<F::Header>() as u32 + u32::from(payload);

    let mut known = Advance::Afresh;
    let mut confirmed = flow::confirmed::<V6>(&key);
    if confirmed.is_none() {
        if let Some(entry) = flow::embryo::<V6>(&key) {
            known = datapath::advance::<V6, L>(hook, &key, entry, flags, node);
            if known == Advance::Keep
                && let Some(copy) = embryo::copy::<V6>(&key, entry)
            {
                stats::note_at_once::<V6>(copy, bytes);
                let answer = send::<F, L>(hook, packet, copy, node, payload);
                // Last, because the entry may move.
                embryo::hatch::<V6>(hook, &key, entry, flags);
                return answer;
            }
        }
        // It may have moved meanwhile.
        if !flow::is_opening(flags) {
            confirmed = flow::confirmed::<V6>(&key);
        }
    }
    if let Some(entry) = confirmed {
        known = datapath::advance::<V6, L>(hook, &key, entry, flags, node);
        if known == Advance::Keep {
            stats::note::<V6>(entry, bytes);
            return send::<F, L>(hook, packet, entry, node, payload);
        }
    }
    if matches!(hook, Hook::CrossUplinkIn) && host::is_another::<Skb>(packet.context()) {
        return PASS;
    }
    if known == Advance::Gone {
        return refuse::<F, L>(hook, packet, flags, Outcome::ResetGone);
    }
    match admission::admit(hook, &key, packet.context(), packet.ifindex()) {
        Admission::NotOurs => return PASS,
        Admission::Refused(reason) => return refuse::<F, L>(hook, packet, flags, reason),
        _ => {}
    }
    let Some(entry) = flow::half::<V6>(&key) else { return Err(Outcome::DropTableFull) };
    stats::opened::<V6>(entry.flow().service, entry.flow().backend);
    stats::note_at_once::<V6>(entry, bytes);
    send::<F, L>(hook, packet, entry, node, payload)
}

#[inline(always)]
fn refuse<F: Family, L: Summed>(hook: Hook, packet: &Skb, flags: u8, reason: Outcome) -> Answer {
    let verdict = reject::refuse::<Skb, F, L>(hook, packet.context(), flags, reason)?;
    Ok(next_hop::redirect(verdict.ifindex))
}

/// Turns the packet into one of the other family and sends it on, or back to tell its sender why not.
#[inline(always)]
fn send<F: Wire, L: Summed>(hook: Hook, packet: &mut Skb, entry: Entry<Ipv6>, node: &Node, payload: u16) -> Answer {
    let Some(header) = packet.at::<F::Header>(ETHERNET) else { return Err(Outcome::DropNotWritable) };
    if F::hop_limit(header) <= 1 {
        return message::tell::<F, L>(hook, packet.context(), F::EXPIRED);
    }
    if !next_hop::is_known(packet, L::PROTOCOL, entry, node) {
        return Err(Outcome::DropNotCrossed);
    }
    let mtu = entry.flow().next_hop.mtu;
    if !fits::<F, L>(packet, payload, mtu) {
        return message::tell::<F, L>(hook, packet.context(), F::too_long(mtu));
    }
    if L::PROTOCOL == Protocol::Udp && !F::IS_V6 && has_no_checksum::<F, L>(packet) {
        return Err(Outcome::DropNotCrossed);
    }
    if !header::turn::<F>(packet.context(), entry.address()) {
        return Err(Outcome::DropNotCrossed);
    }
    if !rewrite::<F::Other, L>(packet, &entry.flow().rewrite) {
        return Err(Outcome::DropNotWritable);
    }
    next_hop::leave::<F::Other>(packet, &entry.flow().next_hop)
}

/// Whether the packet, or each segment it will be cut into, is not too long for its way when it has the other header.
#[inline(always)]
fn fits<F: Wire, L: Summed>(packet: &Skb, payload: u16, mtu: u16) -> bool {
    let header = size_of::<<F::Other as Family>::Header>() as u32;
    let segment = packet.segment();
    let length = if segment == 0 {
        u32::from(payload)
    } else {
        let transport = packet.at::<L::Header>(ETHERNET + size_of::<F::Header>());
        transport.map_or(0, |transport| L::length(transport)) + segment
    };
    header + length <= u32::from(mtu)
}

#[inline(always)]
fn has_no_checksum<F: Wire, L: Summed>(packet: &Skb) -> bool {
    let header = packet.at::<L::Header>(ETHERNET + size_of::<F::Header>());
    header.is_none_or(|header| *L::fields(header).2 == 0)
}

/// Puts the new ports into a packet that has its new IP header, and mends its checksum. What the kernel may have summed up
/// over the whole packet knows the new header already, and hears of the checksum from the helper.
#[inline(always)]
fn rewrite<F: Wire, L: Summed>(packet: &mut Skb, rewrite: &Rewrite<Ipv6>) -> bool {
    let offset = ETHERNET + size_of::<F::Header>();
    let Some(header) = packet.at::<L::Header>(offset) else { return false };
    let (sport, dport, _) = L::fields(header);
    *sport = rewrite.sport;
    *dport = rewrite.dport;
    let (skb, csum) = (packet.context().cast(), (offset + L::CSUM) as u32);
    // A checksum of 0 stays 0 in UDP, and none becomes it.
    let base = if L::HAS_STATE { 0 } else { u64::from(BPF_F_MARK_MANGLED_0) };
    let (addresses, ports) = (u64::from(rewrite.addr_delta), u64::from(rewrite.port_delta));
    // SAFETY: a helper on the program's own context.
    let first = unsafe { helpers::bpf_l4_csum_replace(skb, csum, 0, addresses, base | u64::from(BPF_F_PSEUDO_HDR)) };
    // SAFETY: as above.
    first == 0 && unsafe { helpers::bpf_l4_csum_replace(skb, csum, 0, ports, base) } == 0
}
