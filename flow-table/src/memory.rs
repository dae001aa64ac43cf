//! A table in this machine's own memory.

use crate::bucket::{Head, Places, WAYS};

use crate::word::Word;
use crate::{Bucket, Slot, Table};

/// Buckets of any kind of words, made by a function.
pub(super) struct Memory<W, const K: usize, const V: usize, const TRIES: u32> {
    pub(super) buckets: Vec<Bucket<W, K, V>>,
    locks: Vec<W>,
}

impl<W, const K: usize, const V: usize, const TRIES: u32> Memory<W, K, V, TRIES> {
    pub(super) fn new(buckets: usize, locks: usize, word: impl Fn(u64) -> W) -> Self {
        let words = || core::array::from_fn(|_| word(0));
        let slot = |_| Slot { key: core::array::from_fn(|_| word(0)), value: core::array::from_fn(|_| word(0)) };
        let bucket = |_| Bucket { heads: words(), noted: words(), slots: core::array::from_fn(slot) };
        Self { buckets: (0..buckets).map(bucket).collect(), locks: (0..locks).map(|_| word(0)).collect() }
    }
}

impl<W: Word, const K: usize, const V: usize, const TRIES: u32> Memory<W, K, V, TRIES> {
    /// The heads of a key's entries. More than one would be a mistake.
    pub(super) fn heads_of(&self, key: &[u64; K]) -> Vec<Head> {
        let entries = self.buckets.iter().flat_map(|bucket| bucket.heads.iter().zip(&bucket.slots));
        entries
            .map(|(head, slot)| (Head(head.load()), slot))
            .filter(|(head, slot)| head.tag() != 0 && slot.key.iter().zip(key).all(|(word, key)| word.load() == *key))
            .map(|(head, _)| head)
            .collect()
    }

    /// How many entries are in use.
    pub(super) fn len(&self) -> usize {
        self.buckets.iter().flat_map(|bucket| &bucket.heads).filter(|head| Head(head.load()).is_taken()).count()
    }
}

impl<W: Word, const K: usize, const V: usize, const TRIES: u32> Table<K, V> for Memory<W, K, V, TRIES> {
    type Word = W;
    const TRIES: u32 = TRIES;

    fn bucket(&self, index: u32) -> Option<&Bucket<W, K, V>> {
        self.buckets.get(index as usize)
    }

    fn lock(&self, first: u32) -> Option<&W> {
        self.locks.get(first as usize % self.locks.len())
    }
}

/// Places in the first two buckets, all of one tag: whoever goes by tags alone takes every key for every other.
pub(super) const BESIDE: Places = Places { first: 0, second: 1, tag: 7 };

/// Entries in both buckets.
pub(super) const BOTH: usize = 2 * WAYS;
