//! The hash by which backends are picked: `MurmurHash3`'s mixing of 32-bit words, without a seed, so that every node comes to
//! the same number. It spreads clients, it does not resist those who want to collide.

/// A hash in the making.
#[derive(Clone, Copy)]
pub(crate) struct Hash(u32);

impl Hash {
    /// Of nothing yet.
    pub(crate) const EMPTY: Self = Self(0);

    /// With one more word.
    #[inline(always)]
    pub(crate) const fn word(self, word: u32) -> Self {
        let mixed = word.wrapping_mul(0xcc9e_2d51).rotate_left(15).wrapping_mul(0x1b87_3593);
        Self((self.0 ^ mixed).rotate_left(13).wrapping_mul(5).wrapping_add(0xe654_6b64))
    }

    /// With four more.
    #[inline(always)]
    pub(crate) const fn words(self, words: [u32; 4]) -> Self {
        let [a, b, c, d] = words;
        self.word(a).word(b).word(c).word(d)
    }

    /// The number: every bit of it depends on every bit that went in.
    #[inline(always)]
    pub(crate) const fn finish(self) -> u32 {
        let once = (self.0 ^ self.0 >> 16).wrapping_mul(0x85eb_ca6b);
        let twice = (once ^ once >> 13).wrapping_mul(0xc2b2_ae35);
        twice ^ twice >> 16
    }
}

/// Where a word falls in `[0, count)`: multiply and shift, which is even enough and never divides.
#[inline(always)]
pub(crate) const fn scale(word: u32, count: u32) -> u32 {
    ((word as u64 * count as u64) >> 32) as u32
}

#[cfg(test)]
mod tests {
    use super::{Hash, scale};

    /// Chi-squared of how many of the words fall into each of `count` places.
    fn unevenness(words: impl Iterator<Item = u32>, count: u32) -> f64 {
        let mut places = vec![0_f64; count as usize];
        let mut all = 0_f64;
        for word in words {
            places[scale(word, count) as usize] += 1.0;
            all += 1.0;
        }
        let expected = all / f64::from(count);
        places.iter().map(|got| (got - expected).powi(2) / expected).sum()
    }

    #[test]
    fn neighbours_fall_evenly_over_any_number_of_places() {
        for count in [2, 3, 7, 10, 100] {
            let addresses = (0..20_000_u32).map(|host| Hash::EMPTY.word(u32::to_be(0x0af4_0000 + host)).finish());
            let ports = (0..20_000_u32).map(|port| Hash::EMPTY.word(7).word(port << 16 | 0x50).finish());
            let v6 = (0..20_000_u32).map(|host| Hash::EMPTY.words([0xb80d_0120, 0, 0, host.to_be()]).finish());
            for (name, unevenness) in [
                ("addresses", unevenness(addresses, count)),
                ("ports", unevenness(ports, count)),
                ("v6", unevenness(v6, count)),
            ] {
                // Mean `count - 1`, variance twice that: five standard deviations.
                let degrees = f64::from(count - 1);
                let bound = degrees + 5.0 * (2.0 * degrees).sqrt() + 5.0;
                assert!(unevenness < bound, "{name} over {count}: {unevenness} and not below {bound}");
            }
        }
    }

    #[test]
    fn a_word_more_is_another_hash_even_if_it_is_zero() {
        assert_ne!(Hash::EMPTY.finish(), Hash::EMPTY.word(0).finish());
        assert_ne!(Hash::EMPTY.word(1).word(2).finish(), Hash::EMPTY.word(2).word(1).finish());
    }

    #[test]
    fn the_hash_is_the_same_on_every_node_and_in_every_version() {
        assert_eq!(Hash::EMPTY.words([1, 2, 3, 4]).finish(), 0xf908_2f6e);
    }

    #[test]
    fn scaling_covers_the_range_and_stays_in_it() {
        assert_eq!((scale(0, 3), scale(u32::MAX, 3), scale(u32::MAX, 1)), (0, 2, 0));
    }
}
