//! The command line. In: arguments. Out: an exit code, which scripts may rely on.
//!
//! | code | meaning |
//! |---|---|
//! | 0 | done, or stopped by a signal |
//! | 1 | failed; trying again may help |
//! | 2 | the command line is wrong |
//! | 3 | what was asked for is not there |
//! | 4 | the kernel does not hold what it should: `verify` |
//! | 78 | this node or its configuration must change before it can run Sluice |

mod affinity;
mod backend;
mod bugreport;
mod check;
mod cleanup;
mod completions;
mod counters;
mod explain;
mod flow;
mod logging;
mod man;
mod monitor;
mod output;
mod run;
mod service;
mod status;
mod top;
mod verify;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// A Service proxy for Kubernetes nodes, in BPF.
#[derive(Debug, Parser)]
#[command(name = "sluice", version, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the agent of this node. What it puts into the kernel stays there, and works on, when it ends.
    Run(Box<run::Arguments>),
    /// How this node's dataplane is: who keeps it, what is attached, how full the maps are.
    Status(status::Arguments),
    /// Services, as the kernel has them.
    Service(service::Arguments),
    /// Whom Services lead to.
    Backend(backend::Arguments),
    /// Connections that are translated.
    Flow(flow::Arguments),
    /// Clients that stay with a backend.
    Affinity(affinity::Arguments),
    /// What would become of a packet, and why: which Service, which backend, by which rule.
    Explain(explain::Arguments),
    /// What goes on, as it happens.
    Top(top::Arguments),
    /// A line for each thing that happens to connections and packets, as it happens: opened, rejected, dropped, …
    Monitor(monitor::Arguments),
    /// One archive for whoever is asked for help.
    Bugreport(bugreport::Arguments),
    /// Whether this node can run Sluice, what is missing, and what there is instead.
    Check(check::Arguments),
    /// What the programs have counted, by hook and outcome.
    Counters(counters::Arguments),
    /// Whether the kernel holds what the agent that runs wants, or what the objects of the cluster ask for.
    Verify(verify::Arguments),
    /// A script that has a shell complete commands and flags.
    Completions(completions::Arguments),
    /// Manual pages, a file for each command.
    Man(man::Arguments),
    /// Take everything out of the kernel that agents have put there, with the files they keep, and nothing else.
    Cleanup(cleanup::Arguments),
}

/// A failed command: what to say and how to exit.
#[derive(Debug)]
struct Failure {
    error: anyhow::Error,
    code: u8,
}

/// What the agent would run with, had it been started by these words.
#[cfg(test)]
pub(crate) fn configuration<'a>(words: impl IntoIterator<Item = &'a str>) -> anyhow::Result<crate::config::Config> {
    run::configuration(run_arguments(words)?)
}

/// The same without the file that they may name.
fn run_arguments<'a>(words: impl IntoIterator<Item = &'a str>) -> anyhow::Result<run::Arguments> {
    match Cli::try_parse_from(words)?.command {
        Command::Run(arguments) => Ok(*arguments),
        _ => anyhow::bail!("it is not `sluice run`"),
    }
}

/// The command line is wrong: what clap ends with, too.
const EX_USAGE: u8 = 2;

/// What was asked for is not there.
const EX_NOT_FOUND: u8 = 3;

/// The kernel holds something else than it should.
const EX_DIFFERS: u8 = 4;

/// `EX_CONFIG` of sysexits.h.
const EX_CONFIG: u8 = 78;

impl Failure {
    fn new(error: impl Into<anyhow::Error>, code: u8) -> Self {
        Self { error: error.into(), code }
    }
}

impl Cli {
    /// Carries the command out.
    pub fn execute(self) -> ExitCode {
        let done = match self.command {
            Command::Run(arguments) => run::execute(*arguments),
            Command::Cleanup(arguments) => cleanup::execute(&arguments),
            Command::Check(arguments) => check::execute(&arguments),
            Command::Counters(arguments) => counters::execute(&arguments),
            Command::Top(arguments) => top::execute(&arguments),
            Command::Monitor(arguments) => monitor::execute(&arguments),
            Command::Bugreport(arguments) => bugreport::execute(&arguments),
            Command::Verify(arguments) => verify::execute(&arguments),
            Command::Completions(arguments) => completions::execute(&arguments),
            Command::Man(arguments) => man::execute(&arguments),
            Command::Status(arguments) => status::execute(&arguments),
            Command::Service(arguments) => service::execute(&arguments),
            Command::Backend(arguments) => backend::execute(&arguments),
            Command::Flow(arguments) => flow::execute(&arguments),
            Command::Affinity(arguments) => affinity::execute(&arguments),
            Command::Explain(arguments) => explain::execute(&arguments),
        };
        match done {
            Ok(()) => ExitCode::SUCCESS,
            Err(Failure { error, code }) => {
                eprintln!("sluice: {error}");
                code.into()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory as _, Parser as _};

    use super::Cli;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn wrong_values_are_told_with_what_would_be_right() {
        let cases = [
            (vec!["run", "--source", "files"], "file:DIR"),
            (vec!["run", "--uplink-mode", "fast"], "xdp-generic"),
            (vec!["run", "--socket-lb", "some"], "possible values: all, host, off"),
            (vec!["run", "--node-port-range", "3"], "FIRST-LAST"),
            (vec!["run", "--nodeport-addresses", "public"], "public"),
            (vec!["run", "--pod-devices", "veth["], "`veth[`"),
        ];
        for (arguments, expected) in cases {
            let error = Cli::try_parse_from([vec!["sluice"], arguments.clone()].concat()).unwrap_err();
            assert!(error.to_string().contains(expected), "{arguments:?}: {error}");
        }
    }
}
