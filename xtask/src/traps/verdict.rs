//! What a test program's output says of its test: that it failed, and not that something else did.

use crate::summary::Totals;

/// What became of a test.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It failed, and said this.
    Noticed(String),
    Passed,
    /// The kernel did not take the changed program, so that its behaviour was never seen.
    NotLoaded(String),
    NotRun(String),
}

impl Verdict {
    /// Reads it in what a test program has said.
    pub(super) fn of(output: &str) -> Self {
        const NOT_LOADED: [&str; 3] = ["BPF_PROG_LOAD", "Verifier output", "verifier log"];
        let mut totals = Totals::default();
        output.lines().for_each(|line| totals.read(line));
        if totals.failed + totals.passed == 0 {
            Self::NotRun(output.to_owned())
        } else if totals.failed == 0 {
            Self::Passed
        } else if NOT_LOADED.iter().any(|words| output.contains(words)) {
            Self::NotLoaded(output.to_owned())
        } else {
            Self::Noticed(complaint(output))
        }
    }
}

/// The first line of what a failed test complains about.
fn complaint(output: &str) -> String {
    let mut lines = output.lines().skip_while(|line| !line.contains("panicked at") && !line.starts_with("Error: "));
    let first = lines.next().unwrap_or("it says nothing");
    if first.contains("panicked at") { lines.next().unwrap_or(first).to_owned() } else { first.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::{Verdict, complaint};

    #[test]
    fn a_failure_is_told_from_what_proves_nothing() {
        let failed = "thread 'a' panicked at a.rs:1:\nassertion failed: b\ntest result: FAILED. 0 passed; 1 failed;";
        assert_eq!(Verdict::of(failed), Verdict::Noticed("assertion failed: b".into()));
        assert_eq!(Verdict::of("test result: ok. 1 passed; 0 failed;"), Verdict::Passed);
        assert!(matches!(Verdict::of("test result: ok. 0 passed; 0 failed;"), Verdict::NotRun(_)));
        assert!(matches!(Verdict::of(""), Verdict::NotRun(_)));
        let refused = "Error: the BPF_PROG_LOAD syscall failed\ntest result: FAILED. 0 passed; 1 failed;";
        assert!(matches!(Verdict::of(refused), Verdict::NotLoaded(_)));
    }

    #[test]
    fn what_a_test_returns_is_a_complaint() {
        assert_eq!(complaint("---- stdout ----\nError: waited in vain\n\nCaused by:"), "Error: waited in vain");
    }
}
