//! `fuzz`: packets at random through the programs and through a model of the rules, until they differ or time is up.

use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result, ensure};
use clap::Args;

use crate::{machine, setup, workspace::Workspace};

/// Compare the programs with a model of the rules, packet by packet. Needs root.
#[derive(Args)]
pub(crate) struct Arguments {
    /// For how long.
    #[arg(long, default_value_t = 5.0)]
    minutes: f64,
    /// Instead: for how many packets.
    #[arg(long)]
    packets: Option<u64>,
    /// Of the first episode; that of a difference shows it again at once.
    #[arg(long)]
    seed: Option<u64>,
}

pub(crate) fn run(workspace: &Workspace, arguments: &Arguments) -> Result<ExitCode> {
    ensure!(machine::is_root(), "the fuzzer needs root: it loads the programs; run `cargo xtask fuzz` as root");
    setup::ensure(workspace, &[setup::BPF, setup::KERNEL])?;
    machine::mount_bpf(&workspace.shell)?;
    let built = workspace.executables(&["build", "--release", "--package", "tests", "--bin", "fuzz"])?;
    let fuzz = built.into_iter().find(|it| it.name == "fuzz").context("building the fuzzer made no program")?;
    let mut command = Command::new(fuzz.path);
    command.args(["--minutes", &arguments.minutes.to_string()]);
    if let Some(packets) = arguments.packets {
        command.args(["--packets", &packets.to_string()]);
    }
    if let Some(seed) = arguments.seed {
        command.args(["--seed", &seed.to_string()]);
    }
    let is_success = command.status()?.success();
    Ok(if is_success { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
