//! Incremental internet checksum (RFC 1624, eq. 3). Words are taken in memory order and never byte-swapped: the
//! one's-complement sum does not care (RFC 1071 §1.B), and swapping twice is how these functions go wrong.

/// Folds a sum of 16-bit words into one.
#[inline(always)]
pub(crate) const fn fold(sum: u32) -> u16 {
    let once = (sum & 0xffff) + (sum >> 16);
    let twice = (once & 0xffff) + (once >> 16);
    twice as u16
}

/// What replacing words that sum up to `old` by words that sum up to `new` does to a sum.
#[inline(always)]
pub(crate) const fn delta(old: u32, new: u32) -> u16 {
    fold(new + !fold(old) as u32)
}

/// The opposite of a delta.
#[inline(always)]
pub(crate) const fn negate(delta: u16) -> u16 {
    !delta
}

/// A checksum field after a change of what it covers.
#[inline(always)]
pub(crate) const fn update(field: u16, delta: u32) -> u16 {
    !fold(!field as u32 + delta)
}

/// The sum of whole words, not folded.
#[inline(always)]
pub(crate) fn sum<const N: usize>(words: &[u32; N]) -> u32 {
    words.iter().fold(0, |sum, word| sum + (word & 0xffff) + (word >> 16))
}

/// Half of a sum, in one's complement: 2 × 0x8000 is 1 there, so to halve is to rotate by one bit, whatever the byte order.
#[inline(always)]
pub(crate) const fn half(sum: u16) -> u16 {
    sum.rotate_right(1)
}

/// What taking one from an IPv4 TTL does to the header's sum: the word is `[ttl, protocol]`.
pub(crate) const TTL_DECREMENT: u16 = !u16::from_ne_bytes([1, 0]);

#[cfg(test)]
mod tests {
    use super::{TTL_DECREMENT, delta, fold, half, negate, update};

    /// The checksum by its definition, over big-endian words.
    fn checksum(bytes: &[u8]) -> u16 {
        let mut sum: u32 =
            bytes.chunks(2).map(|c| u32::from(u16::from_be_bytes([c[0], *c.get(1).unwrap_or(&0)]))).sum();
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        !(sum as u16)
    }

    fn sum(bytes: &[u8]) -> u32 {
        bytes.chunks(2).map(|c| u32::from(u16::from_ne_bytes([c[0], c[1]]))).sum()
    }

    #[test]
    fn an_updated_checksum_equals_one_computed_anew() {
        let mut state = 0x1234_5678_u32;
        for round in 0..10_000 {
            let mut bytes = [0_u8; 40];
            for byte in &mut bytes {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                *byte = if round % 7 == 0 { 0xff } else { (state >> 24) as u8 };
            }
            let before = checksum(&bytes);
            let old = sum(&bytes[8..24]);
            for byte in &mut bytes[8..24] {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                *byte = (state >> 24) as u8;
            }
            let change = delta(old, sum(&bytes[8..24]));
            let updated = update(u16::from_ne_bytes(before.to_be_bytes()), u32::from(change));
            let anew = checksum(&bytes);
            let updated = u16::from_be_bytes(updated.to_ne_bytes());
            // 0x0000 and 0xffff are the same number in one's complement.
            assert!(updated == anew || (updated ^ anew) == 0xffff && (anew == 0 || anew == 0xffff), "round {round}");
            let back = update(u16::from_ne_bytes(updated.to_be_bytes()), u32::from(negate(change)));
            assert_eq!(
                fold(u32::from(back)) % 0xffff,
                u16::from_ne_bytes(before.to_be_bytes()) % 0xffff,
                "round {round}"
            );
        }
    }

    #[test]
    fn taking_one_from_the_ttl_is_a_constant() {
        let before = [64, 6, 0x12, 0x34];
        let after = [63, 6, 0x12, 0x34];
        let updated = update(u16::from_ne_bytes(checksum(&before).to_be_bytes()), u32::from(TTL_DECREMENT));
        assert_eq!(u16::from_be_bytes(updated.to_ne_bytes()), checksum(&after));
    }

    #[test]
    fn two_halves_are_a_whole() {
        for sum in 0..=u16::MAX {
            assert_eq!(fold(2 * u32::from(half(sum))) % 0xffff, sum % 0xffff, "{sum:#06x}");
        }
    }
}
