//! A program that may take so long and no longer. Goes in as a command; comes out as how long it took, or that it was ended.

use std::{
    process::{Command, ExitStatus},
    thread,
    time::{Duration, Instant},
};

use anyhow::Result;

/// Between two looks: a two-hundredth of what has passed, so that times are that exact.
const LOOKS: u32 = 200;
const SHORTEST: Duration = Duration::from_micros(50);
const LONGEST: Duration = Duration::from_millis(50);

/// Between two words about what is still going on.
const SAID: Duration = Duration::from_secs(10);

/// How long something took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    /// It was through.
    All(Duration),
    /// It was not by then, and was ended.
    MoreThan(Duration),
}

impl Taken {
    /// No more than it took.
    pub fn at_least(self) -> Duration {
        match self {
            Self::All(taken) | Self::MoreThan(taken) => taken,
        }
    }

    /// Whether it was through.
    pub fn is_all(self) -> bool {
        matches!(self, Self::All(_))
    }
}

/// Runs a command, and ends it after `limit`. `tell` hears now and then how long it has been running. The status is none of
/// one that was ended.
pub fn run(command: &mut Command, limit: Duration, tell: impl Fn(Duration)) -> Result<(Taken, Option<ExitStatus>)> {
    let began = Instant::now();
    let mut child = command.spawn()?;
    let mut said = Duration::ZERO;
    loop {
        let status = child.try_wait()?;
        let passed = began.elapsed();
        if let Some(status) = status {
            return Ok((Taken::All(passed), Some(status)));
        }
        if passed >= limit {
            child.kill()?;
            child.wait()?;
            return Ok((Taken::MoreThan(limit), None));
        }
        if passed >= said + SAID {
            said = passed;
            tell(passed);
        }
        thread::sleep((passed / LOOKS).clamp(SHORTEST, LONGEST).min(limit.saturating_sub(passed)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_mins(10);

    fn sleep(seconds: &str) -> Command {
        let mut command = Command::new("sleep");
        command.arg(seconds);
        command
    }

    #[test]
    fn what_is_through_in_time_took_what_it_took_and_has_a_status() {
        let (taken, status) = run(&mut sleep("0.02"), LONG, |_| {}).unwrap();
        assert!(taken.is_all() && taken.at_least() >= Duration::from_millis(20), "{taken:?}");
        assert!(status.unwrap().success());
    }

    #[test]
    fn what_is_not_through_in_time_is_ended_and_took_more() {
        let limit = Duration::from_millis(20);
        let began = Instant::now();
        let (taken, status) = run(&mut sleep("600"), limit, |_| {}).unwrap();
        assert_eq!((taken, status), (Taken::MoreThan(limit), None));
        assert!(!taken.is_all() && taken.at_least() == limit);
        assert!(began.elapsed() < LONG, "it was waited for");
    }
}
