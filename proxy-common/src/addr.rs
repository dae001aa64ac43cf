//! Addresses, ports and protocols as they stand in maps and on the wire: network order, in memory order.

/// An IPv4 address. Aligned, so that the BPF compiler loads it as one word.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ipv4 {
    /// The four octets, as on the wire.
    pub octets: [u8; 4],
}

/// An IPv6 address. Aligned, so that the BPF compiler loads it as two double words.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ipv6 {
    /// The sixteen octets, as on the wire.
    pub octets: [u8; 16],
}

/// What the two address families have in common.
pub trait Address: Copy + Eq + Ord + Default {
    /// The unspecified address, which stands for "any node address" in a NodePort's frontend.
    const ANY: Self;

    /// The host itself, as Linux takes the unspecified address of a destination.
    const LOOPBACK: Self;

    /// The one's-complement sum of the address, words taken in memory order (RFC 1071 §1.B), not folded.
    fn sum(&self) -> u32;

    /// Whether it never leaves a host: 127.0.0.0/8 and `::1`.
    fn is_loopback(&self) -> bool;

    /// Whether it is `prefix` where the mask has ones.
    fn is_in(&self, prefix: &Self, mask: &Self) -> bool;

    /// Whether it can name one host that has sent something: not the unspecified address, and no group.
    fn is_one_host(&self) -> bool;
}

impl Ipv4 {
    /// The address as one word in memory order, for hashing and comparing; its value has no meaning as a number.
    #[inline(always)]
    pub const fn word(&self) -> u32 {
        u32::from_ne_bytes(self.octets)
    }
}

impl Ipv6 {
    /// The address as four words in memory order.
    #[inline(always)]
    pub const fn words(&self) -> [u32; 4] {
        // SAFETY: both are sixteen bytes of plain data. Written out byte by byte, the BPF compiler would load bytes.
        unsafe { core::mem::transmute(self.octets) }
    }

    /// From four words in memory order.
    #[inline(always)]
    pub const fn from_words(words: [u32; 4]) -> Self {
        // SAFETY: as in `words`.
        Self { octets: unsafe { core::mem::transmute::<[u32; 4], [u8; 16]>(words) } }
    }

    /// The third word of `::ffff:0:0/96`, in which IPv4 addresses are mapped.
    const MAPPED: u32 = 0xffff_u32.to_be();

    /// An IPv4 address in IPv6's clothes (RFC 4291 §2.5.5.2). Its sum is that of the IPv4 address: all ones are zero.
    #[inline(always)]
    pub const fn mapped(address: Ipv4) -> Self {
        Self::from_words([0, 0, Self::MAPPED, address.word()])
    }

    /// Whether it is an IPv4 address.
    #[inline(always)]
    pub const fn is_mapped(&self) -> bool {
        let [first, second, third, _] = self.words();
        first | second == 0 && third == Self::MAPPED
    }

    /// The IPv4 address it is, if it is one.
    #[inline(always)]
    pub const fn unmapped(&self) -> Ipv4 {
        let [.., last] = self.words();
        Ipv4 { octets: last.to_ne_bytes() }
    }
}

#[inline(always)]
const fn halves(word: u32) -> u32 {
    (word & 0xffff) + (word >> 16)
}

impl Address for Ipv4 {
    const ANY: Self = Self { octets: [0; 4] };
    const LOOPBACK: Self = Self { octets: [127, 0, 0, 1] };

    #[inline(always)]
    fn sum(&self) -> u32 {
        halves(self.word())
    }

    #[inline(always)]
    fn is_loopback(&self) -> bool {
        self.octets[0] == 127
    }

    #[inline(always)]
    fn is_in(&self, prefix: &Self, mask: &Self) -> bool {
        self.word() & mask.word() == prefix.word()
    }

    #[inline(always)]
    fn is_one_host(&self) -> bool {
        // Multicast, reserved and broadcast addresses are the upper eighth.
        self.octets[0] != 0 && self.octets[0] < 224
    }
}

impl Address for Ipv6 {
    const ANY: Self = Self { octets: [0; 16] };
    const LOOPBACK: Self = Self { octets: [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1] };

    #[inline(always)]
    fn sum(&self) -> u32 {
        let [a, b, c, d] = self.words();
        halves(a) + halves(b) + halves(c) + halves(d)
    }

    #[inline(always)]
    fn is_loopback(&self) -> bool {
        self.words() == [0, 0, 0, 1_u32.to_be()]
    }

    #[inline(always)]
    fn is_in(&self, prefix: &Self, mask: &Self) -> bool {
        let (own, mask, prefix) = (self.words(), mask.words(), prefix.words());
        own[0] & mask[0] == prefix[0]
            && own[1] & mask[1] == prefix[1]
            && own[2] & mask[2] == prefix[2]
            && own[3] & mask[3] == prefix[3]
    }

    #[inline(always)]
    fn is_one_host(&self) -> bool {
        self.octets[0] != 0xff && self.words() != [0; 4]
    }
}

/// A port in network order.
#[repr(C, align(2))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Port {
    /// Two octets, high one first.
    pub octets: [u8; 2],
}

impl Port {
    /// From a number.
    #[inline(always)]
    pub const fn new(number: u16) -> Self {
        Self { octets: number.to_be_bytes() }
    }

    /// As a number.
    #[inline(always)]
    pub const fn number(self) -> u16 {
        u16::from_be_bytes(self.octets)
    }

    /// As a word in memory order: what a checksum takes.
    #[inline(always)]
    pub const fn word(self) -> u16 {
        u16::from_ne_bytes(self.octets)
    }
}

/// An Ethernet address. Aligned, so that the BPF compiler copies half words and not bytes.
#[repr(C, align(2))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mac {
    /// The six octets, as on the wire.
    pub octets: [u8; 6],
}

impl Mac {
    /// None.
    pub const ZERO: Self = Self { octets: [0; 6] };
}

/// A transport protocol, by its IANA number.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// Every one: in the frontend that stands for all of a ClusterIP, see [`crate::service::Frontend::whole`].
    Any = 0,
    /// TCP
    Tcp = 6,
    /// UDP
    Udp = 17,
    /// SCTP
    Sctp = 132,
}

crate::map_type!(Ipv4, Ipv6, Port, Mac, Protocol);

#[cfg(feature = "user")]
mod user {
    use std::{
        fmt,
        net::{Ipv4Addr, Ipv6Addr},
    };

    use super::{Ipv4, Ipv6, Port, Protocol};

    impl From<Ipv4Addr> for Ipv4 {
        fn from(address: Ipv4Addr) -> Self {
            Self { octets: address.octets() }
        }
    }

    impl From<Ipv6Addr> for Ipv6 {
        fn from(address: Ipv6Addr) -> Self {
            Self { octets: address.octets() }
        }
    }

    impl From<Ipv4> for std::net::IpAddr {
        fn from(address: Ipv4) -> Self {
            Self::V4(address.octets.into())
        }
    }

    impl From<Ipv6> for std::net::IpAddr {
        fn from(address: Ipv6) -> Self {
            Self::V6(address.octets.into())
        }
    }

    impl fmt::Display for Ipv4 {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            Ipv4Addr::from(self.octets).fmt(f)
        }
    }

    impl fmt::Display for Ipv6 {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            Ipv6Addr::from(self.octets).fmt(f)
        }
    }

    impl fmt::Display for Port {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            self.number().fmt(f)
        }
    }

    impl fmt::Display for Protocol {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str(match self {
                Self::Any => "any",
                Self::Tcp => "TCP",
                Self::Udp => "UDP",
                Self::Sctp => "SCTP",
            })
        }
    }
}
