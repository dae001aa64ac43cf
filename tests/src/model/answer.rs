//! What is said in the place of nobody: a RST to TCP, a port unreachable to a datagram. Or nothing, where nothing may be said.

use std::net::IpAddr;

use proxy_common::{
    addr::Protocol,
    outcome::{Hook, Outcome},
};

use super::{
    Expected, Model, Packet, Verdict,
    wire::{self, Segment, half, octets, pseudo, put, sum},
};

const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;

impl Model {
    pub(super) fn refuse(&mut self, packet: &Packet<'_>, segment: &Segment, reason: Outcome) -> Expected {
        let is_told = matches!(reason, Outcome::RejectNoEndpoint | Outcome::RejectNoPort | Outcome::ResetGone);
        self.count(packet.hook, reason);
        if !is_told || !deserves_answer(packet, segment) {
            return Expected::dropped();
        }
        let bytes = match segment.proto {
            Protocol::Tcp => reset(packet, segment),
            _ => unreachable(packet, segment),
        };
        Expected { verdict: Verdict::SendOut, bytes, doubtful: Vec::new() }
    }
}

/// Neither a RST nor what many have got, or what names no single sender, is answered; nor a fragment.
fn deserves_answer(packet: &Packet<'_>, segment: &Segment) -> bool {
    let is_group = packet.bytes.first().is_none_or(|first| first & 1 != 0);
    let is_one_host = match packet.ip.source {
        IpAddr::V4(address) => (1..224).contains(&address.octets()[0]),
        IpAddr::V6(address) => !address.is_multicast() && !address.is_unspecified(),
    };
    segment.flags & RST == 0 && !is_group && packet.ip.payload().is_ok() && is_one_host
}

/// An Ethernet and an IP header of our own, back to whom the packet came from.
fn envelope(packet: &Packet<'_>, protocol: u8, length: usize) -> Vec<u8> {
    let mut bytes = packet.bytes[6..12].to_vec();
    bytes.extend(&packet.bytes[..6]);
    bytes.extend(&packet.bytes[12..14]);
    let (source, destination) = (octets(packet.ip.destination), octets(packet.ip.source));
    if packet.ip.is_v4 {
        bytes.extend([0x45, 0]);
        bytes.extend((20 + length as u16).to_be_bytes());
        bytes.extend([0, 0, 0x40, 0, 64, protocol, 0, 0]);
        bytes.extend(source);
        bytes.extend(destination);
        let checksum = !sum(&[&bytes[wire::ETHERNET..]]);
        put(&mut bytes, wire::ETHERNET + 10, &checksum.to_be_bytes());
    } else {
        bytes.extend([0x60, 0, 0, 0]);
        bytes.extend((length as u16).to_be_bytes());
        bytes.extend([protocol, 64]);
        bytes.extend(source);
        bytes.extend(destination);
    }
    bytes
}

/// RFC 9293 §3.10.7.1. The checksum is the pseudo-header's sum, which is right whether or not a kernel completes it, and
/// the window what makes it right.
fn reset(packet: &Packet<'_>, segment: &Segment) -> Vec<u8> {
    let word = |at: usize| {
        let octets = packet.bytes.get(segment.start + at..segment.start + at + 4);
        u32::from_be_bytes(octets.and_then(|octets| octets.try_into().ok()).unwrap_or_default())
    };
    let header = usize::from(packet.bytes[segment.start + 12] >> 4) * 4;
    let marks = u32::from(segment.flags & SYN != 0) + u32::from(segment.flags & FIN != 0);
    let text = (segment.payload - header) as u32;
    let (sequence, acknowledged, flags) = if segment.flags & ACK != 0 {
        (word(8), 0, RST)
    } else {
        (0, word(4).wrapping_add(text).wrapping_add(marks), RST | ACK)
    };
    let mut tcp = segment.destination.to_be_bytes().to_vec();
    tcp.extend(segment.source.to_be_bytes());
    tcp.extend(sequence.to_be_bytes());
    tcp.extend(acknowledged.to_be_bytes());
    tcp.extend([0x50, flags, 0, 0]);
    let pseudo = pseudo(packet.ip.destination, packet.ip.source, 6, 20);
    tcp.extend(sum(&[&pseudo]).to_be_bytes());
    tcp.extend([0, 0]);
    let window = !sum(&[&pseudo, &tcp]);
    put(&mut tcp, 14, &window.to_be_bytes());
    let mut bytes = envelope(packet, 6, 20);
    bytes.extend(tcp);
    bytes
}

/// The error quotes the IP header and eight bytes. In an skb the quoted checksum is a number that completing does not change.
fn unreachable(packet: &Packet<'_>, segment: &Segment) -> Vec<u8> {
    let mut quote = packet.bytes[wire::ETHERNET..segment.start + 8].to_vec();
    if packet.hook != Hook::UplinkXdp {
        let at = quote.len() - 2;
        put(&mut quote, at, &[0, 0]);
        let half_of_it = sum(&[&quote[at - 6..]]).rotate_right(1);
        put(&mut quote, at, &(!half_of_it).to_be_bytes());
    }
    let (protocol, kind) = if packet.ip.is_v4 { (1, [3, 3]) } else { (58, [1, 4]) };
    let mut message = kind.to_vec();
    message.extend([0; 6]);
    message.extend(&quote);
    let covered = pseudo(packet.ip.destination, packet.ip.source, protocol, message.len());
    let checksum = if packet.ip.is_v4 { !sum(&[&message]) } else { !sum(&[&covered, &message]) };
    put(&mut message, 2, &checksum.to_be_bytes());
    debug_assert!(half(&message, 2) == Some(checksum));
    let mut bytes = envelope(packet, protocol, message.len());
    bytes.extend(message);
    bytes
}
