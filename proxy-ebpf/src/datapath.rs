//! A packet's way, the same at every hook: parse → could it be ours → flow → (if unknown: admit) → rewrite → output.
//! What is not ours or not understood is passed on untouched; `Err` is a drop with its reason.

use core::ops::ControlFlow;

use proxy_common::{
    addr::{Address as _, Protocol},
    flow::Direction,
    node::Node,
    outcome::{Hook, Outcome},
    tuple::{Stage, Tuple},
};

use crate::{
    admit::{self, Admission},
    counters::count,
    dispatch, embryo, event,
    family::{Family, V4, V6},
    filter,
    flow::{self, Advance, Entry},
    headers, host, icmp,
    output::{self, Verdict},
    packet::Packet,
    parse::{Ethernet, Ipv6Header, Payload, Tcp, TcpHeader, Transport, Udp, ethertype},
    rehearsal, reject,
    sctp::Sctp,
    service, stats, vlan,
};

/// The longest run of headers that plain packets have, without that of the link.
const HEADERS: usize = size_of::<Ipv6Header>() + size_of::<TcpHeader>();

pub(crate) const TCP: u8 = Protocol::Tcp as u8;
pub(crate) const UDP: u8 = Protocol::Udp as u8;
pub(crate) const SCTP: u8 = Protocol::Sctp as u8;

/// What becomes of a packet.
#[inline(always)]
pub fn run<P: Packet>(hook: Hook, stage: Stage, packet: &mut P) -> Result<Verdict, Outcome> {
    packet.linearize(P::NETWORK + HEADERS);
    let Some(ethernet) = packet.at::<Ethernet>(0) else { return pass(hook, packet, Outcome::PassMalformed) };
    let mut ethertype = ethernet.ethertype;
    packet.forget_tags(ethernet);
    if vlan::is_tag(ethertype) || (is_way_in(stage) && packet.has_hidden_tag()) {
        let behind = vlan::enter(packet);
        if behind >> 16 != 0 {
            return pass(hook, packet, Outcome::PassVlan);
        }
        ethertype = behind as u16;
        packet.linearize(P::NETWORK + HEADERS);
    }
    let verdict = match ethertype {
        ethertype::IPV4 => internet::<P, V4>(hook, stage, packet),
        ethertype::IPV6 => internet::<P, V6>(hook, stage, packet),
        _ => return Ok(Verdict::PASS),
    }?;
    if packet.put_tags_back() { Ok(verdict) } else { Err(Outcome::DropNotWritable) }
}

/// What becomes of a packet that begins with its IP header.
#[inline(always)]
pub fn run_bare<P: Packet>(hook: Hook, stage: Stage, packet: &mut P) -> Result<Verdict, Outcome> {
    packet.linearize(P::NETWORK + HEADERS);
    let Some(first) = packet.at::<u8>(P::NETWORK) else { return pass(hook, packet, Outcome::PassMalformed) };
    match *first >> 4 {
        4 => internet::<P, V4>(hook, stage, packet),
        6 => internet::<P, V6>(hook, stage, packet),
        _ => Ok(Verdict::PASS),
    }
}

/// Whether packets are let in there, not out.
#[inline(always)]
fn is_way_in(stage: Stage) -> bool {
    matches!(stage, Stage::FromPod | Stage::UplinkIn)
}

#[inline(always)]
fn internet<P: Packet, F: Family>(hook: Hook, stage: Stage, packet: &mut P) -> Result<Verdict, Outcome> {
    let Some(header) = packet.at::<F::Header>(P::NETWORK) else { return pass(hook, packet, Outcome::PassMalformed) };
    let (saddr, daddr) = F::addresses(header);
    let is_way_in = is_way_in(stage);
    if is_way_in && (saddr.is_loopback() || daddr.is_loopback()) {
        return Err(Outcome::DropMartian);
    }
    let is_icmp = F::protocol(header) == F::ICMP;
    let may_be_ours = filter::may_be_ours(stage, &saddr, &daddr);
    if (is_icmp || !may_be_ours) && is_way_in && service::is_unallocated::<F>(&daddr) {
        return Err(Outcome::DropUnallocated);
    }
    // Before the filter has its say: who reports an error need not be ours.
    if is_icmp {
        return Ok(if rehearsal::is_on() { Verdict::PASS } else { icmp::relate::<P, F>(hook, stage, packet) });
    }
    if !may_be_ours {
        return Ok(Verdict::PASS);
    }
    let (protocol, extent) = match F::payload(header) {
        Ok(payload) if !packet.holds(P::NETWORK + size_of::<F::Header>() + payload.length as usize) => {
            return pass(hook, packet, Outcome::PassMalformed);
        }
        Ok(Payload { protocol, length }) => {
            let bytes = size_of::<F::Header>() as u32 + u32::from(length);
            (protocol, Extent { offset: P::NETWORK + size_of::<F::Header>(), payload: length, bytes })
        }
        Err(Outcome::PassMalformed) => return pass(hook, packet, Outcome::PassMalformed),
        Err(_) if rehearsal::is_on() => return Ok(Verdict::PASS),
        Err(_) => match headers::run::<P, F>(hook, stage, packet)? {
            ControlFlow::Continue(found) => found,
            ControlFlow::Break(verdict) => return Ok(verdict),
        },
    };
    match protocol {
        TCP => transport::<P, F, Tcp>(hook, stage, packet, saddr, daddr, extent),
        UDP => transport::<P, F, Udp>(hook, stage, packet, saddr, daddr, extent),
        SCTP => transport::<P, F, Sctp>(hook, stage, packet, saddr, daddr, extent),
        _ => pass(hook, packet, Outcome::PassProtocol),
    }
}

/// Where a transport header is, and how much follows it.
#[derive(Clone, Copy)]
pub(crate) struct Extent {
    /// Where it stands in the frame.
    pub(crate) offset: usize,
    /// Bytes from it on.
    pub(crate) payload: u16,
    /// Bytes from the IP header on.
    pub(crate) bytes: u32,
}

#[inline(always)]
pub(crate) fn transport<P: Packet, F: Family, L: Transport>(
    hook: Hook,
    stage: Stage,
    packet: &mut P,
    saddr: F::Addr,
    daddr: F::Addr,
    extent: Extent,
) -> Result<Verdict, Outcome> {
    if rehearsal::leaves_out::<F, L>() {
        return Ok(Verdict::PASS);
    }
    let Extent { offset, payload, bytes } = extent;
    let Some(header) = packet.at::<L::Header>(offset) else {
        return pass(hook, packet, Outcome::PassMalformed);
    };
    if !L::is_sound(packet, header, offset, payload) {
        return pass(hook, packet, Outcome::PassMalformed);
    }
    let (sport, dport) = L::ports(header);
    let flags = L::flags(packet, header, offset);
    let key = Tuple::new(saddr, daddr, sport, dport, L::PROTOCOL, stage);
    let Some(node) = service::node() else { return Ok(Verdict::PASS) };

    let mut known = Advance::Afresh;
    let mut confirmed = flow::confirmed::<F>(&key);
    if confirmed.is_none() {
        if let Some(entry) = flow::embryo::<F>(&key) {
            known = advance::<F, L>(hook, &key, entry, flags, node);
            if known == Advance::Keep
                && let Some(copy) = embryo::copy::<F>(&key, entry)
            {
                stats::note_at_once::<F>(copy, bytes);
                let verdict = output::send::<P, F, L>(packet, stage, &key, copy, node, extent);
                // Last, because the entry may move.
                embryo::hatch::<F>(hook, &key, entry, flags);
                return verdict;
            }
        }
        // Another CPU may have moved it from the one tier to the other between our looks at them. What begins a flow is not looked for
        // again, as in a full table each look misses the caches: sent again at that very moment, it finds its flow below.
        if !(is_way_in(stage) && flow::is_opening(flags)) {
            confirmed = flow::confirmed::<F>(&key);
        }
    }
    if let Some(entry) = confirmed {
        known = advance::<F, L>(hook, &key, entry, flags, node);
        if known == Advance::Keep {
            stats::note::<F>(entry, bytes);
            return output::send::<P, F, L>(packet, stage, &key, entry, node, extent);
        }
    }
    if matches!(stage, Stage::ToPod | Stage::UplinkOut) {
        return Ok(Verdict::PASS);
    }
    // Only of what nobody knows yet: a flow is entered for frames of this host alone.
    if matches!(stage, Stage::UplinkIn) && host::is_another::<P>(packet.context()) {
        return pass(hook, packet, Outcome::PassOtherHost);
    }
    if known == Advance::Gone {
        return reject::refuse::<P, F, L>(hook, packet.context(), flags, Outcome::ResetGone);
    }
    dispatch::note_sender::<P, F>(packet);
    match admit::admit::<F>(hook, &key, packet.context(), packet.ifindex()) {
        Admission::NotOurs => return Ok(Verdict::PASS),
        Admission::Refused(reason) => return reject::refuse::<P, F, L>(hook, packet.context(), flags, reason),
        _ => {}
    }
    match flow::half::<F>(&key) {
        Some(entry) => {
            stats::opened::<F>(entry.flow().service, entry.flow().backend);
            stats::note_at_once::<F>(entry, bytes);
            output::send::<P, F, L>(packet, stage, &key, entry, node, extent)
        }
        None => Err(Outcome::DropTableFull),
    }
}

/// What the packet means for the flow its tuple is known for. Unless it is kept, the flow is forgotten.
#[inline(always)]
pub(crate) fn advance<F: Family, L: Transport>(
    hook: Hook,
    key: &Tuple<F::Addr>,
    entry: Entry<F::Addr>,
    flags: u8,
    node: &Node,
) -> Advance {
    let mut known = flow::advance::<F>(hook, key, entry, flags, node);
    let flow = entry.flow();
    // A connection stays with its backend; what has no connection leaves one that no longer serves.
    if !L::HAS_STATE
        && known == Advance::Keep
        && matches!(flow.direction, Direction::Original)
        && !flow.is_mask()
        && !service::still_serves::<F>(flow.backend, flow.backend_generation)
    {
        count(hook, Outcome::Moved);
        event::flow::<F>(hook, Outcome::Moved, key, flow, 0);
        known = Advance::Afresh;
    }
    if known != Advance::Keep {
        stats::add_up::<F>(entry);
        flow::forget::<F>(key, flow);
    }
    known
}

#[inline(always)]
#[expect(clippy::unnecessary_wraps, reason = "it is what the story returns")]
fn pass<P: Packet>(hook: Hook, packet: &P, reason: Outcome) -> Result<Verdict, Outcome> {
    count(hook, reason);
    event::packet::<P>(hook, reason, packet.stored_context());
    Ok(Verdict::PASS)
}
