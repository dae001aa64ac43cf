//! What failed, once more at the end of a suite and at the end of all, because most of a long run's record may be cut off. In come the
//! lines that test programs print; out come the names of tests and what they said.

use std::fmt;

/// Lines of a test that are shown again: its last, where its panic stands.
const LINES: usize = 30;

/// The tests that failed.
#[derive(Debug, Default)]
pub(crate) struct Failures(Vec<Failure>);

#[derive(Debug)]
struct Failure {
    suite: &'static str,
    name: String,
    said: Vec<String>,
}

/// Reads what the programs of one suite print, one after the other.
#[derive(Debug)]
pub(crate) struct Reader {
    suite: &'static str,
    section: Section,
    failures: Failures,
}

/// Where a test program is in its report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Section {
    Elsewhere,
    /// What the last failure said.
    Output,
    /// The names of all of them; with `--nocapture` the only section.
    Names,
}

impl Reader {
    pub(crate) fn new(suite: &'static str) -> Self {
        Self { suite, section: Section::Elsewhere, failures: Failures::default() }
    }

    /// Takes in a line.
    pub(crate) fn read(&mut self, line: &str) {
        if line == "failures:" {
            self.section = Section::Names;
        } else if line.starts_with("test result:") {
            self.section = Section::Elsewhere;
        } else if let Some(name) = output_of(line).filter(|_| self.section != Section::Elsewhere) {
            self.section = Section::Output;
            self.push(name);
        } else if self.section == Section::Output {
            if let Some(failure) = self.failures.0.last_mut() {
                failure.said.push(line.to_owned());
            }
        } else if let Some(name) = line.strip_prefix("    ").filter(|_| self.section == Section::Names)
            && !self.failures.0.iter().any(|failure| failure.name == name)
        {
            self.push(name);
        }
    }

    /// All of them. A program that ended badly without a word of a test is one, too.
    pub(crate) fn ended(mut self, success: bool) -> Failures {
        if !success && self.failures.0.is_empty() {
            self.push("no test: a program was not built, or died");
        }
        self.failures
    }

    fn push(&mut self, name: &str) {
        self.failures.0.push(Failure { suite: self.suite, name: name.to_owned(), said: Vec::new() });
    }
}

impl Failures {
    pub(crate) fn extend(&mut self, others: Self) {
        self.0.extend(others.0);
    }
}

impl fmt::Display for Failures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for Failure { suite, name, said } in &self.0 {
            writeln!(f, "FAILED {suite}: {name}")?;
            let said: Vec<_> = said.iter().filter(|line| !line.is_empty()).collect();
            for line in &said[said.len().saturating_sub(LINES)..] {
                writeln!(f, "    {line}")?;
            }
        }
        Ok(())
    }
}

/// The test whose output follows. libtest says that it is its standard output, its imitators do not.
fn output_of(line: &str) -> Option<&str> {
    let name = line.strip_prefix("---- ")?.strip_suffix(" ----")?;
    Some(name.strip_suffix(" stdout").unwrap_or(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failures(output: &str, success: bool) -> String {
        let mut reader = Reader::new("netns");
        output.lines().for_each(|line| reader.read(line));
        reader.ended(success).to_string()
    }

    #[test]
    fn a_test_that_fails_is_named_with_what_it_said() {
        let output = "test a ... FAILED\ntest b ... ok\n\nfailures:\n\n---- a stdout ----\nfirst\n\nthread 'a' panicked\n\n\
            ---- c stdout ----\nsecond\n\nfailures:\n    a\n    c\n\ntest result: FAILED. 1 passed; 2 failed\n    later\n";
        let expected = "FAILED netns: a\n    first\n    thread 'a' panicked\nFAILED netns: c\n    second\n";
        assert_eq!(failures(output, false), expected);
    }

    #[test]
    fn a_test_that_fails_under_another_harness_is_named() {
        let output =
            "\nfailures:\n\n---- pod → b ----\nrefused\n\n\nfailures:\n    pod → b\n\ntest result: FAILED. 0 passed\n";
        assert_eq!(failures(output, false), "FAILED netns: pod → b\n    refused\n");
    }

    #[test]
    fn a_test_whose_output_was_not_kept_is_named() {
        assert_eq!(failures("failures:\n\nfailures:\n    a\n\ntest result: FAILED.", false), "FAILED netns: a\n");
    }

    #[test]
    fn of_much_output_the_end_is_shown() {
        let lines = (0..100).map(|line| format!("line {line}")).collect::<Vec<_>>().join("\n");
        let shown = failures(&format!("failures:\n---- a stdout ----\n{lines}\nfailures:\n    a\n"), false);
        assert_eq!(shown.lines().count(), 1 + LINES);
        assert!(shown.ends_with("    line 99\n"), "{shown}");
    }

    #[test]
    fn output_of_tests_that_pass_is_no_failure() {
        assert_eq!(failures("---- a stdout ----\n    a\ntest result: ok. 1 passed\n", true), "");
    }

    #[test]
    fn a_program_that_dies_is_a_failure() {
        let shown = failures("running 3 tests\ntest a ... ", false);
        assert_eq!(shown, "FAILED netns: no test: a program was not built, or died\n");
    }
}
