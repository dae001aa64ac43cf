//! The agent's word on itself, in the kernel: whoever reads the maps sees whether somebody keeps them, since when, and how
//! fresh they are. It may be told from any thread.

use std::{
    path::Path,
    sync::{Mutex, PoisonError},
};

use proxy_common::names::{Agent, Text};

use super::{error::Error, load::maps_directory, observer, table::Table};

/// Writes the entry of `AGENT`.
pub struct Presence {
    table: Table<u32, Agent>,
    said: Mutex<Agent>,
}

impl std::fmt::Debug for Presence {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Presence").field("said", &self.said).finish_non_exhaustive()
    }
}

impl Presence {
    /// Says that an agent has started, over the maps pinned under a path, and what it has given up: bits of
    /// [`proxy_common::names::confined`].
    pub fn begin(pin_path: &Path, algorithm: &str, confined: u32) -> Result<Self, Error> {
        let table = observer::open(&maps_directory(pin_path), "AGENT")?;
        let now = seconds_since_boot();
        let said = Agent {
            started: now,
            alive: now,
            pid: std::process::id(),
            confined,
            version: Text::new(env!("CARGO_PKG_VERSION")),
            algorithm: Text::new(algorithm),
            ..Agent::NONE
        };
        table.put(&0, &said)?;
        Ok(Self { table, said: Mutex::new(said) })
    }

    /// The source of objects had news. Written with what comes next.
    pub fn hear(&self) {
        self.change(|agent| agent.heard = seconds_since_boot());
    }

    /// The kernel holds everything that is known.
    pub fn sync(&self) -> Result<(), Error> {
        self.say(|agent| (agent.synced, agent.failures) = (seconds_since_boot(), 0))
    }

    /// The kernel could not be made to hold it.
    pub fn fail(&self) -> Result<(), Error> {
        self.say(|agent| agent.failures = agent.failures.saturating_add(1))
    }

    /// The agent is still there.
    pub fn live(&self) -> Result<(), Error> {
        self.say(|_| ())
    }

    fn say(&self, change: impl FnOnce(&mut Agent)) -> Result<(), Error> {
        let said = self.change(|agent| {
            change(agent);
            agent.alive = seconds_since_boot();
        });
        self.table.put(&0, &said)
    }

    fn change(&self, change: impl FnOnce(&mut Agent)) -> Agent {
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut said);
        *said
    }
}

/// The time of everything in [`Agent`].
pub fn seconds_since_boot() -> u64 {
    rustix::time::clock_gettime(rustix::time::ClockId::Boottime).tv_sec.cast_unsigned()
}
