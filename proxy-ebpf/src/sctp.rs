//! SCTP: what its packets say of an association, new ports and the checksum over all that follows them, and the ABORT in the
//! place of nobody. Address parameters of multi-homed hosts stay as they are, as with the kernel's own NAT.
//!
//! The checksum is a CRC32c (RFC 9260 appendix A), which is linear: a change of the ports changes it by the CRC of that
//! change with as many zeros behind it as the packet has bytes, and that is a product of polynomials. A checksum of 0 stays
//! 0: a device or the kernel computes it later, over everything, this field included; or there is none (RFC 9653).

use core::{ffi::c_void, mem};

use proxy_common::{
    addr::{Port, Protocol},
    flow::Rewrite,
};

use crate::{
    family::Family,
    packet::{Packet, bounded},
    parse::{Transport, tcp},
    reject,
};

/// SCTP's common header. What a sender leaves to be cut into packets later has no more than that in one piece, and must not be
/// pulled together: its pieces are the packets.
#[repr(C)]
pub(crate) struct SctpHeader {
    /// Source port.
    pub sport: Port,
    /// Destination port.
    pub dport: Port,
    /// By which the receiver knows the association.
    pub tag: u32,
    /// CRC32c, low byte first.
    pub csum: u32,
}

/// The header of a chunk.
#[repr(C)]
struct Chunk {
    /// What it is: see [`chunk`].
    kind: u8,
    flags: u8,
    /// With this header, network order.
    length: u16,
}

/// An INIT up to what an answer needs of it.
#[repr(C)]
struct Init {
    header: SctpHeader,
    chunk: Chunk,
    /// The tag its sender wants to be known by.
    tag: u32,
}

/// An ABORT of the common header, the chunk, and one cause.
#[repr(C)]
struct Abort {
    header: SctpHeader,
    chunk: Chunk,
    /// [`USER_INITIATED`].
    cause: u16,
    /// The cause's.
    length: u16,
    /// Any four bytes.
    reason: u32,
}

const _: () = assert!(size_of::<SctpHeader>() == 12 && size_of::<Init>() == 20 && size_of::<Abort>() == 24);

/// Chunks that begin or end an association, and what is between.
mod chunk {
    pub(super) const DATA: u8 = 0;
    pub(super) const INIT: u8 = 1;
    pub(super) const INIT_ACK: u8 = 2;
    pub(super) const ABORT: u8 = 6;
    pub(super) const SHUTDOWN: u8 = 7;
    pub(super) const SHUTDOWN_ACK: u8 = 8;
    pub(super) const SHUTDOWN_COMPLETE: u8 = 14;
}

/// Of an ABORT: its tag is that of the packet it answers, because its sender knows no other.
const TAG_REFLECTED: u8 = 1;
/// The cause of an ABORT that its sender wanted.
const USER_INITIATED: u16 = 12_u16.to_be();

/// Headers end before it, whatever they are.
const END: usize = 0x7ff;

/// SCTP.
pub(crate) struct Sctp;

impl Transport for Sctp {
    type Header = SctpHeader;
    const PROTOCOL: Protocol = Protocol::Sctp;
    const HAS_STATE: bool = true;

    #[inline(always)]
    fn ports(header: &SctpHeader) -> (Port, Port) {
        (header.sport, header.dport)
    }

    /// Whatever opens or closes stands alone in its packet, or before all else. What is to be cut up carries data.
    #[inline(always)]
    fn flags<P: Packet>(packet: &P, _: &SctpHeader, offset: usize) -> u8 {
        match packet.at::<Chunk>(offset + size_of::<SctpHeader>()).map_or(chunk::DATA, |first| first.kind) {
            chunk::INIT => tcp::SYN,
            chunk::INIT_ACK => tcp::SYN | tcp::ACK,
            chunk::SHUTDOWN | chunk::SHUTDOWN_ACK => tcp::FIN | tcp::ACK,
            chunk::ABORT | chunk::SHUTDOWN_COMPLETE => tcp::RST,
            _ => tcp::ACK,
        }
    }

    #[inline(always)]
    fn is_sound<P: Packet>(packet: &P, _: &SctpHeader, offset: usize, payload: u16) -> bool {
        const COMMON: u16 = size_of::<SctpHeader>() as u16;
        const CHUNK: u16 = size_of::<Chunk>() as u16;
        let length =
            packet.at::<Chunk>(offset + size_of::<SctpHeader>()).map_or(CHUNK, |first| u16::from_be(first.length));
        length >= CHUNK && payload >= COMMON && length <= payload - COMMON
    }

    #[inline(always)]
    fn rewrite<P: Packet, F: Family>(packet: &mut P, rewrite: &Rewrite<F::Addr>, offset: usize) -> bool {
        set_ports::<P, F>(packet.context(), offset, word(rewrite.sport, rewrite.dport))
    }
}

/// Both ports as they lie in memory.
#[inline(always)]
fn word(sport: Port, dport: Port) -> u32 {
    let [a, b] = sport.octets;
    let [c, d] = dport.octets;
    u32::from_ne_bytes([a, b, c, d])
}

/// Puts new ports into the header at an offset. Out of line: what TCP and UDP do is none the longer for it.
#[inline(never)]
fn set_ports<P: Packet, F: Family>(context: *mut c_void, offset: usize, ports: u32) -> bool {
    let packet = P::from_context(context);
    let Some(ip) = packet.at::<F::Header>(P::NETWORK) else { return false };
    let Some(header) = packet.at::<SctpHeader>(bounded::<END>(offset)) else { return false };
    let length = (P::NETWORK + F::length(ip)).wrapping_sub(offset);
    let change = word(header.sport, header.dport) ^ ports;
    let [a, b, c, d] = ports.to_ne_bytes();
    header.sport = Port { octets: [a, b] };
    header.dport = Port { octets: [c, d] };
    if header.csum != 0 {
        header.csum ^= crc32c::crc32c_change(u32::from_le(change), length as u32).to_le();
    }
    true
}

/// Makes a packet the ABORT about itself (RFC 9260 §8.4): a client that opens is told at once, where an ICMP error would
/// let it try again.
///
/// Its checksum is 0, and right: the reason is what makes it so. Then it is the same whether or not somebody completes it.
#[inline(always)]
pub(crate) fn abort<P: Packet, F: Family>(context: *mut c_void) -> bool {
    let mut packet = P::from_context(context);
    let transport = P::NETWORK + size_of::<F::Header>();
    let Some(header) = packet.at::<SctpHeader>(transport) else { return false };
    let (tag, flags) = match packet.at::<Init>(transport) {
        Some(init) if init.chunk.kind == chunk::INIT => (init.tag, 0),
        _ => (header.tag, TAG_REFLECTED),
    };
    // Which may be longer than it was.
    if !packet.cut(transport + size_of::<Abort>()) {
        return false;
    }
    if !reject::turn_link_round(&packet) {
        return false;
    }
    let Some(ip) = packet.at::<F::Header>(P::NETWORK) else { return false };
    let Some(abort) = packet.at::<Abort>(transport) else { return false };
    let (client, frontend) = F::addresses(ip);
    F::compose(ip, frontend, client, Protocol::Sctp as u8, size_of::<Abort>() as u16);
    let header = &mut abort.header;
    mem::swap(&mut header.sport, &mut header.dport);
    header.tag = tag;
    header.csum = 0;
    abort.chunk = Chunk { kind: chunk::ABORT, flags, length: 12_u16.to_be() };
    abort.cause = USER_INITIATED;
    abort.length = 8_u16.to_be();
    // SAFETY: these are the first twenty bytes of what is there, plain data.
    let words: &[u32; 5] = unsafe { &*core::ptr::from_ref(abort).cast() };
    abort.reason = crc32c::word_to_zero(words).to_le();
    true
}

/// CRC32c, on registers as the wire has them: the lowest bit is that of the highest power.
mod crc32c {
    /// The polynomial, without its highest power.
    const POLYNOMIAL: u32 = 0x82f6_3b78;
    /// The polynomial 1.
    const ONE: u32 = 1 << 31;

    type Table = [u32; 256];

    /// What eight zero bits make of each value of the eight lowest.
    static BYTE: Table = bytes();
    /// x to the power of eight times the index.
    static LOW: Table = powers(ONE, 1);
    /// x to the power of 2,048 times the index.
    static HIGH: Table = powers(ONE, 256);

    /// One zero bit more.
    const fn bit(register: u32) -> u32 {
        (register >> 1) ^ if register & 1 == 0 { 0 } else { POLYNOMIAL }
    }

    /// That many zero bits more.
    const fn bits(mut register: u32, count: u32) -> u32 {
        let mut done = 0;
        while done < count {
            register = bit(register);
            done += 1;
        }
        register
    }

    #[expect(clippy::indexing_slicing, reason = "while compiling")]
    const fn bytes() -> Table {
        let mut table = [0; 256];
        let mut index = 0;
        while index < 256 {
            table[index] = bits(index as u32, 8);
            index += 1;
        }
        table
    }

    #[expect(clippy::indexing_slicing, reason = "while compiling")]
    const fn powers(first: u32, bytes: u32) -> Table {
        let mut table = [first; 256];
        let mut index = 1;
        while index < 256 {
            table[index] = bits(table[index - 1], 8 * bytes);
            index += 1;
        }
        table
    }

    #[inline(always)]
    fn at(table: &'static Table, index: u8) -> u32 {
        table.get(index as usize).copied().unwrap_or_default()
    }

    /// Four zero bytes more: times x to the power of 32.
    #[inline(always)]
    fn shift(mut register: u32) -> u32 {
        for _ in 0..4 {
            register = (register >> 8) ^ at(&BYTE, register as u8);
        }
        register
    }

    /// Multiplies without carries. Bits that stand four apart are numbers of their own: no sum of theirs has more than the
    /// eight ones that four bits hold, and the lowest of the four is the sum without carries.
    #[inline(always)]
    const fn product(a: u32, b: u32) -> u64 {
        const EVERY: u64 = 0x1111_1111_1111_1111;
        let (a, b) = (a as u64, b as u64);
        let (a0, a1, a2, a3) = (a & EVERY, a & (EVERY << 1), a & (EVERY << 2), a & (EVERY << 3));
        let (b0, b1, b2, b3) = (b & EVERY, b & (EVERY << 1), b & (EVERY << 2), b & (EVERY << 3));
        (((a0 * b0) ^ (a1 * b3) ^ (a2 * b2) ^ (a3 * b1)) & EVERY)
            | (((a0 * b1) ^ (a1 * b0) ^ (a2 * b3) ^ (a3 * b2)) & (EVERY << 1))
            | (((a0 * b2) ^ (a1 * b1) ^ (a2 * b0) ^ (a3 * b3)) & (EVERY << 2))
            | (((a0 * b3) ^ (a1 * b2) ^ (a2 * b1) ^ (a3 * b0)) & (EVERY << 3))
    }

    /// Multiplies modulo the polynomial.
    #[inline(always)]
    fn times(a: u32, b: u32) -> u32 {
        let product = product(a, b) << 1;
        (product >> 32) as u32 ^ shift(product as u32)
    }

    /// What changing the first four bytes of `length` (at most 65,535) by some bits does to their CRC. Global to the
    /// programs, so that the verifier looks at it once and not wherever it is called.
    #[unsafe(no_mangle)]
    #[inline(never)]
    pub(super) extern "C" fn crc32c_change(bits: u32, length: u32) -> u32 {
        times(times(bits, at(&LOW, length as u8)), at(&HIGH, (length >> 8) as u8))
    }

    /// The word that makes the CRC 0 of these and itself.
    #[inline(always)]
    pub(super) fn word_to_zero(words: &[u32; 5]) -> u32 {
        /// The register that four zero bytes make all ones, of which the complement is the CRC.
        const BEFORE: u32 = unshift(u32::MAX);
        words.iter().fold(u32::MAX, |register, word| shift(register ^ u32::from_le(*word))) ^ BEFORE
    }

    /// Takes four zero bytes back.
    const fn unshift(mut register: u32) -> u32 {
        let mut done = 0;
        while done < 32 {
            register = if register >> 31 == 0 { register << 1 } else { ((register ^ POLYNOMIAL) << 1) | 1 };
            done += 1;
        }
        register
    }

    #[cfg(test)]
    mod tests {
        use proptest::prelude::*;

        use super::{crc32c_change, word_to_zero};

        proptest! {
            #[test]
            fn a_changed_crc_equals_one_computed_anew(
                mut packet in prop::collection::vec(any::<u8>(), 4..9_000),
                ports in any::<[u8; 4]>(),
            ) {
                let before = ::crc32c::crc32c(&packet);
                let bits = u32::from_le_bytes([packet[0], packet[1], packet[2], packet[3]]) ^ u32::from_le_bytes(ports);
                packet[..4].copy_from_slice(&ports);
                prop_assert_eq!(before ^ crc32c_change(bits, packet.len() as u32), ::crc32c::crc32c(&packet));
            }

            #[test]
            fn a_word_makes_the_crc_zero(words in any::<[u32; 5]>()) {
                let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
                bytes.extend(word_to_zero(&words).to_le_bytes());
                prop_assert_eq!(::crc32c::crc32c(&bytes), 0);
            }
        }

        #[test]
        fn every_length_is_advanced_over() {
            let mut packet = vec![0x5a; 65_535];
            for length in 4..=65_535 {
                let (was, is) = (0x1234_5678_u32, 0x0bad_cafe_u32);
                if length % 499 != 0 && length > 2_100 && length < 65_500 {
                    continue;
                }
                packet[..4].copy_from_slice(&was.to_le_bytes());
                let before = ::crc32c::crc32c(&packet[..length]);
                packet[..4].copy_from_slice(&is.to_le_bytes());
                let after = ::crc32c::crc32c(&packet[..length]);
                assert_eq!(before ^ crc32c_change(was ^ is, length as u32), after, "{length}");
            }
        }
    }
}
