//! The set-associative flow table in the kernel, from two CPUs at once.

use std::{collections::HashMap, thread, time::Duration};

use anyhow::{Result, ensure};
use flow_table::bucket::Head;
use tests::{
    patience,
    probe::{
        self, Probe,
        contract::{CONNECTIONS, KEYS, STIRRED, V4, count, key, value},
    },
};

/// How often a program runs on each CPU before one looks.
const RUNS: u32 = 200_000;
/// How long two CPUs may take to meet, on a machine that has other things to do.
const MET: Duration = Duration::from_secs(20);

/// Runs a program on two CPUs at once.
fn on_two_cpus(probe: &Probe, name: &str, times: u32) -> Result<()> {
    ensure!(thread::available_parallelism()?.get() > 1, "this needs two CPUs");
    let program = probe.program(name)?;
    thread::scope(|scope| {
        let running = [0, 1].map(|cpu| {
            scope.spawn(move || {
                probe::pin(cpu)?;
                probe::repeat(program, 64, times)
            })
        });
        running.into_iter().try_for_each(|thread| thread.join().expect("it does not panic").map(|_| ()))
    })
}

/// How many entries each key has, in the first buckets of the table.
fn entries(probe: &mut Probe, buckets: u32) -> Result<HashMap<[u64; V4.0], Vec<[u64; V4.1]>>> {
    let mut entries = HashMap::<_, Vec<_>>::new();
    for bucket in probe.buckets(buckets)? {
        for (head, slot) in bucket.heads.into_iter().map(Head).zip(bucket.slots) {
            assert!(!head.is_busy(), "nobody is left to finish it");
            let (key, value) = slot.split_at(V4.0);
            if head.tag() != 0 {
                entries.entry(key.try_into()?).or_default().push(value.try_into()?);
            }
        }
    }
    Ok(entries)
}

fn all(probe: &mut Probe, index: u32) -> Result<u64> {
    Ok(probe.counted(index)?.iter().sum())
}

#[test]
fn two_cpus_at_four_buckets_tear_double_and_lose_nothing() -> Result<()> {
    let mut probe = Probe::new(3, STIRRED + 1, 64)?.with(&["begin", "stir"])?;
    for number in 0..CONNECTIONS as usize {
        probe::repeat(probe.program("begin")?, 60 + number, 1)?;
    }
    // Until they have met: had one waited for the other, it would have found little of what that one wrote.
    let met = patience::wait_until("both CPUs at the table", MET, || {
        let result = on_two_cpus(&probe, "stir", RUNS).and_then(|()| all(&mut probe, count::FOREIGN));
        result
            .map(|foreign| foreign > u64::from(RUNS) / 10)
            .map_or_else(|error| Some(Err(error)), |met| met.then_some(Ok(())))
    })?;
    met?;
    let acts = probe.counted(count::ACTS)?;
    assert!(acts[0] == acts[1] && acts[0] >= RUNS.into(), "each on its own CPU: {acts:?}");
    for (what, index) in
        [("torn", count::TORN), ("lost", count::LOST), ("wrongly noted", count::WRONG), ("displaced", count::DISPLACED)]
    {
        assert_eq!(all(&mut probe, index)?, 0, "{what}");
    }
    for (what, index) in [("found", count::FOUND), ("entered", count::ENTERED), ("written anew", count::REWRITTEN)] {
        assert!(all(&mut probe, index)? > u64::from(RUNS) / 100, "{what}");
    }
    let entries = entries(&mut probe, STIRRED + 1)?;
    for (slot_key, values) in &entries {
        let number = (0..KEYS).find(|number| key(*number) == *slot_key).expect("one of the keys");
        let [found] = values.as_slice() else { panic!("{number} has {}", values.len()) };
        assert_eq!(*found, value(number, found[0] >> 8 & 0xff_ffff_ffff));
    }
    for number in 0..CONNECTIONS {
        assert!(entries.contains_key(&key(number)), "connection {number}");
    }
    Ok(())
}

#[test]
fn of_two_cpus_that_claim_one_key_one_enters_it() -> Result<()> {
    const BUCKETS: u32 = 8_192;
    const CLAIMS: u32 = 10_000;
    let mut probe = Probe::new(5, BUCKETS, 64)?.with(&["claim_next"])?;
    on_two_cpus(&probe, "claim_next", CLAIMS)?;
    let entries = entries(&mut probe, BUCKETS)?;
    let doubled = entries.values().filter(|values| values.len() > 1).count();
    assert_eq!(doubled, 0, "keys with two entries");
    // As many claims as two for each key.
    assert_eq!(entries.len() as u32, CLAIMS);
    assert_eq!(all(&mut probe, count::ENTERED)?, u64::from(CLAIMS), "and nobody was displaced");
    Ok(())
}
