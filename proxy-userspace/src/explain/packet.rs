//! The packet that is tried, and what is read of one that a program has left. In and out: bytes, with every checksum right.

use std::net::{IpAddr, SocketAddr};

use etherparse::{
    IpNumber, NetSlice, PacketBuilder, PacketBuilderStep, SlicedPacket, TransportSlice,
    err::packet::{BuildWriteError, SliceError},
};
use proxy_common::addr::Protocol;

use super::{answer::Packet, place::Stand};
use crate::dataplane::{AnyCall, Moment};

/// Who has put it on the link: nobody that the node knows.
const SENDER: [u8; 6] = [2, 0, 0, 0, 0, 0xfe];
/// As most hosts send it.
const HOP_LIMIT: u8 = 64;
/// Of a new connection's first packet.
const SEQUENCE: u32 = 1;
const WINDOW: u16 = 65_535;

/// An SCTP header without a checksum, as it is while a device has still to compute it, and an INIT of the least length (RFC 9260
/// §3.3.2). A DATA chunk of the same length stands for what comes later.
const SCTP: usize = 12 + 20;
const INIT: u8 = 1;
const DATA: u8 = 0;

/// What a packet of a call is called.
pub(super) fn kind(protocol: Protocol, moment: Moment) -> &'static str {
    match (protocol, moment) {
        (Protocol::Tcp, Moment::First) => "TCP SYN",
        (Protocol::Tcp, Moment::Later) => "TCP ACK",
        (Protocol::Sctp, Moment::First) => "SCTP INIT",
        (Protocol::Sctp, Moment::Later) => "SCTP DATA",
        (Protocol::Udp | Protocol::Any, _) => "UDP datagram",
    }
}

/// The protocol of a call.
pub(super) fn protocol(call: &AnyCall) -> Protocol {
    match call {
        AnyCall::V4(call) => call.protocol,
        AnyCall::V6(call) => call.protocol,
    }
}

/// Where a call goes.
pub(super) fn destination(call: &AnyCall) -> SocketAddr {
    match call {
        AnyCall::V4(call) => SocketAddr::new(call.daddr.into(), call.dport.number()),
        AnyCall::V6(call) => SocketAddr::new(call.daddr.into(), call.dport.number()),
    }
}

/// The packet of a call.
pub(super) fn build(stand: &Stand, call: &AnyCall, client: SocketAddr, moment: Moment) -> Vec<u8> {
    let mut bytes = Vec::new();
    // A vector takes every write, and these payloads fit every header.
    let _ = write(&mut bytes, stand, call, client, moment);
    bytes
}

fn write(
    bytes: &mut Vec<u8>,
    stand: &Stand,
    call: &AnyCall,
    client: SocketAddr,
    moment: Moment,
) -> Result<(), BuildWriteError> {
    let to = destination(call);
    let internet = internet(stand, client.ip(), to.ip());
    let (sport, dport) = (client.port(), to.port());
    match (protocol(call), moment) {
        (Protocol::Tcp, Moment::First) => internet.tcp(sport, dport, SEQUENCE, WINDOW).syn().write(bytes, &[]),
        (Protocol::Tcp, Moment::Later) => internet.tcp(sport, dport, SEQUENCE, WINDOW).ack(SEQUENCE).write(bytes, &[]),
        (Protocol::Sctp, moment) => internet.write(bytes, IpNumber::SCTP, &sctp(sport, dport, moment)),
        (Protocol::Udp | Protocol::Any, _) => internet.udp(sport, dport).write(bytes, &[]),
    }
}

/// The headers before the transport's.
fn internet(stand: &Stand, from: IpAddr, to: IpAddr) -> PacketBuilderStep<etherparse::IpHeaders> {
    let device = stand.device.as_ref().and_then(|device| device.mac).unwrap_or_default();
    match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) if stand.has_ethernet() => {
            PacketBuilder::ethernet2(SENDER, device).ipv4(from.octets(), to.octets(), HOP_LIMIT)
        }
        (IpAddr::V4(from), IpAddr::V4(to)) => PacketBuilder::ipv4(from.octets(), to.octets(), HOP_LIMIT),
        (from, to) => {
            let [from, to] = [from, to].map(|address| match address {
                IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
                IpAddr::V6(v6) => v6.octets(),
            });
            if stand.has_ethernet() {
                PacketBuilder::ethernet2(SENDER, device).ipv6(from, to, HOP_LIMIT)
            } else {
                PacketBuilder::ipv6(from, to, HOP_LIMIT)
            }
        }
    }
}

fn sctp(sport: u16, dport: u16, moment: Moment) -> [u8; SCTP] {
    let mut packet = [0; SCTP];
    packet[0..2].copy_from_slice(&sport.to_be_bytes());
    packet[2..4].copy_from_slice(&dport.to_be_bytes());
    packet[12] = if moment == Moment::First { INIT } else { DATA };
    packet[14..16].copy_from_slice(&20_u16.to_be_bytes());
    packet
}

/// What a packet says of itself; none for one that is not understood.
pub(super) fn read(stand: &Stand, bytes: &[u8]) -> Option<Packet> {
    let sliced = slice(stand, bytes).ok()?;
    let (source, destination, protocol, payload) = match sliced.net.as_ref()? {
        NetSlice::Ipv4(ip) => (
            IpAddr::V4(ip.header().source_addr()),
            IpAddr::V4(ip.header().destination_addr()),
            ip.payload().ip_number,
            ip.payload().payload,
        ),
        NetSlice::Ipv6(ip) => (
            IpAddr::V6(ip.header().source_addr()),
            IpAddr::V6(ip.header().destination_addr()),
            ip.payload().ip_number,
            ip.payload().payload,
        ),
        NetSlice::Arp(_) => return None,
    };
    let (kind, ports) = describe(sliced.transport.as_ref(), protocol, payload);
    let end = |address: IpAddr, port: Option<u16>| match port {
        Some(port) => SocketAddr::new(address, port).to_string(),
        None => address.to_string(),
    };
    Some(Packet {
        kind,
        source: end(source, ports.map(|(sport, _)| sport)),
        destination: end(destination, ports.map(|(_, dport)| dport)),
    })
}

fn slice<'a>(stand: &Stand, bytes: &'a [u8]) -> Result<SlicedPacket<'a>, SliceError> {
    if stand.has_ethernet() { SlicedPacket::from_ethernet(bytes) } else { SlicedPacket::from_ip(bytes) }
}

/// What follows the IP header, in a word, and its ports.
fn describe(
    transport: Option<&TransportSlice<'_>>,
    protocol: IpNumber,
    payload: &[u8],
) -> (String, Option<(u16, u16)>) {
    match transport {
        Some(TransportSlice::Tcp(tcp)) => {
            let flags = [(tcp.syn(), "SYN"), (tcp.rst(), "RST"), (tcp.fin(), "FIN"), (tcp.ack(), "ACK")];
            let flags = flags.iter().filter(|(is_set, _)| *is_set).map(|(_, flag)| *flag);
            (format!("TCP {}", flags.collect::<Vec<_>>().join(" ")), Some((tcp.source_port(), tcp.destination_port())))
        }
        Some(TransportSlice::Udp(udp)) => ("UDP datagram".into(), Some((udp.source_port(), udp.destination_port()))),
        Some(TransportSlice::Icmpv4(_)) => ("ICMP".into(), None),
        Some(TransportSlice::Icmpv6(_)) => ("ICMPv6".into(), None),
        None if protocol == IpNumber::SCTP => sctp_chunk(payload),
        _ => (format!("protocol {}", protocol.0), None),
    }
}

fn sctp_chunk(packet: &[u8]) -> (String, Option<(u16, u16)>) {
    let port = |at: usize| Some(u16::from_be_bytes([*packet.get(at)?, *packet.get(at + 1)?]));
    let chunk = match packet.get(12) {
        Some(&DATA) => "DATA",
        Some(&INIT) => "INIT",
        Some(6) => "ABORT",
        _ => "chunk",
    };
    (format!("SCTP {chunk}"), port(0).zip(port(2)))
}
