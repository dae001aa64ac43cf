//! Packets as bytes and as fields: what a header says, what it may say, and how a changed field is written with every
//! checksum that covers it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use proxy_common::{addr::Protocol, outcome::Outcome};

use super::{End, Verdict};

/// Length of an Ethernet header.
pub(super) const ETHERNET: usize = 14;

/// What the model expects to come out of a hook.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expected {
    /// Whether the packet goes on.
    pub verdict: Verdict,
    /// Its bytes, unless it is dropped.
    pub bytes: Vec<u8>,
    /// Where checksums stand that were wrong before: there, both zeros of one's complement are one number.
    pub doubtful: Vec<usize>,
}

impl Expected {
    pub(super) fn untouched(bytes: &[u8]) -> Self {
        Self { verdict: Verdict::Pass, bytes: bytes.to_vec(), doubtful: Vec::new() }
    }

    pub(super) fn dropped() -> Self {
        Self { verdict: Verdict::Drop, bytes: Vec::new(), doubtful: Vec::new() }
    }

    /// Whether these bytes are what was expected.
    pub fn is_met_by(&self, bytes: &[u8]) -> bool {
        self.bytes.len() == bytes.len()
            && (self.bytes == bytes
                || self.bytes.iter().zip(bytes).enumerate().all(|(at, (one, other))| {
                    one == other || self.doubtful.iter().any(|start| self.is_same_zero(bytes, *start, at))
                }))
    }

    fn is_same_zero(&self, bytes: &[u8], start: usize, at: usize) -> bool {
        let is_zero = |bytes: &[u8]| matches!(bytes.get(start..start + 2), Some([0, 0] | [0xff, 0xff]));
        (start..start + 2).contains(&at) && is_zero(&self.bytes) && is_zero(bytes)
    }
}

/// An IP header: its fixed part.
#[derive(Clone, Copy, Debug)]
pub(super) struct Header {
    pub(super) is_v4: bool,
    /// Where it begins.
    pub(super) start: usize,
    pub(super) source: IpAddr,
    pub(super) destination: IpAddr,
    /// TTL or hop limit.
    pub(super) life: u8,
    protocol: u8,
    version_and_length: u8,
    length: usize,
    fragment: u16,
}

/// What follows an IP header.
#[derive(Clone, Copy, Debug)]
pub(super) struct Payload {
    pub(super) protocol: u8,
    /// Where it begins.
    pub(super) start: usize,
    /// How long it is by the header's account.
    pub(super) length: usize,
}

pub(super) fn half(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

pub(super) fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    if let Some(place) = bytes.get_mut(at..at + value.len()) {
        place.copy_from_slice(value);
    }
}

fn v4(bytes: &[u8], at: usize) -> Option<IpAddr> {
    let octets: [u8; 4] = bytes.get(at..at + 4)?.try_into().ok()?;
    Some(Ipv4Addr::from(octets).into())
}

fn v6(bytes: &[u8], at: usize) -> Option<IpAddr> {
    let octets: [u8; 16] = bytes.get(at..at + 16)?.try_into().ok()?;
    Some(Ipv6Addr::from(octets).into())
}

pub(super) fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

impl Header {
    /// Reads what a header's bytes say, be it true or not; `None` where there are too few.
    pub(super) fn read(bytes: &[u8], start: usize, is_v4: bool) -> Option<Self> {
        let version_and_length = *bytes.get(start)?;
        Some(if is_v4 {
            Self {
                is_v4,
                start,
                source: v4(bytes, start + 12)?,
                destination: v4(bytes, start + 16)?,
                life: *bytes.get(start + 8)?,
                protocol: *bytes.get(start + 9)?,
                version_and_length,
                length: half(bytes, start + 2)?.into(),
                fragment: half(bytes, start + 6)?,
            }
        } else {
            Self {
                is_v4,
                start,
                source: v6(bytes, start + 8)?,
                destination: v6(bytes, start + 24)?,
                life: *bytes.get(start + 7)?,
                protocol: *bytes.get(start + 6)?,
                version_and_length,
                length: half(bytes, start + 4)?.into(),
                fragment: 0,
            }
        })
    }

    /// How long its fixed part is.
    pub(super) fn size(&self) -> usize {
        if self.is_v4 { 20 } else { 40 }
    }

    /// Where a payload of a length ends.
    pub(super) fn end(&self, length: usize) -> usize {
        self.start + self.size() + length
    }

    /// What it says of its packet's length: in IPv4 of all of it, in IPv6 of what follows the header.
    pub(super) fn length(&self) -> usize {
        self.length
    }

    /// How long it says its packet is.
    pub(super) fn total(&self) -> usize {
        self.length + if self.is_v4 { 0 } else { 40 }
    }

    /// How long it is with its options.
    pub(super) fn size_with_options(&self) -> usize {
        if self.is_v4 { (usize::from(self.version_and_length & 15) * 4).max(20) } else { 40 }
    }

    pub(super) fn protocol(&self) -> u8 {
        self.protocol
    }

    /// Whether it begins with the packet's first byte. Of IPv4.
    pub(super) fn is_first(&self) -> bool {
        self.fragment << 3 == 0
    }

    /// Whether more fragments follow, or others came before. Of IPv4.
    pub(super) fn is_fragment(&self) -> bool {
        self.fragment & 0x3fff != 0
    }

    pub(super) fn is_icmp(&self) -> bool {
        self.protocol == if self.is_v4 { 1 } else { 58 }
    }

    /// What follows, or why the packet is passed on instead.
    pub(super) fn payload(&self) -> Result<Payload, Outcome> {
        let start = self.start + self.size();
        let version = self.version_and_length >> 4;
        if !self.is_v4 {
            return match self.protocol {
                _ if version != 6 => Err(Outcome::PassMalformed),
                44 => Err(Outcome::PassFragment),
                0 | 43 | 51 | 60 | 135 | 139 | 140 => Err(Outcome::PassExtension),
                protocol => Ok(Payload { protocol, start, length: self.length }),
            };
        }
        let words = self.version_and_length & 15;
        if version != 4 || words < 5 {
            return Err(Outcome::PassMalformed);
        }
        if words > 5 {
            return Err(Outcome::PassOptions);
        }
        if self.is_fragment() {
            return Err(Outcome::PassFragment);
        }
        match self.length.checked_sub(20) {
            Some(length) => Ok(Payload { protocol: self.protocol, start, length }),
            None => Err(Outcome::PassMalformed),
        }
    }
}

/// A TCP segment or a UDP datagram.
#[derive(Clone, Copy, Debug)]
pub(super) struct Segment {
    pub(super) proto: Protocol,
    pub(super) start: usize,
    /// How long it is, header and all.
    pub(super) length: usize,
    /// How much of the packet follows the IP header.
    pub(super) payload: usize,
    pub(super) source: u16,
    pub(super) destination: u16,
    /// Of TCP.
    pub(super) flags: u8,
}

impl Segment {
    /// Reads one whose lengths are true.
    pub(super) fn read(bytes: &[u8], payload: Payload, proto: Protocol) -> Option<Self> {
        let start = payload.start;
        let is_tcp = proto == Protocol::Tcp;
        bytes.get(start..start + if is_tcp { 20 } else { 8 })?;
        let (least, length, whole) = if is_tcp {
            (20, usize::from(bytes.get(start + 12)? >> 4) * 4, payload.length)
        } else {
            let length = usize::from(half(bytes, start + 4)?);
            (8, length, length)
        };
        if length < least || length > payload.length {
            return None;
        }
        Some(Self {
            proto,
            start,
            length: whole,
            payload: payload.length,
            source: half(bytes, start)?,
            destination: half(bytes, start + 2)?,
            flags: if is_tcp { *bytes.get(start + 13)? } else { 0 },
        })
    }

    /// Where its checksum stands.
    pub(super) fn checksum(&self) -> usize {
        self.start + if self.proto == Protocol::Tcp { 16 } else { 6 }
    }
}

/// The sum of 16-bit words, folded, without carry.
pub(super) fn sum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0_u64;
    for part in parts {
        for word in part.chunks(2) {
            sum += u64::from(word[0]) << 8 | u64::from(word.get(1).copied().unwrap_or(0));
        }
    }
    fold(sum)
}

fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// A checksum field after a change: computed in full, or as wrong as it was before.
pub(super) fn changed(field: u16, before: u16, after: u16) -> u16 {
    if field == !before { !after } else { !fold(u64::from(!field) + u64::from(after) + u64::from(!before)) }
}

/// The words of addresses, protocol and length that a transport checksum covers.
pub(super) fn pseudo(source: IpAddr, destination: IpAddr, protocol: u8, length: usize) -> Vec<u8> {
    let mut bytes = octets(source);
    bytes.extend(octets(destination));
    bytes.extend((length as u32).to_be_bytes());
    bytes.extend([0, protocol]);
    bytes
}

/// New content of a packet, with the checksums that cover what changes.
pub(super) struct Rewriting {
    pub(super) bytes: Vec<u8>,
    pub(super) doubtful: Vec<usize>,
}

impl Rewriting {
    pub(super) fn of(bytes: &[u8]) -> Self {
        Self { bytes: bytes.to_vec(), doubtful: Vec::new() }
    }

    /// Writes addresses, ports and what else changes of the headers.
    pub(super) fn translate(&mut self, ip: &Header, segment: &Segment, source: End, destination: End) {
        let before = self.transport_sum(ip, segment);
        self.set_addresses(ip, source.0, destination.0);
        put(&mut self.bytes, segment.start, &source.1.to_be_bytes());
        put(&mut self.bytes, segment.start + 2, &destination.1.to_be_bytes());
        let Some(ip) = Header::read(&self.bytes, ip.start, ip.is_v4) else { return };
        let after = self.transport_sum(&ip, segment);
        let is_udp = segment.proto == Protocol::Udp;
        let Some(field) = half(&self.bytes, segment.checksum()) else { return };
        if is_udp && field == 0 {
            return;
        }
        // A UDP checksum of 0 would mean that there is none.
        let before_field = if is_udp && field == 0xffff && before == 0xffff { 0 } else { field };
        let value = changed(before_field, before, after);
        self.put_checksum(segment.checksum(), before_field, before, if is_udp && value == 0 { 0xffff } else { value });
    }

    fn transport_sum(&self, ip: &Header, segment: &Segment) -> u16 {
        let pseudo = pseudo(ip.source, ip.destination, segment.proto as u8, segment.length);
        let mut covered = self.bytes.get(segment.start..segment.start + segment.length).unwrap_or_default().to_vec();
        put(&mut covered, segment.checksum() - segment.start, &[0, 0]);
        sum(&[&pseudo, &covered])
    }

    fn put_checksum(&mut self, at: usize, field: u16, before: u16, value: u16) {
        if field != !before {
            self.doubtful.push(at);
        }
        put(&mut self.bytes, at, &value.to_be_bytes());
    }

    /// Writes addresses, and the checksum of an IPv4 header.
    pub(super) fn set_addresses(&mut self, ip: &Header, source: IpAddr, destination: IpAddr) {
        let (at, next) = if ip.is_v4 { (12, 16) } else { (8, 24) };
        self.change_header(ip, |header| {
            put(header, at, &octets(source));
            put(header, next, &octets(destination));
        });
    }

    /// Gives a packet the life of a new one.
    pub(super) fn renew_life(&mut self, ip: &Header) {
        self.change_header(ip, |header| put(header, if ip.is_v4 { 8 } else { 7 }, &[64]));
    }

    /// Takes one from the life of a packet, if there is one left.
    pub(super) fn shorten_life(&mut self, ip: &Header) {
        self.change_header(ip, |header| {
            if let Some(life) = header.get_mut(if ip.is_v4 { 8 } else { 7 }) {
                *life = life.saturating_sub(1);
            }
        });
    }

    fn change_header(&mut self, ip: &Header, change: impl FnOnce(&mut [u8])) {
        let end = (ip.start + ip.size_with_options()).min(self.bytes.len());
        let range = ip.start..end;
        let Some(header) = self.bytes.get_mut(range) else { return };
        if !ip.is_v4 {
            change(header);
            return;
        }
        let field = half(header, 10).unwrap_or(0);
        put(header, 10, &[0, 0]);
        let before = sum(&[header]);
        change(header);
        let after = sum(&[header]);
        self.put_checksum(ip.start + 10, field, before, changed(field, before, after));
    }

    /// Writes the MACs of a next hop.
    pub(super) fn set_macs(&mut self, destination: [u8; 6], source: [u8; 6]) {
        put(&mut self.bytes, 0, &destination);
        put(&mut self.bytes, 6, &source);
    }

    /// Sends the frame back to whom it came from.
    pub(super) fn swap_macs(&mut self) {
        if let Some(macs) = self.bytes.get_mut(..12) {
            macs.rotate_left(6);
        }
    }

    pub(super) fn into_expected(self, verdict: Verdict) -> Expected {
        Expected { verdict, bytes: self.bytes, doubtful: self.doubtful }
    }
}
