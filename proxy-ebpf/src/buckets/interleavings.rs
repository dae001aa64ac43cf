//! Every order in which two or three CPUs may come upon one bucket, as far as a bounded number of preemptions makes one, under the
//! memory model of C11 (loom): weaker than that of the machines the table is for.

use std::sync::Arc;

use loom::{model::Builder, thread};
use proxy_common::{
    addr::Protocol,
    bucket::{Head, Places},
    flow::state,
};

use super::{Entered, Found, Seen, memory::Memory};
use crate::word::Word;

/// A word that loom knows who has seen what of.
struct Modelled(loom::sync::atomic::AtomicU64);

impl Word for Modelled {
    fn load(&self) -> u64 {
        self.0.load(loom::sync::atomic::Ordering::Acquire)
    }

    fn store(&self, value: u64) {
        self.0.store(value, loom::sync::atomic::Ordering::Release);
    }

    fn exchange(&self, old: u64, new: u64) -> u64 {
        use loom::sync::atomic::Ordering::SeqCst;
        match self.0.compare_exchange(old, new, SeqCst, SeqCst) {
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
    super::claim(table, &key, PLACES, &value, about(5), HZ)
}

/// What is there under a key.
fn find(table: &Table, key: [u64; 2]) -> (Found, [u64; 2]) {
    let mut value = [0; 2];
    let found = super::find(table, &key, PLACES, &mut value);
    (found, value)
}

fn seen(table: &Table, key: [u64; 2]) -> Seen {
    match find(table, key).0 {
        Found::There(seen) => seen,
        other => panic!("{other:?}"),
    }
}

fn leave(table: &Table, key: [u64; 2]) -> bool {
    matches!(find(table, key).0, Found::There(seen) if super::leave(table, seen))
}

/// Tries every order of what happens to a table that `before` has been done to.
fn explore(before: fn(&Table), parts: &'static [fn(&Table)], after: fn(&Table)) {
    let mut builder = Builder::new();
    builder.preemption_bound = Some(3);
    builder.max_branches = 10_000;
    builder.check(move || {
        let table = Arc::new(Table::new(1, 1, |value| Modelled(loom::sync::atomic::AtomicU64::new(value))));
        before(&table);
        let (here, others) = parts.split_first().expect("something to do");
        let others: Vec<_> = others
            .iter()
            .map(|part| {
                let table = Arc::clone(&table);
                thread::spawn(move || part(&table))
            })
            .collect();
        here(&table);
        for other in others {
            other.join().expect("no assertion failed");
        }
        after(&table);
    });
}

/// Whoever sees a value of Ann's sees one that is hers.
fn ann_is_read_whole(table: &Table) {
    let (found, value) = find(table, ANN);
    if let Found::There(_) = found {
        assert!(value == ANNS || value == [12, 13], "{value:?}");
    }
}

#[test]
fn of_two_who_claim_one_key_one_has_it() {
    fn part(table: &Table) {
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
            |table| {
                while claim(table, ANN, ANNS) == Entered::Busy {
                    thread::yield_now();
                }
            },
            |table| {
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

#[test]
fn a_key_that_is_left_and_claimed_is_there_once_or_not_at_all() {
    explore(
        |table| assert_eq!(claim(table, ANN, ANNS), Entered::Free),
        &[
            |table| assert!(leave(table, ANN)),
            |table| {
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
        |table| assert_eq!(claim(table, ANN, ANNS), Entered::Free),
        &[ann_is_read_whole, |table| {
            assert!(leave(table, ANN));
            assert_eq!(claim(table, BOB, BOBS), Entered::Free);
        }],
        |table| assert_eq!(table.heads_of(&ANN).len(), 0),
    );
}

#[test]
fn a_flow_whose_value_is_written_anew_is_never_unknown() {
    explore(
        |table| assert_eq!(claim(table, ANN, ANNS), Entered::Free),
        &[
            |table| {
                let (found, value) = find(table, ANN);
                assert_ne!(found, Found::Nowhere);
                assert!(found == Found::Busy || value == ANNS || value == [12, 13], "{value:?}");
            },
            |table| assert!(super::rewrite(table, seen(table, ANN), 0, &[12, 13])),
        ],
        |table| assert_eq!(find(table, ANN).1, [12, 13]),
    );
}

#[test]
fn what_comes_late_for_one_flow_does_nothing_to_the_next() {
    /// Everything that may be written in place.
    const WRITES: [fn(&Table, Seen) -> bool; 4] = [
        |table, seen| super::amend(table, seen, Head::KEPT | Head::bits(state::RESET), 99),
        |table, seen| super::rewrite(table, seen, 1, &[66]),
        |table, seen| super::leave(table, seen),
        |table, seen| super::note(table, seen, 1_000).packets() == 0,
    ];
    fn check<const INDEX: usize>() {
        explore(
            |table| assert_eq!(claim(table, ANN, ANNS), Entered::Free),
            &[
                |table| {
                    if let (Found::There(seen), _) = find(table, ANN) {
                        WRITES[INDEX](table, seen);
                    }
                },
                |table| {
                    // Not at all, if what is written comes in between.
                    if leave(table, ANN) {
                        assert_eq!(claim(table, BOB, BOBS), Entered::Free);
                    }
                },
            ],
            |table| {
                if let (Found::There(seen), value) = find(table, BOB) {
                    assert_eq!(value, BOBS);
                    assert_eq!((seen.head.last_seen(), seen.head.state()), (5, 0));
                    assert!(seen.head.is_embryo());
                    let noted = super::take_noted(table, seen);
                    assert_eq!((noted.packets(), noted.bytes()), (0, 0));
                } else {
                    assert_eq!(table.heads_of(&BOB).len(), 0, "nobody takes Bob out");
                }
            },
        );
    }
    check::<0>();
    check::<1>();
    check::<2>();
    check::<3>();
}

#[test]
fn who_is_confirmed_is_not_displaced_as_one_who_is_not() {
    explore(
        |table| {
            for key in 1..5 {
                assert_eq!(claim(table, [1, key], [key, key]), Entered::Free);
            }
        },
        &[
            |table| {
                // The one that would go first: all are equal, and the first of them is chosen.
                let mut value = [0; 2];
                if let Found::There(seen) = super::find(table, &ANN, PLACES, &mut value)
                    && super::amend(table, seen, Head::KEPT, 5)
                {
                    assert_eq!(table.heads_of(&ANN).len(), 1);
                }
            },
            |table| {
                let entered = claim(table, [1, 9], BOBS);
                assert_eq!(entered, Entered::Embryo);
            },
        ],
        |table| {
            assert_eq!(table.len(), 4);
            assert_eq!(find(table, [1, 9]).1, BOBS);
        },
    );
}

#[test]
fn two_who_write_one_value_do_not_mix_it() {
    explore(
        |table| assert_eq!(claim(table, ANN, ANNS), Entered::Free),
        &[
            |table| {
                super::rewrite(table, seen(table, ANN), 0, &[30, 31]);
            },
            |table| {
                if let (Found::There(seen), _) = find(table, ANN) {
                    super::rewrite(table, seen, 0, &[40, 41]);
                }
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
            assert_eq!(claim(table, ANN, ANNS), Entered::Free);
            assert_eq!(super::note(table, seen(table, ANN), 100).packets(), 1);
        },
        &[|table| assert!(super::rewrite(table, seen(table, ANN), 1, &[12])), ann_or_mixed_is_read],
        |table| {
            let noted = super::take_noted(table, seen(table, ANN));
            assert_eq!((noted.packets(), noted.bytes()), (1, 100));
        },
    );
}

/// One word is old whatever happens, the other old or new.
fn ann_or_mixed_is_read(table: &Table) {
    if let (Found::There(_), value) = find(table, ANN) {
        assert!(value == [10, 11] || value == [10, 12], "{value:?}");
    }
}
