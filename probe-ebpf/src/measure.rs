//! Looks keys up, one in each run: in the table, in the kernel's LRU map, and, to be taken off, nowhere.

use flow_table::{self as buckets, Entered, Found, bucket::Head};
use proxy_common::{addr::Protocol, flow::state};

use crate::{
    contract::{V4, V6},
    maps::{KEYS, LRU_V4, LRU_V6, MASK, NEXT, SEED, TableV4, TableV6, sink},
};

/// The next key of the list.
#[inline(always)]
fn next() -> Option<&'static [u64; 5]> {
    let place = NEXT.get_ptr_mut(0)?;
    // SAFETY: the pointer is to a value of a map, which stays as long as the map; one program runs at a time.
    let [next, count] = unsafe { &mut *place };
    let key = KEYS.get(*next);
    *next = if *next + 1 >= *count { 0 } else { *next + 1 };
    key
}

#[inline(always)]
fn of_v4(key: &[u64; 5]) -> [u64; V4.0] {
    let [a, b, ..] = *key;
    [a, b]
}

#[inline(always)]
fn sum(words: &[u64]) -> u64 {
    words.iter().fold(0, |sum, word| sum ^ word)
}

/// Takes the next key, and no more.
#[inline(always)]
pub fn nothing_v4() -> u32 {
    let Some(key) = next() else { return 0 };
    sink(sum(&of_v4(key)));
    1
}

/// The same of IPv6.
#[inline(always)]
pub fn nothing_v6() -> u32 {
    let Some(key) = next() else { return 0 };
    sink(sum(key));
    1
}

/// Looks the next key up in the kernel's map.
#[inline(always)]
pub fn lru_v4() -> u32 {
    let Some(key) = next() else { return 0 };
    let key = of_v4(key);
    // SAFETY: nobody writes it meanwhile.
    let Some(value) = (unsafe { LRU_V4.get(&key) }) else { return 0 };
    sink(sum(value));
    1
}

/// The same of IPv6.
#[inline(always)]
pub fn lru_v6() -> u32 {
    let Some(key) = next() else { return 0 };
    let key = *key;
    // SAFETY: as above.
    let Some(value) = (unsafe { LRU_V6.get(&key) }) else { return 0 };
    sink(sum(value));
    1
}

/// Looks the next key up in the table.
#[inline(always)]
pub fn table_v4() -> u32 {
    let Some(key) = next() else { return 0 };
    let key = of_v4(key);
    let mut value = [0; V4.1];
    let Found::There(seen) = buckets::find(&TableV4, &key, SEED.places(&key, MASK.load()), &mut value) else {
        return 0;
    };
    sink(sum(&value) ^ seen.head.0);
    1
}

/// The same of IPv6.
#[inline(always)]
pub fn table_v6() -> u32 {
    let Some(key) = next() else { return 0 };
    let key = *key;
    let mut value = [0; V6.1];
    let Found::There(seen) = buckets::find(&TableV6, &key, SEED.places(&key, MASK.load()), &mut value) else {
        return 0;
    };
    sink(sum(&value) ^ seen.head.0);
    1
}

/// Enters the next key into the kernel's map.
#[inline(always)]
pub fn enter_lru_v4() -> u32 {
    let Some(key) = next() else { return 0 };
    u32::from(LRU_V4.insert(&of_v4(key), &[1, 2, 3, 4, 5, 6, 7, 8], 0).is_ok())
}

/// The same of IPv6.
#[inline(always)]
pub fn enter_lru_v6() -> u32 {
    let Some(key) = next() else { return 0 };
    u32::from(LRU_V6.insert(key, &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], 0).is_ok())
}

/// Enters the next key into the table.
#[inline(always)]
pub fn enter_table_v4() -> u32 {
    let Some(key) = next() else { return 0 };
    let key = of_v4(key);
    let places = SEED.places(&key, MASK.load());
    is_in(buckets::claim(&TableV4, &key, places, &[1, 2, 3, 4, 5, 6], live(), 100))
}

/// The same of IPv6.
#[inline(always)]
pub fn enter_table_v6() -> u32 {
    let Some(key) = next() else { return 0 };
    let key = *key;
    let places = SEED.places(&key, MASK.load());
    is_in(buckets::claim(&TableV6, &key, places, &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], live(), 100))
}

#[inline(always)]
fn live() -> Head {
    Head::new(Protocol::Tcp, state::CONFIRMED | state::REPLIED, 7).kept()
}

#[inline(always)]
fn is_in(entered: Entered) -> u32 {
    u32::from(!matches!(entered, Entered::Busy | Entered::Full))
}
