//! `bench`: measurements, with an optimised agent, on this machine and its running kernel. Each prints tables with goals,
//! and ends with status 0 if all of them were met.

use std::{
    path::PathBuf,
    process::{Command, ExitCode},
};

use anyhow::{Context as _, Result, ensure};
use clap::{Args, ValueEnum};

use crate::{machine, setup, test, workspace::Workspace};

/// Measure an optimised build. Nothing else should run meanwhile.
#[derive(Args)]
pub(crate) struct Arguments {
    /// What is measured.
    #[arg(default_value = "cost")]
    what: Bench,
    /// Roughly, to see that it works.
    #[arg(long)]
    quick: bool,
    /// Passed to the program that measures: `--help` shows what it takes.
    #[arg(last = true)]
    options: Vec<String>,
}

/// What can be measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Bench {
    /// The programs, per packet, beside the smallest honest balancer.
    Cost,
    /// Packets per second through a veth: the programs, the kernel, rules of nftables and iptables.
    Pps,
    /// The agent and 10,000 Services of three endpoints, beside the same as rules of nftables and iptables.
    Programming,
    /// The agent and 10,000 Services: time to the first complete picture, time per change, memory.
    Scale,
}

impl Bench {
    /// The program that measures.
    fn program(self) -> &'static str {
        match self {
            Self::Cost => "cost",
            Self::Pps => "pps",
            Self::Programming | Self::Scale => "scale",
        }
    }
}

pub(crate) fn run(workspace: &Workspace, arguments: &Arguments) -> Result<ExitCode> {
    ensure!(machine::is_root(), "namespaces and BPF programs need root: run `cargo xtask bench` as root");
    let is_of_programs = matches!(arguments.what, Bench::Cost | Bench::Pps);
    ensure!(!arguments.quick || is_of_programs, "there is no quick way to measure that");
    setup::ensure(workspace, &[setup::BPF, setup::KERNEL])?;
    if matches!(arguments.what, Bench::Pps | Bench::Programming) {
        setup::ensure(workspace, &[setup::RULES])?;
    }
    let agent = build(workspace, "proxy-userspace", "sluice")?;
    let program = build(workspace, "tests", arguments.what.program())?;
    machine::mount_bpf(&workspace.shell)?;
    let mut bench = Command::new(program);
    if arguments.quick {
        bench.arg("--quick");
    }
    if is_of_programs {
        bench.arg("--into").arg(workspace.target.join("bench"));
    }
    if arguments.what == Bench::Programming {
        bench.args(["--endpoints", "3", "--rules"]);
    }
    let status = bench.env(test::AGENT, agent).args(&arguments.options).status()?;
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn build(workspace: &Workspace, package: &str, program: &str) -> Result<PathBuf> {
    let built = workspace.executables(&["build", "--release", "--package", package, "--bin", program])?;
    let executable = built.into_iter().find(|executable| executable.name == program);
    Ok(executable.with_context(|| format!("building {program} made no program"))?.path)
}
