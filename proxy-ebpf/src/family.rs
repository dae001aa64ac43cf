//! What differs between IPv4 and IPv6: headers, maps, and nothing else.

use core::ptr;

use proxy_common::{
    addr::{Address, Ipv4, Ipv6},
    filter::Hashed,
    node::{FURTHER, Node},
    outcome::Outcome,
};

use crate::{
    checksum,
    fragment::Fragment,
    headers::{self, Walked},
    maps,
    once::Once,
    packet::Packet,
    parse::{self, FragmentHeader, Ipv4Header, Ipv6Header, Payload, ethertype},
};

/// Hop limit of packets of our own, as of most hosts.
const HOP_LIMIT: u8 = 64;

/// An address family.
pub trait Family: 'static {
    /// Its addresses.
    type Addr: Address + Hashed + Once + 'static;
    /// Its header, without options and extensions.
    type Header: 'static;
    /// In network order.
    const ETHERTYPE: u16;
    /// `AF_INET` or `AF_INET6`.
    const NUMBER: u8;
    /// Where the hop limit stands in the header.
    const HOP_LIMIT: usize;
    /// Length of the header that says where a fragment belongs; IPv4 says it in its own.
    const FRAGMENT_HEADER: usize;
    /// The protocol number of ICMP.
    const ICMP: u8;
    /// Types of ICMP's echo request and reply.
    const ECHO: (u8, u8);
    /// Type and code of ICMP's "port unreachable".
    const PORT_UNREACHABLE: (u8, u8);
    /// Type and code of the ICMP error that tells of a path MTU.
    const TOO_LONG: (u8, u8);
    /// Whether the header has no checksum of its own, so that a change of it changes the sum of the whole packet.
    const IS_V6: bool;
    /// What an IP header says that is followed by another one of its family.
    const ENCAPSULATED: u8;

    fn services() -> &'static maps::Services<Self::Addr>;
    fn backends() -> &'static maps::Backends<Self::Addr>;
    fn local_addrs() -> &'static maps::LocalAddrs<Self::Addr>;
    fn peer_addrs() -> &'static maps::PeerAddrs<Self::Addr>;
    fn flows() -> &'static maps::Flows<Self::Addr>;
    fn embryos() -> &'static maps::Embryos<Self::Addr>;
    fn drafts() -> &'static maps::Drafts<Self::Addr>;
    fn fragments() -> &'static maps::Fragments<Self::Addr>;
    fn sockets() -> &'static maps::Sockets<Self::Addr>;
    fn foreign() -> &'static maps::Foreign<Self::Addr>;
    fn affinities() -> &'static maps::Affinities<Self::Addr>;
    fn sources() -> &'static maps::Sources<Self::Addr>;
    fn active() -> &'static maps::Active;
    fn turns() -> &'static maps::Turns;
    /// Whether ClusterIPs may be taken from where an address is.
    fn is_in_service_cidrs(addr: &Self::Addr) -> bool;
    /// The address the node's own traffic bears.
    fn masquerade(node: &Node) -> Self::Addr;
    /// The others it may bear.
    fn further(node: &Node) -> &[Self::Addr; FURTHER];

    fn addresses(header: &Self::Header) -> (Self::Addr, Self::Addr);
    /// Understands the header, or says why the packet is passed on.
    fn payload(header: &Self::Header) -> Result<Payload, Outcome>;
    /// Looks for the transport header behind options and extensions.
    fn walk<P: Packet>(packet: &mut P) -> Result<Walked, Outcome>;
    /// Understands a fragment, whose other IP headers end at an offset.
    fn fragment<P: Packet>(packet: &P, at: usize) -> Option<Fragment>;
    /// Understands a quoted header: the transport protocol, and how many bytes lie between the two. A fragment's counts, if
    /// it is the first one of its packet.
    fn quoted<P: Packet>(packet: &P, offset: usize) -> Option<(u8, usize)>;
    /// Bytes from the header on, by its own account.
    fn length(header: &Self::Header) -> usize;
    fn hop_limit(header: &Self::Header) -> u8;
    /// Sets the hop limit to that of packets of our own; returns what that does to the sum of the packet.
    fn renew_hop_limit(header: &mut Self::Header) -> u16;
    /// What follows the header.
    fn protocol(header: &Self::Header) -> u8;
    /// Whether an ICMP message of this type quotes the packet it is about.
    fn is_icmp_error(kind: u8) -> bool;
    /// Writes the addresses; `delta` is what they do to the header's sum.
    fn set_addresses(header: &mut Self::Header, saddr: Self::Addr, daddr: Self::Addr, delta: u16);
    /// The same, and takes one from the hop limit.
    fn pass_on(header: &mut Self::Header, saddr: Self::Addr, daddr: Self::Addr, delta: u16);
    /// Takes one from the hop limit.
    fn decrement_hop_limit(header: &mut Self::Header);
    /// An address as the FIB takes it.
    fn words(addr: Self::Addr) -> [u32; 4];
    /// An address as the FIB gives it.
    fn from_words(words: [u32; 4]) -> Self::Addr;
    /// Writes a header of our own, without options, before `length` bytes of a protocol.
    fn compose(header: &mut Self::Header, saddr: Self::Addr, daddr: Self::Addr, protocol: u8, length: u16);
    /// Traffic class, or what IPv4 calls type of service.
    fn traffic_class(header: &Self::Header) -> u8;
    /// Gives a header of our own a traffic class, and allows routers to cut the packet, whose fragments are told by a number.
    fn let_be_cut(header: &mut Self::Header, class: u8, id: u16);
    /// The sum of a header's words, not folded.
    fn sum(header: &Self::Header) -> u32;
}

/// IPv4.
pub(crate) struct V4;
/// IPv6.
pub(crate) struct V6;

macro_rules! family_maps {
    ($services:ident $backends:ident $local:ident $peers:ident $flows:ident $embryos:ident $drafts:ident $fragments:ident $sockets:ident $foreign:ident
     $affinities:ident $sources:ident $active:ident $turns:ident) => {
        #[inline(always)]
        fn services() -> &'static maps::Services<Self::Addr> {
            &maps::$services
        }
        #[inline(always)]
        fn backends() -> &'static maps::Backends<Self::Addr> {
            &maps::$backends
        }
        #[inline(always)]
        fn local_addrs() -> &'static maps::LocalAddrs<Self::Addr> {
            &maps::$local
        }
        #[inline(always)]
        fn peer_addrs() -> &'static maps::PeerAddrs<Self::Addr> {
            &maps::$peers
        }
        #[inline(always)]
        fn flows() -> &'static maps::Flows<Self::Addr> {
            &maps::$flows
        }
        #[inline(always)]
        fn embryos() -> &'static maps::Embryos<Self::Addr> {
            &maps::$embryos
        }
        #[inline(always)]
        fn drafts() -> &'static maps::Drafts<Self::Addr> {
            &maps::$drafts
        }
        #[inline(always)]
        fn fragments() -> &'static maps::Fragments<Self::Addr> {
            &maps::$fragments
        }
        #[inline(always)]
        fn sockets() -> &'static maps::Sockets<Self::Addr> {
            &maps::$sockets
        }
        #[inline(always)]
        fn foreign() -> &'static maps::Foreign<Self::Addr> {
            &maps::$foreign
        }
        #[inline(always)]
        fn affinities() -> &'static maps::Affinities<Self::Addr> {
            &maps::$affinities
        }
        #[inline(always)]
        fn sources() -> &'static maps::Sources<Self::Addr> {
            &maps::$sources
        }
        #[inline(always)]
        fn active() -> &'static maps::Active {
            &maps::$active
        }
        #[inline(always)]
        fn turns() -> &'static maps::Turns {
            &maps::$turns
        }
    };
}

impl Family for V4 {
    type Addr = Ipv4;
    type Header = Ipv4Header;
    const ETHERTYPE: u16 = ethertype::IPV4;
    const NUMBER: u8 = 2;
    const HOP_LIMIT: usize = core::mem::offset_of!(Ipv4Header, ttl);
    const FRAGMENT_HEADER: usize = 0;
    const ICMP: u8 = 1;
    const ECHO: (u8, u8) = (8, 0);
    const PORT_UNREACHABLE: (u8, u8) = (3, 3);
    const TOO_LONG: (u8, u8) = (3, 4);
    const IS_V6: bool = false;
    const ENCAPSULATED: u8 = 4;

    family_maps!(SERVICES_V4 BACKENDS_V4 LOCAL_ADDRS_V4 PEER_ADDRS_V4 FLOWS_V4 EMBRYOS_V4 DRAFTS_V4 FRAGMENTS_V4 SOCKETS_V4 FOREIGN_V4
                 AFFINITY_V4 SOURCES_V4 ACTIVE_V4 TURNS_V4);

    #[inline(always)]
    fn is_in_service_cidrs(addr: &Ipv4) -> bool {
        maps::SERVICE_CIDRS.get(0).is_some_and(|cidrs| cidrs.v4.iter().any(|cidr| cidr.contains(addr)))
    }

    #[inline(always)]
    fn masquerade(node: &Node) -> Ipv4 {
        node.masquerade_v4
    }

    #[inline(always)]
    fn further(node: &Node) -> &[Ipv4; FURTHER] {
        &node.further_v4
    }

    #[inline(always)]
    fn addresses(header: &Ipv4Header) -> (Ipv4, Ipv4) {
        (header.saddr, header.daddr)
    }

    #[inline(always)]
    fn payload(header: &Ipv4Header) -> Result<Payload, Outcome> {
        parse::ipv4(header)
    }

    #[inline(always)]
    fn walk<P: Packet>(packet: &mut P) -> Result<Walked, Outcome> {
        headers::ipv4(packet)
    }

    #[inline(always)]
    fn fragment<P: Packet>(packet: &P, _: usize) -> Option<Fragment> {
        let header = packet.at::<Ipv4Header>(P::NETWORK)?;
        Some(Fragment {
            id: u32::from(header.id),
            protocol: header.protocol,
            offset: (u16::from_be(header.fragment) & 0x1fff) << 3,
            end: P::NETWORK + u16::from_be(header.total_length) as usize,
        })
    }

    #[inline(always)]
    fn quoted<P: Packet>(packet: &P, offset: usize) -> Option<(u8, usize)> {
        let header = packet.at::<Ipv4Header>(offset)?;
        match parse::ipv4(header) {
            Ok(payload) => Some((payload.protocol, 0)),
            Err(Outcome::PassFragment) if header.fragment & 0x1fff_u16.to_be() == 0 => Some((header.protocol, 0)),
            Err(_) => None,
        }
    }

    #[inline(always)]
    fn length(header: &Ipv4Header) -> usize {
        u16::from_be(header.total_length).into()
    }

    #[inline(always)]
    fn hop_limit(header: &Ipv4Header) -> u8 {
        header.ttl
    }

    #[inline(always)]
    fn renew_hop_limit(header: &mut Ipv4Header) -> u16 {
        let word = |ttl| u32::from(u16::from_ne_bytes([ttl, 0]));
        let change = checksum::delta(word(header.ttl), word(HOP_LIMIT));
        header.ttl = HOP_LIMIT;
        header.csum = checksum::update(header.csum, u32::from(change));
        0
    }

    #[inline(always)]
    fn protocol(header: &Ipv4Header) -> u8 {
        header.protocol
    }

    /// Destination unreachable, time exceeded, parameter problem. Redirects are for routers, source quenches for nobody.
    #[inline(always)]
    fn is_icmp_error(kind: u8) -> bool {
        matches!(kind, 3 | 11 | 12)
    }

    #[inline(always)]
    fn set_addresses(header: &mut Ipv4Header, saddr: Ipv4, daddr: Ipv4, delta: u16) {
        header.saddr = saddr;
        header.daddr = daddr;
        header.csum = checksum::update(header.csum, u32::from(delta));
    }

    #[inline(always)]
    fn pass_on(header: &mut Ipv4Header, saddr: Ipv4, daddr: Ipv4, delta: u16) {
        header.saddr = saddr;
        header.daddr = daddr;
        header.ttl -= 1;
        header.csum = checksum::update(header.csum, u32::from(delta) + u32::from(checksum::TTL_DECREMENT));
    }

    #[inline(always)]
    fn decrement_hop_limit(header: &mut Ipv4Header) {
        header.ttl -= 1;
        header.csum = checksum::update(header.csum, u32::from(checksum::TTL_DECREMENT));
    }

    #[inline(always)]
    fn words(addr: Ipv4) -> [u32; 4] {
        [addr.word(), 0, 0, 0]
    }

    #[inline(always)]
    fn from_words(words: [u32; 4]) -> Ipv4 {
        let [word, ..] = words;
        Ipv4 { octets: word.to_ne_bytes() }
    }

    #[inline(always)]
    fn compose(header: &mut Ipv4Header, saddr: Ipv4, daddr: Ipv4, protocol: u8, length: u16) {
        header.version_ihl = 0x45;
        header.tos = 0;
        header.total_length = (size_of::<Ipv4Header>() as u16 + length).to_be();
        header.id = 0;
        header.fragment = parse::DO_NOT_FRAGMENT;
        header.ttl = HOP_LIMIT;
        header.protocol = protocol;
        header.csum = 0;
        header.saddr = saddr;
        header.daddr = daddr;
        header.csum = !checksum::fold(Self::sum(header));
    }

    #[inline(always)]
    fn traffic_class(header: &Ipv4Header) -> u8 {
        header.tos
    }

    #[inline(always)]
    fn let_be_cut(header: &mut Ipv4Header, class: u8, id: u16) {
        header.tos = class;
        header.id = id;
        header.fragment = 0;
        header.csum = 0;
        header.csum = !checksum::fold(Self::sum(header));
    }

    #[inline(always)]
    fn sum(header: &Ipv4Header) -> u32 {
        // SAFETY: the header is twenty bytes of plain data.
        checksum::sum::<5>(unsafe { &*ptr::from_ref(header).cast() })
    }
}

impl Family for V6 {
    type Addr = Ipv6;
    type Header = Ipv6Header;
    const ETHERTYPE: u16 = ethertype::IPV6;
    const NUMBER: u8 = 10;
    const HOP_LIMIT: usize = core::mem::offset_of!(Ipv6Header, hop_limit);
    const FRAGMENT_HEADER: usize = size_of::<FragmentHeader>();
    const ICMP: u8 = 58;
    const ECHO: (u8, u8) = (128, 129);
    const PORT_UNREACHABLE: (u8, u8) = (1, 4);
    const TOO_LONG: (u8, u8) = (2, 0);
    const IS_V6: bool = true;
    const ENCAPSULATED: u8 = 41;

    family_maps!(SERVICES_V6 BACKENDS_V6 LOCAL_ADDRS_V6 PEER_ADDRS_V6 FLOWS_V6 EMBRYOS_V6 DRAFTS_V6 FRAGMENTS_V6 SOCKETS_V6 FOREIGN_V6
                 AFFINITY_V6 SOURCES_V6 ACTIVE_V6 TURNS_V6);

    #[inline(always)]
    fn is_in_service_cidrs(addr: &Ipv6) -> bool {
        maps::SERVICE_CIDRS.get(0).is_some_and(|cidrs| cidrs.v6.iter().any(|cidr| cidr.contains(addr)))
    }

    #[inline(always)]
    fn masquerade(node: &Node) -> Ipv6 {
        node.masquerade_v6
    }

    #[inline(always)]
    fn further(node: &Node) -> &[Ipv6; FURTHER] {
        &node.further_v6
    }

    #[inline(always)]
    fn addresses(header: &Ipv6Header) -> (Ipv6, Ipv6) {
        (header.saddr, header.daddr)
    }

    #[inline(always)]
    fn payload(header: &Ipv6Header) -> Result<Payload, Outcome> {
        parse::ipv6(header)
    }

    #[inline(always)]
    fn walk<P: Packet>(packet: &mut P) -> Result<Walked, Outcome> {
        headers::ipv6(packet)
    }

    #[inline(always)]
    fn fragment<P: Packet>(packet: &P, at: usize) -> Option<Fragment> {
        let ip = packet.at::<Ipv6Header>(P::NETWORK)?;
        let header = packet.at::<FragmentHeader>(at)?;
        let end = P::NETWORK + Self::length(ip);
        (end >= at + size_of::<FragmentHeader>()).then_some(Fragment {
            id: u32::from(header.id[0]) | u32::from(header.id[1]) << 16,
            protocol: header.next_header,
            offset: u16::from_be(header.place) & 0xfff8,
            end,
        })
    }

    #[inline(always)]
    fn quoted<P: Packet>(packet: &P, offset: usize) -> Option<(u8, usize)> {
        match parse::ipv6(packet.at::<Ipv6Header>(offset)?) {
            Ok(payload) => Some((payload.protocol, 0)),
            Err(Outcome::PassFragment) => {
                let header = packet.at::<FragmentHeader>(offset + size_of::<Ipv6Header>())?;
                let is_first = header.place & 0xfff8_u16.to_be() == 0;
                is_first.then_some((header.next_header, size_of::<FragmentHeader>()))
            }
            Err(_) => None,
        }
    }

    #[inline(always)]
    fn length(header: &Ipv6Header) -> usize {
        size_of::<Ipv6Header>() + usize::from(u16::from_be(header.payload_length))
    }

    #[inline(always)]
    fn hop_limit(header: &Ipv6Header) -> u8 {
        header.hop_limit
    }

    #[inline(always)]
    fn renew_hop_limit(header: &mut Ipv6Header) -> u16 {
        let word = |hop_limit| u32::from(u16::from_ne_bytes([0, hop_limit]));
        let change = checksum::delta(word(header.hop_limit), word(HOP_LIMIT));
        header.hop_limit = HOP_LIMIT;
        change
    }

    #[inline(always)]
    fn protocol(header: &Ipv6Header) -> u8 {
        header.next_header
    }

    /// Destination unreachable, packet too big, time exceeded, parameter problem.
    #[inline(always)]
    fn is_icmp_error(kind: u8) -> bool {
        matches!(kind, 1..=4)
    }

    #[inline(always)]
    fn set_addresses(header: &mut Ipv6Header, saddr: Ipv6, daddr: Ipv6, _: u16) {
        header.saddr = saddr;
        header.daddr = daddr;
    }

    #[inline(always)]
    fn pass_on(header: &mut Ipv6Header, saddr: Ipv6, daddr: Ipv6, _: u16) {
        header.saddr = saddr;
        header.daddr = daddr;
        header.hop_limit -= 1;
    }

    #[inline(always)]
    fn decrement_hop_limit(header: &mut Ipv6Header) {
        header.hop_limit -= 1;
    }

    #[inline(always)]
    fn words(addr: Ipv6) -> [u32; 4] {
        addr.words()
    }

    #[inline(always)]
    fn from_words(words: [u32; 4]) -> Ipv6 {
        let mut addr = Ipv6::default();
        for (octets, word) in addr.octets.as_chunks_mut::<4>().0.iter_mut().zip(words) {
            *octets = word.to_ne_bytes();
        }
        addr
    }

    #[inline(always)]
    fn compose(header: &mut Ipv6Header, saddr: Ipv6, daddr: Ipv6, protocol: u8, length: u16) {
        header.version = 0x6000_0000_u32.to_be();
        header.payload_length = length.to_be();
        header.next_header = protocol;
        header.hop_limit = HOP_LIMIT;
        header.saddr = saddr;
        header.daddr = daddr;
    }

    #[inline(always)]
    fn traffic_class(header: &Ipv6Header) -> u8 {
        (u32::from_be(header.version) >> 20) as u8
    }

    /// Routers do not cut, in IPv6.
    #[inline(always)]
    fn let_be_cut(header: &mut Ipv6Header, class: u8, _: u16) {
        header.version |= (u32::from(class) << 20).to_be();
    }

    #[inline(always)]
    fn sum(header: &Ipv6Header) -> u32 {
        // SAFETY: the header is forty bytes of plain data.
        checksum::sum::<10>(unsafe { &*ptr::from_ref(header).cast() })
    }
}
