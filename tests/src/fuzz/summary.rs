//! What was tried, and what it reached.

use std::{collections::BTreeMap, fmt, time::Duration};

use comfy_table::Table;
use proxy_common::outcome::{Hook, Outcome};

use super::{HOOKS, episode::Tally, traffic::Kind};

/// Sums over all episodes.
#[derive(Clone, Debug, Default)]
pub struct Summary {
    /// How many there were.
    pub episodes: u64,
    /// How many of them ended early, because what was chosen by chance left no trace.
    pub unknowable: u64,
    /// Packets of which the kernel makes none for a hook: too short for an skb.
    pub refused: u64,
    /// How long it took.
    pub elapsed: Duration,
    packets: BTreeMap<(Kind, bool, Hook), u64>,
    verdicts: BTreeMap<(Hook, &'static str), u64>,
    outcomes: BTreeMap<(Hook, Outcome), u64>,
}

impl Summary {
    /// Adds an episode and what the programs counted in it.
    pub fn add(&mut self, tally: &Tally, counted: BTreeMap<(Hook, Outcome), u64>, elapsed: Duration) {
        self.episodes += 1;
        self.unknowable += u64::from(tally.is_unknowable);
        self.refused += tally.refused;
        self.elapsed = elapsed;
        for (what, count) in &tally.packets {
            *self.packets.entry(*what).or_default() += count;
        }
        for (what, count) in &tally.verdicts {
            *self.verdicts.entry(*what).or_default() += count;
        }
        for (what, count) in counted {
            *self.outcomes.entry(what).or_default() += count;
        }
    }

    /// How many packets went through programs and model.
    pub fn packets(&self) -> u64 {
        self.packets.values().sum()
    }

    /// How often something was counted, at all hooks.
    pub fn reached(&self, outcome: Outcome) -> u64 {
        self.outcomes.iter().filter(|((_, it), _)| *it == outcome).map(|(_, count)| count).sum()
    }

    /// How many packets each second.
    pub fn pace(&self) -> u64 {
        self.packets() * 1_000 / (self.elapsed.as_millis() as u64).max(1)
    }
}

/// A table of something by hook.
fn table<K: Ord + Copy>(first: &str, counts: &BTreeMap<(Hook, K), u64>, name: impl Fn(K) -> String) -> Table {
    let mut table = Table::new();
    table.set_header([first.to_owned()].into_iter().chain(HOOKS.map(|hook| format!("{hook:?}"))));
    let mut rows: Vec<K> = counts.keys().map(|(_, key)| *key).collect();
    rows.sort_unstable();
    rows.dedup();
    for row in rows {
        let cells = HOOKS.map(|hook| counts.get(&(hook, row)).copied().unwrap_or(0).to_string());
        table.add_row([name(row)].into_iter().chain(cells));
    }
    table
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let packets =
            self.packets.iter().map(|((kind, is_spoilt, hook), count)| ((*hook, (*kind, *is_spoilt)), *count));
        let spoilt = |(kind, is_spoilt): (Kind, bool)| format!("{kind:?}{}", if is_spoilt { ", spoilt" } else { "" });
        writeln!(f, "{}", table("packets", &packets.collect(), spoilt))?;
        writeln!(f, "{}", table("what became of them", &self.verdicts, str::to_owned))?;
        writeln!(f, "{}", table("counted", &self.outcomes, |outcome| format!("{outcome:?}")))?;
        writeln!(
            f,
            "{} packets in {:.0?}, {} each second; {} episodes, {} of them cut short; {} packets too short for an skb",
            self.packets(),
            self.elapsed,
            self.pace(),
            self.episodes,
            self.unknowable,
            self.refused,
        )
    }
}
