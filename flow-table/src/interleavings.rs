//! Every order in which two or three CPUs may come upon one bucket, as far as a bounded number of preemptions makes one, under the
//! memory model of C11 (loom): weaker than that of the machines the table is for.

use std::sync::Arc;

use crate::bucket::{Head, Places};
use loom::{
    model::Builder,
    sync::atomic::{
        AtomicU64,
        Ordering::{Acquire, Relaxed, Release, SeqCst},
    },
    thread,
};
use proxy_common::{addr::Protocol, flow::state};

use crate::word::Word;
use crate::{Entered, Found, Seen, memory::Memory};

/// A word of which loom knows who may see what.
///
/// loom changes from one thread to another only where it has seen an access after the last one by another thread, and what it takes
/// for the last one may be a thread's own load: a writer that has looked before it writes is never let in between. So every access is
/// accompanied by one to a word that all have in common, which changes with each; it is relaxed, and lets nobody see more.
struct Modelled {
    word: AtomicU64,
    pulse: Arc<AtomicU64>,
}

impl Modelled {
    fn at_last(&self) -> &AtomicU64 {
        self.pulse.fetch_add(1, Relaxed);
        &self.word
    }
}

impl Word for Modelled {
    fn load(&self) -> u64 {
        self.at_last().load(Acquire)
    }

    fn store(&self, value: u64) {
        self.at_last().store(value, Release);
    }

    fn exchange(&self, old: u64, new: u64) -> u64 {
        match self.at_last().compare_exchange(old, new, SeqCst, SeqCst) {
            Ok(found) | Err(found) => found,
        }
    }
}

type Table = Memory<Modelled, 2, 2, 2>;

/// One bucket, so that there are fewer orders; all keys have one tag.
const PLACES: Places = Places { first: 0, second: 1, tag: 7 };
/// Keys that have a word in common, so that one half of each makes the other.
const ANN: [u64; 2] = [1, 1];
const BOB: [u64; 2] = [1, 2];
const ANNS: [u64; 2] = [10, 11];
const BOBS: [u64; 2] = [20, 21];
const HZ: u32 = 100;

fn about(last_seen: u32) -> Head {
    Head::new(Protocol::Udp, 0, last_seen)
}

fn claim(table: &Table, key: [u64; 2], value: [u64; 2]) -> Entered {
    crate::claim(table, &key, PLACES, &value, about(5), HZ)
}

/// What is there under a key.
fn find(table: &Table, key: [u64; 2]) -> (Found, [u64; 2]) {
    let mut value = [0; 2];
    let found = crate::find(table, &key, PLACES, &mut value);
    (found, value)
}

fn leave(table: &Table, key: [u64; 2]) -> bool {
    matches!(find(table, key).0, Found::There(seen) if crate::leave(table, seen))
}

/// What one CPU does to the table. Where Ann was before, if she was, it knows.
type Part = fn(&Table, Seen);

/// Tries every order of what happens to a table that `before` has been done to.
fn explore(before: fn(&Table), parts: &'static [Part], after: fn(&Table)) {
    let mut builder = Builder::new();
    builder.preemption_bound = Some(2);
    builder.max_branches = 10_000;
    let orders = Arc::new(std::sync::atomic::AtomicU64::new(0));
    let count = Arc::clone(&orders);
    builder.check(move || {
        orders.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let pulse = Arc::new(AtomicU64::new(0));
        let word = |value| Modelled { word: AtomicU64::new(value), pulse: Arc::clone(&pulse) };
        let table = Arc::new(Table::new(1, 2, word));
        before(&table);
        let nowhere = Seen { place: u32::MAX, head: Head(0) };
        let seen = if let (Found::There(seen), _) = find(&table, ANN) { seen } else { nowhere };
        let (here, others) = parts.split_first().expect("something to do");
        let others: Vec<_> = others
            .iter()
            .map(|part| {
                let table = Arc::clone(&table);
                thread::spawn(move || part(&table, seen))
            })
            .collect();
        here(&table, seen);
        for other in others {
            other.join().expect("no assertion failed");
        }
        after(&table);
    });
    println!("{count:?} orders");
}

fn ann_is_there(table: &Table) {
    assert_eq!(claim(table, ANN, ANNS), Entered::Free);
}

/// Ann goes, and Bob gets her entry: or another one, if she is being written or has been written anew.
fn bob_for_ann(table: &Table, seen: Seen) {
    crate::leave(table, seen);
    assert_eq!(claim(table, BOB, BOBS), Entered::Free);
}

#[test]
fn of_two_who_claim_one_key_one_has_it() {
    fn part(table: &Table, _: Seen) {
        let entered = claim(table, ANN, ANNS);
        assert!(matches!(entered, Entered::Free | Entered::Exists | Entered::Busy), "{entered:?}");
        // Who is told that it is there finds it.
        if entered != Entered::Busy {
            assert_eq!(find(table, ANN).1, ANNS);
        }
    }
    explore(|_| {}, &[part, part], |table| assert_eq!(table.heads_of(&ANN).len(), 1));
}

#[test]
fn two_who_claim_two_keys_get_two_entries() {
    explore(
        |_| {},
        &[
            |table, _| {
                while claim(table, ANN, ANNS) == Entered::Busy {
                    thread::yield_now();
                }
            },
            |table, _| {
                while claim(table, BOB, BOBS) == Entered::Busy {
                    thread::yield_now();
                }
            },
        ],
        |table| {
            assert_eq!((find(table, ANN).1, find(table, BOB).1), (ANNS, BOBS));
            assert_eq!(table.len(), 2);
        },
    );
}

/// Their locks are two: nothing but the heads keeps them apart.
#[test]
fn two_who_hold_different_locks_get_two_entries() {
    fn claim(table: &Table, key: [u64; 2], value: [u64; 2], first: u32) -> Entered {
        let places = Places { first, second: 1 - first, tag: 7 };
        crate::claim(table, &key, places, &value, about(5), HZ)
    }
    explore(
        |table| {
            for key in 10..12 {
                assert_eq!(claim(table, [1, key], [key, key], 0), Entered::Free);
            }
        },
        &[
            |table, _| assert_eq!(claim(table, ANN, ANNS, 0), Entered::Free),
            |table, _| assert_eq!(claim(table, BOB, BOBS, 1), Entered::Free),
        ],
        |table| {
            assert_eq!((find(table, ANN).1, find(table, BOB).1), (ANNS, BOBS));
            assert_eq!(table.len(), 4);
        },
    );
}

#[test]
fn a_key_that_is_left_and_claimed_is_there_once_or_not_at_all() {
    explore(
        ann_is_there,
        &[
            |table, _| assert!(leave(table, ANN)),
            |table, _| {
                let entered = claim(table, ANN, [12, 13]);
                // Entered after she had left, so nobody takes it out any more.
                if entered == Entered::Free {
                    assert_eq!(find(table, ANN).1, [12, 13]);
                }
            },
        ],
        |table| assert!(table.heads_of(&ANN).len() <= 1),
    );
}

#[test]
fn a_reader_never_sees_what_the_entry_holds_for_another() {
    explore(
        ann_is_there,
        &[
            |table, _| {
                let (found, value) = find(table, ANN);
                if let Found::There(_) = found {
                    assert_eq!(value, ANNS);
                }
            },
            bob_for_ann,
        ],
        |table| assert_eq!(table.heads_of(&ANN).len(), 0),
    );
}

#[test]
fn a_flow_whose_value_is_written_anew_is_never_unknown() {
    explore(
        ann_is_there,
        &[
            |table, _| {
                let (found, value) = find(table, ANN);
                assert_ne!(found, Found::Nowhere);
                assert!(found == Found::Busy || value == ANNS || value == [12, 13], "{value:?}");
                assert_ne!(crate::locate(table, &ANN, PLACES), Found::Nowhere);
            },
            |table, seen| assert!(crate::rewrite(table, seen, 0, &[12, 13])),
        ],
        |table| assert_eq!(find(table, ANN).1, [12, 13]),
    );
}

/// A packet of Ann's is on its way; when it comes to be noted, the entry may be Bob's.
fn late_for_ann(part: Part) {
    // loom takes no closures that hold something.
    let parts: &'static [Part] = Box::leak(Box::new([part, bob_for_ann as Part]));
    explore(ann_is_there, parts, |table| {
        let (Found::There(seen), value) = find(table, BOB) else { panic!("somebody has taken Bob out") };
        assert_eq!(value, BOBS);
        assert_eq!((seen.head.last_seen(), seen.head.state()), (5, 0));
        assert!(seen.head.is_embryo());
        let noted = crate::take_noted(table, seen);
        assert_eq!((noted.packets(), noted.bytes()), (0, 0));
    });
}

#[test]
fn who_is_late_to_note_a_state_does_nothing_to_the_next_flow() {
    late_for_ann(|table, seen| {
        crate::amend(table, seen, Head::KEPT | Head::bits(state::RESET), 99);
    });
}

#[test]
fn who_is_late_to_write_a_value_does_nothing_to_the_next_flow() {
    late_for_ann(|table, seen| {
        crate::rewrite(table, seen, 1, &[66]);
    });
}

#[test]
fn who_is_late_to_take_a_flow_out_does_nothing_to_the_next_one() {
    late_for_ann(|table, seen| {
        crate::leave(table, seen);
    });
}

#[test]
fn who_is_late_to_note_a_packet_does_nothing_to_the_next_flow() {
    late_for_ann(|table, seen| {
        crate::note(table, seen, 1_000);
    });
}

#[test]
fn who_is_confirmed_in_time_is_not_displaced_as_one_who_is_not() {
    explore(
        |table| {
            for key in 1..5 {
                assert_eq!(claim(table, [1, key], [key, key]), Entered::Free);
            }
        },
        &[
            |table, seen| {
                if crate::amend(table, seen, Head::KEPT, 5) {
                    assert_eq!(table.heads_of(&ANN).len(), 1);
                }
            },
            |table, _| {
                for key in [8, 9] {
                    assert_eq!(claim(table, [1, key], BOBS), Entered::Embryo);
                }
            },
        ],
        |table| assert_eq!(table.len(), 4),
    );
}

#[test]
fn two_who_write_one_value_do_not_mix_it() {
    explore(
        ann_is_there,
        &[
            |table, seen| {
                crate::rewrite(table, seen, 0, &[30, 31]);
            },
            |table, seen| {
                crate::rewrite(table, seen, 0, &[40, 41]);
            },
        ],
        |table| {
            let value = find(table, ANN).1;
            assert!(value == [30, 31] || value == [40, 41], "{value:?}");
        },
    );
}

#[test]
fn what_was_noted_is_carried_over_when_the_value_is_written() {
    explore(
        |table| {
            ann_is_there(table);
            if let Found::There(seen) = find(table, ANN).0 {
                assert_eq!(crate::note(table, seen, 100).packets(), 1);
            }
        },
        &[
            |table, seen| assert!(crate::rewrite(table, seen, 1, &[12])),
            // One word is old whatever happens, the other old or new.
            |table, _| {
                if let (Found::There(_), value) = find(table, ANN) {
                    assert!(value == [10, 11] || value == [10, 12], "{value:?}");
                }
            },
        ],
        |table| {
            let Found::There(seen) = find(table, ANN).0 else { panic!("she is gone") };
            let noted = crate::take_noted(table, seen);
            assert_eq!((noted.packets(), noted.bytes()), (1, 100));
        },
    );
}
