//! Deadlines: how long a test waits for a condition before it gives up.
//!
//! `SLUICE_TEST_SLOWNESS` (a number, 1 when unset) stretches every deadline, for emulated machines. `SLUICE_TEST_RELEASE` (anything)
//! says that the agent is built as it is shipped.

use std::{
    env, thread,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};

/// How much slower than a developer's machine this one is.
pub fn slowness() -> f64 {
    env::var("SLUICE_TEST_SLOWNESS").ok().and_then(|factor| factor.parse().ok()).unwrap_or(1.0)
}

/// A time that is long enough on this machine for what takes `usual` on a developer's.
pub fn patience(usual: Duration) -> Duration {
    usual.mul_f64(slowness())
}

/// Whether the agent is built as it is shipped, so that what is promised of its speed must hold: `cargo xtask test --release`.
pub fn is_shipped() -> bool {
    env::var_os("SLUICE_TEST_RELEASE").is_some()
}

/// Asks `condition` until it has an answer.
///
/// `usual` is stretched by [`slowness`]; `what` completes the sentence "waited in vain for …".
pub fn wait_until<T>(what: &str, usual: Duration, mut condition: impl FnMut() -> Option<T>) -> Result<T> {
    let deadline = Instant::now() + patience(usual);
    loop {
        if let Some(answer) = condition() {
            return Ok(answer);
        }
        if Instant::now() >= deadline {
            bail!("waited {:.1} s in vain for {what}", patience(usual).as_secs_f64());
        }
        thread::sleep(Duration::from_millis(2));
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::wait_until;

    #[test]
    fn waiting_ends_with_the_first_answer() {
        let mut left = 3;
        let answer = wait_until("three questions", Duration::from_secs(5), || {
            left -= 1;
            (left == 0).then_some("now")
        });
        assert_eq!(answer.unwrap(), "now");
    }

    #[test]
    fn waiting_in_vain_names_what_was_awaited() {
        let error = wait_until("the end of time", Duration::from_millis(5), || None::<()>).unwrap_err();
        assert!(error.to_string().contains("the end of time"), "{error}");
    }
}
