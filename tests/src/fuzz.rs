//! Differential fuzzing: packets and service tables at random go through the programs, on the real verifier and real maps, and
//! through the model of the rules. Verdict, bytes, flows and counters must be the same.

pub mod chance;
pub mod episode;
pub mod packet;
pub mod rig;
pub mod scene;
pub mod summary;
pub mod traffic;

use std::{
    fmt,
    time::{Duration, Instant},
};

use anyhow::Result;
use proxy_common::outcome::Hook;

use crate::testbed::Testbed;
use chance::Chance;
use episode::{Compare, Difference, EVENTS};
use rig::Rig;
use summary::Summary;

/// Hooks that see packets.
pub const HOOKS: [Hook; 5] = [Hook::UplinkXdp, Hook::UplinkIn, Hook::UplinkOut, Hook::PodIn, Hook::PodOut];

/// When it is enough.
#[derive(Clone, Copy, Debug)]
pub enum Until {
    /// After so many packets.
    Packets(u64),
    /// After so long.
    Elapsed(Duration),
}

/// A difference, with the shortest history that shows it.
#[derive(Debug)]
pub struct Finding {
    /// Seed of the episode.
    pub seed: u64,
    /// Numbers of the events that are needed.
    pub events: Vec<u32>,
    /// What they come to.
    pub difference: Difference,
}

/// Runs episode after episode, the first one with this seed, until it is enough or there is a difference. `tell` hears of the
/// progress now and then.
pub fn run(seed: u64, until: Until, tell: impl FnMut(&Summary) + Send) -> Result<(Summary, Option<Finding>)> {
    let mut bed = Testbed::new()?;
    bed.ip(scene::NARROW_ROUTES)?;
    for hook in HOOKS {
        bed.load(hook)?;
    }
    bed.inside(|bed| go_on(&mut Rig::new(bed), seed, until, tell))
}

fn go_on(
    rig: &mut Rig<'_>,
    first: u64,
    until: Until,
    mut tell: impl FnMut(&Summary),
) -> Result<(Summary, Option<Finding>)> {
    let events: Vec<u32> = (0..EVENTS).collect();
    let begin = Instant::now();
    let mut told = begin;
    let mut summary = Summary::default();
    let mut seed = first;
    loop {
        let (tally, difference) = episode::run(rig, seed, &events, Compare::AtTheEnd)?;
        summary.add(&tally, rig.count()?, begin.elapsed());
        if let Some(difference) = difference {
            let (events, difference) = episode::minimise(rig, seed)?.unwrap_or((events, difference));
            return Ok((summary, Some(Finding { seed, events, difference })));
        }
        let is_enough = match until {
            Until::Packets(packets) => summary.packets() >= packets,
            Until::Elapsed(time) => begin.elapsed() >= time,
        };
        if is_enough {
            return Ok((summary, None));
        }
        if told.elapsed() > Duration::from_secs(10) {
            told = Instant::now();
            tell(&summary);
        }
        seed = Chance::new(seed, 0).word();
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "a difference: `--seed {}` shows it again; it needs {} events: {:?}",
            self.seed,
            self.events.len(),
            self.events
        )?;
        write!(f, "event {}: {}", self.difference.event, self.difference.what)
    }
}
