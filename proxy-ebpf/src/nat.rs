//! Writes a ready-made rewrite into a packet.

use proxy_common::flow::Rewrite;

use crate::{
    family::Family,
    packet::Packet,
    parse::{Summed, Transport},
};

/// Puts the new addresses and ports into the packet and mends its checksums. `false` when the packet could not be written
/// whole, which leaves nothing but to drop it. Views of the packet are stale after it.
#[inline(always)]
pub(crate) fn apply<P: Packet, F: Family, L: Transport>(
    packet: &mut P,
    rewrite: &Rewrite<F::Addr>,
    transport: usize,
) -> bool {
    let Some(ip) = packet.at::<F::Header>(P::NETWORK) else { return false };
    F::set_addresses(ip, rewrite.saddr, rewrite.daddr, rewrite.addr_delta);
    L::rewrite::<P, F>(packet, rewrite, transport)
}

/// The same for a packet that goes on to its next hop, which takes one from the hop limit. `ip` is its header.
#[inline(always)]
pub(crate) fn apply_and_pass_on<P: Packet, F: Family, L: Transport>(
    packet: &mut P,
    ip: &mut F::Header,
    rewrite: &Rewrite<F::Addr>,
    transport: usize,
) -> bool {
    // Only the kernel can make up for it where a device has summed up all of the packet.
    if F::IS_V6 && !P::IS_FRAME {
        F::set_addresses(ip, rewrite.saddr, rewrite.daddr, rewrite.addr_delta);
        packet.decrement_hop_limit::<F>(P::NETWORK);
    } else {
        F::pass_on(ip, rewrite.saddr, rewrite.daddr, rewrite.addr_delta);
    }
    L::rewrite::<P, F>(packet, rewrite, transport)
}

/// [`Transport::rewrite`] of what has an internet checksum.
#[inline(always)]
pub(crate) fn rewrite_summed<P: Packet, F: Family, L: Summed>(
    packet: &mut P,
    rewrite: &Rewrite<F::Addr>,
    offset: usize,
) -> bool {
    let Some(header) = packet.at::<L::Header>(offset) else { return false };
    let (sport, dport, csum) = L::fields(header);
    // Read first, so that both are written as one word.
    (*sport, *dport) = (rewrite.sport, rewrite.dport);
    packet.mend_checksum::<F, L>(csum, offset, rewrite.addr_delta, rewrite.port_delta)
}
