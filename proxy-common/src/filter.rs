//! The address filter in front of everything: "could this packet be ours?" in a few instructions. `INBOUND` is asked for
//! a packet's destination (frontends, node addresses), `OUTBOUND` for its addresses on the way out (backends). A clear
//! bit is certain, a set one is not.

use crate::addr::{Ipv4, Ipv6};

/// Words of a filter.
pub const WORDS: usize = 1024;

/// The one entry of `INBOUND` and of `OUTBOUND`: 65,536 bits.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Filter {
    /// Bit `i` is bit `i % 64` of word `i / 64`.
    pub words: [u64; WORDS],
}

/// An address's place in a filter.
pub trait Hashed {
    /// The number of the bit. The low bits select by the end of the address, where neighbours differ, and the rest is
    /// mixed in by a multiplication.
    fn bit(&self) -> u16;
}

/// Spreads a word; the constant is 2³² / φ.
#[inline(always)]
const fn spread(word: u32) -> u16 {
    (word.wrapping_mul(0x9E37_79B1) >> 16) as u16
}

impl Hashed for Ipv4 {
    #[inline(always)]
    fn bit(&self) -> u16 {
        spread(self.word())
    }
}

impl Hashed for Ipv6 {
    #[inline(always)]
    fn bit(&self) -> u16 {
        let [a, b, c, d] = self.words();
        spread(a ^ b.rotate_left(7) ^ c.rotate_left(13) ^ d.rotate_left(19))
    }
}

impl Filter {
    /// A filter that lets nothing through.
    pub const EMPTY: Self = Self { words: [0; WORDS] };

    /// Whether the address may be one of those that were added.
    #[inline(always)]
    pub fn may_have(&self, bit: u16) -> bool {
        // The mask is what the verifier goes by; `bit` is in range by its type.
        let word = self.words[(bit >> 6) as usize & (WORDS - 1)];
        word >> (bit & 63) & 1 != 0
    }

    /// Adds an address.
    pub fn add(&mut self, address: &impl Hashed) {
        let bit = address.bit();
        self.words[(bit >> 6) as usize] |= 1 << (bit & 63);
    }
}

crate::map_type!(Filter);

#[cfg(test)]
mod tests {
    use super::{Filter, Hashed};
    use crate::addr::Ipv4;

    #[test]
    fn an_added_address_is_found_and_others_mostly_not() {
        let mut filter = Box::new(Filter::EMPTY);
        for host in 0..=255 {
            filter.add(&Ipv4 { octets: [10, 96, 0, host] });
        }
        assert!((0..=255).all(|host| filter.may_have(Ipv4 { octets: [10, 96, 0, host] }.bit())));
        let strangers = (0..=255).filter(|&host| filter.may_have(Ipv4 { octets: [192, 168, 7, host] }.bit())).count();
        assert!(strangers < 8, "{strangers} of 256 strangers pass");
    }
}
