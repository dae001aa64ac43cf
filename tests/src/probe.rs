//! The set-associative flow table as the kernel runs it: the programs of `probe-ebpf`, run from as many CPUs as need be.

// By its file: `probe-ebpf` brings functions for programs under the names of libc's, which would be linked in their place.
#[path = "../../probe-ebpf/src/contract.rs"]
pub mod contract;

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use aya::{
    Ebpf, EbpfLoader, Pod,
    maps::{Array, MapData, PerCpuArray},
    programs::{TestRun as _, TestRunOptions, Xdp},
};
use flow_table::bucket::Seed;
use nix::{sched, unistd::Pid};

use self::contract::V4;

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/probe.bpf.o"));

/// A bucket of IPv4, as one sees it from outside.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Bucket {
    /// What is said of each entry.
    pub heads: [u64; 4],
    /// What each has noted.
    pub noted: [u64; 4],
    /// Key and value.
    pub slots: [[u64; V4.0 + V4.1]; 4],
}

// SAFETY: words alone.
unsafe impl Pod for Bucket {}

/// The object with its tables.
pub struct Probe(Ebpf);

impl Probe {
    /// Loads it, with tables of so many buckets, a power of two, and LRU maps of so many entries.
    pub fn new(random: u64, buckets: u32, entries: u32) -> Result<Self> {
        crate::netns::require_root()?;
        let (seed, mask) = (Seed::from_random(random), buckets - 1);
        let mut loader = EbpfLoader::new();
        loader.override_global("SEED", &seed, true).override_global("MASK", &mask, true);
        for (map, count) in [("TABLE_V4", buckets), ("TABLE_V6", buckets), ("LRU_V4", entries), ("LRU_V6", entries)] {
            loader.map_max_entries(map, count);
        }
        Ok(Self(loader.load(OBJECT)?))
    }

    /// Has programs verified.
    pub fn with(mut self, names: &[&str]) -> Result<Self> {
        for name in names {
            let program = self.0.program_mut(name).with_context(|| format!("no program {name}"))?;
            TryInto::<&mut Xdp>::try_into(program)?.load()?;
        }
        Ok(self)
    }

    /// A program that was verified. Several threads may run it.
    pub fn program(&self, name: &str) -> Result<&Xdp> {
        Ok(self.0.program(name).with_context(|| format!("no program {name}"))?.try_into()?)
    }

    /// The keys that are looked up, in their order.
    pub fn set_keys(&mut self, keys: &[[u64; 5]]) -> Result<()> {
        let mut map: Array<_, [u64; 5]> = self.array("KEYS")?;
        for (index, key) in (0..).zip(keys) {
            map.set(index, key, 0)?;
        }
        self.array::<[u32; 2]>("NEXT")?.set(0, [0, keys.len() as u32], 0)?;
        Ok(())
    }

    /// What was counted, by each CPU.
    pub fn counted(&mut self, index: u32) -> Result<Vec<u64>> {
        let map = self.0.map_mut("COUNTS").context("no map COUNTS")?;
        Ok(PerCpuArray::<_, u64>::try_from(map)?.get(&index, 0)?.to_vec())
    }

    /// The first buckets of the table of IPv4.
    pub fn buckets(&mut self, count: u32) -> Result<Vec<Bucket>> {
        let map: Array<_, Bucket> = self.array("TABLE_V4")?;
        (0..count).map(|index| Ok(map.get(&index, 0)?)).collect()
    }

    fn array<T: Pod>(&mut self, name: &str) -> Result<Array<&mut MapData, T>> {
        Ok(Array::try_from(self.0.map_mut(name).with_context(|| format!("no map {name}"))?)?)
    }
}

/// Runs a program so many times; how long one took. It has to answer with 1 each time, of which the last is seen.
pub fn repeat(program: &Xdp, packet: usize, times: u32) -> Result<Duration> {
    let bytes = vec![0; packet];
    let options = TestRunOptions { data_in: Some(&bytes), repeat: times, ..TestRunOptions::new() };
    let result = program.test_run(options)?;
    ensure!(result.return_value == 1, "the program answers {}", result.return_value);
    Ok(result.duration)
}

/// Lets this thread run on one CPU alone.
pub fn pin(cpu: usize) -> Result<()> {
    let mut set = sched::CpuSet::new();
    set.set(cpu)?;
    Ok(sched::sched_setaffinity(Pid::from_raw(0), &set)?)
}
