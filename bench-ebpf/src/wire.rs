//! Headers as they lie in a packet, and their checksums: RFC 1624 over words in memory order. Structs laid over a packet are
//! not aligned as they promise to be, which every machine that runs BPF programs can do with.

use proxy_common::addr::{Ipv4, Ipv6, Mac, Port};

#[repr(C)]
pub(crate) struct Ethernet {
    pub(crate) dmac: Mac,
    pub(crate) smac: Mac,
    pub(crate) ethertype: u16,
}

#[repr(C)]
pub(crate) struct Ipv4Header {
    pub(crate) version_ihl: u8,
    pub(crate) tos: u8,
    pub(crate) total_length: u16,
    pub(crate) id: u16,
    pub(crate) fragment: u16,
    pub(crate) ttl: u8,
    pub(crate) protocol: u8,
    pub(crate) csum: u16,
    pub(crate) saddr: Ipv4,
    pub(crate) daddr: Ipv4,
}

#[repr(C)]
pub(crate) struct Ipv6Header {
    pub(crate) version: u32,
    pub(crate) payload_length: u16,
    pub(crate) next_header: u8,
    pub(crate) hop_limit: u8,
    pub(crate) saddr: Ipv6,
    pub(crate) daddr: Ipv6,
}

/// What TCP and UDP begin with.
#[repr(C)]
pub(crate) struct Ports {
    pub(crate) sport: Port,
    pub(crate) dport: Port,
}

const _: () = assert!(size_of::<Ethernet>() == 14 && size_of::<Ipv4Header>() == 20 && size_of::<Ipv6Header>() == 40);

/// Where a TCP header has its checksum.
pub(crate) const TCP_CSUM: usize = 16;
/// Where a UDP header has it.
pub(crate) const UDP_CSUM: usize = 6;

/// IANA numbers.
pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;

/// Folds a sum of words into sixteen bits.
#[inline(always)]
pub(crate) const fn fold(sum: u64) -> u16 {
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    let sum = (sum & 0xffff) + (sum >> 16 & 0xffff) + (sum >> 32);
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}

/// What replacing a word does to a sum.
#[inline(always)]
pub(crate) const fn change(old: u32, new: u32) -> u64 {
    !old as u64 + new as u64
}

/// Mixes a word into a hash as `MurmurHash3` does.
#[inline(always)]
pub(crate) const fn mix(hash: u32, word: u32) -> u32 {
    let mixed = word.wrapping_mul(0xcc9e_2d51).rotate_left(15).wrapping_mul(0x1b87_3593);
    (hash ^ mixed).rotate_left(13).wrapping_mul(5).wrapping_add(0xe654_6b64)
}

/// A checksum after a change of what it covers.
#[inline(always)]
pub(crate) const fn mend(csum: u16, change: u64) -> u16 {
    !fold(!csum as u64 + change)
}
