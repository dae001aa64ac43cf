//! What is to be said of each family on the way to the other: its addresses in the tables, what of its header is carried over,
//! and what its ICMP errors are called (RFC 7915).

use proxy_common::addr::{Ipv4, Ipv6};

use crate::{
    checksum,
    family::{Family, V4, V6},
    parse::{self, Ipv4Header, Ipv6Header},
};

/// What an IP header takes over from one of the other family.
pub(super) struct Carried {
    /// Type of service, or traffic class.
    class: u8,
    /// One less than it was.
    hop_limit: u8,
    protocol: u8,
    /// How much follows the header.
    length: u16,
}

impl Carried {
    /// It is not on its way any more.
    #[inline(always)]
    pub(super) const fn keep_hop_limit(&mut self) {
        self.hop_limit = self.hop_limit.wrapping_add(1);
    }
}

/// What an ICMP error says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Message {
    pub(super) kind: u8,
    pub(super) code: u8,
    /// As in [`parse::IcmpHeader`].
    pub(super) rest: [u16; 2],
}

impl Message {
    const fn new(kind: u8, code: u8) -> Self {
        Self { kind, code, rest: [0; 2] }
    }

    /// Type and code in a word, for functions out of line.
    #[inline(always)]
    pub(super) const fn word(self) -> u32 {
        u16::from_ne_bytes([self.kind, self.code]) as u32
    }

    /// From that word and the low half of the MTU, as they stand in a packet.
    #[inline(always)]
    pub(super) const fn from_words(word: u32, mtu: u32) -> Self {
        let [kind, code] = (word as u16).to_ne_bytes();
        Self { kind, code, rest: [0, mtu as u16] }
    }
}

/// The difference between the two headers.
const GROWTH: u16 = (size_of::<Ipv6Header>() - size_of::<Ipv4Header>()) as u16;

/// The least MTU that IPv6 knows.
const LEAST_MTU: u16 = 1_280;

/// A family on the wire, and the one its packets become.
pub(super) trait Wire: Family {
    /// What its packets become.
    type Other: Wire;
    /// "Its life ended on the way."
    const EXPIRED: Message;

    /// An address as it stands in tables.
    fn mixed(address: Self::Addr) -> Ipv6;
    /// An address of the family, from a table.
    fn wire(address: &Ipv6) -> Self::Addr;
    /// What goes over into the other header.
    fn carried(header: &Self::Header) -> Carried;
    /// A header with what goes over into it.
    fn carry(carried: &Carried, saddr: &Ipv6, daddr: &Ipv6) -> Self::Header;
    /// "Too long", of a packet of this family whose way takes so much of the other one.
    fn too_long(mtu: u16) -> Message;
    /// The other family's error that means the same, if there is one.
    fn translated(message: Message) -> Option<Message>;
}

impl Wire for V4 {
    type Other = V6;
    const EXPIRED: Message = Message::new(11, 0);

    #[inline(always)]
    fn mixed(address: Ipv4) -> Ipv6 {
        Ipv6::mapped(address)
    }

    #[inline(always)]
    fn wire(address: &Ipv6) -> Ipv4 {
        address.unmapped()
    }

    #[inline(always)]
    fn carried(header: &Ipv4Header) -> Carried {
        Carried {
            class: header.tos,
            hop_limit: header.ttl.wrapping_sub(1),
            protocol: header.protocol,
            length: u16::from_be(header.total_length).wrapping_sub(size_of::<Ipv4Header>() as u16),
        }
    }

    /// In IPv6 nobody on the way cuts a packet, so nobody may here.
    #[inline(always)]
    fn carry(carried: &Carried, saddr: &Ipv6, daddr: &Ipv6) -> Ipv4Header {
        let mut header = Ipv4Header {
            version_ihl: 0x45,
            tos: carried.class,
            total_length: (size_of::<Ipv4Header>() as u16).wrapping_add(carried.length).to_be(),
            id: 0,
            fragment: parse::DO_NOT_FRAGMENT,
            ttl: carried.hop_limit,
            protocol: carried.protocol,
            csum: 0,
            saddr: saddr.unmapped(),
            daddr: daddr.unmapped(),
        };
        header.csum = !checksum::fold(Self::sum(&header));
        header
    }

    #[inline(always)]
    fn too_long(mtu: u16) -> Message {
        Message { rest: [0, mtu.saturating_sub(GROWTH).to_be()], ..Message::new(3, 4) }
    }

    /// RFC 7915 §4.2.
    #[inline(always)]
    fn translated(message: Message) -> Option<Message> {
        let [_, mtu] = message.rest;
        match (message.kind, message.code) {
            (3, 0 | 1 | 5..=8 | 11 | 12) => Some(Message::new(1, 0)),
            // The pointer is to the field that says what follows the header.
            (3, 2) => Some(Message { rest: [0, 6_u16.to_be()], ..Message::new(4, 1) }),
            (3, 3) => Some(Message::new(1, 4)),
            (3, 4) => Some(V6::too_long(u16::from_be(mtu))),
            (3, 9 | 10 | 13 | 15) => Some(Message::new(1, 1)),
            (11, code) => Some(Message::new(3, code)),
            _ => None,
        }
    }
}

impl Wire for V6 {
    type Other = V4;
    const EXPIRED: Message = Message::new(3, 0);

    #[inline(always)]
    fn mixed(address: Ipv6) -> Ipv6 {
        address
    }

    #[inline(always)]
    fn wire(address: &Ipv6) -> Ipv6 {
        *address
    }

    #[inline(always)]
    fn carried(header: &Ipv6Header) -> Carried {
        Carried {
            class: (u32::from_be(header.version) >> 20) as u8,
            hop_limit: header.hop_limit.wrapping_sub(1),
            protocol: header.next_header,
            length: u16::from_be(header.payload_length),
        }
    }

    #[inline(always)]
    fn carry(carried: &Carried, saddr: &Ipv6, daddr: &Ipv6) -> Ipv6Header {
        Ipv6Header {
            version: (0x6000_0000 | u32::from(carried.class) << 20).to_be(),
            payload_length: carried.length.to_be(),
            next_header: carried.protocol,
            hop_limit: carried.hop_limit,
            saddr: *saddr,
            daddr: *daddr,
        }
    }

    #[inline(always)]
    fn too_long(mtu: u16) -> Message {
        let mtu = mtu.saturating_add(GROWTH);
        let mtu = if mtu < LEAST_MTU { LEAST_MTU } else { mtu };
        Message { rest: [0, mtu.to_be()], ..Message::new(2, 0) }
    }

    /// RFC 7915 §5.2.
    #[inline(always)]
    fn translated(message: Message) -> Option<Message> {
        let [high, low] = message.rest;
        match (message.kind, message.code) {
            (1, 0 | 2 | 3) => Some(Message::new(3, 1)),
            (1, 1) => Some(Message::new(3, 10)),
            (1, 4) => Some(Message::new(3, 3)),
            (2, _) => Some(V4::too_long(if high == 0 { u16::from_be(low) } else { u16::MAX })),
            (3, code) => Some(Message::new(11, code)),
            (4, 1) => Some(Message::new(3, 2)),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Message, V4, V6, Wire};

    fn message(kind: u8, code: u8, number: u32) -> Message {
        let [a, b, c, d] = number.to_be_bytes();
        Message { kind, code, rest: [u16::from_ne_bytes([a, b]), u16::from_ne_bytes([c, d])] }
    }

    type Error = (u8, u8, u32);

    #[test]
    fn errors_of_ipv4_mean_what_rfc_7915_says() {
        let cases: [(&str, Error, Option<Error>); 9] = [
            ("no route", (3, 0, 0), Some((1, 0, 0))),
            ("no such host", (3, 1, 0), Some((1, 0, 0))),
            ("no such protocol", (3, 2, 0), Some((4, 1, 6))),
            ("no such port", (3, 3, 0), Some((1, 4, 0))),
            ("too long", (3, 4, 1_400), Some((2, 0, 1_420))),
            ("too long, where nobody says for what", (3, 4, 0), Some((2, 0, 1_280))),
            ("forbidden", (3, 13, 0), Some((1, 1, 0))),
            ("expired", (11, 0, 0), Some((3, 0, 0))),
            ("source quench", (4, 0, 0), None),
        ];
        for (name, (kind, code, number), expected) in cases {
            let expected = expected.map(|(kind, code, number)| message(kind, code, number));
            assert_eq!(V4::translated(message(kind, code, number)), expected, "{name}");
        }
    }

    #[test]
    fn errors_of_ipv6_mean_what_rfc_7915_says() {
        let cases: [(&str, Error, Option<Error>); 8] = [
            ("no route", (1, 0, 0), Some((3, 1, 0))),
            ("forbidden", (1, 1, 0), Some((3, 10, 0))),
            ("no such host", (1, 3, 0), Some((3, 1, 0))),
            ("no such port", (1, 4, 0), Some((3, 3, 0))),
            ("too long", (2, 0, 1_400), Some((3, 4, 1_380))),
            ("expired", (3, 0, 0), Some((11, 0, 0))),
            ("no such header", (4, 1, 6), Some((3, 2, 0))),
            ("an option nobody knows", (4, 2, 0), None),
        ];
        for (name, (kind, code, number), expected) in cases {
            let expected = expected.map(|(kind, code, number)| message(kind, code, number));
            assert_eq!(V6::translated(message(kind, code, number)), expected, "{name}");
        }
    }
}
