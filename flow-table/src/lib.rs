//! The set-associative flow table: buckets of four entries, two of which a key may stand in. In go keys and values as words of
//! 64 bits; out come copies of values that were entered under the key asked for, and never of another's.
//!
//! Nobody waits for anybody: every loop has a bound, and who has tried in vain says so. The rules that make it safe:
//!
//! * **An entry is its head.** Whose it is, and which of its values, is one word ([`Head`]), and everything that happens to an entry
//!   happens by an exchange of that word. It says `turn`, which changes with every owner and every value.
//! * **A reader copies, then looks at the head again.** If owner, value or turn are not what they were, the copy is no one's.
//!   While a value is written anew the head says so and keeps its tag: the reader tries again, and does not take the flow for unknown.
//! * **A writer owns the entry while it writes.** It has exchanged the head for one that is busy, which only one can. Only then does
//!   it write words of the value, and the key only where the head has no tag: where nobody finds it.
//! * **Small things are in the head.** When a flow was heard of, its state: who changes them exchanges the head for itself with
//!   something else in it, which fails if the entry has another owner or value by now. Nothing of one flow gets into another.
//! * **Counts say whose they are.** They are written for each packet, so without an exchange: with the turn in which they were noted.
//!   What a late writer leaves in an entry that has changed hands is of another turn and counts for nobody.
//! * **Who enters a key holds the lock of that key**, so that two who enter the same one agree. The lock keeps nobody else out: entries
//!   are won by exchanges. It is for programs alone, which are not suspended while they hold it, and it is tried a bounded number of
//!   times: on one CPU a program may interrupt another that has it.
//!
//! A turn has twelve bits: a reader that stands still in the middle of a copy while its entry changes hands 4,096 times exactly
//! would not notice.

#![cfg_attr(target_arch = "bpf", no_std, feature(asm_experimental_arch))]
// A panic path is a verifier failure.
#![cfg_attr(not(test), deny(clippy::indexing_slicing, clippy::panic, clippy::unwrap_used, clippy::expect_used))]
#![allow(clippy::inline_always, reason = "a call costs more than most of these functions")]

pub mod bucket;
#[cfg(test)]
mod interleavings;
#[cfg(test)]
mod memory;
#[cfg(test)]
mod order;
#[cfg(test)]
mod threads;
pub mod word;

use proxy_common::lifetime::silence;

use bucket::{Head, Noted, Places, WAYS};
use word::Word;

/// Four entries: what is said of each, what each has noted, and what they are.
#[repr(C)]
pub struct Bucket<W, const K: usize, const V: usize> {
    /// One for each entry, see [`Head`].
    pub heads: [W; WAYS],
    /// One for each entry, see [`Noted`].
    pub noted: [W; WAYS],
    /// The entries.
    pub slots: [Slot<W, K, V>; WAYS],
}

/// A key and its value.
#[repr(C)]
pub struct Slot<W, const K: usize, const V: usize> {
    /// Written only while the head has no tag.
    pub key: [W; K],
    /// Written only while the head is busy.
    pub value: [W; V],
}

/// Where the buckets are.
pub trait Table<const K: usize, const V: usize> {
    /// What they are made of.
    type Word: Word;
    /// How often a lock is tried.
    const TRIES: u32;
    /// A bucket.
    fn bucket(&self, index: u32) -> Option<&Bucket<Self::Word, K, V>>;
    /// The lock of all keys that may stand in a bucket and another one.
    fn lock(&self, first: u32) -> Option<&Self::Word>;
}

/// An entry and what was said of it when its value was copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Which bucket, times [`WAYS`], and which of its entries.
    pub place: u32,
    /// What was said of it.
    pub head: Head,
}

/// What a look-up came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// There it is, and its value has been copied.
    There(Seen),
    /// The key is not in the table.
    Nowhere,
    /// The key's entry was written each time it was looked at.
    Busy,
}

/// What became of a key that was to be entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Entered {
    /// It has an entry that nobody had.
    Free = 0,
    /// It has the entry of a flow that was over.
    Over = 1,
    /// It has the entry of one that had shown nothing but a first packet.
    Embryo = 2,
    /// It has the entry of one that was neither.
    Live = 3,
    /// It has its value in the place of the one before.
    Anew = 4,
    /// It was there already.
    Exists = 5,
    /// There was no entry to be had.
    Full = 6,
    /// Others were at it all the time.
    Busy = 7,
}

/// How often what others interfere with is tried.
const TRIES: u32 = 4;

/// Looks a key up and copies its value.
#[inline(always)]
pub fn find<T: Table<K, V>, const K: usize, const V: usize>(
    table: &T,
    key: &[u64; K],
    places: Places,
    value: &mut [u64; V],
) -> Found {
    for _ in 0..TRIES {
        let found = look(table, key, places, value);
        if found != Found::Busy {
            return found;
        }
    }
    Found::Busy
}

#[inline(always)]
fn look<T: Table<K, V>, const K: usize, const V: usize>(
    table: &T,
    key: &[u64; K],
    places: Places,
    value: &mut [u64; V],
) -> Found {
    let Some(seen) = spot(table, key, places) else { return Found::Nowhere };
    let Some((head, _, slot)) = entry(table, seen.place) else { return Found::Nowhere };
    copy(&slot.value, value);
    let is_stable = !seen.head.is_busy() && seen.head.is_same_tenure(Head(head.load()));
    if is_stable { Found::There(seen) } else { Found::Busy }
}

/// The entry that has the key's tag and the key, when it is looked at. Whether it still has them is for the caller to ask: if what
/// was said of it is no longer true, it may never have had the one while it had the other.
#[inline(always)]
fn spot<T: Table<K, V>, const K: usize, const V: usize>(table: &T, key: &[u64; K], places: Places) -> Option<Seen> {
    for index in [places.first, places.second] {
        let Some(bucket) = table.bucket(index) else { continue };
        let mut candidates = with_tag(bucket, places.tag);
        for _ in 0..WAYS {
            if candidates == 0 {
                break;
            }
            let way = lowest(candidates);
            candidates &= candidates - 1;
            let (Some(head), Some(slot)) = (bucket.heads.get(way), bucket.slots.get(way)) else { break };
            let head = Head(head.load());
            if head.tag() == places.tag && is_same(&slot.key, key) {
                return Some(Seen { place: place(index, way), head });
            }
        }
    }
    None
}

/// The entries that have a tag: a bit for each. Without a branch for each.
#[inline(always)]
fn with_tag<W: Word, const K: usize, const V: usize>(bucket: &Bucket<W, K, V>, tag: u64) -> u64 {
    let (mut found, mut any) = (0, 0);
    for (way, head) in bucket.heads.iter().enumerate() {
        any = head.load();
        let odds = Head(any).tag() ^ tag;
        found |= (odds.wrapping_sub(1) >> 63) << way;
    }
    W::forget(found, any) & ((1 << WAYS) - 1)
}

/// The number of the lowest bit of four: two bits for each of their sixteen combinations.
#[inline(always)]
const fn lowest(bits: u64) -> usize {
    const NUMBERS: u32 = 0b00_01_00_10_00_01_00_11_00_01_00_10_00_01_00_00;
    (NUMBERS >> ((bits & 15) * 2)) as usize & (WAYS - 1)
}

/// Where a key stands, without its value. An entry whose value is being written is there, too. Who holds the key's lock knows that
/// it enters no other place meanwhile.
#[inline(always)]
pub fn locate<T: Table<K, V>, const K: usize, const V: usize>(table: &T, key: &[u64; K], places: Places) -> Found {
    for _ in 0..TRIES {
        let Some(seen) = spot(table, key, places) else { return Found::Nowhere };
        let Some((head, ..)) = entry(table, seen.place) else { return Found::Nowhere };
        if seen.head.is_same_tenure(Head(head.load())) {
            return Found::There(seen);
        }
    }
    Found::Busy
}

/// Enters a key that is not there. What is said of the flow is in `about`.
#[inline(always)]
pub fn claim<T: Table<K, V>, const K: usize, const V: usize>(
    table: &T,
    key: &[u64; K],
    places: Places,
    value: &[u64; V],
    about: Head,
    jiffies_per_second: u32,
) -> Entered {
    let Some(lock) = hold(table, places) else { return Entered::Busy };
    let entered = match locate(table, key, places) {
        Found::Nowhere => occupy(table, key, places, value, about, jiffies_per_second),
        Found::There(_) => Entered::Exists,
        Found::Busy => Entered::Busy,
    };
    lock.store(0);
    entered
}

/// Enters a key, or gives the value that it has another one.
#[inline(always)]
pub fn enter<T: Table<K, V>, const K: usize, const V: usize>(
    table: &T,
    key: &[u64; K],
    places: Places,
    value: &[u64; V],
    about: Head,
    jiffies_per_second: u32,
) -> Entered {
    let Some(lock) = hold(table, places) else { return Entered::Busy };
    let mut found = Found::Busy;
    for _ in 0..TRIES {
        found = locate(table, key, places);
        let Found::There(seen) = found else { break };
        if write(table, seen, 0, value, |_| about) {
            break;
        }
        found = Found::Busy;
    }
    let entered = match found {
        Found::Nowhere => occupy(table, key, places, value, about, jiffies_per_second),
        Found::There(_) => Entered::Anew,
        Found::Busy => Entered::Busy,
    };
    lock.store(0);
    entered
}

/// Writes words of a value, from one on. `false` when the entry has changed hands or got another value, or others were at it all
/// the time.
#[inline(always)]
pub fn rewrite<T: Table<K, V>, const K: usize, const V: usize>(
    table: &T,
    seen: Seen,
    from: usize,
    words: &[u64],
) -> bool {
    write(table, seen, from, words, |before| before)
}

/// Notes that a flow was heard of, and bits of its state. `false` when the entry has changed hands, or others were at it all the
/// time.
#[inline(always)]
pub fn amend<T: Table<K, V>, const K: usize, const V: usize>(table: &T, seen: Seen, bits: u64, last_seen: u32) -> bool {
    let Some((head, ..)) = entry(table, seen.place) else { return false };
    win(head, seen.head, |before| before.amended(bits, last_seen)).is_some()
}

/// Frees an entry. `false` when it has changed hands, or others were at it all the time.
#[inline(always)]
pub fn leave<T: Table<K, V>, const K: usize, const V: usize>(table: &T, seen: Seen) -> bool {
    let Some((head, ..)) = entry(table, seen.place) else { return false };
    win(head, seen.head, Head::freed).is_some()
}

/// Notes a packet, and tells what has been noted.
#[inline(always)]
pub fn note<T: Table<K, V>, const K: usize, const V: usize>(table: &T, seen: Seen, bytes: u32) -> Noted {
    let Some((_, noted, _)) = entry(table, seen.place) else { return Noted::default() };
    let now = Noted(noted.load()).of(seen.head).with(bytes);
    noted.store(now.0);
    now
}

/// Takes what an entry has noted.
#[inline(always)]
pub fn take_noted<T: Table<K, V>, const K: usize, const V: usize>(table: &T, seen: Seen) -> Noted {
    let Some((_, noted, _)) = entry(table, seen.place) else { return Noted::default() };
    let taken = Noted(noted.load()).of(seen.head);
    noted.store(Noted::none(seen.head).0);
    taken
}

/// The lock of a key, held: nobody else enters the key until it is 0 again.
#[inline(always)]
fn hold<T: Table<K, V>, const K: usize, const V: usize>(table: &T, places: Places) -> Option<&T::Word> {
    let lock = table.lock(places.first)?;
    for _ in 0..T::TRIES {
        if lock.exchange(0, 1) == 0 {
            return Some(lock);
        }
    }
    None
}

/// Gives a key the entry that is missed least, of those of both its buckets.
#[inline(always)]
fn occupy<T: Table<K, V>, const K: usize, const V: usize>(
    table: &T,
    key: &[u64; K],
    places: Places,
    value: &[u64; V],
    about: Head,
    jiffies_per_second: u32,
) -> Entered {
    for _ in 0..TRIES {
        let Some((at, expendability)) = least_missed(table, places, about.last_seen(), jiffies_per_second) else {
            return Entered::Full;
        };
        let Some((head, noted, slot)) = entry(table, at.place) else { return Entered::Full };
        // Exactly what it was: who has been heard of, or confirmed, meanwhile is looked at again.
        let reserved = at.head.reserved();
        if head.exchange(at.head.0, reserved.0) != at.head.0 {
            continue;
        }
        for (word, key) in slot.key.iter().zip(key) {
            word.store(*key);
        }
        for (word, value) in slot.value.iter().zip(value) {
            word.store(*value);
        }
        let published = reserved.published(about, places.tag);
        noted.store(Noted::none(published).0);
        head.store(published.0);
        return match expendability >> 32 {
            4 => Entered::Free,
            3 => Entered::Over,
            2 => Entered::Embryo,
            _ => Entered::Live,
        };
    }
    Entered::Full
}

/// The entry that is missed least, if there is one that nobody is writing, and its [`bucket::expendability`]; of free ones one in the
/// emptier bucket.
#[inline(always)]
fn least_missed<T: Table<K, V>, const K: usize, const V: usize>(
    table: &T,
    places: Places,
    now: u32,
    jiffies_per_second: u32,
) -> Option<(Seen, u64)> {
    // With the number of the entry in the lowest bits, so that there is one number to compare.
    let (mut greatest, mut head) = (0, Head(0));
    for (of, index) in [places.first, places.second].into_iter().enumerate() {
        let Some(bucket) = table.bucket(index) else { continue };
        let mut free = 0;
        for (way, word) in bucket.heads.iter().enumerate() {
            let found = Head(word.load());
            let mut expendability = bucket::expendability(found, silence(now, found.last_seen()), jiffies_per_second);
            if expendability == bucket::FREE {
                free = T::Word::forget(free + 1, found.0);
                expendability += free;
            }
            let number = T::Word::forget(expendability << 3 | ((1 - of) * WAYS + way) as u64, found.0);
            if number > greatest && !found.is_busy() {
                (greatest, head) = (number, found);
            }
            greatest = T::Word::forget(greatest, found.0);
        }
    }
    if greatest == 0 {
        return None;
    }
    let number = T::Word::forget(greatest, head.0);
    let index = if number & WAYS as u64 == 0 { places.second } else { places.first };
    Some((Seen { place: place(index, number as usize % WAYS), head }, number >> 3))
}

/// Writes words of a value while it is this one's alone; what was noted stays.
#[inline(always)]
fn write<T: Table<K, V>, const K: usize, const V: usize>(
    table: &T,
    seen: Seen,
    from: usize,
    words: &[u64],
    about: impl Fn(Head) -> Head,
) -> bool {
    let Some((head, noted, slot)) = entry(table, seen.place) else { return false };
    let Some(before) = win(head, seen.head, Head::busy) else { return false };
    for (word, value) in slot.value.iter().skip(from).zip(words) {
        word.store(*value);
    }
    let after = before.published(about(before), before.tag());
    carry(noted, before, after);
    head.store(after.0);
    true
}

/// Exchanges a head, as long as its tenure is the one that was seen. What it was, if that succeeds.
#[inline(always)]
fn win<W: Word>(head: &W, seen: Head, change: impl Fn(Head) -> Head) -> Option<Head> {
    let mut before = Head(head.load());
    for _ in 0..TRIES {
        if !before.is_same_tenure(seen) || before.is_busy() {
            return None;
        }
        let found = Head(head.exchange(before.0, change(before).0));
        if found == before {
            return Some(before);
        }
        before = found;
    }
    None
}

/// Takes what was noted over into the owner's next turn.
#[inline(always)]
fn carry<W: Word>(noted: &W, before: Head, after: Head) {
    let old = Noted(noted.load()).of(before);
    noted.store(Noted::none(after).0 | old.0 & !Noted::none(Head(u64::MAX)).0);
}

/// An entry's words.
#[inline(always)]
#[expect(clippy::type_complexity, reason = "three words of one entry")]
fn entry<T: Table<K, V>, const K: usize, const V: usize>(
    table: &T,
    place: u32,
) -> Option<(&T::Word, &T::Word, &Slot<T::Word, K, V>)> {
    let bucket = table.bucket(place / WAYS as u32)?;
    let way = place as usize % WAYS;
    Some((bucket.heads.get(way)?, bucket.noted.get(way)?, bucket.slots.get(way)?))
}

#[inline(always)]
const fn place(index: u32, way: usize) -> u32 {
    index * WAYS as u32 + way as u32
}

#[inline(always)]
fn is_same<W: Word, const K: usize>(words: &[W; K], key: &[u64; K]) -> bool {
    words.iter().zip(key).all(|(word, key)| word.load() == *key)
}

#[inline(always)]
fn copy<W: Word, const V: usize>(words: &[W; V], value: &mut [u64; V]) {
    for (word, place) in words.iter().zip(value) {
        *place = word.load();
    }
}
