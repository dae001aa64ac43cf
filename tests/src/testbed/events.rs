//! What the programs tell while somebody watches.

use std::collections::BTreeMap;

use anyhow::Result;
use aya::maps::{Array, RingBuf};
use proxy_common::{
    event::{Event, watch},
    outcome::{Hook, Outcome},
};

use super::Testbed;

impl Testbed {
    /// Watches for so many seconds from now on; less than none for one who has stopped.
    pub fn watch_for(&mut self, seconds: i32) -> Result<()> {
        let length = self.jiffies_per_second().cast_signed() * seconds;
        let until = self.jiffies()?.wrapping_add_signed(length);
        Ok(Array::<_, u32>::try_from(self.map("WATCH")?)?.set(watch::UNTIL, until, 0)?)
    }

    /// Watches for longer than any test takes.
    pub fn watch(&mut self) -> Result<()> {
        self.watch_for(600)
    }

    /// What was told since the last time.
    pub fn events(&mut self) -> Result<Vec<Event>> {
        let mut records = RingBuf::try_from(self.map("EVENTS")?)?;
        let mut events = Vec::new();
        while let Some(record) = records.next() {
            events.extend(Event::read(&record));
        }
        Ok(events)
    }

    /// How many records were lost.
    pub fn lost(&mut self) -> Result<u32> {
        Ok(Array::<_, u32>::try_from(self.map("WATCH")?)?.get(&watch::LOST, 0)?)
    }
}

/// How often each thing was told of, in the order and the form of [`Testbed::counters`].
pub fn told(events: &[Event]) -> Vec<(Hook, Outcome, u64)> {
    let mut counts = BTreeMap::new();
    for event in events {
        *counts.entry((event.hook, event.outcome)).or_default() += 1;
    }
    let named =
        |hook: Hook, outcome: Outcome| counts.get(&(hook as u8, outcome as u8)).map(|count| (hook, outcome, *count));
    Hook::ALL.into_iter().flat_map(|hook| Outcome::ALL.map(|outcome| named(hook, outcome))).flatten().collect()
}
