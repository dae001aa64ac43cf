//! What differs between IPv4 and IPv6.

use proxy_common::addr::{Ipv4, Ipv6};

use crate::{
    contract::Node,
    maps::{self, Backends, Flows, Services},
    wire::{Ipv4Header, Ipv6Header, change, mend, mix},
};

/// An address family.
pub(crate) trait Family {
    /// Its addresses.
    type Addr: Copy + PartialEq + 'static;
    /// Its header, without options and extensions.
    type Header: 'static;

    fn services() -> &'static Services<Self::Addr>;
    fn backends() -> &'static Backends<Self::Addr>;
    fn flows() -> &'static Flows<Self::Addr>;
    /// The address of the node.
    fn node(node: &Node) -> Self::Addr;
    /// Source, destination and protocol of a packet that is whole and has no options.
    fn read(header: &Self::Header) -> Option<(Self::Addr, Self::Addr, u8)>;
    /// Length of the packet.
    fn length(header: &Self::Header) -> u64;
    /// Mixes an address into a hash.
    fn mix(hash: u32, addr: Self::Addr) -> u32;
    /// Writes addresses and takes one from the hop limit. Returns what the addresses do to a sum.
    fn rewrite(header: &mut Self::Header, saddr: Self::Addr, daddr: Self::Addr) -> u64;
    /// Whether a router may send it on.
    fn may_go_on(header: &Self::Header) -> bool;
}

/// What a new address does to a sum.
#[inline(always)]
fn words([a, b, c, d]: [u32; 4], [new_a, new_b, new_c, new_d]: [u32; 4]) -> u64 {
    change(a, new_a) + change(b, new_b) + change(c, new_c) + change(d, new_d)
}

/// IPv4.
pub(crate) struct V4;
/// IPv6.
pub(crate) struct V6;

impl Family for V4 {
    type Addr = Ipv4;
    type Header = Ipv4Header;

    #[inline(always)]
    fn services() -> &'static Services<Ipv4> {
        &maps::SERVICES_V4
    }

    #[inline(always)]
    fn backends() -> &'static Backends<Ipv4> {
        &maps::BACKENDS_V4
    }

    #[inline(always)]
    fn flows() -> &'static Flows<Ipv4> {
        &maps::FLOWS_V4
    }

    #[inline(always)]
    fn node(node: &Node) -> Ipv4 {
        node.v4
    }

    #[inline(always)]
    fn read(header: &Ipv4Header) -> Option<(Ipv4, Ipv4, u8)> {
        let is_plain = header.version_ihl == 0x45 && header.fragment & 0x3fff_u16.to_be() == 0;
        is_plain.then_some((header.saddr, header.daddr, header.protocol))
    }

    #[inline(always)]
    fn length(header: &Ipv4Header) -> u64 {
        u16::from_be(header.total_length).into()
    }

    #[inline(always)]
    fn mix(hash: u32, addr: Ipv4) -> u32 {
        mix(hash, addr.word())
    }

    #[inline(always)]
    fn rewrite(header: &mut Ipv4Header, saddr: Ipv4, daddr: Ipv4) -> u64 {
        let addresses = change(header.saddr.word(), saddr.word()) + change(header.daddr.word(), daddr.word());
        // The word is `[ttl, protocol]`.
        let hop = u64::from(!u16::from_ne_bytes([1, 0]));
        header.saddr = saddr;
        header.daddr = daddr;
        header.ttl -= 1;
        header.csum = mend(header.csum, addresses + hop);
        addresses
    }

    #[inline(always)]
    fn may_go_on(header: &Ipv4Header) -> bool {
        header.ttl > 1
    }
}

impl Family for V6 {
    type Addr = Ipv6;
    type Header = Ipv6Header;

    #[inline(always)]
    fn services() -> &'static Services<Ipv6> {
        &maps::SERVICES_V6
    }

    #[inline(always)]
    fn backends() -> &'static Backends<Ipv6> {
        &maps::BACKENDS_V6
    }

    #[inline(always)]
    fn flows() -> &'static Flows<Ipv6> {
        &maps::FLOWS_V6
    }

    #[inline(always)]
    fn node(node: &Node) -> Ipv6 {
        node.v6
    }

    #[inline(always)]
    fn read(header: &Ipv6Header) -> Option<(Ipv6, Ipv6, u8)> {
        let is_plain = header.version & 0xf000_0000_u32.to_be() == 0x6000_0000_u32.to_be();
        is_plain.then_some((header.saddr, header.daddr, header.next_header))
    }

    #[inline(always)]
    fn length(header: &Ipv6Header) -> u64 {
        u64::from(u16::from_be(header.payload_length)) + 40
    }

    #[inline(always)]
    fn mix(hash: u32, addr: Ipv6) -> u32 {
        let [a, b, c, d] = addr.words();
        mix(mix(mix(mix(hash, a), b), c), d)
    }

    #[inline(always)]
    fn rewrite(header: &mut Ipv6Header, saddr: Ipv6, daddr: Ipv6) -> u64 {
        let addresses = words(header.saddr.words(), saddr.words()) + words(header.daddr.words(), daddr.words());
        header.saddr = saddr;
        header.daddr = daddr;
        header.hop_limit -= 1;
        addresses
    }

    #[inline(always)]
    fn may_go_on(header: &Ipv6Header) -> bool {
        header.hop_limit > 1
    }
}
