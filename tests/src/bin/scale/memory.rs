//! What an agent has in memory that no file backs, in KiB.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::Result;
use tests::sandbox::anonymous_memory;

/// Between two looks.
const PAUSE: Duration = Duration::from_millis(10);
/// For memory to be given back.
const REST: Duration = Duration::from_secs(3);

/// Somebody who looks all the time.
pub(crate) struct Watcher {
    most: Arc<AtomicU64>,
    is_over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Watcher {
    /// Looks at a process until dropped.
    pub(crate) fn of(process: u32) -> Self {
        let (most, is_over) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (seen, over) = (Arc::clone(&most), Arc::clone(&is_over));
        let thread = thread::spawn(move || {
            while !over.load(Ordering::Relaxed) {
                seen.fetch_max(anonymous_memory(process).unwrap_or_default(), Ordering::Relaxed);
                thread::sleep(PAUSE);
            }
        });
        Self { most, is_over, thread: Some(thread) }
    }

    /// The most so far.
    pub(crate) fn most(&self) -> u64 {
        self.most.load(Ordering::Relaxed)
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What a process has when it has nothing to do: the least within a few seconds.
pub(crate) fn settled(process: u32) -> Result<u64> {
    let (mut least, end) = (u64::MAX, Instant::now() + REST);
    while Instant::now() < end {
        least = anonymous_memory(process)?.min(least);
        thread::sleep(10 * PAUSE);
    }
    Ok(least)
}
