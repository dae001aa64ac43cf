//! The set-associative flow table in the kernel, from two CPUs at once.

use std::{collections::HashMap, thread};

use anyhow::{Result, ensure};
use flow_table::bucket::Head;
use probe_ebpf::contract::{CONNECTIONS, KEYS, STIRRED, V4, count, key, value};
use tests::probe::{self, Probe};

/// How often a program runs on each CPU.
const RUNS: u32 = 1_000_000;

#[test]
fn two_cpus_at_four_buckets_tear_double_and_lose_nothing() -> Result<()> {
    let cpus = thread::available_parallelism()?.get();
    ensure!(cpus > 1, "this needs two CPUs");
    let mut probe = Probe::new(3, STIRRED + 1, 64)?;
    for number in 0..CONNECTIONS as usize {
        probe::repeat(probe.program("begin")?, 14 + CONNECTIONS as usize * 10 + number, 1)?;
    }
    let stir = probe.program("stir")?;
    thread::scope(|scope| {
        let stirring = [0, 1].map(|cpu| {
            scope.spawn(move || {
                probe::pin(cpu)?;
                probe::repeat(stir, 64, RUNS)
            })
        });
        stirring.into_iter().try_for_each(|thread| thread.join().expect("it does not panic").map(|_| ()))
    })?;
    println!("{:?}", probe.tell()?);
    let acts = probe.counted(count::ACTS)?;
    assert_eq!((acts[0], acts[1]), (RUNS.into(), RUNS.into()), "each on its own CPU");
    let mut all = |index| -> Result<u64> { Ok(probe.counted(index)?.iter().sum()) };
    for (what, index) in
        [("torn", count::TORN), ("lost", count::LOST), ("wrongly noted", count::WRONG), ("displaced", count::DISPLACED)]
    {
        assert_eq!(all(index)?, 0, "{what}");
    }
    for (what, index) in [("found", count::FOUND), ("entered", count::ENTERED), ("written anew", count::REWRITTEN)] {
        assert!(all(index)? > u64::from(RUNS) / 100, "{what}");
    }
    // Without these two CPUs would not have met.
    assert!(all(count::BUSY)? + all(count::LOCKED)? > 0, "nobody was in anybody's way");

    let mut entries = HashMap::<[u64; V4.0], u32>::new();
    for bucket in probe.buckets(STIRRED + 1)? {
        for (head, slot) in bucket.heads.into_iter().map(Head).zip(bucket.slots) {
            assert!(!head.is_busy());
            let (slot_key, slot_value) = slot.split_at(V4.0);
            if head.tag() != 0 {
                *entries.entry(slot_key.try_into()?).or_default() += 1;
                let number = (0..KEYS).find(|number| key(*number) == slot_key).expect("one of the keys");
                assert_eq!(slot_value, value(number, slot_value[0] >> 8 & 0xff_ffff_ffff));
            }
        }
    }
    assert!(entries.values().all(|count| *count == 1), "{entries:?}");
    for number in 0..CONNECTIONS {
        assert!(entries.contains_key(&key(number)), "connection {number}");
    }
    Ok(())
}
