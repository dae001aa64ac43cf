//! From the IP header of one family to that of the other (RFC 7915 §4.1 and §5.1).

use core::ffi::c_void;

use aya_ebpf::{bindings::BPF_F_RECOMPUTE_CSUM, helpers::generated as helpers};
use proxy_common::{addr::Ipv6, flow::Flow};

use super::{Skb, wire::Wire};
use crate::{
    flow::Entry,
    packet::{ETHERNET, Packet},
};

/// Puts the header of the other family, with the addresses of a rewrite, in the place of a packet's own. `false` when the
/// kernel does not: it has no room, or is to segment what is no TCP.
#[inline(never)]
pub(super) fn turn<F: Wire>(context: *mut c_void, flow: *mut Flow<Ipv6>) -> bool {
    let packet = Skb::from_context(context);
    let Some(header) = packet.at::<F::Header>(ETHERNET) else { return false };
    let carried = F::carried(header);
    let to = &Entry::at(flow).flow().rewrite;
    let header = F::Other::carry(&carried, &to.saddr, &to.daddr);
    change::<F::Other>(context)
        // SAFETY: a helper on the program's own context; the header is on the stack, and as long as stated.
        && unsafe {
            helpers::bpf_skb_store_bytes(
                context.cast(),
                ETHERNET as u32,
                (&raw const header).cast(),
                size_of_val(&header) as u32,
                u64::from(BPF_F_RECOMPUTE_CSUM),
            )
        } == 0
}

/// Makes room for the header of a family in the place of the other's: of its bytes nothing is said. Views are stale after it.
#[inline(always)]
pub(super) fn change<F: Wire>(context: *mut c_void) -> bool {
    // SAFETY: a helper on the program's own context.
    (unsafe { helpers::bpf_skb_change_proto(context.cast(), F::ETHERTYPE, 0) }) == 0
}
