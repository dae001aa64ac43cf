//! The kernel's thread that goes on with received packets when those who sent them have had their share of a processor.

use std::{fs, path::PathBuf, time::Duration};

use anyhow::{Context as _, Result};
use nix::sched::sched_getcpu;

/// The time that the thread of the caller's processor has had of it so far.
pub fn spent() -> Result<Duration> {
    let name = format!("ksoftirqd/{}", sched_getcpu()?);
    let is_it = |process: &PathBuf| fs::read_to_string(process.join("comm")).is_ok_and(|comm| comm.trim() == name);
    let mut processes = fs::read_dir("/proc")?.flatten().map(|entry| entry.path());
    let thread = processes.find(is_it).with_context(|| format!("no {name} to be seen"))?;
    let statistics = fs::read_to_string(thread.join("schedstat")).context("has this kernel no CONFIG_SCHED_INFO?")?;
    parse(&statistics).with_context(|| format!("{name} says {statistics:?}"))
}

/// Nanoseconds on the processor, those of waiting, and turns.
fn parse(statistics: &str) -> Option<Duration> {
    Some(Duration::from_nanos(statistics.split(' ').next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_number_is_the_time_on_the_processor() {
        assert_eq!(parse("5000000123 7 9\n"), Some(Duration::from_nanos(5_000_000_123)));
        assert_eq!(parse(""), None);
    }

    #[test]
    fn this_machine_tells() {
        assert!(spent().is_ok());
    }
}
