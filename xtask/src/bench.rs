//! `bench`: measurements, with optimised programs, on this machine and its running kernel. Each part prints tables with goals, and writes
//! figures and a drawing into `target/bench`; the exit status is 0 if every goal was met.

use std::{
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use anyhow::{Context as _, Result, ensure};
use clap::{Args, ValueEnum};

use crate::{machine, setup, test, workspace::Workspace};

/// Measure an optimised build. Nothing else should run meanwhile.
#[derive(Args)]
pub(crate) struct Arguments {
    /// What is measured; if nothing is named, all but `scale`, and then all goals in one table.
    what: Option<Bench>,
    /// Roughly, to see that it works.
    #[arg(long)]
    quick: bool,
    /// Passed to the program that measures: `--help` shows what it takes.
    #[arg(last = true, requires = "what")]
    options: Vec<String>,
}

/// What can be measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Bench {
    /// The programs, per packet, beside the smallest honest balancer.
    Cost,
    /// Packets per second through a veth: the programs, the kernel, rules of nftables and iptables.
    Pps,
    /// TCP connections per second between pods: direct, by sockets, by packets, by rules.
    Connect,
    /// The agent and 10,000 Services of three endpoints, beside the same as rules of nftables and iptables.
    Programming,
    /// The agent and 10,000 Services: time to the first complete picture, time per change, memory.
    Scale,
}

impl Bench {
    /// Those whose goals are told together.
    const USUAL: [Self; 4] = [Self::Cost, Self::Pps, Self::Connect, Self::Programming];

    /// What its files are called.
    fn name(self) -> &'static str {
        match self {
            Self::Cost => "cost",
            Self::Pps => "pps",
            Self::Connect => "connect",
            Self::Programming => "programming",
            Self::Scale => "scale",
        }
    }

    /// The program that measures.
    fn program(self) -> &'static str {
        if self == Self::Programming { "scale" } else { self.name() }
    }

    fn has_rules(self) -> bool {
        matches!(self, Self::Pps | Self::Connect | Self::Programming)
    }

    fn options(self) -> &'static [&'static str] {
        if self == Self::Programming { &["--endpoints", "3", "--rules"] } else { &[] }
    }
}

pub(crate) fn run(workspace: &Workspace, arguments: &Arguments) -> Result<ExitCode> {
    ensure!(machine::is_root(), "namespaces and BPF programs need root: run `cargo xtask bench` as root");
    let parts = arguments.what.map_or(Bench::USUAL.to_vec(), |part| vec![part]);
    setup::ensure(workspace, &[setup::BPF, setup::KERNEL])?;
    if parts.iter().any(|part| part.has_rules()) {
        setup::ensure(workspace, &[setup::RULES])?;
    }
    let programs = Programs::build(workspace, &parts)?;
    machine::mount_bpf(&workspace.shell)?;
    let directory = workspace.target.join("bench");
    let mut is_good = true;
    for part in &parts {
        is_good &= programs.measure(*part, arguments, &directory)?;
    }
    if parts.len() > 1 {
        let names = parts.iter().map(|part| part.name());
        is_good &=
            Command::new(programs.path("findings")?).arg("--from").arg(directory).args(names).status()?.success();
    }
    Ok(if is_good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// What was built.
struct Programs(Vec<(String, PathBuf)>);

impl Programs {
    fn build(workspace: &Workspace, parts: &[Bench]) -> Result<Self> {
        let mut arguments = vec!["build", "--release", "--package", "proxy-userspace", "--bin", "sluice"];
        arguments.extend(["--package", "tests", "--bin", "lab", "--bin", "findings"]);
        arguments.extend(parts.iter().flat_map(|part| ["--bin", part.program()]));
        let built = workspace.executables(&arguments)?;
        Ok(Self(built.into_iter().map(|executable| (executable.name, executable.path)).collect()))
    }

    fn path(&self, name: &str) -> Result<&Path> {
        let program = self.0.iter().find(|(program, _)| program == name);
        Ok(&program.with_context(|| format!("building made no program {name}"))?.1)
    }

    /// Whether every goal was met.
    fn measure(&self, part: Bench, arguments: &Arguments, directory: &Path) -> Result<bool> {
        let mut bench = Command::new(self.path(part.program())?);
        bench.env(test::AGENT, self.path("sluice")?).arg("--into").arg(directory).args(part.options());
        if arguments.quick {
            bench.arg("--quick");
        }
        Ok(bench.args(&arguments.options).status()?.success())
    }
}
