//! From where a Service may be used: `loadBalancerSourceRanges`, asked for new flows of Services that have some.

use aya_ebpf::btf_maps::lpm_trie::Key;
use proxy_common::{service::Source, tuple::Tuple};

use crate::{family::Family, service};

/// Whether a client is in one of the Service's ranges. Where the node itself is, a packet from the frontend's own address is
/// too: that is what a node sends that has the address of the load balancer on a device of its own.
#[inline(never)]
pub(crate) fn is_allowed<F: Family>(service: u32, key: &Tuple<F::Addr>) -> bool {
    if has::<F>(service, key.saddr) {
        return true;
    }
    let Some(node) = service::node() else { return false };
    F::words(key.saddr) == F::words(key.daddr) && has::<F>(service, F::masquerade(node))
}

#[inline(always)]
fn has<F: Family>(service: u32, addr: F::Addr) -> bool {
    let key = Key::new(size_of::<Source<F::Addr>>() as u32 * 8, Source { service, pad: 0, addr });
    F::sources().get(&key).is_some()
}
