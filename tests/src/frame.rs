//! Packets for tests of the programs: built and read with etherparse, which computes every checksum on its own. Nothing
//! here shares code with the datapath.
#![expect(clippy::panic, clippy::missing_panics_doc, reason = "a fixture speaks by failing the test")]

pub mod sctp;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use etherparse::{IpNumber, NetSlice, PacketBuilder, SlicedPacket, TransportSlice};

pub use self::sctp::Chunk;

/// The checksum a header should have; etherparse's headers have the same functions, but no trait.
macro_rules! checksum {
    ($header:expr, $source:expr, $destination:expr, $payload:expr) => {
        match ($source, $destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                $header.calc_checksum_ipv4_raw(source.octets(), destination.octets(), $payload)
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                $header.calc_checksum_ipv6_raw(source.octets(), destination.octets(), $payload)
            }
            mixed => panic!("a packet of two families: {mixed:?}"),
        }
        .expect("a payload that fits")
    };
}

/// Length of an Ethernet header.
pub const ETHERNET: usize = 14;
/// MAC addresses of built packets: destination, source.
pub const MACS: ([u8; 6], [u8; 6]) = ([2, 0, 0, 0, 0, 0x0a], [2, 0, 0, 0, 0, 0x0b]);

/// TCP flags.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flags(pub u8);

impl Flags {
    /// Opens.
    pub const SYN: Self = Self(2);
    /// Opens back.
    pub const SYN_ACK: Self = Self(2 | 16);
    /// Goes on.
    pub const ACK: Self = Self(16);
    /// Ends.
    pub const FIN: Self = Self(1 | 16);
    /// Ends at once.
    pub const RST: Self = Self(4);
}

/// A transport protocol with what the tests vary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// TCP with flags.
    Tcp(Flags),
    /// UDP.
    Udp,
    /// UDP without a checksum.
    UdpUnchecked,
    /// SCTP with one chunk.
    Sctp(Chunk),
}

/// A packet to be built, or one that was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Destination and source MAC.
    pub macs: ([u8; 6], [u8; 6]),
    /// Source.
    pub source: (IpAddr, u16),
    /// Destination.
    pub destination: (IpAddr, u16),
    /// Transport.
    pub transport: Transport,
    /// TTL or hop limit.
    pub hop_limit: u8,
    /// What follows the headers.
    pub payload: Vec<u8>,
}

impl Frame {
    /// A packet with some payload.
    pub fn new(source: (IpAddr, u16), destination: (IpAddr, u16), transport: Transport) -> Self {
        Self { macs: MACS, source, destination, transport, hop_limit: 64, payload: b"eleven char".to_vec() }
    }

    /// The bytes of the frame, checksums included.
    pub fn bytes(&self) -> Vec<u8> {
        let ethernet = PacketBuilder::ethernet2(self.macs.1, self.macs.0);
        let internet = match (self.source.0, self.destination.0) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                ethernet.ipv4(source.octets(), destination.octets(), self.hop_limit)
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                ethernet.ipv6(source.octets(), destination.octets(), self.hop_limit)
            }
            mixed => panic!("a packet of two families: {mixed:?}"),
        };
        let (sport, dport) = (self.source.1, self.destination.1);
        let mut bytes = Vec::new();
        match self.transport {
            Transport::Tcp(Flags(flags)) => {
                let mut tcp = internet.tcp(sport, dport, 1_000, 4_000);
                for (bit, set) in [(1, 0_u8), (2, 1), (4, 2)] {
                    if flags & bit != 0 {
                        tcp = match set {
                            0 => tcp.fin(),
                            1 => tcp.syn(),
                            _ => tcp.rst(),
                        };
                    }
                }
                if flags & 16 != 0 {
                    tcp = tcp.ack(2_000);
                }
                tcp.write(&mut bytes, &self.payload).expect("a vector takes every write");
            }
            Transport::Udp | Transport::UdpUnchecked => {
                internet.udp(sport, dport).write(&mut bytes, &self.payload).expect("a vector takes every write");
            }
            Transport::Sctp(chunk) => {
                let packet = sctp::packet(sport, dport, chunk, &self.payload);
                internet.write(&mut bytes, IpNumber::SCTP, &packet).expect("a vector takes every write");
            }
        }
        if self.transport == Transport::UdpUnchecked {
            let csum = ETHERNET + if self.source.0.is_ipv4() { 20 } else { 40 } + 6;
            bytes[csum..csum + 2].fill(0);
        }
        bytes
    }

    /// Reads a frame and checks every checksum in it.
    ///
    /// # Panics
    ///
    /// When it is no TCP, UDP or SCTP packet, or a checksum is wrong: that is what a test wants to know.
    pub fn read(bytes: &[u8]) -> Self {
        let sliced = SlicedPacket::from_ethernet(bytes).unwrap_or_else(|e| panic!("not a packet: {e}: {bytes:02x?}"));
        let (source, destination, hop_limit, rest) = match sliced.net.as_ref().expect("an IP header") {
            NetSlice::Ipv4(ip) => {
                let header = ip.header();
                let expected = header.to_header().calc_header_checksum();
                assert_eq!(header.header_checksum(), expected, "checksum of the IPv4 header");
                (IpAddr::V4(header.source_addr()), IpAddr::V4(header.destination_addr()), header.ttl(), ip.payload())
            }
            NetSlice::Ipv6(ip) => {
                let header = ip.header();
                let (source, destination) = (header.source_addr(), header.destination_addr());
                (IpAddr::V6(source), IpAddr::V6(destination), header.hop_limit(), ip.payload())
            }
            NetSlice::Arp(_) => panic!("an ARP packet"),
        };
        let (sport, dport, transport, payload) = match sliced.transport.as_ref() {
            Some(TransportSlice::Tcp(tcp)) => {
                let header = tcp.to_header();
                let expected = checksum!(header, source, destination, tcp.payload());
                assert_eq!(header.checksum, expected, "checksum of TCP");
                let bits = [(header.fin, 1), (header.syn, 2), (header.rst, 4), (header.ack, 16)];
                let flags = bits.iter().filter(|(set, _)| *set).map(|(_, bit)| bit).sum();
                (header.source_port, header.destination_port, Transport::Tcp(Flags(flags)), tcp.payload())
            }
            Some(TransportSlice::Udp(udp)) => {
                let header = udp.to_header();
                let transport = if header.checksum == 0 { Transport::UdpUnchecked } else { Transport::Udp };
                if transport == Transport::Udp {
                    let expected = checksum!(header, source, destination, udp.payload());
                    assert_eq!(header.checksum, expected, "checksum of UDP");
                }
                (header.source_port, header.destination_port, transport, udp.payload())
            }
            None if rest.ip_number == IpNumber::SCTP => {
                let (sport, dport, chunk, body) = sctp::read(rest.payload);
                (sport, dport, Transport::Sctp(chunk), body)
            }
            other => panic!("neither TCP nor UDP nor SCTP: {other:?}"),
        };
        let mut macs = MACS;
        macs.0.copy_from_slice(&bytes[0..6]);
        macs.1.copy_from_slice(&bytes[6..12]);
        Self {
            macs,
            source: (source, sport),
            destination: (destination, dport),
            transport,
            hop_limit,
            payload: payload.to_vec(),
        }
    }
}

/// The same host in both families.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Host {
    /// Its IPv4 address.
    pub v4: Ipv4Addr,
    /// Its IPv6 address.
    pub v6: Ipv6Addr,
}

/// An address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// IPv4
    V4,
    /// IPv6
    V6,
}

impl Family {
    /// Both.
    pub const BOTH: [Self; 2] = [Self::V4, Self::V6];
}

impl Host {
    /// Its address in one family.
    pub fn address(&self, family: Family) -> IpAddr {
        match family {
            Family::V4 => self.v4.into(),
            Family::V6 => self.v6.into(),
        }
    }
}
