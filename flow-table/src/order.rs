//! One CPU alone: who is displaced, what is said of it, and how far a table fills up before anybody is.

use std::collections::HashMap;

use crate::bucket::{Head, Places, Seed, WAYS};
use proptest::prelude::*;
use proxy_common::{addr::Protocol, flow::state, lifetime};

use crate::word::{Shared, Word as _};
use crate::{
    Entered, Found, Seen,
    memory::{BESIDE, BOTH, Memory},
};

const HZ: u32 = 100;
type Key = [u64; 2];
type Table = Memory<Shared, 2, 6, 4>;

fn table(buckets: usize) -> Table {
    Table::new(buckets, 16, Shared::new)
}

fn value(of: u64) -> [u64; 6] {
    core::array::from_fn(|index| of * 10 + index as u64)
}

fn embryo(last_seen: u32) -> Head {
    Head::new(Protocol::Tcp, 0, last_seen)
}

/// Open on both sides, and kept.
fn live(last_seen: u32) -> Head {
    Head::new(Protocol::Tcp, state::CONFIRMED | state::REPLIED, last_seen).kept()
}

/// Closed on both sides: over after two seconds.
fn closed(last_seen: u32) -> Head {
    let bits = state::CONFIRMED | state::REPLIED | state::FIN_ORIGINAL | state::FIN_REPLY;
    Head::new(Protocol::Tcp, bits, last_seen).kept()
}

fn claim(table: &Table, key: u64, about: Head) -> Entered {
    crate::claim(table, &[1, key], BESIDE, &value(key), about, HZ)
}

fn find(table: &Table, key: Key, places: Places) -> Option<(Seen, [u64; 6])> {
    let mut value = [0; 6];
    match crate::find(table, &key, places, &mut value) {
        Found::There(seen) => Some((seen, value)),
        Found::Nowhere => None,
        Found::Busy => panic!("nobody else is here"),
    }
}

fn is_there(table: &Table, key: u64) -> bool {
    find(table, [1, key], BESIDE).is_some()
}

#[test]
fn a_key_is_found_with_its_value_until_it_leaves() {
    let table = table(2);
    assert_eq!(claim(&table, 3, live(50)), Entered::Free);
    let (seen, found) = find(&table, [1, 3], BESIDE).unwrap();
    assert_eq!(found, value(3));
    assert_eq!((seen.head.last_seen(), seen.head.state()), (50, state::CONFIRMED | state::REPLIED));
    assert!(!is_there(&table, 4));
    assert_eq!(claim(&table, 3, live(51)), Entered::Exists);
    assert!(crate::leave(&table, seen));
    assert!(!is_there(&table, 3));
    assert!(!crate::leave(&table, seen), "it has left");
    assert_eq!(table.len(), 0);
}

#[test]
fn a_value_is_replaced_in_its_place() {
    let table = table(2);
    let enter = |of: u64, about| crate::enter(&table, &[1, 3], BESIDE, &value(of), about, HZ);
    assert_eq!(enter(3, embryo(50)), Entered::Free);
    let before = find(&table, [1, 3], BESIDE).unwrap().0;
    assert_eq!(enter(4, live(60)), Entered::Anew);
    let (seen, found) = find(&table, [1, 3], BESIDE).unwrap();
    assert_eq!((found, seen.place, seen.head.last_seen()), (value(4), before.place, 60));
    assert!(!seen.head.is_embryo());
    assert_eq!(table.len(), 1);
    assert!(!crate::amend(&table, before, Head::bits(state::RESET), 99), "that was of the other value");
    assert!(crate::amend(&table, seen, Head::bits(state::RESET), 99));
    let seen = find(&table, [1, 3], BESIDE).unwrap().0;
    assert_eq!((seen.head.last_seen(), seen.head.state()), (99, state::RESET | state::CONFIRMED | state::REPLIED));
}

#[test]
fn the_free_go_first_then_those_that_are_over_then_the_unconfirmed_and_the_longest_silent_last() {
    let now = 100_000_000;
    let second = |seconds: u32| now - seconds * HZ;
    let table = table(2);
    // An embryo of TCP is over after 120 seconds, a closed connection after two.
    let abouts = [
        live(second(80_000)),
        embryo(second(3)),
        closed(second(1)),
        embryo(second(121)),
        live(second(0)),
        closed(second(9)),
        embryo(second(100)),
        live(second(9)),
    ];
    for (key, about) in abouts.into_iter().enumerate() {
        assert_eq!(claim(&table, key as u64, about), Entered::Free);
    }
    let order = [
        (3, Entered::Over),
        (5, Entered::Over),
        (6, Entered::Embryo),
        (1, Entered::Embryo),
        (0, Entered::Live),
        (7, Entered::Live),
        (2, Entered::Live),
        (4, Entered::Live),
    ];
    for (turn, (displaced, how)) in order.into_iter().enumerate() {
        assert!(is_there(&table, displaced));
        // Nobody is silent for less time than those who come.
        assert_eq!(claim(&table, 100 + turn as u64, live(now + turn as u32)), how, "{displaced}");
        assert!(!is_there(&table, displaced), "{displaced}");
        assert_eq!(table.len(), BOTH);
    }
}

#[test]
fn silence_is_told_right_when_the_clock_wraps() {
    let table = table(2);
    // Ten seconds before, a tenth after, and on a CPU that read the clock before this one did.
    let seen_at = [u32::MAX - 10 * HZ, 10, 60];
    for (key, last_seen) in (0..BOTH as u32).zip(seen_at.into_iter().cycle()) {
        claim(&table, key.into(), live(last_seen.wrapping_add(key)));
    }
    for displaced in [0, 3, 6] {
        assert!(is_there(&table, displaced));
        assert_eq!(claim(&table, 100 + displaced, live(50)), Entered::Live, "nobody is over");
        assert!(!is_there(&table, displaced), "{displaced}");
    }
    let table = self::table(2);
    for key in 0..BOTH as u64 {
        claim(&table, key, closed(if key == 5 { u32::MAX - 199 } else { 10 }));
    }
    assert_eq!(claim(&table, 100, live(10)), Entered::Over, "more than two seconds across the wrap");
    assert!(!is_there(&table, 5));
}

#[test]
fn who_is_being_written_is_displaced_by_nobody() {
    let table = table(2);
    for key in 0..BOTH as u64 {
        claim(&table, key, embryo(1));
    }
    for head in table.buckets.iter().flat_map(|bucket| &bucket.heads) {
        head.store(Head(head.load()).busy().0);
    }
    assert_eq!(claim(&table, 100, live(2)), Entered::Full);
    assert_eq!(claim(&table, 3, live(2)), Entered::Exists, "it is written, but it is there");
    let mut value = [0; 6];
    assert_eq!(crate::find(&table, &[1, 3], BESIDE, &mut value), Found::Busy);
    assert_eq!(crate::find(&table, &[1, 100], BESIDE, &mut value), Found::Nowhere);
}

#[test]
fn who_finds_the_lock_taken_gives_up_and_has_changed_nothing() {
    use crate::Table as _;
    let table = table(2);
    let lock = table.lock(0).unwrap();
    assert_eq!(lock.exchange(0, 1), 0);
    assert_eq!(claim(&table, 3, live(2)), Entered::Busy);
    assert_eq!(table.len(), 0);
    lock.store(0);
    assert_eq!(claim(&table, 3, live(2)), Entered::Free);
    assert_eq!(lock.load(), 0, "it is given back");
}

#[test]
fn what_is_noted_is_of_the_turn_it_was_noted_in() {
    let table = table(2);
    claim(&table, 3, live(1));
    let (seen, _) = find(&table, [1, 3], BESIDE).unwrap();
    crate::note(&table, seen, 1_500);
    let noted = crate::note(&table, seen, u32::MAX);
    assert_eq!((noted.packets(), noted.bytes()), (2, 1_499), "bytes wrap alone");
    crate::leave(&table, seen);
    // All are free, and the same one is chosen again.
    claim(&table, 4, live(1));
    let (next, _) = find(&table, [1, 4], BESIDE).unwrap();
    assert_eq!(next.place, seen.place);
    assert_eq!(crate::take_noted(&table, next).packets(), 0);
    crate::note(&table, next, 7);
    crate::note(&table, seen, 1_500);
    assert_eq!(crate::take_noted(&table, next), crate::bucket::Noted::none(next.head), "lost, but not wrong");
}

#[test]
fn a_flood_of_first_packets_displaces_no_connection_that_has_one_of_them_beside_it() {
    // A table of 4,096 entries, 1,000 connections, and a quarter of a million strangers.
    const STRANGERS: usize = 250_000;
    let (table, seed, mask) = (table(1_024), Seed::from_random(1), 1_023);
    let connections: Vec<Key> = (0..1_000).map(|port| [0x0a00_0001_0a00_0002, port]).collect();
    for key in &connections {
        crate::claim(&table, key, seed.places(key, mask), &value(key[1]), live(0), HZ);
    }
    let mut displaced = HashMap::<Entered, u32>::new();
    for stranger in 0..STRANGERS as u64 {
        let key = [stranger << 32 | 0x0a00_0002, 0x5000_1234];
        let now = (stranger / 1_000) as u32;
        *displaced
            .entry(crate::claim(&table, &key, seed.places(&key, mask), &value(stranger), embryo(now), HZ))
            .or_default() += 1;
    }
    let alive = connections.iter().filter(|key| find(&table, **key, seed.places(key, mask)).is_some()).count();
    assert_eq!(alive, 1_000);
    assert_eq!(
        displaced.keys().filter(|how| **how != Entered::Free && **how != Entered::Embryo).count(),
        0,
        "{displaced:?}"
    );
    assert_eq!(displaced[&Entered::Embryo] as usize, STRANGERS + 1_000 - table.len(), "what is gone is counted");
}

/// What a row of keys has in common, and the nth of them.
type Row = (&'static str, fn(u64) -> Key);

/// Keys as they are in life: one client's ports; many clients, one port; both halves of many connections.
fn lifelike() -> [Row; 3] {
    [
        ("ports", |n| [0x0100_000a_0900_600a, n & 0xffff | 0x5000 << 16 | 6 << 32 | (n >> 16) << 40]),
        ("clients", |n| [n.swap_bytes() >> 32 | 0x0900_600a << 32, 0x5000_1234 | 6 << 32]),
        ("halves", |n| {
            if n & 1 == 0 {
                [(n >> 1).swap_bytes() >> 32 | 0x0900_600a << 32, n & 0xfffe | 0x5000 << 16 | 6 << 32 | 3 << 40]
            } else {
                [0x0101_f40a | (n >> 1).swap_bytes() >> 32 << 32, 0x901f | (n & 0xfffe) << 16 | 6 << 32 | 4 << 40]
            }
        }),
    ]
}

#[test]
fn keys_fall_evenly_over_buckets_and_tags() {
    for (name, key) in lifelike() {
        for random in 1..4 {
            let seed = Seed::from_random(random);
            let (mut first, mut second, mut tags) = (vec![0_u32; 1_024], vec![0_u32; 1_024], vec![0_u32; 256]);
            for places in (0..65_536).map(|n| seed.places(&key(n), 1_023)) {
                assert_ne!(places.first, places.second);
                assert!(places.first < 1_024 && places.second < 1_024 && (1..256).contains(&places.tag));
                first[places.first as usize] += 1;
                second[places.second as usize] += 1;
                tags[places.tag as usize] += 1;
            }
            // What would have the tag 0 has the tag 1.
            tags.drain(..2);
            for (what, places) in [("first", first), ("second", second), ("tag", tags)] {
                let (all, degrees) = (f64::from(places.iter().sum::<u32>()), f64::from(places.len() as u32 - 1));
                let expected = all / (degrees + 1.0);
                let uneven: f64 = places.iter().map(|got| (f64::from(*got) - expected).powi(2) / expected).sum();
                // Five standard deviations.
                let bound = degrees + 5.0 * (2.0 * degrees).sqrt();
                assert!(uneven < bound, "{name}, {what}, seed {random}: {uneven} and not below {bound}");
            }
        }
    }
}

#[test]
fn another_seed_is_another_order() {
    let together = |random: u64| {
        let seed = Seed::from_random(random);
        let first = |n: u64| seed.places(&[7, n], 63).first;
        (0..1_000).filter(|n| first(*n) == first(n + 1_000)).collect::<Vec<_>>()
    };
    assert_eq!(together(1), together(1));
    assert_ne!(together(1), together(2));
}

/// Fills a table of so many buckets to three quarters with live flows: in thousandths of its entries, how many had come when the
/// first one found no free entry, and of those who have come, how many have gone.
fn fill(buckets: u32, random: u64, key: fn(u64) -> Key) -> (u32, u32) {
    let (table, seed) = (table(buckets as usize), Seed::from_random(random));
    let all = buckets * WAYS as u32 * 3 / 4;
    let displaced: Vec<u32> = (0..all)
        .filter(|n| {
            let key = key(u64::from(*n));
            crate::claim(&table, &key, seed.places(&key, buckets - 1), &value(0), live(0), HZ) != Entered::Free
        })
        .collect();
    (displaced.first().unwrap_or(&all) * 750 / all, displaced.len() as u32 * 1_000 / all)
}

#[test]
fn few_are_displaced_before_a_table_is_three_quarters_full_and_none_before_it_is_at_two_fifths() {
    for (name, key) in lifelike() {
        for buckets in [16, 1_024, 16_384] {
            let fills: Vec<_> = (1..6).map(|random| fill(buckets, random, key)).collect();
            println!("{name}, {buckets} buckets: {fills:?}");
            assert!(fills.iter().all(|(first, _)| *first > 400), "{name}, {buckets} buckets: {fills:?}");
            let displaced: u32 = fills.iter().map(|(_, displaced)| displaced).sum();
            assert!(displaced < 5 * 15, "{name}, {buckets} buckets: {fills:?}");
        }
    }
}

/// What a table of a few buckets should hold, by key.
type Model = HashMap<u64, (Head, [u64; 6])>;

#[derive(Clone, Copy, Debug)]
enum Act {
    Claim(u64, Head),
    Enter(u64, Head),
    Leave(u64),
    Amend(u64),
    Rewrite(u64),
    Wait(u32),
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let about = prop_oneof![Just(embryo(0)), Just(live(0)), Just(closed(0))];
    let key = 0..40_u64;
    let act = prop_oneof![
        4 => (key.clone(), about.clone()).prop_map(|(key, about)| Act::Claim(key, about)),
        1 => (key.clone(), about).prop_map(|(key, about)| Act::Enter(key, about)),
        1 => key.clone().prop_map(Act::Leave),
        1 => key.clone().prop_map(Act::Amend),
        1 => key.prop_map(Act::Rewrite),
        2 => (0..3_000_u32).prop_map(Act::Wait),
    ];
    prop::collection::vec(act, 1..120)
}

/// Worse to lose, greater: 0 over, 1 unconfirmed, 2 live; and then how shortly it has been silent.
fn worth(head: Head, now: u32) -> (u8, std::cmp::Reverse<u32>) {
    let silent = now.wrapping_sub(head.last_seen());
    let lifetime = lifetime::seconds_to_be_over(Protocol::Tcp, head.state());
    let kind = if silent > lifetime * HZ { 0 } else { u8::from(!head.is_embryo()) + 1 };
    (kind, std::cmp::Reverse(silent))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn the_table_holds_what_a_map_would_but_for_those_it_had_to_displace(acts in acts(), random in 1..1_000_u64) {
        let (table, seed, mut model) = (table(4), Seed::from_random(random), Model::new());
        let places = |key: u64| seed.places(&[9, key], 3);
        // So that the clock wraps on the way.
        let mut now = u32::MAX - 20_000;
        let at = |head: Head, now: u32| head.amended(0, now);
        for act in acts {
            match act {
                Act::Wait(jiffies) => now = now.wrapping_add(jiffies),
                Act::Claim(key, about) | Act::Enter(key, about) => {
                    let is_upsert = matches!(act, Act::Enter(..));
                    let (about, value) = (at(about, now), value(u64::from(now)));
                    let enter = if is_upsert { crate::enter } else { crate::claim };
                    let entered = enter(&table, &[9, key], places(key), &value, about, HZ);
                    let gone: Vec<u64> =
                        model.keys().copied().filter(|key| find(&table, [9, *key], places(*key)).is_none()).collect();
                    let kind = match entered {
                        Entered::Over => Some(0),
                        Entered::Embryo => Some(1),
                        Entered::Live => Some(2),
                        _ => None,
                    };
                    prop_assert_eq!(gone.len(), usize::from(kind.is_some()));
                    if let Some(displaced) = gone.first() {
                        // Nobody in either bucket was worth less.
                        let own = places(key);
                        let beside: Vec<_> = (model.iter())
                            .filter(|(other, _)| *other == displaced || find(&table, [9, **other], places(**other)).is_some_and(|(seen, _)| {
                                [own.first, own.second].contains(&(seen.place / 4))
                            }))
                            .map(|(_, (head, _))| worth(*head, now))
                            .collect();
                        let lost = worth(model[displaced].0, now);
                        prop_assert_eq!(Some(lost.0), kind);
                        prop_assert_eq!(beside.len(), BOTH);
                        prop_assert_eq!(Some(&lost), beside.iter().min());
                        model.remove(displaced);
                    }
                    let was_there = model.contains_key(&key);
                    let expected = if was_there { if is_upsert { Entered::Anew } else { Entered::Exists } } else { entered };
                    prop_assert_eq!(entered, expected);
                    prop_assert!(kind.is_some() || entered == expected && (was_there || entered == Entered::Free));
                    if is_upsert || !was_there {
                        model.insert(key, (about, value));
                    }
                }
                Act::Leave(key) => {
                    let found = find(&table, [9, key], places(key));
                    prop_assert_eq!(found.is_some_and(|(seen, _)| crate::leave(&table, seen)), model.remove(&key).is_some());
                }
                Act::Amend(key) => {
                    if let Some((seen, _)) = find(&table, [9, key], places(key)) {
                        let bits = Head::KEPT | Head::bits(state::FIN_ORIGINAL);
                        prop_assert!(crate::amend(&table, seen, bits, now));
                        model.entry(key).and_modify(|(head, _)| *head = head.amended(bits, now));
                    }
                }
                Act::Rewrite(key) => {
                    if let Some((seen, _)) = find(&table, [9, key], places(key)) {
                        prop_assert!(crate::rewrite(&table, seen, 4, &[1, 2]));
                        model.entry(key).and_modify(|(_, value)| [value[4], value[5]] = [1, 2]);
                    }
                }
            }
            for key in 0..40 {
                let found = find(&table, [9, key], places(key));
                let about = |head: Head| (head.last_seen(), head.state(), head.is_embryo());
                let found = found.map(|(seen, value)| (about(seen.head), value));
                prop_assert_eq!(found, model.get(&key).map(|(head, value)| (about(*head), *value)), "{}", key);
            }
            prop_assert_eq!(table.len(), model.len());
        }
    }
}
