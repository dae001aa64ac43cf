//! `sluice verify`: whether the kernel holds what it should.

use std::{fs, time::Duration};

use anyhow::Context as _;
use clap::Args;

use super::{
    Failure, configuration,
    output::{Target, columns},
};
use crate::{
    config::Config,
    inspect::Inspector,
    verify::{Comparison, Difference, verify},
};

/// What to compare.
#[derive(Debug, Args)]
#[command(
    after_help = "Exit status 1 means that something differs.\n\nExamples:\n  sluice verify                                  # as the agent that runs was started\n  sluice verify -- --source file:/etc/sluice     # or by these flags of `sluice run`"
)]
pub(super) struct Arguments {
    /// Seconds until the source of objects must have told everything.
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    timeout: u64,
    #[command(flatten)]
    target: Target,
    /// Flags of `sluice run`; without any, those that the running agent was started with.
    #[arg(last = true)]
    flags: Vec<String>,
}

pub(super) fn execute(arguments: &Arguments) -> Result<(), Failure> {
    let inspector = arguments.target.inspector()?;
    let mut config = arguments.config(&inspector).map_err(|error| Failure::new(error, 2))?;
    config.dataplane.pin_path.clone_from(&arguments.target.pin_path);
    arguments.target.warn_of_another_network();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.map_err(|error| Failure::new(error, 1))?;
    let compared = runtime.block_on(verify(&config, Duration::from_secs(arguments.timeout)));
    runtime.shutdown_background();
    let comparison = compared.map_err(|error| {
        let code = error.exit_code();
        Failure::new(error, code)
    })?;
    arguments.target.show(&comparison, describe)?;
    match comparison.differences.len() {
        0 => Ok(()),
        count => Err(Failure::new(anyhow::anyhow!("{count} entries differ"), 1)),
    }
}

impl Arguments {
    fn config(&self, inspector: &Inspector) -> anyhow::Result<Config> {
        let words = if self.flags.is_empty() { running(inspector)? } else { self.flags.clone() };
        configuration(["sluice", "run"].into_iter().chain(words.iter().map(String::as_str)))
    }
}

/// The flags that the running agent was started with.
fn running(inspector: &Inspector) -> anyhow::Result<Vec<String>> {
    let status = inspector.status()?;
    anyhow::ensure!(status.agent.is_running, "no agent runs: give the flags of `sluice run` behind `--`");
    let path = format!("/proc/{}/cmdline", status.agent.pid);
    let advice = || format!("the agent's command line cannot be read at {path}: give its flags behind `--`");
    let line = fs::read(&path).with_context(advice)?;
    let words = line.split(|octet| *octet == 0).map(|word| String::from_utf8_lossy(word).into_owned());
    let words: Vec<String> = words.skip_while(|word| word != "run").skip(1).filter(|word| !word.is_empty()).collect();
    anyhow::ensure!(!words.is_empty(), advice());
    Ok(words)
}

fn describe(comparison: &Comparison) -> String {
    let Comparison { frontends, backends, differences } = comparison;
    let row =
        |difference: &Difference| [difference.map.to_owned(), difference.entry.clone(), difference.problem.clone()];
    let nothing = format!("The kernel holds what it should: {frontends} frontends, {backends} backends.");
    columns(&["MAP", "ENTRY", "PROBLEM"], differences.iter().map(row), &nothing)
}
