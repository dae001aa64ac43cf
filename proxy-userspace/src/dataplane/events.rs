//! What the programs tell while this process watches. In: the pins of an agent. Out: records in the order of time. One may watch
//! at a time: a record is for whoever takes it first.

use std::{
    fs::{File, TryLockError},
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use aya::maps::{Map, MapData, RingBuf};
use proxy_common::event::{Event, watch};
use tokio::io::unix::AsyncFd;

use super::{
    error::Error,
    flow_table,
    load::{jiffies_per_second, maps_directory},
    observer, syscall,
    table::Table,
};

/// For how many seconds the programs go on telling when they are not asked again to: that is what is left of a process that was
/// killed.
const SECONDS: u32 = 3;

/// Records taken at once, before anything else has its turn.
const BATCH: usize = 512;

/// Why nobody can watch.
#[derive(Debug, thiserror::Error)]
pub enum WatchError {
    /// Another process does.
    #[error("another `sluice monitor` watches {path}: a record is for whoever takes it first, so that there can be one at a time; end that one", path = .path.display())]
    InUse {
        /// The pin path.
        path: PathBuf,
    },
    /// Programs of an earlier version.
    #[error("the programs under {path} tell nothing: run an agent of this version first", path = .path.display())]
    Silent {
        /// The pin path.
        path: PathBuf,
    },
    /// The lock, or the kernel's word that there is something.
    #[error("cannot {operation}: {source}")]
    Wait {
        /// What was tried.
        operation: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// A map.
    #[error(transparent)]
    Access(#[from] Error),
}

/// Watches for as long as it lives, and is renewed.
pub struct Watch {
    records: AsyncFd<RingBuf<MapData>>,
    entries: Table<u32, u32>,
    lost: u32,
    /// Locked for as long as this one watches.
    _lock: File,
}

impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watch").field("lost", &self.lost).finish_non_exhaustive()
    }
}

impl Watch {
    /// How often [`Self::renew`] is to be called.
    pub const RENEWAL: Duration = Duration::from_secs(1);

    /// Begins to watch what is pinned under a path. Within a runtime.
    pub fn begin(pin_path: &Path) -> Result<Self, WatchError> {
        let directory = maps_directory(pin_path);
        if !directory.join("EVENTS").exists() {
            return Err(WatchError::Silent { path: pin_path.into() });
        }
        let lock = lock(&directory, pin_path)?;
        let shape = |_| Error::MapShape { map: "EVENTS" };
        let mut records = RingBuf::try_from(Map::RingBuf(observer::pinned(&directory, "EVENTS")?)).map_err(shape)?;
        // What is left of one who was killed is of another time.
        while records.next().is_some() {}
        let entries: Table<u32, u32> = observer::open(&directory, "WATCH")?;
        let error = |source| WatchError::Wait { operation: "wait for records", source };
        let records = syscall::wait_on(records).map_err(error)?;
        let watch = Self { records, lost: entries.read(&watch::LOST)?, entries, _lock: lock };
        watch.renew()?;
        Ok(watch)
    }

    /// Has the programs go on telling.
    pub fn renew(&self) -> Result<(), Error> {
        let until = flow_table::jiffies().wrapping_add(SECONDS * jiffies_per_second());
        // 0 is for nobody.
        self.entries.put(&watch::UNTIL, &until.max(1))
    }

    /// Records that have come, as soon as there are any. Nothing is lost when it is not waited for to the end.
    pub async fn next(&mut self) -> Result<Vec<Event>, WatchError> {
        let error = |source| WatchError::Wait { operation: "wait for records", source };
        let mut ready = self.records.readable_mut().await.map_err(error)?;
        let mut events = Vec::new();
        let records = ready.get_inner_mut();
        while events.len() < BATCH {
            let Some(record) = records.next() else {
                ready.clear_ready();
                break;
            };
            events.extend(Event::read(&record));
        }
        Ok(events)
    }

    /// How many records there was no room for since the last time.
    pub fn lost(&mut self) -> Result<u32, Error> {
        let lost = self.entries.read(&watch::LOST)?;
        Ok(lost.wrapping_sub(std::mem::replace(&mut self.lost, lost)))
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // Else the programs go on for as long as they were asked to.
        let _ = self.entries.put(&watch::UNTIL, &0);
    }
}

fn lock(directory: &Path, pin_path: &Path) -> Result<File, WatchError> {
    let error = |source| WatchError::Wait { operation: "lock the maps", source };
    let lock = File::open(directory).map_err(error)?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(TryLockError::WouldBlock) => Err(WatchError::InUse { path: pin_path.into() }),
        Err(TryLockError::Error(source)) => Err(error(source)),
    }
}
