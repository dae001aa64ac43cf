//! Direct server return: what comes from outside for a Service that asks for it goes, as it came, to the node of its backend,
//! which answers the client itself. Two nodes are in it: the one that dispatches, by writing another link-layer header, and
//! the one that receives, which knows such a packet by the address on its link that sent it.
//!
//! Of a dispatched flow one direction is seen. It is one entry, confirmed by what its client sends next, and changes nothing in
//! a packet but its hop limit, which bounds any loop.

use core::ffi::c_void;

use proxy_common::{
    addr::{Address as _, Mac, Protocol},
    flow::{Draft, Flow, NextHop, Output, Rewrite, Tier, state},
    node::Node,
    outcome::{Hook, Outcome},
    service::{Frontend, Service, flag},
    tuple::{Stage, Tuple},
};

use crate::{
    active,
    counters::count,
    family::Family,
    flow::{self, Entry},
    kernel,
    maps::PEERS,
    output::{self, Verdict},
    packet::Packet,
    parse::Ethernet,
    service, table,
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
    draft.can_leave = 0;
    draft.is_frame = u8::from(P::IS_FRAME);
    if P::NETWORK == 0 {
        return;
    }
    let packet = P::from_context(context);
    let Some(ethernet) = packet.at::<Ethernet>(0) else { return };
    draft.sender = ethernet.smac;
    draft.can_leave = u8::from(tags == 0);
}

/// An address on a link as a number, for comparing.
#[inline(always)]
fn number(mac: &Mac) -> u64 {
    let pairs = mac.octets.as_chunks::<2>().0;
    pairs.iter().fold(0, |number, pair| number << 16 | u64::from(u16::from_ne_bytes(*pair)))
}

/// Whether another node put the packet on the link.
#[inline(always)]
fn is_of_peer<A>(draft: &Draft<A>) -> bool {
    // SAFETY: entries are replaced, never written in place.
    unsafe { PEERS.get(&draft.sender) }.is_some()
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

/// Enters the drafted flow as one that is dispatched, if its backend's node is a neighbour. Not if the client may be there: it
/// would be answered without anybody putting the frontend's address back.
#[inline(never)]
pub(crate) fn enter<F: Family>(hook: Hook, key: &Tuple<F::Addr>, context: *mut c_void, ifindex: u32) -> bool {
    let Some(draft) = flow::draft::<F>() else { return false };
    if draft.flow.output != Output::Forward || draft.service.flags & flag::DISPATCHED == 0 {
        return false;
    }
    let is_sent = send_off::<F>(key, context, ifindex);
    count(hook, if is_sent { Outcome::Dispatched } else { Outcome::NotDispatched });
    is_sent
}

#[inline(always)]
fn send_off<F: Family>(key: &Tuple<F::Addr>, context: *mut c_void, ifindex: u32) -> bool {
    let (Some(node), Some(draft)) = (service::node(), flow::draft::<F>()) else { return false };
    let flow = &mut draft.flow;
    let Some(backend) = F::backends().get(flow.backend) else { return false };
    let client = F::words(key.saddr);
    if draft.can_leave == 0 || client == F::words(backend.addr) || client == F::words(backend.node) {
        return false;
    }
    let leaving = Leaving { ifindex, is_frame: draft.is_frame.into() };
    if !find_way::<F>(context, &leaving, key.proto, &backend.node, &mut flow.next_hop)
        || number(&flow.next_hop.dmac) == number(&draft.sender)
    {
        return false;
    }
    flow.next_hop.generation = node.route_generation as u16;
    let (addr_delta, port_delta) = (0, 0);
    let Tuple { saddr, daddr, sport, dport, .. } = *key;
    flow.rewrite = Rewrite { saddr, daddr, sport, dport, addr_delta, port_delta };
    flow.output = Output::Dispatch;
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

/// The way to a node, if it is the next one on it.
#[inline(never)]
fn find_way<F: Family>(
    context: *mut c_void,
    leaving: &Leaving,
    proto: Protocol,
    to: &F::Addr,
    next_hop: &mut NextHop,
) -> bool {
    let Some(node) = service::node() else { return false };
    if *to == F::Addr::ANY {
        return false;
    }
    let Some(found) = output::neighbour::<F>(context, leaving.ifindex, proto, F::masquerade(node), *to) else {
        return false;
    };
    if leaving.is_frame != 0 && found.ifindex != leaving.ifindex && !output::takes_frames(found.ifindex) {
        return false;
    }
    next_hop.ifindex = found.ifindex;
    next_hop.mtu = found.mtu;
    next_hop.dmac = found.dmac;
    next_hop.smac = found.smac;
    true
}

/// Looks up anew, after a change of routes, where a flow's node is. Where it is not to be found, it is where it was: the flow
/// can be nobody else's.
#[inline(never)]
fn renew<F: Family>(context: *mut c_void, ifindex: u32, is_frame: u32, flow: *mut Flow<F::Addr>) {
    let Some(node) = service::node() else { return };
    let entry = Entry::at(flow);
    let flow = entry.flow();
    let mut next_hop = flow.next_hop;
    if let Some(backend) = F::backends().get(flow.backend)
        && backend.generation == flow.backend_generation
    {
        find_way::<F>(context, &Leaving { ifindex, is_frame }, Protocol::Any, &backend.node, &mut next_hop);
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
    forward::<P, F>(packet, entry.flow())
}

/// The same, without a look at routes. What the node itself has sent back is not sent there once more.
#[inline(always)]
pub(crate) fn forward<P: Packet, F: Family>(packet: &mut P, flow: &Flow<F::Addr>) -> Result<Verdict, Outcome> {
    let Some(header) = packet.at::<F::Header>(P::NETWORK) else { return Err(Outcome::DropNotDispatched) };
    if P::NETWORK == 0 || packet.is_tagged() || F::hop_limit(header) <= 1 {
        return Err(Outcome::DropNotDispatched);
    }
    let Some(ethernet) = packet.at::<Ethernet>(0) else { return Err(Outcome::DropNotDispatched) };
    if number(&ethernet.smac) == number(&flow.next_hop.dmac) {
        return Err(Outcome::DropNotDispatched);
    }
    output::forward::<P, F>(packet, &flow.next_hop).ok_or(Outcome::DropNotWritable)
}
