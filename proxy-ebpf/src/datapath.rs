//! A packet's way, the same at every hook: parse → could it be ours → flow → (if unknown: admit) → rewrite → output.
//! What is not ours or not understood is passed on untouched; `Err` is a drop with its reason.

use proxy_common::{
    addr::Protocol,
    flow::{Direction, Flow, Output},
    node::Node,
    outcome::{Hook, Outcome},
    tuple::{Stage, Tuple},
};

use crate::{
    admit::{self, Admission},
    counters::count,
    family::{Family, V4, V6},
    filter,
    flow::{self, Advance, Entry},
    nat,
    output::{self, Verdict},
    packet::Packet,
    parse::{ETHERNET, Ethernet, Ipv6Header, Tcp, TcpHeader, Transport, Udp, ethertype},
    service,
};

/// The longest run of headers that is looked at.
const HEADERS: usize = ETHERNET + size_of::<Ipv6Header>() + size_of::<TcpHeader>();

const TCP: u8 = Protocol::Tcp as u8;
const UDP: u8 = Protocol::Udp as u8;

/// What becomes of a packet.
#[inline(always)]
pub fn run<P: Packet>(hook: Hook, stage: Stage, packet: &mut P) -> Result<Verdict, Outcome> {
    packet.linearize(HEADERS);
    let Some(ethernet) = packet.at::<Ethernet>(0) else { return pass(hook, Outcome::PassMalformed) };
    match ethernet.ethertype {
        ethertype::IPV4 => internet::<P, V4>(hook, stage, packet),
        ethertype::IPV6 => internet::<P, V6>(hook, stage, packet),
        ethertype::VLAN | ethertype::QINQ => pass(hook, Outcome::PassVlan),
        _ => Ok(Verdict::PASS),
    }
}

#[inline(always)]
fn internet<P: Packet, F: Family>(hook: Hook, stage: Stage, packet: &mut P) -> Result<Verdict, Outcome> {
    let Some(header) = packet.at::<F::Header>(ETHERNET) else { return pass(hook, Outcome::PassMalformed) };
    let (saddr, daddr) = F::addresses(header);
    if !filter::may_be_ours(stage, &saddr, &daddr) {
        return Ok(Verdict::PASS);
    }
    let payload = match F::payload(header) {
        Ok(payload) => payload,
        Err(reason) => return pass(hook, reason),
    };
    if !packet.holds(ETHERNET + size_of::<F::Header>() + payload.length as usize) {
        return pass(hook, Outcome::PassMalformed);
    }
    match payload.protocol {
        TCP => transport::<P, F, Tcp>(hook, stage, packet, saddr, daddr, payload.length),
        UDP => transport::<P, F, Udp>(hook, stage, packet, saddr, daddr, payload.length),
        _ => pass(hook, Outcome::PassProtocol),
    }
}

#[inline(always)]
fn transport<P: Packet, F: Family, L: Transport>(
    hook: Hook,
    stage: Stage,
    packet: &mut P,
    saddr: F::Addr,
    daddr: F::Addr,
    payload: u16,
) -> Result<Verdict, Outcome> {
    let Some(header) = packet.at::<L::Header>(ETHERNET + size_of::<F::Header>()) else {
        return pass(hook, Outcome::PassMalformed);
    };
    if !L::is_sound(header, payload) {
        return pass(hook, Outcome::PassMalformed);
    }
    let (sport, dport) = L::ports(header);
    let flags = L::flags(header);
    let key = Tuple::new(saddr, daddr, sport, dport, L::PROTOCOL, stage);
    let Some(node) = service::node() else { return Ok(Verdict::PASS) };

    if let Some(entry) = flow::confirmed::<F>(&key) {
        if is_kept::<F, L>(hook, &key, entry, flags, node) {
            return send::<P, F, L>(packet, &key, entry, node);
        }
    } else if let Some(entry) = flow::embryo::<F>(&key)
        && is_kept::<F, L>(hook, &key, entry, flags, node)
    {
        let verdict = send::<P, F, L>(packet, &key, entry, node);
        // Last, because the entry may move.
        flow::hatch::<F>(hook, &key, entry, flags);
        return verdict;
    }
    if matches!(stage, Stage::ToPod | Stage::UplinkOut) {
        return Ok(Verdict::PASS);
    }
    match admit::select::<F>(&key) {
        Admission::NotOurs => return Ok(Verdict::PASS),
        Admission::Refused(reason) => return Err(reason),
        Admission::Selected if !admit::claim::<F>(hook, &key) => return Err(Outcome::DropNoPort),
        Admission::Selected => {}
    }
    match flow::half::<F>(&key) {
        Some(entry) => send::<P, F, L>(packet, &key, entry, node),
        None => Err(Outcome::DropTableFull),
    }
}

/// Whether the packet belongs to the flow its tuple is known for. If not, the flow is forgotten.
#[inline(always)]
fn is_kept<F: Family, L: Transport>(
    hook: Hook,
    key: &Tuple<F::Addr>,
    entry: Entry<F::Addr>,
    flags: u8,
    node: &Node,
) -> bool {
    if flow::advance::<F>(hook, key, entry, flags, node) == Advance::Keep {
        let flow = entry.flow();
        // A connection stays with its backend; what has no connection leaves one that no longer serves.
        if L::HAS_STATE
            || !matches!(flow.direction, Direction::Original)
            || service::still_serves::<F>(flow.backend, flow.backend_generation)
        {
            return true;
        }
        count(hook, Outcome::Moved);
    }
    flow::forget::<F>(key, entry.flow());
    false
}

/// Rewrites the packet and sends it on.
#[inline(always)]
fn send<P: Packet, F: Family, L: Transport>(
    packet: &mut P,
    key: &Tuple<F::Addr>,
    entry: Entry<F::Addr>,
    node: &Node,
) -> Result<Verdict, Outcome> {
    let flow = entry.flow();
    let output = flow.output;
    if output != Output::Forward {
        if !nat::apply::<P, F, L>(packet, &flow.rewrite) {
            return Err(Outcome::DropNotWritable);
        }
        let verdict = if output == Output::Hairpin { output::hairpin::<P, F>(packet) } else { Some(Verdict::PASS) };
        return verdict.ok_or(Outcome::DropNotWritable);
    }
    if !has_next_hop::<P, F>(packet, key.proto, entry, node) {
        return send_through_stack::<P, F, L>(packet, key, flow);
    }
    if !nat::apply::<P, F, L>(packet, &flow.rewrite) {
        return Err(Outcome::DropNotWritable);
    }
    output::forward::<P, F>(packet, &flow.next_hop).ok_or(Outcome::DropNotWritable)
}

/// Whether the flow knows its next hop, which is looked up anew after a change of routes. If not, the kernel has to route.
#[inline(always)]
fn has_next_hop<P: Packet, F: Family>(packet: &P, proto: Protocol, entry: Entry<F::Addr>, node: &Node) -> bool {
    // The kernel answers the sender of a packet whose life ends here.
    if packet.at::<F::Header>(ETHERNET).is_none_or(|header| F::hop_limit(header) <= 1) {
        return false;
    }
    let next_hop = &entry.flow().next_hop;
    if next_hop.ifindex != 0 && next_hop.generation == node.route_generation {
        return true;
    }
    output::resolve::<P, F>(packet, proto, entry, node.route_generation)
}

/// The way for packets the kernel has to route: only the destination is rewritten here, because the kernel refuses to
/// forward what bears its own address, and the source at the uplink's egress, by an entry made for it.
#[inline(always)]
fn send_through_stack<P: Packet, F: Family, L: Transport>(
    packet: &mut P,
    key: &Tuple<F::Addr>,
    flow: &Flow<F::Addr>,
) -> Result<Verdict, Outcome> {
    let Some(draft) = flow::draft::<F>() else { return Err(Outcome::DropNotWritable) };
    flow::cut::<F>(key, flow, draft);
    if nat::apply::<P, F, L>(packet, &draft.flow.rewrite) { Ok(Verdict::PASS) } else { Err(Outcome::DropNotWritable) }
}

#[inline(always)]
#[expect(clippy::unnecessary_wraps, reason = "it is what the story returns")]
fn pass(hook: Hook, reason: Outcome) -> Result<Verdict, Outcome> {
    count(hook, reason);
    Ok(Verdict::PASS)
}
