//! Wire headers as they lie in memory, and the checks that make a packet one we understand. Structs are laid over the
//! packet; their alignment is a promise to the compiler that whole words may be loaded, which every BPF machine can do
//! at any address.

use proxy_common::{
    addr::{Ipv4, Ipv6, Mac, Port, Protocol},
    flow::Rewrite,
    outcome::Outcome,
};

use crate::{family::Family, nat, packet::Packet};

/// Ethernet.
#[repr(C)]
pub struct Ethernet {
    /// Destination.
    pub dmac: Mac,
    /// Source.
    pub smac: Mac,
    /// In network order.
    pub ethertype: u16,
}

/// Ethertypes in network order.
pub(crate) mod ethertype {
    /// IPv4
    pub(crate) const IPV4: u16 = 0x0800_u16.to_be();
    /// IPv6
    pub(crate) const IPV6: u16 = 0x86DD_u16.to_be();
    /// 802.1Q
    pub(crate) const VLAN: u16 = 0x8100_u16.to_be();
    /// 802.1ad
    pub(crate) const QINQ: u16 = 0x88A8_u16.to_be();
}

/// IPv4 without options.
#[repr(C)]
pub(crate) struct Ipv4Header {
    /// Version and length in words.
    pub version_ihl: u8,
    /// Type of service.
    pub tos: u8,
    /// Length of the packet, network order.
    pub total_length: u16,
    /// Identification.
    pub id: u16,
    /// Flags and fragment offset, network order.
    pub fragment: u16,
    /// Time to live.
    pub ttl: u8,
    /// Transport protocol.
    pub protocol: u8,
    /// Checksum of the header.
    pub csum: u16,
    /// Source.
    pub saddr: Ipv4,
    /// Destination.
    pub daddr: Ipv4,
}

/// [`Ipv4Header::fragment`] of a packet that is none and must not become one.
pub(crate) const DO_NOT_FRAGMENT: u16 = 0x4000_u16.to_be();

/// IPv6, the fixed header. Addresses are bytes here, because a header of 40 bytes is not a multiple of an aligned one.
#[repr(C)]
pub(crate) struct Ipv6Header {
    /// Version, traffic class, flow label.
    pub version: u32,
    /// Length of what follows, network order.
    pub payload_length: u16,
    /// Transport protocol, or the first extension header.
    pub next_header: u8,
    /// Hop limit.
    pub hop_limit: u8,
    /// Source.
    pub saddr: Ipv6,
    /// Destination.
    pub daddr: Ipv6,
}

/// IPv6's fragment header.
#[repr(C)]
pub(crate) struct FragmentHeader {
    /// Transport protocol.
    pub next_header: u8,
    /// Zero.
    pub reserved: u8,
    /// Offset in units of eight bytes, in the high thirteen bits; then whether more follow. Network order.
    pub place: u16,
    /// Identification, in halves because nothing aligns it.
    pub id: [u16; 2],
}

/// What an IPv6 extension header begins with: a routing header's words, of which the others need the first two.
#[repr(C)]
pub(crate) struct ExtensionHeader {
    /// What comes after it.
    pub next_header: u8,
    /// Its length in units of eight bytes, without the first.
    pub length: u8,
    /// Which kind of routing header.
    pub kind: u8,
    /// How many addresses the packet has yet to visit.
    pub segments_left: u8,
    /// What depends on the kind.
    pub rest: [u16; 2],
}

/// Hop-by-hop options that say how long a packet is that is too long for its IPv6 header.
#[repr(C)]
pub(crate) struct JumboHeader {
    /// What comes after it.
    pub next_header: u8,
    /// As in all extension headers.
    pub length: u8,
    /// Of the option.
    pub kind_and_length: [u8; 2],
    /// In halves, because nothing aligns it. Network order.
    pub payload_length: [u16; 2],
}

impl JumboHeader {
    /// "Jumbo payload", which has four bytes.
    pub(crate) const KIND_AND_LENGTH: [u8; 2] = [194, 4];
}

/// Numbers of what may follow an IP header.
pub(crate) mod protocol {
    /// Hop-by-hop options, which only come first.
    pub(crate) const HOP_BY_HOP: u8 = 0;
    /// IPv6's routing header.
    pub(crate) const ROUTING: u8 = 43;
    /// IPv6's fragment header.
    pub(crate) const FRAGMENT: u8 = 44;
    /// Destination options.
    pub(crate) const DESTINATION: u8 = 60;

    /// Hop-by-hop, routing, authentication, destination options, mobility, HIP, shim6. A fragment's is something else.
    #[inline(always)]
    pub(crate) const fn is_extension(number: u8) -> bool {
        matches!(number, HOP_BY_HOP | ROUTING | 51 | DESTINATION | 135 | 139 | 140)
    }
}

/// Numbers of IPv4's options, which end or do nothing or have a length after them.
pub(crate) mod option {
    /// The last one.
    pub(crate) const END: u8 = 0;
    /// Fills a byte.
    pub(crate) const NOTHING: u8 = 1;
    /// Addresses the packet has yet to visit.
    pub(crate) const LOOSE_ROUTE: u8 = 131;
    /// The same.
    pub(crate) const STRICT_ROUTE: u8 = 137;
}

/// TCP without options.
#[repr(C)]
pub(crate) struct TcpHeader {
    /// Source port.
    pub sport: Port,
    /// Destination port.
    pub dport: Port,
    /// Sequence number.
    pub sequence: u32,
    /// Acknowledged.
    pub acknowledged: u32,
    /// Length in words, in the high four bits.
    pub data_offset: u8,
    /// See [`tcp`].
    pub flags: u8,
    /// Window.
    pub window: u16,
    /// Checksum.
    pub csum: u16,
    /// Urgent pointer.
    pub urgent: u16,
}

/// TCP flags.
pub(crate) mod tcp {
    /// The sender is done.
    pub(crate) const FIN: u8 = 1;
    /// Opens a connection.
    pub(crate) const SYN: u8 = 2;
    /// Ends a connection at once.
    pub(crate) const RST: u8 = 4;
    /// The acknowledgement number is valid.
    pub(crate) const ACK: u8 = 16;
}

/// Where TCP has its checksum.
pub(crate) const TCP_CSUM: usize = core::mem::offset_of!(TcpHeader, csum);
/// The same in UDP.
pub(crate) const UDP_CSUM: usize = core::mem::offset_of!(UdpHeader, csum);

/// What all ICMP and `ICMPv6` messages begin with.
#[repr(C)]
pub(crate) struct IcmpHeader {
    /// What it says.
    pub kind: u8,
    /// What of that.
    pub code: u8,
    /// Checksum, in `ICMPv6` with a pseudo-header.
    pub csum: u16,
    /// What depends on the type: in errors nothing, a pointer, or an MTU.
    pub rest: [u16; 2],
}

/// UDP.
#[repr(C)]
pub(crate) struct UdpHeader {
    /// Source port.
    pub sport: Port,
    /// Destination port.
    pub dport: Port,
    /// Length with header, network order.
    pub length: u16,
    /// Checksum; 0 means none.
    pub csum: u16,
}

const _: () =
    assert!(size_of::<IcmpHeader>() == 8 && size_of::<ExtensionHeader>() == 8 && size_of::<JumboHeader>() == 8);
const _: () = assert!(size_of::<Ethernet>() == 14 && size_of::<Ipv4Header>() == 20 && size_of::<Ipv6Header>() == 40);
const _: () = assert!(size_of::<TcpHeader>() == 20 && size_of::<UdpHeader>() == 8);

/// A transport protocol whose ports are translated.
pub trait Transport {
    /// Its header.
    type Header: 'static;
    /// Its number.
    const PROTOCOL: Protocol;
    /// Whether a packet can say that a connection begins or ends.
    const HAS_STATE: bool;

    /// Source and destination port.
    fn ports(header: &Self::Header) -> (Port, Port);
    /// TCP flags, or those that mean the same, or 0.
    fn flags<P: Packet>(packet: &P, header: &Self::Header, offset: usize) -> u8;
    /// Whether the lengths that the header at an offset tells of fit the packet: `payload` bytes follow the IP header.
    fn is_sound<P: Packet>(packet: &P, header: &Self::Header, offset: usize, payload: u16) -> bool;
    /// Puts new ports into the header at an offset and mends its checksum for them, and for new addresses if it covers any.
    /// `false` when that could not be done whole. Views of the packet are stale after it.
    fn rewrite<P: Packet, F: Family>(packet: &mut P, rewrite: &Rewrite<F::Addr>, offset: usize) -> bool;
    /// The header's length, options included.
    #[inline(always)]
    fn length(_: &Self::Header) -> u32 {
        size_of::<Self::Header>() as u32
    }
}

/// One with an internet checksum over a pseudo-header.
pub trait Summed: Transport {
    /// Where the checksum stands in the header.
    const CSUM: usize;

    /// The ports and the checksum, to be written.
    fn fields(header: &mut Self::Header) -> (&mut Port, &mut Port, &mut u16);
}

/// TCP.
pub(crate) struct Tcp;
/// UDP.
pub(crate) struct Udp;

impl Transport for Tcp {
    type Header = TcpHeader;
    const PROTOCOL: Protocol = Protocol::Tcp;
    const HAS_STATE: bool = true;

    #[inline(always)]
    fn ports(header: &TcpHeader) -> (Port, Port) {
        (header.sport, header.dport)
    }

    #[inline(always)]
    fn flags<P: Packet>(_: &P, header: &TcpHeader, _: usize) -> u8 {
        header.flags
    }

    #[inline(always)]
    fn is_sound<P: Packet>(_: &P, header: &TcpHeader, _: usize, payload: u16) -> bool {
        let length = u16::from(header.data_offset >> 4) * 4;
        length >= 20 && length <= payload
    }

    #[inline(always)]
    fn length(header: &TcpHeader) -> u32 {
        u32::from(header.data_offset >> 4) * 4
    }

    #[inline(always)]
    fn rewrite<P: Packet, F: Family>(packet: &mut P, rewrite: &Rewrite<F::Addr>, offset: usize) -> bool {
        nat::rewrite_summed::<P, F, Self>(packet, rewrite, offset)
    }
}

impl Summed for Tcp {
    const CSUM: usize = TCP_CSUM;

    #[inline(always)]
    fn fields(header: &mut TcpHeader) -> (&mut Port, &mut Port, &mut u16) {
        (&mut header.sport, &mut header.dport, &mut header.csum)
    }
}

impl Transport for Udp {
    type Header = UdpHeader;
    const PROTOCOL: Protocol = Protocol::Udp;
    const HAS_STATE: bool = false;

    #[inline(always)]
    fn ports(header: &UdpHeader) -> (Port, Port) {
        (header.sport, header.dport)
    }

    #[inline(always)]
    fn flags<P: Packet>(_: &P, _: &UdpHeader, _: usize) -> u8 {
        0
    }

    #[inline(always)]
    fn is_sound<P: Packet>(_: &P, header: &UdpHeader, _: usize, payload: u16) -> bool {
        let length = u16::from_be(header.length);
        length >= 8 && length <= payload
    }

    #[inline(always)]
    fn rewrite<P: Packet, F: Family>(packet: &mut P, rewrite: &Rewrite<F::Addr>, offset: usize) -> bool {
        nat::rewrite_summed::<P, F, Self>(packet, rewrite, offset)
    }
}

impl Summed for Udp {
    const CSUM: usize = UDP_CSUM;

    #[inline(always)]
    fn fields(header: &mut UdpHeader) -> (&mut Port, &mut Port, &mut u16) {
        (&mut header.sport, &mut header.dport, &mut header.csum)
    }
}

/// What an IP header says of the rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Payload {
    /// Transport protocol.
    pub protocol: u8,
    /// How many bytes follow the IP header.
    pub length: u16,
}

/// Understands an IPv4 header. An error is why the packet is passed on instead.
#[inline(always)]
pub(crate) fn ipv4(header: &Ipv4Header) -> Result<Payload, Outcome> {
    if header.version_ihl != 0x45 {
        return Err(if header.version_ihl >> 4 == 4 && header.version_ihl & 15 > 5 {
            Outcome::PassOptions
        } else {
            Outcome::PassMalformed
        });
    }
    // All but "do not fragment" and the reserved bit.
    if header.fragment & 0x3fff_u16.to_be() != 0 {
        return Err(Outcome::PassFragment);
    }
    let total = u16::from_be(header.total_length);
    match total.checked_sub(20) {
        Some(length) => Ok(Payload { protocol: header.protocol, length }),
        None => Err(Outcome::PassMalformed),
    }
}

/// Understands an IPv6 header. An error is why the packet is passed on instead.
#[inline(always)]
pub(crate) fn ipv6(header: &Ipv6Header) -> Result<Payload, Outcome> {
    if header.version & 0xf000_0000_u32.to_be() != 0x6000_0000_u32.to_be() {
        return Err(Outcome::PassMalformed);
    }
    match header.next_header {
        next if protocol::is_extension(next) => Err(Outcome::PassExtension),
        protocol::FRAGMENT => Err(Outcome::PassFragment),
        protocol => Ok(Payload { protocol, length: u16::from_be(header.payload_length) }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::XdpPacket;

    fn header() -> Ipv4Header {
        Ipv4Header {
            version_ihl: 0x45,
            tos: 0,
            total_length: 60_u16.to_be(),
            id: 0,
            fragment: 0x4000_u16.to_be(),
            ttl: 64,
            protocol: 6,
            csum: 0,
            saddr: Ipv4::default(),
            daddr: Ipv4::default(),
        }
    }

    #[test]
    fn ipv4_headers_are_understood_or_named() {
        type Change = fn(&mut Ipv4Header);
        let cases: [(&str, Change, Result<u16, Outcome>); 7] = [
            ("plain", |_| {}, Ok(40)),
            ("options", |h| h.version_ihl = 0x46, Err(Outcome::PassOptions)),
            ("too short a header", |h| h.version_ihl = 0x44, Err(Outcome::PassMalformed)),
            ("another version", |h| h.version_ihl = 0x65, Err(Outcome::PassMalformed)),
            ("more fragments", |h| h.fragment = 0x2000_u16.to_be(), Err(Outcome::PassFragment)),
            ("a later fragment", |h| h.fragment = 1_u16.to_be(), Err(Outcome::PassFragment)),
            ("shorter than its header", |h| h.total_length = 19_u16.to_be(), Err(Outcome::PassMalformed)),
        ];
        for (name, change, expected) in cases {
            let mut header = header();
            change(&mut header);
            assert_eq!(ipv4(&header).map(|payload| payload.length), expected, "{name}");
        }
    }

    #[test]
    fn transport_lengths_must_fit() {
        let udp = |length: u16| UdpHeader { sport: Port::new(1), dport: Port::new(2), length: length.to_be(), csum: 0 };
        let mut context = aya_ebpf::bindings::xdp_md {
            data: 0,
            data_end: 0,
            data_meta: 0,
            ingress_ifindex: 1,
            rx_queue_index: 0,
            egress_ifindex: 0,
        };
        let packet = XdpPacket::from_context((&raw mut context).cast());
        assert!(Udp::is_sound(&packet, &udp(8), 0, 8));
        assert!(Udp::is_sound(&packet, &udp(8), 0, 20), "the rest is padding");
        assert!(!Udp::is_sound(&packet, &udp(7), 0, 20));
        assert!(!Udp::is_sound(&packet, &udp(21), 0, 20));
    }
}
