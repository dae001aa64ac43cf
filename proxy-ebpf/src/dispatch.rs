//! Direct server return: what comes from outside for a Service that asks for it goes, as it came, to the node of its backend,
//! which answers the client itself. Two nodes are in it: the one that dispatches, by writing another link-layer header and, where
//! that node is not on the link, an IP header to it; and the one that receives, which knows such a packet by the address on
//! its link that sent it, or by that of the header that its kernel took off.
//!
//! Of a dispatched flow one direction is seen. It is one entry, confirmed by what its client sends next, and changes nothing in
//! a packet but its hop limit, which bounds any loop.

use core::ffi::c_void;

use proxy_common::{
    addr::{Address as _, Mac, Protocol},
    flow::{Draft, Flow, NextHop, Output, Rewrite, Tier, leaving, state},
    node::{Node, TUNNELS},
    outcome::{Hook, Outcome},
    service::{Frontend, Service, flag},
    tuple::{Stage, Tuple},
};

use crate::{
    active, event,
    family::Family,
    flow::{self, Entry},
    kernel,
    maps::PEERS,
    output::{self, Route, Verdict},
    packet::Packet,
    parse::Ethernet,
    reject, service, table, tunnel,
};

/// Notes in the draft who put a packet on the link, and whether it could be sent on from here.
///
/// Out of line and with what is known forgotten: else everything behind would be looked at once more for each thing that the
/// verifier learns here.
#[inline(always)]
pub(crate) fn note_sender<P: Packet, F: Family>(packet: &P) {
    note::<P, F>(packet.context(), kernel::forgotten(packet.memory()));
}

#[inline(never)]
fn note<P: Packet, F: Family>(context: *mut c_void, tags: u64) {
    let Some(draft) = flow::draft::<F>() else { return };
    draft.sender = Mac::ZERO;
    draft.leaves_as = leaving::NOTHING;
    draft.is_tunnelled = 0;
    if P::NETWORK == 0 {
        draft.is_tunnelled = u8::from(tunnel::is_of_peer::<F>(context));
        return;
    }
    let packet = P::from_context(context);
    let Some(ethernet) = packet.at::<Ethernet>(0) else { return };
    draft.sender = ethernet.smac;
    if tags == 0 {
        draft.leaves_as = if P::IS_FRAME { leaving::FRAME } else { leaving::SKB };
    }
}

/// An address on a link as a number, for comparing.
#[inline(always)]
fn number(mac: &Mac) -> u64 {
    let pairs = mac.octets.as_chunks::<2>().0;
    pairs.iter().fold(0, |number, pair| number << 16 | u64::from(u16::from_ne_bytes(*pair)))
}

/// Whether another node put the packet on the link, or into its tunnel.
#[inline(always)]
fn is_of_peer<A>(draft: &Draft<A>) -> bool {
    // SAFETY: entries are replaced, never written in place.
    draft.is_tunnelled != 0 || unsafe { PEERS.get(&draft.sender) }.is_some()
}

/// The Service of a NodePort at the address of another node, if a node dispatched the packet here.
#[inline(never)]
pub(crate) fn of_other_node<F: Family>(key: &Tuple<F::Addr>) -> Option<&'static Service> {
    if !service::may_be_node_port(service::node()?, key.dport) {
        return None;
    }
    // SAFETY: entries are replaced, never written in place, and freed only after a grace period.
    unsafe { F::peer_addrs().get(&key.daddr) }?;
    if !is_of_peer(flow::draft::<F>()?) {
        return None;
    }
    // SAFETY: as above.
    unsafe { F::services().get(Frontend::new(F::Addr::ANY, key.dport, key.proto)) }
        .filter(|service| service.flags & flag::DISPATCHED != 0)
}

/// What a Service in the draft is to a packet that another node may have dispatched here: its backends of this node alone, who
/// answer the client directly. It is not dispatched twice. What a node's own client sends to a NodePort of this one is no
/// such packet.
#[inline(never)]
pub(crate) fn receive<F: Family>(key: &Tuple<F::Addr>) {
    let (Some(node), Some(draft)) = (service::node(), flow::draft::<F>()) else { return };
    let is_own = service::may_be_node_port(node, key.dport) && service::is_of_node::<F>(&key.daddr);
    if is_own || !is_of_peer(draft) {
        return;
    }
    let service = &mut draft.service;
    service.flags &= !flag::DISPATCHED;
    if service.local.count != 0 {
        service.external = service.local;
        service.flags |= flag::SOURCE_KEPT;
    }
}

/// Enters the drafted flow as one that is dispatched, if its backend's node can be reached so. Not if the client may be there: it
/// would be answered without anybody putting the frontend's address back.
#[inline(never)]
pub(crate) fn enter<F: Family>(hook: Hook, key: &Tuple<F::Addr>, context: *mut c_void, ifindex: u32) -> bool {
    let Some(draft) = flow::draft::<F>() else { return false };
    if draft.flow.output != Output::Forward || draft.service.flags & flag::DISPATCHED == 0 {
        return false;
    }
    let is_sent = send_off::<F>(key, context, ifindex);
    let outcome = if is_sent { Outcome::Dispatched } else { Outcome::NotDispatched };
    event::drafted::<F>(hook, outcome, key, ifindex);
    is_sent
}

#[inline(always)]
fn send_off<F: Family>(key: &Tuple<F::Addr>, context: *mut c_void, ifindex: u32) -> bool {
    let (Some(node), Some(draft)) = (service::node(), flow::draft::<F>()) else { return false };
    let flow = &mut draft.flow;
    let Some(backend) = F::backends().get(flow.backend) else { return false };
    let client = F::words(key.saddr);
    if draft.leaves_as == leaving::NOTHING || client == F::words(backend.addr) || client == F::words(backend.node) {
        return false;
    }
    let (addr_delta, port_delta) = (0, 0);
    let (saddr, daddr) = (F::masquerade(node), backend.node);
    flow.rewrite = Rewrite { saddr, daddr, sport: key.sport, dport: key.dport, addr_delta, port_delta };
    let leaving = Leaving { ifindex, is_frame: u32::from(draft.leaves_as == leaving::FRAME) };
    let output = find_way::<F>(context, &leaving, &flow.rewrite, &mut flow.next_hop);
    let is_link = output == Output::Dispatch;
    if !output.is_dispatch() || (is_link && number(&flow.next_hop.dmac) == number(&draft.sender)) {
        return false;
    }
    flow.output = output;
    flow.next_hop.generation = node.route_generation as u16;
    flow.twin_output = Output::Dispatch;
    flow.twin_stage = Stage::UplinkOut;
    flow.state = state::ONE_WAY;
    // Another CPU may have opened the same flow a moment ago: then its backend counts.
    if table::claim::<F>(Tier::Embryos, key, flow) {
        active::raise::<F>(flow.backend);
    }
    true
}

/// Where a packet came in, and as what it would leave.
struct Leaving {
    ifindex: u32,
    is_frame: u32,
}

/// The way from this node to another: over the link if it is the next one, else through the tunnel if there is one. Otherwise
/// `Output::Stack`.
#[inline(never)]
fn find_way<F: Family>(
    context: *mut c_void,
    leaving: &Leaving,
    between: &Rewrite<F::Addr>,
    next_hop: &mut NextHop,
) -> Output {
    let Some(node) = service::node() else { return Output::Stack };
    if between.daddr == F::Addr::ANY {
        return Output::Stack;
    }
    let found = output::route::<F>(context, leaving.ifindex, Protocol::Any, between.saddr, between.daddr);
    let Some(Route { next_hop: found, is_link }) = found else { return Output::Stack };
    if leaving.is_frame != 0 && found.ifindex != leaving.ifindex && !output::takes_frames(found.ifindex) {
        return Output::Stack;
    }
    if is_link == 0 && node.flags & TUNNELS == 0 {
        return Output::Stack;
    }
    next_hop.ifindex = found.ifindex;
    next_hop.mtu = if is_link == 0 { found.mtu.saturating_sub(size_of::<F::Header>() as u16) } else { found.mtu };
    next_hop.dmac = found.dmac;
    next_hop.smac = found.smac;
    if is_link == 0 { Output::Tunnel } else { Output::Dispatch }
}

/// Looks up anew, after a change of routes, where a flow's node is. Where it is not to be found, it is where it was: the flow
/// can be nobody else's.
#[inline(never)]
fn renew<F: Family>(context: *mut c_void, ifindex: u32, is_frame: u32, flow: *mut Flow<F::Addr>) {
    let Some(node) = service::node() else { return };
    let entry = Entry::at(flow);
    let flow = entry.flow();
    let mut next_hop = flow.next_hop;
    let output = find_way::<F>(context, &Leaving { ifindex, is_frame }, &flow.rewrite, &mut next_hop);
    if output.is_dispatch() {
        entry.set_output(output);
    }
    next_hop.generation = node.route_generation as u16;
    entry.set_next_hop(next_hop);
}

/// Sends a packet of a dispatched flow to its node.
#[inline(always)]
pub(crate) fn send<P: Packet, F: Family>(
    packet: &mut P,
    entry: Entry<F::Addr>,
    node: &Node,
) -> Result<Verdict, Outcome> {
    if entry.flow().next_hop.generation != node.route_generation as u16 {
        renew::<F>(packet.context(), packet.ifindex(), u32::from(P::IS_FRAME), entry.address());
    }
    match forward::<P, F>(packet, entry.flow()) {
        Err(Outcome::DropTooLong) => reject::too_long::<P, F>(packet.context(), entry.flow().next_hop.mtu),
        sent => sent,
    }
}

/// The same, without a look at routes. What the node itself has sent back is not sent there once more.
#[inline(always)]
pub(crate) fn forward<P: Packet, F: Family>(packet: &mut P, flow: &Flow<F::Addr>) -> Result<Verdict, Outcome> {
    let Some(header) = packet.at::<F::Header>(P::NETWORK) else { return Err(Outcome::DropNotDispatched) };
    if P::NETWORK == 0 || packet.is_tagged() || F::hop_limit(header) <= 1 {
        return Err(Outcome::DropNotDispatched);
    }
    // Of one that will be cut up, the segments fit: they came by a link, and `wrap` makes them shorter.
    if packet.segment() == 0 && F::length(header) > usize::from(flow.next_hop.mtu) {
        return Err(Outcome::DropTooLong);
    }
    if flow.output == Output::Tunnel {
        packet.decrement_hop_limit::<F>(P::NETWORK);
        if !tunnel::wrap::<P, F>(packet.context(), flow) {
            return Err(Outcome::DropNotWritable);
        }
    } else {
        let Some(ethernet) = packet.at::<Ethernet>(0) else { return Err(Outcome::DropNotDispatched) };
        if number(&ethernet.smac) == number(&flow.next_hop.dmac) {
            return Err(Outcome::DropNotDispatched);
        }
    }
    if !output::forward::<P, F>(packet, &flow.next_hop) {
        return Err(Outcome::DropNotWritable);
    }
    Ok(Verdict::redirect(flow.next_hop.ifindex))
}
