//! Suites beside each other: each lane is a thread that runs its suites one after the other, and what they print comes together here.

use std::{
    io::{BufRead as _, BufReader},
    panic,
    process::{Command, Stdio},
    sync::mpsc,
    thread,
    time::Instant,
};

use anyhow::{Context as _, Result};
use xshell::Cmd;

use super::Suite;
use crate::{
    failures::{Failures, Reader},
    scenarios::Table,
    summary::Totals,
};

/// A command that runs tests of a suite.
pub(super) struct Run {
    suite: Suite,
    command: Command,
    /// As it would be typed.
    typed: String,
}

/// What came of all runs.
#[derive(Default)]
pub(super) struct Report {
    pub(super) totals: Totals,
    pub(super) failures: Failures,
    pub(super) table: Option<Table>,
}

impl Run {
    pub(super) fn new(suite: Suite, command: Cmd<'_>) -> Self {
        let typed = format!("$ {command}");
        Self { suite, command: Command::from(command), typed }
    }

    pub(super) fn suite(&self) -> Suite {
        self.suite
    }

    /// The same, with an environment variable.
    pub(super) fn env(mut self, name: &str, value: &str) -> Self {
        self.command.env(name, value);
        self
    }

    /// Runs it, hands over each line that it prints as it comes, and counts the results in them.
    fn count(mut self, mut show: impl FnMut(&str)) -> Result<(Totals, Failures)> {
        let start = Instant::now();
        show(&self.typed);
        let mut child = self.command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
        let (mut totals, mut failures) = (Totals::default(), Reader::new(self.suite.name()));
        let output = child.stdout.take().context("the output is not captured")?;
        for line in BufReader::new(output).split(b'\n') {
            let line = line?;
            let line = String::from_utf8_lossy(&line);
            show(&line);
            totals.read(&line);
            failures.read(&line);
        }
        let success = child.wait()?.success();
        let totals = totals.ended(success);
        let failures = failures.ended(success);
        show(&format!("{totals}, in {} s", start.elapsed().as_secs()));
        for line in failures.to_string().lines() {
            show(line);
        }
        Ok((totals, failures))
    }
}

impl Report {
    /// Runs all lanes to their ends, and shows what they print. Of several at once each line begins with its suite.
    pub(super) fn run(&mut self, lanes: Vec<Vec<Run>>) -> Result<()> {
        let alone = lanes.len() == 1;
        let (sender, printed) = mpsc::channel();
        thread::scope(|scope| {
            let start = |lane: Vec<Run>| {
                let sender = sender.clone();
                scope.spawn(move || {
                    let run = |run: Run| {
                        let suite = run.suite;
                        // Who would read them is there until the last of them.
                        run.count(|line| drop(sender.send((suite, line.to_owned()))))
                    };
                    lane.into_iter().map(run).collect::<Result<Vec<_>>>()
                })
            };
            let lanes: Vec<_> = lanes.into_iter().map(start).collect();
            drop(sender);
            for (suite, line) in printed {
                self.show(suite, &line, alone);
            }
            for lane in lanes {
                for (totals, failures) in lane.join().unwrap_or_else(|panic| panic::resume_unwind(panic))? {
                    self.totals += totals;
                    self.failures.extend(failures);
                }
            }
            Ok(())
        })
    }

    fn show(&mut self, suite: Suite, line: &str, alone: bool) {
        if alone {
            println!("{line}");
        } else {
            println!("{:9} | {line}", suite.name());
        }
        if let Some(table) = self.table.as_mut().filter(|_| suite == Suite::Scenarios) {
            table.read(line);
        }
    }
}

#[cfg(test)]
mod tests {
    use xshell::{Shell, cmd};

    use super::*;

    #[test]
    fn lanes_run_beside_each_other_and_all_results_are_counted() {
        let shell = Shell::new().unwrap();
        let directory = shell.create_temp_dir().unwrap();
        let meeting = directory.path().join("meeting");
        cmd!(shell, "mkfifo {meeting}").quiet().run().unwrap();
        let said = "test result: ok. 2 passed; 0 failed; 1 ignored";
        // Each waits for the other.
        let first = cmd!(shell, "timeout 60 sh -c 'echo met > \"$0\"; echo \"$1\"' {meeting} {said}");
        let second = cmd!(shell, "timeout 60 sh -c 'cat \"$0\"; echo \"$1\"; exit 1' {meeting} {said}");
        let third = cmd!(shell, "echo {said}");
        let mut report = Report::default();
        let lanes = vec![
            vec![Run::new(Suite::Unit, first)],
            vec![Run::new(Suite::Netns, second), Run::new(Suite::Agent, third)],
        ];
        report.run(lanes).unwrap();
        assert_eq!(report.totals, Totals { passed: 6, failed: 1, ignored: 3 });
        assert_eq!(report.failures.to_string(), "FAILED netns: no test: a program was not built, or died\n");
    }
}
