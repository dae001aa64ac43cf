//! Where a packet leaves by, in the family it has become. A neighbour that the FIB does not know is left to the kernel, which
//! asks for it on the way out; and so is a device that has no link-layer addresses.

use core::{ffi::c_void, ptr};

use aya_ebpf::{bindings::BPF_FIB_LKUP_RET_NO_NEIGH, helpers::generated as helpers};
use proxy_common::{
    addr::{Ipv6, Mac, Protocol},
    flow::{Flow, NextHop},
    node::Node,
    outcome::Outcome,
};

use super::{Answer, Skb, wire::Wire};
use crate::{
    family::{V4, V6},
    flow::Entry,
    output::Question,
    packet::Packet,
    parse::Ethernet,
};

/// Whether the flow knows its way, which is looked up anew after a change of routes.
#[inline(always)]
pub(super) fn is_known(packet: &Skb, proto: Protocol, entry: Entry<Ipv6>, node: &Node) -> bool {
    let next_hop = &entry.flow().next_hop;
    let generation = node.route_generation as u16;
    next_hop.ifindex != 0 && next_hop.generation == generation
        || find(packet.context(), packet.ifindex(), proto, entry.address(), generation)
}

/// A question of the FIB about the way from an address to another of its family.
#[inline(always)]
pub(super) fn question(ifindex: u32, saddr: &Ipv6, daddr: &Ipv6, proto: Protocol) -> Question {
    if daddr.is_mapped() {
        Question::new::<V4>(ifindex, saddr.unmapped(), daddr.unmapped(), proto)
    } else {
        Question::new::<V6>(ifindex, *saddr, *daddr, proto)
    }
}

/// Out of line, for the room its question takes on the stack.
#[inline(never)]
fn find(context: *mut c_void, ifindex: u32, proto: Protocol, flow: *mut Flow<Ipv6>, generation: u16) -> bool {
    let entry = Entry::at(flow);
    let to = &entry.flow().rewrite;
    let mut question = question(ifindex, &to.saddr, &to.daddr, proto);
    (question.sport, question.dport) = (to.sport, to.dport);
    let answer = question.ask(context, 0);
    let is_neighbour_known = answer == 0;
    if !is_neighbour_known && answer != i64::from(BPF_FIB_LKUP_RET_NO_NEIGH) {
        return false;
    }
    let ifindex = question.ifindex;
    let (dmac, smac) = if is_neighbour_known { (question.dmac, question.smac) } else { (Mac::ZERO, Mac::ZERO) };
    let told = if is_neighbour_known { u32::from(question.length) } else { device_mtu(context, ifindex) };
    // Of 65,536 and more, as loopback has it, the helper tells the low half.
    let mtu = if told == 0 || told > u32::from(u16::MAX) { u16::MAX } else { told as u16 };
    entry.set_next_hop(NextHop { ifindex, generation, mtu, dmac, smac });
    true
}

/// The longest packet a device sends.
#[inline(always)]
fn device_mtu(context: *mut c_void, ifindex: u32) -> u32 {
    let mut mtu = 0;
    // SAFETY: a helper on the program's own context. It tells the MTU whatever it finds of the packet.
    unsafe { helpers::bpf_check_mtu(context, ifindex, &raw mut mtu, 0, 0) };
    mtu
}

/// Sends a packet out of a device.
#[inline(always)]
pub(super) fn redirect(ifindex: u32) -> i32 {
    // SAFETY: takes two numbers.
    (unsafe { helpers::bpf_redirect(ifindex, 0) }) as i32
}

/// Sends a packet, which is of this family now, out at its next hop.
#[inline(always)]
pub(super) fn leave<F: Wire>(packet: &Skb, next_hop: &NextHop) -> Answer {
    let Some(ethernet) = packet.at::<Ethernet>(0) else { return Err(Outcome::DropNotWritable) };
    ethernet.ethertype = F::ETHERTYPE;
    let ifindex = next_hop.ifindex;
    if next_hop.dmac == Mac::ZERO {
        // SAFETY: without a next hop of ours, the kernel looks for it.
        return Ok((unsafe { helpers::bpf_redirect_neigh(ifindex, ptr::null_mut(), 0, 0) }) as i32);
    }
    ethernet.dmac = next_hop.dmac;
    ethernet.smac = next_hop.smac;
    Ok(redirect(ifindex))
}
