//! Packets behind another IP header of their own family (RFC 2003, RFC 2473): how they get to a node that is not on this link.
//! Its kernel takes the header off again, and remembers who had put it there.

use core::{ffi::c_void, mem};

use aya_ebpf::{
    bindings::{__sk_buff, BPF_F_TUNINFO_IPV6, bpf_tunnel_key},
    helpers::generated as helpers,
};
use proxy_common::{addr::Address as _, flow::Flow};

use crate::{checksum, family::Family, kernel, packet::Packet, parse::Ethernet};

/// What of `struct bpf_tunnel_key` kernels have known for longest.
const LENGTH: usize = mem::offset_of!(bpf_tunnel_key, tunnel_label);

/// Puts a packet behind a header from this node to that of its backend. Views are stale after it.
///
/// Routers on the way may cut what they find too long: nobody would tell the client of it.
#[inline(never)]
pub(crate) fn wrap<P: Packet, F: Family>(context: *mut c_void, flow: *const Flow<F::Addr>) -> bool {
    // SAFETY: an entry of the flow table; see `flow::Entry`.
    let rewrite = unsafe { &(*flow).rewrite };
    let mut packet = P::from_context(context);
    let Some(inner) = packet.at::<F::Header>(P::NETWORK) else { return false };
    let (length, class) = (F::length(inner) as u16, F::traffic_class(inner));
    if !packet.wrap::<F>() {
        return false;
    }
    let Some(ethernet) = packet.at::<Ethernet>(0) else { return false };
    let Some(outer) = packet.at::<F::Header>(P::NETWORK) else { return false };
    ethernet.ethertype = F::ETHERTYPE;
    F::compose(outer, rewrite.saddr, rewrite.daddr, F::ENCAPSULATED, length);
    F::let_be_cut(outer, class, kernel::random() as u16);
    if F::IS_V6 {
        packet.account(checksum::fold(F::sum(outer)));
    }
    true
}

/// Whether another node has sent a packet through its tunnel.
#[inline(always)]
pub(crate) fn is_of_peer<F: Family>(context: *mut c_void) -> bool {
    let mut key = mem::MaybeUninit::<bpf_tunnel_key>::zeroed();
    let flags = if F::IS_V6 { u64::from(BPF_F_TUNINFO_IPV6) } else { 0 };
    // SAFETY: only programs on skbs come here; the structure is on the stack, and longer than stated.
    if (unsafe { helpers::bpf_skb_get_tunnel_key(context.cast::<__sk_buff>(), key.as_mut_ptr(), LENGTH as u32, flags) })
        != 0
    {
        return false;
    }
    // SAFETY: zeros are one.
    let remote = unsafe { key.assume_init_ref() }.__bindgen_anon_1;
    // SAFETY: as many words as any of them has.
    let remote = unsafe { remote.remote_ipv6 };
    // Of IPv4 in host order.
    let remote = if F::IS_V6 { remote } else { [remote[0].to_be(), 0, 0, 0] };
    let remote = F::from_words(remote);
    // SAFETY: entries are replaced, never written in place.
    remote != F::Addr::ANY && unsafe { F::peer_addrs().get(&remote) }.is_some()
}
