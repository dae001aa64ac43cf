//! `sluice verify`: whether the kernel holds what it should.

use std::{
    fmt::Display,
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::anyhow;
use clap::Args;

use super::{
    EX_CONFIG, EX_DIFFERS, EX_USAGE, Failure,
    output::{Target, columns},
    run, run_arguments,
};
use crate::{
    inspect::Inspector,
    verify::{self, ByAgent, Comparison, Difference, Objects, VerifyError},
};

/// What to compare.
#[derive(Debug, Args)]
#[command(
    after_help = "Exit status 4 means that something differs, 1 that this could not be found out: nobody answered, or nobody can be asked; 78 that the configuration cannot be used.\n\nExamples:\n  sluice verify                                  # with what the agent that runs has heard of\n  sluice verify --anew                           # with what its source says now\n  sluice verify -- --source file:/etc/sluice     # or by these flags of `sluice run`"
)]
pub(super) struct Arguments {
    /// Seconds until the agent must have answered, each time it is asked, or the source of objects told everything.
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    timeout: u64,
    /// Read all objects from their source again, as an agent does that starts, even if one runs that could be asked
    #[arg(long)]
    anew: bool,
    #[command(flatten)]
    target: Target,
    /// Flags of `sluice run`, by which all objects are read; without any, those that the running agent was started with.
    #[arg(last = true)]
    flags: Vec<String>,
}

pub(super) fn execute(arguments: &Arguments) -> Result<(), Failure> {
    let inspector = arguments.target.inspector()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.map_err(|error| Failure::new(error, 1))?;
    let compared = runtime.block_on(arguments.compare(&inspector));
    runtime.shutdown_background();
    let comparison = compared?;
    arguments.target.show(&comparison, describe)?;
    match comparison.differences.len() {
        0 => Ok(()),
        count => Err(Failure::new(anyhow!("{count} entries differ"), EX_DIFFERS)),
    }
}

impl Arguments {
    async fn compare(&self, inspector: &Inspector) -> Result<Comparison, Failure> {
        let patience = Duration::from_secs(self.timeout);
        // Flags that are wrong are to be corrected by who has given them; those of an agent are as they are.
        let (words, is_wrong) = match self.flags.as_slice() {
            [] => (running(inspector).map_err(|error| Failure::new(error, 1))?, 1),
            flags => (flags.to_vec(), EX_USAGE),
        };
        let words = ["sluice", "run"].into_iter().chain(words.iter().map(String::as_str));
        let flags = run_arguments(words).map_err(|error| Failure::new(error, is_wrong))?;
        let failed = |error: VerifyError| {
            let code = error.exit_code();
            Failure::new(error, code)
        };
        let agent = inspector.agent().ok().filter(|_| !self.anew && self.flags.is_empty());
        if let (Some(agent), Some(state_dir)) = (agent, &flags.state_dir) {
            match verify::by_agent(&seen_by(agent.pid, state_dir), agent.pid, patience).await.map_err(failed)? {
                ByAgent::Compared(comparison) => return Ok(comparison),
                ByAgent::Nobody(reason) => {
                    eprintln!("sluice: the agent cannot be asked ({reason}): all objects are read from their source");
                }
            }
        }
        let mut config = run::configuration(flags).map_err(|error| Failure::new(error, EX_CONFIG))?;
        config.dataplane.pin_path.clone_from(&self.target.pin_path);
        self.target.warn_of_another_network();
        verify::anew(&config, patience).await.map_err(failed)
    }
}

/// A directory of a process, which may have other mounts than this one.
fn seen_by(process: u32, directory: &Path) -> PathBuf {
    let process = Path::new("/proc").join(process.to_string());
    match directory.strip_prefix("/") {
        Ok(directory) => process.join("root").join(directory),
        Err(_) => process.join("cwd").join(directory),
    }
}

/// The flags that the running agent was started with.
fn running(inspector: &Inspector) -> anyhow::Result<Vec<String>> {
    let agent = inspector.agent()?;
    anyhow::ensure!(agent.is_running, "no agent runs: give the flags of `sluice run` behind `--`");
    let path = format!("/proc/{}/cmdline", agent.pid);
    let advice = |why: &dyn Display| {
        format!("the agent's command line cannot be read at {path} ({why}): give its flags behind `--`")
    };
    let line = fs::read(&path).map_err(|error| anyhow!(advice(&error)))?;
    let words = line.split(|octet| *octet == 0).map(|word| String::from_utf8_lossy(word).into_owned());
    let words: Vec<String> = words.skip_while(|word| word != "run").skip(1).filter(|word| !word.is_empty()).collect();
    anyhow::ensure!(!words.is_empty(), advice(&"it has no `run`"));
    Ok(words)
}

fn describe(comparison: &Comparison) -> String {
    let Comparison { objects, frontends, backends, differences } = comparison;
    let whose = match objects {
        Objects::Agent => "as far as its agent has heard",
        Objects::Source => "by the objects that there are now",
    };
    if differences.is_empty() {
        return format!("The kernel holds what it should, {whose}: {frontends} frontends, {backends} backends.");
    }
    let row =
        |difference: &Difference| [difference.map.clone().into(), difference.entry.clone(), difference.problem.clone()];
    let rows = columns(&["MAP", "ENTRY", "PROBLEM"], differences.iter().map(row), "");
    format!("The kernel does not hold what it should, {whose}:\n{rows}")
}
