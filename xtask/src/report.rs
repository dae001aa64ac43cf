//! What a virtual machine's console says about the suites that ran in it, and a table of such reports.

use anyhow::Result;

use crate::{summary::Totals, test::Suite};

/// The results of one machine.
pub(crate) struct Report {
    kernel: String,
    /// What is known of each suite; nothing of one that has not begun.
    suites: Vec<(Suite, Option<Totals>)>,
    /// The suite of the test program that is running, and what it has reported so far.
    running: Option<(Suite, Totals)>,
    /// How the machine ended.
    end: Result<u8>,
}

impl Report {
    pub(crate) fn new(kernel: &str, suites: &[Suite]) -> Self {
        let suites = suites.iter().map(|suite| (*suite, None)).collect();
        Self { kernel: kernel.to_owned(), suites, running: None, end: Ok(0) }
    }

    /// Takes in one line of the console.
    pub(crate) fn read(&mut self, line: &str) {
        if let Some(begun) = line.strip_prefix("::begin ") {
            let suite = self.suites.iter().map(|(suite, _)| *suite).find(|suite| begun.starts_with(suite.name()));
            self.running = suite.map(|suite| (suite, Totals::default()));
        } else if let Some(status) = line.strip_prefix("::end ") {
            self.finish(status.trim() == "0");
        } else if let Some((_, totals)) = &mut self.running {
            totals.read(line);
        }
    }

    /// Takes in how the machine ended: what had not come to an end by then has failed.
    pub(crate) fn end(&mut self, status: Result<u8>) {
        self.finish(false);
        for (_, totals) in &mut self.suites {
            totals.get_or_insert(Totals::ONE_FAILURE);
        }
        self.end = status;
    }

    pub(crate) fn is_success(&self) -> bool {
        let has_passed = |totals: &Option<Totals>| totals.is_some_and(Totals::is_success);
        matches!(self.end, Ok(0)) && self.suites.iter().all(|(_, totals)| has_passed(totals))
    }

    fn finish(&mut self, success: bool) {
        let Some((running, totals)) = self.running.take() else { return };
        for (suite, known) in &mut self.suites {
            if *suite == running {
                *known.get_or_insert_default() += totals.ended(success);
            }
        }
    }

    fn cells(&self) -> Vec<String> {
        let mut cells = vec![self.kernel.clone()];
        cells.extend(self.suites.iter().map(|(_, totals)| totals.unwrap_or_default().to_string()));
        cells.push(match &self.end {
            Ok(status) => format!("exit status {status}"),
            Err(error) => format!("{error:#}"),
        });
        cells
    }
}

/// One line per machine, one column per suite.
pub(crate) fn table(suites: &[Suite], reports: &[Report]) -> String {
    let mut head = vec!["kernel".to_owned()];
    head.extend(suites.iter().map(|suite| suite.name().to_owned()));
    head.push("machine".to_owned());
    let rows: Vec<Vec<String>> = std::iter::once(head).chain(reports.iter().map(Report::cells)).collect();
    let widths: Vec<usize> =
        (0..suites.len() + 2).map(|column| rows.iter().map(|row| row[column].len()).max().unwrap_or(0)).collect();
    let line = |row: &Vec<String>| {
        let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        format!("{}\n", cells.join("  ").trim_end())
    };
    rows.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    use super::*;

    const SUITES: [Suite; 2] = [Suite::Program, Suite::Netns];

    fn report(console: &str, status: Result<u8>) -> Report {
        let mut report = Report::new("6.1", &SUITES);
        console.lines().for_each(|line| report.read(line));
        report.end(status);
        report
    }

    #[test]
    fn results_go_to_the_suite_of_the_program_that_reports_them() {
        let console = "::begin program program_nat\ntest result: ok. 3 passed; 0 failed;\n::end 0\n\
            ::begin program program_parse\ntest result: ok. 4 passed; 0 failed;\n::end 0\n\
            ::begin netns netns\ntest result: FAILED. 1 passed; 2 failed;\n::end 101\n";
        let report = report(console, Ok(1));
        assert_eq!(report.cells()[1..3], ["7 passed, 0 failed", "1 passed, 2 failed"]);
        assert!(!report.is_success());
    }

    #[test]
    fn a_machine_that_dies_fails_what_ran_and_what_was_to_come() {
        let report = report("::begin program program\nrunning 9 tests\n", Err(anyhow!("the guest died")));
        assert_eq!(report.cells()[1..], ["0 passed, 1 failed", "0 passed, 1 failed", "the guest died"]);
    }

    #[test]
    fn success_is_every_suite_with_a_test_and_the_status_zero() {
        let good = "::begin program p\ntest result: ok. 3 passed; 0 failed;\n::end 0\n\
            ::begin netns n\ntest result: ok. 1 passed; 0 failed;\n::end 0\n";
        assert!(report(good, Ok(0)).is_success());
        assert!(!report(good, Ok(1)).is_success());
        assert!(!report(&good.replace("1 passed", "0 passed"), Ok(0)).is_success());
    }

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let text = table(&SUITES, &[report("", Ok(0))]);
        let expected = "kernel  program             netns               machine\n\
            6.1     0 passed, 1 failed  0 passed, 1 failed  exit status 0\n";
        assert_eq!(text, expected);
    }
}
