//! Where a translated packet goes: up the stack, out at its next hop, or back to the pod it came from.

use core::ffi::c_void;

use aya_ebpf::{
    bindings::{BPF_FIB_LKUP_RET_NO_NEIGH, BPF_FIB_LOOKUP_SRC, bpf_fib_lookup},
    helpers::generated as helpers,
};
use proxy_common::{
    addr::{Address as _, Mac, Port, Protocol},
    flow::{Flow, NextHop, Output},
    node::Node,
    outcome::Outcome,
    tuple::{Stage, Tuple},
};

use crate::{
    datapath::Extent,
    dispatch,
    family::Family,
    flow::{self, Entry},
    maps::UPLINKS,
    nat,
    packet::{Macs, Packet},
    parse::{Ethernet, Transport},
    service,
};

/// The answer to a packet. Not an enum, because a variant without a payload leaves half a register undefined, and the
/// compiler may fill it with a pointer, which the verifier refuses.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Verdict {
    /// Device to leave by, which may be the one the packet came in by; 0 to go on through the kernel.
    pub ifindex: u32,
}

impl Verdict {
    /// On its way through the kernel.
    pub const PASS: Self = Self { ifindex: 0 };

    /// Out of a device.
    #[inline(always)]
    pub const fn redirect(ifindex: u32) -> Self {
        Self { ifindex }
    }
}

/// Rewrites the packet and sends it on.
#[inline(always)]
pub(crate) fn send<P: Packet, F: Family, L: Transport>(
    packet: &mut P,
    stage: Stage,
    key: &Tuple<F::Addr>,
    entry: Entry<F::Addr>,
    node: &Node,
    extent: Extent,
) -> Result<Verdict, Outcome> {
    let transport = extent.offset;
    let flow = entry.flow();
    let output = flow.output;
    // Of no use elsewhere, and known when the program is compiled; not so in the key.
    if matches!(stage, Stage::UplinkIn) && output.is_dispatch() {
        return dispatch::send::<P, F>(packet, entry, node);
    }
    if output != Output::Forward {
        if !nat::apply::<P, F, L>(packet, &flow.rewrite, transport) {
            return Err(Outcome::DropNotWritable);
        }
        if output != Output::Hairpin {
            return Ok(Verdict::PASS);
        }
        if !hairpin::<P, F>(packet) {
            return Err(Outcome::DropNotWritable);
        }
        return Ok(Verdict::redirect(packet.ifindex()));
    }
    let Some((macs, header)) = packet.frame::<F::Header>() else {
        return send_through_stack::<P, F, L>(packet, key, flow, transport);
    };
    if packet.is_tagged() || !has_next_hop::<P, F, L>(packet, header, key.proto, entry, node, extent) {
        return send_through_stack::<P, F, L>(packet, key, flow, transport);
    }
    *macs = Macs::of(&flow.next_hop);
    if !nat::apply_and_pass_on::<P, F, L>(packet, header, &flow.rewrite, transport) {
        return Err(Outcome::DropNotWritable);
    }
    Ok(Verdict::redirect(flow.next_hop.ifindex))
}

/// Whether the flow knows its next hop, which is looked up anew after a change of routes, and the packet may go there. If not,
/// the kernel has to route: it cuts what is too long, or tells the sender.
#[inline(always)]
fn has_next_hop<P: Packet, F: Family, L: Transport>(
    packet: &P,
    header: &F::Header,
    proto: Protocol,
    entry: Entry<F::Addr>,
    node: &Node,
    extent: Extent,
) -> bool {
    // The kernel answers the sender of a packet whose life ends here.
    if F::hop_limit(header) <= 1 {
        return false;
    }
    let next_hop = &entry.flow().next_hop;
    let generation = node.route_generation as u16;
    let is_known = next_hop.ifindex != 0 && next_hop.generation == generation;
    if !is_known && !resolve::<P, F>(packet, proto, entry, generation) {
        return false;
    }
    if P::IS_FRAME && next_hop.ifindex != packet.ifindex() && !packet.shows(P::NETWORK + F::length(header)) {
        return false;
    }
    extent.bytes <= u32::from(next_hop.mtu) || has_short_segments::<P, L>(packet, extent, next_hop.mtu)
}

/// Whether a packet that is too long will be cut into segments that are not.
#[inline(always)]
fn has_short_segments<P: Packet, L: Transport>(packet: &P, extent: Extent, mtu: u16) -> bool {
    let segment = packet.segment();
    let header = packet.at::<L::Header>(extent.offset).map_or(0, |header| L::length(header));
    segment != 0 && (extent.offset - P::NETWORK) as u32 + header + segment <= u32::from(mtu)
}

/// Whether a frame lies in one page: not every device sends those that do not.
#[inline(always)]
fn is_in_one_part<P: Packet, F: Family>(packet: &P) -> bool {
    let header = packet.at::<F::Header>(P::NETWORK);
    header.is_some_and(|header| packet.shows(P::NETWORK + F::length(header)))
}

/// Whether a flow knows its next hop already, for a packet that does not look it up itself.
#[inline(always)]
pub(crate) fn knows_way<P: Packet, F: Family>(packet: &P, flow: &Flow<F::Addr>, header: &F::Header) -> bool {
    P::NETWORK != 0
        && flow.next_hop.ifindex != 0
        && !packet.is_tagged()
        && F::hop_limit(header) > 1
        && F::length(header) <= usize::from(flow.next_hop.mtu)
        && service::node().is_some_and(|node| node.route_generation as u16 == flow.next_hop.generation)
        && (!P::IS_FRAME || flow.next_hop.ifindex == packet.ifindex() || is_in_one_part::<P, F>(packet))
}

/// The way for packets the kernel has to route: only the destination is rewritten here, because the kernel refuses to
/// forward what bears its own address, and the source at the uplink's egress, by an entry made for it.
#[inline(always)]
fn send_through_stack<P: Packet, F: Family, L: Transport>(
    packet: &mut P,
    key: &Tuple<F::Addr>,
    flow: &Flow<F::Addr>,
    transport: usize,
) -> Result<Verdict, Outcome> {
    let Some(draft) = flow::draft::<F>() else { return Err(Outcome::DropNotWritable) };
    flow::cut::<F>(key, flow);
    if nat::apply::<P, F, L>(packet, &draft.flow.rewrite, transport) {
        Ok(Verdict::PASS)
    } else {
        Err(Outcome::DropNotWritable)
    }
}

/// Asks the kernel's FIB for the way to the rewritten destination and keeps it with the flow. `false` when the kernel has
/// to find it: no neighbour entry yet, an unreachable destination, a tunnel, or a device that takes no frames from us.
#[inline(always)]
fn resolve<P: Packet, F: Family>(packet: &P, proto: Protocol, entry: Entry<F::Addr>, generation: u16) -> bool {
    ask::<F, P>(packet.context(), packet.ifindex(), proto, entry, generation)
}

/// Out of line, for the room its question takes on the stack.
#[inline(never)]
fn ask<F: Family, P: Packet>(
    context: *mut c_void,
    ifindex: u32,
    proto: Protocol,
    entry: Entry<F::Addr>,
    generation: u16,
) -> bool {
    let mut question = Question::new::<F>(ifindex, entry.flow().rewrite.saddr, entry.flow().rewrite.daddr, proto);
    (question.sport, question.dport) = (entry.flow().rewrite.sport, entry.flow().rewrite.dport);
    let answer = question.ask(context, 0);
    // What has no link-layer address has no such header either.
    if answer != 0 || question.dmac == Mac::ZERO {
        return false;
    }
    let leaves_as_frame = P::IS_FRAME && question.ifindex != ifindex;
    // SAFETY: entries are replaced, never written in place.
    if leaves_as_frame && unsafe { UPLINKS.get(question.ifindex) }.is_none() {
        return false;
    }
    let mtu = longest(question.length);
    let (dmac, smac) = (question.dmac, question.smac);
    entry.set_next_hop(NextHop { ifindex: question.ifindex, generation, mtu, dmac, smac });
    true
}

/// The longest packet that may go a way. Of 65,536 and more, as loopback has it, the helper tells the low half.
#[inline(always)]
fn longest(mtu: u16) -> u16 {
    if mtu == 0 { u16::MAX } else { mtu }
}

/// The way to an address.
pub(crate) struct Route {
    /// Where it begins, but for the generation.
    pub(crate) next_hop: NextHop,
    /// 1 when it ends there, too.
    pub(crate) is_link: u32,
}

/// The way to an address as the kernel's FIB knows it. Inlined where there is room for the question.
#[inline(always)]
pub(crate) fn route<F: Family>(
    context: *mut c_void,
    ifindex: u32,
    proto: Protocol,
    saddr: F::Addr,
    daddr: F::Addr,
) -> Option<Route> {
    let mut question = Question::new::<F>(ifindex, saddr, daddr, proto);
    let answer = question.ask(context, 0);
    // In the place of the destination stands the gateway, if there is one.
    let is_link = u32::from(question.family == F::NUMBER && question.destination == F::words(daddr));
    let Question { ifindex, dmac, smac, .. } = question;
    let next_hop = NextHop { ifindex, generation: 0, mtu: longest(question.length), dmac, smac };
    (answer == 0 && dmac != Mac::ZERO).then_some(Route { next_hop, is_link })
}

/// Whether a device takes frames from XDP.
#[inline(always)]
pub(crate) fn takes_frames(ifindex: u32) -> bool {
    // SAFETY: entries are replaced, never written in place.
    unsafe { UPLINKS.get(ifindex) }.is_some()
}

/// Has the kernel look up from which of the node's addresses it would send to the backend of the drafted flow, which is
/// that of the device which leads there: another one might come back another way, or not at all. Where it does not say,
/// what stands in the draft stays.
#[inline(never)]
pub(crate) fn choose_source<F: Family>(context: *mut c_void, ifindex: u32) {
    let Some(draft) = flow::draft::<F>() else { return };
    let mut question = Question::new::<F>(ifindex, F::Addr::ANY, draft.to.daddr, draft.to.proto);
    (question.sport, question.dport) = (draft.to.sport, draft.to.dport);
    let answer = question.ask(context, BPF_FIB_LOOKUP_SRC);
    // A neighbour that is not known yet has a route all the same.
    if (answer == 0 || answer == i64::from(BPF_FIB_LKUP_RET_NO_NEIGH)) && F::from_words(question.source) != F::Addr::ANY
    {
        draft.to.saddr = F::from_words(question.source);
    }
}

/// `struct bpf_fib_lookup` without its unions.
#[repr(C)]
pub(crate) struct Question {
    family: u8,
    protocol: u8,
    pub(crate) sport: Port,
    pub(crate) dport: Port,
    /// In: the length of a packet. Out: the longest there may be.
    pub(crate) length: u16,
    pub(crate) ifindex: u32,
    flow_info: u32,
    pub(crate) source: [u32; 4],
    destination: [u32; 4],
    vlan: [u16; 2],
    pub(crate) smac: Mac,
    pub(crate) dmac: Mac,
}

/// As the helper takes it.
const LENGTH: i32 = 64;

const _: () = assert!(size_of::<Question>() == size_of::<bpf_fib_lookup>() && size_of::<Question>() == LENGTH as usize);

impl Question {
    #[inline(always)]
    pub(crate) fn new<F: Family>(ifindex: u32, saddr: F::Addr, daddr: F::Addr, proto: Protocol) -> Self {
        Self {
            family: F::NUMBER,
            protocol: proto as u8,
            sport: Port::new(0),
            dport: Port::new(0),
            // No packet is longer than the way allows that has one byte. With 0, an skb's own length would be looked at.
            length: 1,
            ifindex,
            flow_info: 0,
            source: F::words(saddr),
            destination: F::words(daddr),
            vlan: [0; 2],
            smac: Mac::ZERO,
            dmac: Mac::ZERO,
        }
    }

    /// Has the kernel's FIB answer it. 0 is an answer.
    #[inline(always)]
    pub(crate) fn ask(&mut self, context: *mut c_void, flags: u32) -> i64 {
        // SAFETY: callers pass their program's own context; the structure is as long as stated.
        unsafe { helpers::bpf_fib_lookup(context, core::ptr::from_mut(self).cast(), LENGTH, flags) }
    }
}

/// Makes a packet one for its next hop, which [`Verdict::redirect`] sends it to. `false` when it is too short, which cannot be.
#[inline(always)]
pub(crate) fn forward<P: Packet, F: Family>(packet: &mut P, next_hop: &NextHop) -> bool {
    let Some((macs, _)) = packet.frame::<F::Header>() else { return false };
    *macs = Macs::of(next_hop);
    packet.decrement_hop_limit::<F>(P::NETWORK);
    true
}

/// Makes a packet one for where it came from.
#[inline(always)]
pub(crate) fn hairpin<P: Packet, F: Family>(packet: &mut P) -> bool {
    if P::NETWORK != 0 {
        let Some(ethernet) = packet.at::<Ethernet>(0) else { return false };
        core::mem::swap(&mut ethernet.dmac, &mut ethernet.smac);
    }
    // A life that is over does not begin anew.
    if packet.at::<F::Header>(P::NETWORK).is_some_and(|header| F::hop_limit(header) > 0) {
        packet.decrement_hop_limit::<F>(P::NETWORK);
    }
    true
}
