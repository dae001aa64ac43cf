//! A port's way: a process of the node may not take a port that is a `NodePort` in use, because what arrives for it goes to
//! the Service. In: a socket that has just been bound. Out: whether it may stay so. Pods have ports of their own, and what
//! was bound before the Service came stays.
//!
//! The kernel's own choice for port 0 is judged like any other: it takes from the ephemeral range, which must not overlap the
//! range of `NodePorts`. A socket that connects without `bind` is never asked about.

use aya_ebpf::{EbpfContext as _, bindings::bpf_sock, helpers::generated as helpers, programs::SockContext};
use proxy_common::{
    addr::{Address, Ipv4, Ipv6, Port, Protocol},
    node::local,
    outcome::{Hook, Outcome},
    service::Frontend,
};

use crate::{
    counters::count,
    event,
    family::{Family, V4, V6},
    kernel::HOST_NETNS_COOKIE,
    peer::{load, load6, mapped_address},
    service,
    socket::Answer,
};

const EADDRINUSE: i32 = 98;

/// A socket bound to an IPv4 address.
#[inline(always)]
pub fn post_bind4(context: &SockContext) -> Answer {
    let Some((port, protocol)) = candidate(context) else { return Answer::GoOn };
    let address = address4(context);
    if is_taken::<V4>(address, port, protocol) { refuse::<V4>(address, port, protocol) } else { Answer::GoOn }
}

/// A socket bound to an IPv6 address. One bound to every address takes IPv4 as well, unless it is told not to, which cannot
/// be seen here.
#[inline(always)]
pub fn post_bind6(context: &SockContext) -> Answer {
    let Some((port, protocol)) = candidate(context) else { return Answer::GoOn };
    let address = address6(context);
    let is_taken = match mapped_address(&address) {
        Some(address) => is_taken::<V4>(address, port, protocol),
        None => {
            is_taken::<V6>(address, port, protocol) || address == Ipv6::ANY && is_taken::<V4>(Ipv4::ANY, port, protocol)
        }
    };
    if is_taken { refuse::<V6>(address, port, protocol) } else { Answer::GoOn }
}

/// Port and protocol of a socket of the node's own, if a `NodePort` can have them.
#[inline(always)]
fn candidate(context: &SockContext) -> Option<(Port, Protocol)> {
    let sock = context.sock;
    // SAFETY: only the place of the field is taken.
    let protocol = match load(unsafe { &raw const (*sock).protocol }) {
        6 => Protocol::Tcp,
        17 => Protocol::Udp,
        132 => Protocol::Sctp,
        _ => return None,
    };
    // SAFETY: only the place of the field is taken. The kernel shows this port in host order.
    let port = Port::new(load(unsafe { &raw const (*sock).src_port }) as u16);
    // SAFETY: a helper on the program's own context.
    let is_node = unsafe { helpers::bpf_get_netns_cookie(context.as_ptr()) } == HOST_NETNS_COOKIE.load();
    (is_node && service::may_be_node_port(service::node()?, port)).then_some((port, protocol))
}

/// Whether some Service has the port as its `NodePort` and is served on the address, or on any that the unspecified address
/// stands for.
#[inline(always)]
fn is_taken<F: Family>(address: F::Addr, port: Port, protocol: Protocol) -> bool {
    // SAFETY: entries are replaced, never written in place, and freed only after a grace period.
    let serves = |address| unsafe { F::local_addrs().get(address) }.is_some_and(|bits| bits & local::NODE_PORTS != 0);
    (address == F::Addr::ANY || serves(&address))
        // SAFETY: as above.
        && unsafe { F::services().get(Frontend::new(F::Addr::ANY, port, protocol)) }.is_some()
}

#[inline(always)]
fn refuse<F: Family>(address: F::Addr, port: Port, protocol: Protocol) -> Answer {
    count(Hook::PostBind, Outcome::RefuseBind);
    event::unserved::<F>(Hook::PostBind, Outcome::RefuseBind, address, port, protocol);
    // SAFETY: takes a number.
    unsafe { helpers::bpf_set_retval(-EADDRINUSE) };
    Answer::Refuse
}

#[inline(always)]
fn address4(context: &SockContext) -> Ipv4 {
    let sock: *mut bpf_sock = context.sock;
    // SAFETY: only the place of the field is taken.
    Ipv4 { octets: load(unsafe { &raw const (*sock).src_ip4 }).to_ne_bytes() }
}

#[inline(always)]
fn address6(context: &SockContext) -> Ipv6 {
    let sock: *mut bpf_sock = context.sock;
    // SAFETY: only the place of the field is taken.
    load6(unsafe { &raw const (*sock).src_ip6 }.cast())
}
