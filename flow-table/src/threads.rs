//! Threads that do everything at once to a few buckets, on this machine's own memory and for as long as a test may take.

use std::{
    sync::{
        Barrier,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use crate::bucket::{Head, Places, Seed};
use proxy_common::{addr::Protocol, flow::state};

use crate::word::Shared;
use crate::{Entered, Found, Seen, memory::Memory};

const HZ: u32 = 100;
const BUCKETS: u32 = 4;
/// Three times as many as there are entries.
const KEYS: u64 = 48;
/// The first of them are connections, which nobody takes out.
const CONNECTIONS: u64 = 3;
const LONG: Duration = Duration::from_millis(1_500);

type Key = [u64; 2];
type Value = [u64; 6];
type Table = Memory<Shared, 2, 6, 64>;

/// Each thread's own order of things.
struct Chance(u64);

impl Chance {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % end
    }
}

fn key(number: u64) -> Key {
    // Halves that others have, too.
    [number / 8, number % 8]
}

fn places(number: u64) -> Places {
    // One tag for all: tags keep nobody apart here.
    Places { tag: 9, ..Seed::from_random(3).places(&key(number), BUCKETS - 1) }
}

/// What some version of a key's value is: every word of it tells the key, the version, and which word it is.
fn value(number: u64, version: u64) -> Value {
    core::array::from_fn(|index| number << 48 | version << 8 | index as u64)
}

fn is_whole(number: u64, value: &Value) -> bool {
    let version = value[0] >> 8 & 0xff_ffff_ffff;
    *value == self::value(number, version)
}

fn find(table: &Table, number: u64) -> Found {
    let mut value = [0; 6];
    let found = crate::find(table, &key(number), places(number), &mut value);
    if let Found::There(_) = found {
        assert!(is_whole(number, &value), "{number} has {value:x?}");
    }
    found
}

fn embryo() -> Head {
    Head::new(Protocol::Udp, 0, 7)
}

/// One of the things that happen to flows.
fn act(table: &Table, chance: &mut Chance, version: u64) {
    let number = CONNECTIONS + chance.below(KEYS - CONNECTIONS);
    let seen: Option<Seen> = match find(table, number) {
        Found::There(seen) => Some(seen),
        _ => None,
    };
    match (chance.below(8), seen) {
        (0, Some(seen)) => {
            crate::leave(table, seen);
        }
        (1, Some(seen)) => {
            crate::rewrite(table, seen, 0, &value(number, version));
        }
        (2, Some(seen)) => {
            crate::amend(table, seen, Head::bits(state::REPLIED), 7);
        }
        (3, Some(seen)) => {
            // Bytes that tell whose they are: a hundred and the number for each packet.
            let noted = crate::note(table, seen, 100 + number as u32);
            assert_eq!(noted.bytes(), u32::from(noted.packets()) * (100 + number as u32), "{number}: {noted:x?}");
        }
        (4, Some(seen)) => {
            let noted = crate::take_noted(table, seen);
            assert_eq!(noted.bytes(), u32::from(noted.packets()) * (100 + number as u32), "{number}: {noted:x?}");
        }
        (5, _) => {
            crate::enter(table, &key(number), places(number), &value(number, version), embryo(), HZ);
        }
        _ => {
            let entered = crate::claim(table, &key(number), places(number), &value(number, version), embryo(), HZ);
            assert!(!matches!(entered, Entered::Live | Entered::Over), "{entered:?}");
        }
    }
}

/// Packets of connections: they are noted, heard of, and sent another way now and then.
fn talk(table: &Table, chance: &mut Chance, version: u64) {
    let number = chance.below(CONNECTIONS);
    match find(table, number) {
        Found::There(seen) if chance.below(50) == 0 => {
            crate::rewrite(table, seen, 0, &value(number, version));
        }
        Found::There(seen) => {
            crate::amend(table, seen, 0, 7);
        }
        Found::Busy => {}
        Found::Nowhere => panic!("connection {number} is gone"),
    }
}

#[test]
fn whatever_several_cpus_do_at_once_no_flow_is_torn_doubled_or_lost() {
    let table = Table::new(BUCKETS as usize, 2, Shared::new);
    for number in 0..CONNECTIONS {
        let about = Head::new(Protocol::Udp, state::CONFIRMED, 7).kept();
        assert_eq!(crate::claim(&table, &key(number), places(number), &value(number, 0), about, HZ), Entered::Free);
    }
    let (is_over, acts) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        for number in 1..5_u64 {
            let (table, is_over, acts) = (&table, &is_over, &acts);
            scope.spawn(move || {
                let mut chance = Chance(number * 0x9e37_79b9);
                let mut count = 0;
                while !is_over.load(Relaxed) {
                    count += 1;
                    let version = count << 3 | number;
                    if number == 1 { talk(table, &mut chance, version) } else { act(table, &mut chance, version) }
                }
                acts.fetch_add(count, Relaxed);
            });
        }
        let begin = Instant::now();
        while begin.elapsed() < LONG {
            for number in 0..KEYS {
                find(&table, number);
            }
        }
        is_over.store(true, Relaxed);
    });
    println!("{} acts", acts.load(Relaxed));
    for number in 0..KEYS {
        let entries = table.heads_of(&key(number)).len();
        assert!(entries <= 1, "{number} has {entries}");
        assert!(entries == 1 || number >= CONNECTIONS);
    }
    // And nothing is stuck.
    for number in 0..KEYS {
        let entered = crate::claim(&table, &key(number), places(number), &value(number, 1), embryo(), HZ);
        assert!(matches!(entered, Entered::Free | Entered::Embryo | Entered::Exists), "{entered:?}");
    }
}

/// Two at a time claim a key, each with a value of its own: one of them has it, and the other is told so and sees that one.
#[test]
fn claimers_of_one_key_agree() {
    const ROUNDS: u64 = 5_000;
    // With room for all, so that nobody is displaced.
    let table = Table::new(8_192, 4, Shared::new);
    let seed = Seed::from_random(8);
    let places = |round: u64| seed.places(&key(round), 8_191);
    let start = Barrier::new(2);
    let claim_all = |claimer: u64| {
        let (table, start) = (&table, &start);
        move || {
            let claim = |round: u64| {
                start.wait();
                let entered = loop {
                    let value = value(claimer, round);
                    match crate::claim(table, &key(round), places(round), &value, embryo(), HZ) {
                        Entered::Busy => {}
                        entered => break entered,
                    }
                };
                let mut found = [0; 6];
                assert!(matches!(crate::find(table, &key(round), places(round), &mut found), Found::There(_)));
                (entered, found)
            };
            (0..ROUNDS).map(claim).collect::<Vec<_>>()
        }
    };
    let (ones, others) = thread::scope(|scope| {
        let other = scope.spawn(claim_all(1));
        (claim_all(2)(), other.join().unwrap())
    });
    for (round, (one, other)) in ones.into_iter().zip(others).enumerate() {
        let (winner, loser, claimer) = if one.0 == Entered::Free { (one, other, 2) } else { (other, one, 1) };
        assert_eq!((winner.0, loser.0), (Entered::Free, Entered::Exists), "{round}");
        assert_eq!(winner.1, value(claimer, round as u64));
        assert_eq!(loser.1, winner.1, "{round}");
    }
    assert_eq!(table.len() as u64, ROUNDS);
}
