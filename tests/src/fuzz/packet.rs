//! Packets as they are put on the wire: whole ones with right checksums, and the same cut into fragments or spoilt.

use std::net::IpAddr;

use proxy_common::addr::Protocol;

use super::chance::Chance;
use crate::{
    frame::MACS,
    model::{End, checksum},
};

/// A packet to be built.
#[derive(Clone, Debug)]
pub struct Blueprint {
    /// Sender.
    pub source: End,
    /// Receiver.
    pub destination: End,
    /// Transport protocol.
    pub proto: Protocol,
    /// Of TCP.
    pub flags: u8,
    /// TTL or hop limit.
    pub life: u8,
    /// Whether UDP has a checksum.
    pub is_checked: bool,
    /// What follows the headers.
    pub payload: Vec<u8>,
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

/// An Ethernet and an IP header before a payload. Length and checksum are right.
pub fn internet(source: IpAddr, destination: IpAddr, protocol: u8, life: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = [MACS.0, MACS.1].concat();
    if source.is_ipv4() {
        bytes.extend([0x08, 0x00, 0x45, 0]);
        bytes.extend((20 + payload.len() as u16).to_be_bytes());
        bytes.extend([0x12, 0x34, 0x40, 0, life, protocol, 0, 0]);
        bytes.extend(octets(source));
        bytes.extend(octets(destination));
        let sum = checksum(&[&bytes[14..34]]);
        bytes[24..26].copy_from_slice(&sum.to_be_bytes());
    } else {
        bytes.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
        bytes.extend((payload.len() as u16).to_be_bytes());
        bytes.extend([protocol, life]);
        bytes.extend(octets(source));
        bytes.extend(octets(destination));
    }
    bytes.extend(payload);
    bytes
}

fn pseudo(source: IpAddr, destination: IpAddr, protocol: u8, length: usize) -> Vec<u8> {
    let mut bytes = [octets(source), octets(destination)].concat();
    bytes.extend((length as u32).to_be_bytes());
    bytes.extend([0, 0, 0, protocol]);
    bytes
}

impl Blueprint {
    /// The transport header and what follows it.
    pub fn segment(&self) -> Vec<u8> {
        let mut bytes = [self.source.1.to_be_bytes(), self.destination.1.to_be_bytes()].concat();
        let at = if self.proto == Protocol::Tcp {
            bytes.extend([0, 0, 3, 0xe8, 0, 0, 7, 0xd0, 0x50, self.flags, 0x0f, 0xa0, 0, 0, 0, 0]);
            16
        } else {
            bytes.extend((8 + self.payload.len() as u16).to_be_bytes());
            bytes.extend([0, 0]);
            6
        };
        bytes.extend(&self.payload);
        if self.proto == Protocol::Tcp || self.is_checked {
            let pseudo = pseudo(self.source.0, self.destination.0, self.proto as u8, bytes.len());
            let sum = match checksum(&[&pseudo, &bytes]) {
                0 if self.proto == Protocol::Udp => 0xffff,
                sum => sum,
            };
            bytes[at..at + 2].copy_from_slice(&sum.to_be_bytes());
        }
        bytes
    }

    /// The frame.
    pub fn bytes(&self) -> Vec<u8> {
        internet(self.source.0, self.destination.0, self.proto as u8, self.life, &self.segment())
    }

    /// The fragments of the frame, each of so many bytes of payload.
    pub fn fragments(&self, id: u16, piece: usize) -> Vec<Vec<u8>> {
        let segment = self.segment();
        let last = segment.chunks(piece).count() - 1;
        let cut = |(index, part): (usize, &[u8])| {
            let (place, more) = ((index * piece / 8) as u16, index < last);
            if self.source.0.is_ipv4() {
                let mut bytes = internet(self.source.0, self.destination.0, self.proto as u8, self.life, part);
                bytes[18..20].copy_from_slice(&id.to_be_bytes());
                bytes[20..22].copy_from_slice(&(place | u16::from(more) << 13).to_be_bytes());
                bytes[24..26].fill(0);
                let sum = checksum(&[&bytes[14..34]]);
                bytes[24..26].copy_from_slice(&sum.to_be_bytes());
                bytes
            } else {
                let mut body = vec![self.proto as u8, 0];
                body.extend((place << 3 | u16::from(more)).to_be_bytes());
                body.extend([0, 1]);
                body.extend(id.to_be_bytes());
                body.extend(part);
                internet(self.source.0, self.destination.0, 44, self.life, &body)
            }
        };
        segment.chunks(piece).enumerate().map(cut).collect()
    }
}

/// An ICMP message, with its checksum.
pub fn icmp(source: IpAddr, destination: IpAddr, life: u8, kind: [u8; 2], body: &[u8]) -> Vec<u8> {
    let protocol = if source.is_ipv4() { 1 } else { 58 };
    let mut message = vec![kind[0], kind[1], 0, 0, 0, 0, 0, 0];
    message.extend(body);
    let pseudo = pseudo(source, destination, protocol, message.len());
    let sum = if source.is_ipv4() { checksum(&[&message]) } else { checksum(&[&pseudo, &message]) };
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    internet(source, destination, protocol, life, &message)
}

/// Spoils a packet: bits, lengths, its end.
pub fn spoil(bytes: &mut Vec<u8>, chance: &mut Chance) {
    match chance.below(8) {
        0..3 => {
            for _ in 0..=chance.below(3) {
                // Mostly in the headers.
                let bound = if chance.percent(80) { bytes.len().min(66) } else { bytes.len() };
                bytes[chance.below(bound)] ^= 1 << chance.below(8);
            }
        }
        3 => bytes.truncate(14 + chance.below(bytes.len() - 13)),
        4 => bytes.extend((0..=chance.below(24)).map(|_| 0xa5)),
        5 => {
            let lengths = if bytes[12] == 0x08 { [16, 38, 46] } else { [18, 58, 66] };
            let at = chance.of(&lengths);
            if let Some(place) = bytes.get_mut(at..at + 2) {
                let lie = chance.of(&[0, 1, 7, 8, 19, 20, 21, 39, 40, 60, 0xffff]);
                place.copy_from_slice(&u16::to_be_bytes(lie));
            }
        }
        6 => {
            let at = chance.below(bytes.len());
            bytes[at] = chance.word() as u8;
        }
        _ => {
            let protocol = if bytes[12] == 0x08 { 23 } else { 20 };
            bytes[protocol] = chance.of(&[0, 1, 6, 17, 43, 44, 47, 50, 51, 58, 59, 60, 33, 253]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        frame::{Family, Frame},
        testbed::{CLIENT, SERVICE},
    };

    #[test]
    fn what_is_built_is_right_by_another_account() {
        for family in Family::BOTH {
            for (proto, length) in [(Protocol::Tcp, 0), (Protocol::Udp, 0), (Protocol::Tcp, 11), (Protocol::Udp, 30)] {
                let blueprint = Blueprint {
                    source: (CLIENT.address(family), 4_000),
                    destination: (SERVICE.address(family), 80),
                    proto,
                    flags: 2,
                    life: 64,
                    is_checked: true,
                    payload: vec![7; length],
                };
                let read = Frame::read(&blueprint.bytes());
                assert_eq!((read.source, read.destination), (blueprint.source, blueprint.destination));
                assert_eq!(read.payload, blueprint.payload);
            }
        }
    }
}
