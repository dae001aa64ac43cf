//! Chance that can be had again: a sequence of words that follows from its seed alone (`SplitMix64`).

/// A source of random words.
#[derive(Clone, Debug)]
pub struct Chance(u64);

const fn mix(word: u64) -> u64 {
    let word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ word >> 31
}

impl Chance {
    /// The sequence of a number within that of a seed.
    pub fn new(seed: u64, number: u64) -> Self {
        Self(mix(seed ^ mix(number.wrapping_add(0x9e37_79b9_7f4a_7c15))))
    }

    /// The next word.
    pub fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number below another.
    pub fn below(&mut self, bound: usize) -> usize {
        ((u128::from(self.word()) * bound as u128) >> 64) as usize
    }

    /// Whether something of so many in a hundred happens.
    pub fn percent(&mut self, share: usize) -> bool {
        self.below(100) < share
    }

    /// One of several.
    pub fn of<T: Copy>(&mut self, several: &[T]) -> T {
        several[self.below(several.len())]
    }

    /// One of several, each as likely as its weight says.
    pub fn weighted<T: Copy>(&mut self, several: &[(T, usize)]) -> T {
        let mut place = self.below(several.iter().map(|(_, weight)| weight).sum());
        for (it, weight) in several {
            if place < *weight {
                return *it;
            }
            place -= weight;
        }
        several[0].0
    }
}
