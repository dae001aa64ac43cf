//! Everything that may happen to flows, at random, to a few keys that have a few buckets, all with one tag.

use aya_ebpf::helpers::generated::{bpf_get_prandom_u32, bpf_get_smp_processor_id};
use flow_table::{
    self as buckets, Entered, Found, Seen,
    bucket::{Head, Places},
    word::{Shared, Word as _},
};
use proxy_common::{addr::Protocol, flow::state};

use crate::{
    contract::{CONNECTIONS, KEYS, STIRRED, V4, count, key, value},
    maps::{MASK, SEED, TURN, TableV4, add},
};

const HZ: u32 = 100;
const VALUE: usize = V4.1;

#[inline(always)]
fn random() -> u64 {
    // SAFETY: takes no argument.
    u64::from(unsafe { bpf_get_prandom_u32() })
}

#[inline(always)]
fn places(key: &[u64; V4.0]) -> Places {
    // One tag for all: tags keep nobody apart here.
    Places { tag: 9, ..SEED.places(key, STIRRED) }
}

#[inline(always)]
fn embryo() -> Head {
    Head::new(Protocol::Udp, 0, 7)
}

/// One of the things that happen.
#[inline(always)]
pub fn run() {
    add(count::ACTS, 1);
    let chance = random();
    let version = chance >> 8 << 1 | cpu();
    if chance.is_multiple_of(4) {
        talk(random() % CONNECTIONS, version);
    } else {
        act(CONNECTIONS + random() % (KEYS - CONNECTIONS), chance >> 2 & 7, version);
    }
}

/// One bit of the number of this CPU, which stands in what it writes.
#[inline(always)]
fn cpu() -> u64 {
    // SAFETY: takes no argument.
    u64::from(unsafe { bpf_get_smp_processor_id() }) & 1
}

/// Claims a key that nobody had, as the next or the last but one to run does, on whatever CPU.
#[inline(always)]
pub fn claim_next() {
    let Some(word) = TURN.get_ptr_mut(0) else { return };
    // SAFETY: it is a word, and shared as such.
    let word = unsafe { &*word.cast::<Shared>() };
    let mut turn = word.load();
    for _ in 0..64 {
        let found = word.exchange(turn, turn + 1);
        if found == turn {
            break;
        }
        turn = found;
    }
    let number = turn >> 1;
    let key = key(number);
    let places = Places { tag: 9, ..SEED.places(&key, MASK.load()) };
    tell(buckets::claim(&TableV4, &key, places, &value(number & 0xff, turn), embryo(), HZ));
}

/// Enters the connections.
#[inline(always)]
pub fn begin(number: u64) {
    let key = key(number);
    let about = Head::new(Protocol::Udp, state::CONFIRMED, 7).kept();
    if buckets::claim(&TableV4, &key, places(&key), &value(number, 0), about, HZ) == Entered::Free {
        add(count::ENTERED, 1);
    }
}

/// A packet of a connection, which is heard of and sent another way now and then.
#[inline(never)]
fn talk(number: u64, version: u64) {
    let key = key(number);
    let mut found = [0; VALUE];
    match buckets::find(&TableV4, &key, places(&key), &mut found) {
        Found::There(seen) => {
            check(number, &found);
            if (version >> 1).is_multiple_of(16) {
                rewrite(number, seen, version);
            } else {
                buckets::amend(&TableV4, seen, 0, 7);
            }
        }
        Found::Nowhere => add(count::LOST, 1),
        Found::Busy => add(count::BUSY, 1),
    }
}

/// Whatever may happen to a flow that is no connection.
#[inline(never)]
fn act(number: u64, what: u64, version: u64) {
    let key = key(number);
    let mut found = [0; VALUE];
    match buckets::find(&TableV4, &key, places(&key), &mut found) {
        Found::There(seen) => {
            check(number, &found);
            match what {
                0 => {
                    buckets::leave(&TableV4, seen);
                }
                1 => rewrite(number, seen, version),
                2 => {
                    buckets::amend(&TableV4, seen, Head::bits(state::REPLIED), 7);
                }
                3 => note(number, seen),
                4 => enter(number, version),
                _ => claim(number, version),
            }
        }
        Found::Nowhere if what == 4 => enter(number, version),
        Found::Nowhere => claim(number, version),
        Found::Busy => add(count::BUSY, 1),
    }
}

#[inline(always)]
fn check(number: u64, found: &[u64; VALUE]) {
    let [first, ..] = found;
    let own = value(number, *first >> 8 & 0xff_ffff_ffff);
    let is_whole = found.iter().zip(&own).fold(0, |odd, (found, own)| odd | (found ^ own)) == 0;
    add(if is_whole { count::FOUND } else { count::TORN }, 1);
    add(count::FOREIGN, (*first >> 8 ^ cpu()) & 1);
}

#[inline(never)]
fn claim(number: u64, version: u64) {
    let key = key(number);
    tell(buckets::claim(&TableV4, &key, places(&key), &value(number, version), embryo(), HZ));
}

#[inline(never)]
fn enter(number: u64, version: u64) {
    let key = key(number);
    tell(buckets::enter(&TableV4, &key, places(&key), &value(number, version), embryo(), HZ));
}

#[inline(always)]
fn tell(entered: Entered) {
    match entered {
        Entered::Free | Entered::Embryo | Entered::Over => add(count::ENTERED, 1),
        Entered::Live => add(count::DISPLACED, 1),
        Entered::Busy => add(count::LOCKED, 1),
        _ => {}
    }
}

#[inline(always)]
fn rewrite(number: u64, seen: Seen, version: u64) {
    if buckets::rewrite(&TableV4, seen, 0, &value(number, version)) {
        add(count::REWRITTEN, 1);
    }
}

/// Bytes that tell whose they are: a hundred and the number for each packet.
#[inline(always)]
fn note(number: u64, seen: Seen) {
    let noted = buckets::note(&TableV4, seen, 100 + number as u32);
    if noted.bytes() != u32::from(noted.packets()).wrapping_mul(100 + number as u32) {
        add(count::WRONG, 1);
    }
}
