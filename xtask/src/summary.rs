//! Counts what test programs report on their standard output: the `test result:` lines of libtest and its imitators.

use std::{fmt, ops::AddAssign};

/// How many tests passed and failed. Its `Display` is the line every test run ends with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Totals {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
    pub(crate) ignored: u64,
}

impl Totals {
    /// Something that is not a test but must make the run fail.
    pub(crate) const ONE_FAILURE: Self = Self { passed: 0, failed: 1, ignored: 0 };

    /// Adds what `line` reports, if it is a result line.
    pub(crate) fn read(&mut self, line: &str) {
        if let Some(counts) = line.trim_start().strip_prefix("test result:") {
            *self += Self {
                passed: count(counts, "passed"),
                failed: count(counts, "failed"),
                ignored: count(counts, "ignored"),
            };
        }
    }

    /// The same, with a failure if the program ended badly without having reported one: it did not build, or it died.
    pub(crate) fn ended(mut self, success: bool) -> Self {
        if !success && self.failed == 0 {
            self += Self::ONE_FAILURE;
        }
        self
    }

    /// Whether any test ran, and none failed.
    pub(crate) fn is_success(self) -> bool {
        self.failed == 0 && self.passed > 0
    }
}

impl AddAssign for Totals {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.ignored += other.ignored;
    }
}

impl fmt::Display for Totals {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} passed, {} failed", self.passed, self.failed)
    }
}

/// The number before `word` in `ok. 3 passed; 0 failed; …`.
fn count(counts: &str, word: &str) -> u64 {
    let before = counts.split_once(word).map_or("", |(before, _)| before.trim_end());
    before.rsplit(' ').next().and_then(|number| number.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn totals(output: &str) -> Totals {
        let mut totals = Totals::default();
        output.lines().for_each(|line| totals.read(line));
        totals
    }

    #[test]
    fn results_of_several_programs_are_summed() {
        let output = "running 3 tests\n\
            test result: ok. 2 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.01s\n\
            test a ... FAILED\n\
            test result: FAILED. 10 passed; 3 failed; 0 ignored; 0 measured; 7 filtered out; finished in 0.01s\n";
        assert_eq!(totals(output), Totals { passed: 12, failed: 3, ignored: 1 });
    }

    #[test]
    fn a_coloured_result_is_read() {
        let output = "test result: \u{1b}[32mok\u{1b}(B\u{1b}[m. 4 passed; 0 failed; 0 ignored; 0 measured";
        assert_eq!(totals(output), Totals { passed: 4, failed: 0, ignored: 0 });
    }

    #[test]
    fn a_program_that_dies_without_a_result_is_one_failure() {
        assert_eq!(totals("running 3 tests\n").ended(false), Totals::ONE_FAILURE);
    }

    #[test]
    fn a_program_that_reported_its_failures_is_not_counted_twice() {
        let reported = totals("test result: FAILED. 1 passed; 2 failed; 0 ignored");
        assert_eq!(reported.ended(false).failed, 2);
    }

    #[test]
    fn no_test_at_all_is_no_success() {
        assert!(!Totals::default().is_success());
    }

    #[test]
    fn the_last_line_is_what_scripts_look_for() {
        assert_eq!(Totals { passed: 7, failed: 0, ignored: 2 }.to_string(), "7 passed, 0 failed");
    }
}
