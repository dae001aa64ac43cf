//! A socket's peer, as the context of a socket address program holds it: comes in as two fields, goes out as two fields.

use aya_ebpf::{
    bindings::{bpf_sock, bpf_sock_addr},
    programs::SockAddrContext,
};
use proxy_common::addr::{Address, Ipv4, Ipv6, Port};

use crate::family::{Family as _, V6};

/// Address and port of whom a socket talks to.
#[derive(Clone, Copy)]
pub(crate) struct Peer<A> {
    pub(crate) addr: A,
    pub(crate) port: Port,
}

/// The socket's protocol, by its IANA number.
#[inline(always)]
pub(crate) fn protocol(context: &SockAddrContext) -> u32 {
    // SAFETY: only the place of the field is taken.
    load(unsafe { &raw const (*context.sock_addr).protocol })
}

impl<A: Address> Peer<A> {
    /// Whom Linux takes it for: to a host of its own, the unspecified address means the host itself.
    #[inline(always)]
    pub(crate) fn meant(self) -> Self {
        Self { addr: if self.addr == A::ANY { A::LOOPBACK } else { self.addr }, ..self }
    }
}

/// The socket's family, by the kernel's number.
#[inline(always)]
pub(crate) fn family(context: &SockAddrContext) -> u32 {
    // SAFETY: only the place of the field is taken.
    load(unsafe { &raw const (*context.sock_addr).family })
}

/// Loads and stores of the context are volatile: the kernel knows its fields by offset and width, so they must not be
/// merged.
#[inline(always)]
pub(crate) fn load(field: *const u32) -> u32 {
    // SAFETY: callers pass a field of the context their program was called with.
    unsafe { field.read_volatile() }
}

#[inline(always)]
fn store(field: *mut u32, value: u32) {
    // SAFETY: callers pass a field of the context their program was called with, of those that may be written.
    unsafe { field.write_volatile(value) }
}

#[inline(always)]
fn port(context: *mut bpf_sock_addr) -> Port {
    // SAFETY: only the place of the field is taken.
    let word = load(unsafe { &raw const (*context).user_port });
    Port { octets: (word as u16).to_ne_bytes() }
}

#[inline(always)]
fn set_port(context: *mut bpf_sock_addr, port: Port) {
    // SAFETY: only the place of the field is taken.
    store(unsafe { &raw mut (*context).user_port }, u32::from(port.word()));
}

#[inline(always)]
pub(crate) fn peer4(context: &SockAddrContext) -> Peer<Ipv4> {
    let context = context.sock_addr;
    // SAFETY: only the place of the field is taken.
    let word = load(unsafe { &raw const (*context).user_ip4 });
    Peer { addr: Ipv4 { octets: word.to_ne_bytes() }, port: port(context) }
}

#[inline(always)]
pub(crate) fn set_peer4(context: &SockAddrContext, peer: Peer<Ipv4>) {
    let context = context.sock_addr;
    // SAFETY: only the place of the field is taken.
    store(unsafe { &raw mut (*context).user_ip4 }, peer.addr.word());
    set_port(context, peer.port);
}

#[inline(always)]
pub(crate) fn peer6(context: &SockAddrContext) -> Peer<Ipv6> {
    let context = context.sock_addr;
    // SAFETY: only the place of the field is taken.
    let addr = load6(unsafe { &raw const (*context).user_ip6 }.cast());
    Peer { addr, port: port(context) }
}

/// The IPv4 address a socket sends from, if that is settled: it is bound to it, or to the mapped one.
#[inline(always)]
pub(crate) fn source4(context: &SockAddrContext) -> Ipv4 {
    let sock = sock(context);
    // SAFETY: only the place of the field is taken.
    if load(unsafe { &raw const (*sock).family }) == u32::from(V6::NUMBER) {
        return mapped_address(&source6(context)).unwrap_or(Ipv4::ANY);
    }
    // SAFETY: only the place of the field is taken.
    Ipv4 { octets: load(unsafe { &raw const (*sock).src_ip4 }).to_ne_bytes() }
}

/// The IPv6 address a socket sends from, if that is settled.
#[inline(always)]
pub(crate) fn source6(context: &SockAddrContext) -> Ipv6 {
    // SAFETY: only the place of the field is taken.
    load6(unsafe { &raw const (*sock(context)).src_ip6 }.cast())
}

/// The port a socket sends from, if it has one yet.
#[inline(always)]
pub(crate) fn source_port(context: &SockAddrContext) -> Port {
    // SAFETY: only the place of the field is taken.
    Port::new(load(unsafe { &raw const (*sock(context)).src_port }) as u16)
}

#[inline(always)]
fn sock(context: &SockAddrContext) -> *const bpf_sock {
    let context = context.sock_addr;
    // SAFETY: only the place of the field is taken.
    let place = unsafe { &raw const (*context).__bindgen_anon_1 }.cast::<*const bpf_sock>();
    // SAFETY: a field of the context this program was called with, which is never null.
    unsafe { place.read_volatile() }
}

/// Four words of the context that are an address.
#[inline(always)]
pub(crate) fn load6(words: *const u32) -> Ipv6 {
    let mut addr = Ipv6::default();
    for (index, octets) in addr.octets.as_chunks_mut::<4>().0.iter_mut().enumerate() {
        *octets = load(words.wrapping_add(index)).to_ne_bytes();
    }
    addr
}

#[inline(always)]
pub(crate) fn set_peer6(context: &SockAddrContext, peer: Peer<Ipv6>) {
    set_words6(context.sock_addr, peer.addr.words());
    set_port(context.sock_addr, peer.port);
}

#[inline(always)]
pub(crate) fn set_mapped_peer(context: &SockAddrContext, peer: Peer<Ipv4>) {
    set_words6(context.sock_addr, [0, 0, MAPPED, peer.addr.word()]);
    set_port(context.sock_addr, peer.port);
}

#[inline(always)]
fn set_words6(context: *mut bpf_sock_addr, words: [u32; 4]) {
    // SAFETY: only the place of the field is taken.
    let place = unsafe { &raw mut (*context).user_ip6 }.cast::<u32>();
    for (index, word) in words.into_iter().enumerate() {
        store(place.wrapping_add(index), word);
    }
}

/// The third word of `::ffff:0:0/96`.
const MAPPED: u32 = 0xffff_u32.to_be();

/// The IPv4 peer a mapped IPv6 address stands for.
#[inline(always)]
pub(crate) fn mapped(peer: &Peer<Ipv6>) -> Option<Peer<Ipv4>> {
    Some(Peer { addr: mapped_address(&peer.addr)?, port: peer.port })
}

/// The IPv4 address a mapped IPv6 address stands for.
#[inline(always)]
pub(crate) fn mapped_address(address: &Ipv6) -> Option<Ipv4> {
    match address.words() {
        [0, 0, MAPPED, word] => Some(Ipv4 { octets: word.to_ne_bytes() }),
        _ => None,
    }
}
