//! `test`: the suites on this machine and its running kernel, and one line that sums them up.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use clap::{Args, ValueEnum};
use xshell::Cmd;

use crate::{
    machine,
    scenarios::{self, Table},
    setup,
    summary::Totals,
    workspace::{Executable, Workspace},
};

/// Run the tests: all suites, or one.
#[derive(Args)]
pub(crate) struct Arguments {
    /// All that exist if none is named. All but `unit` need root.
    suite: Option<Suite>,
    /// How many tests of a program run at once; suites that build networks run one by one unless told otherwise.
    #[arg(long)]
    test_threads: Option<usize>,
    /// Every agent of a lab is started by the rendered manifest, as kubelet and a container runtime would, and asks an API server.
    #[arg(long)]
    installed: bool,
    /// The agent that tests start is built as it is shipped, and what is promised of its speed is held to the promise.
    #[arg(long)]
    release: bool,
    /// Passed to the test programs: a part of a test's name, `--nocapture`, …
    #[arg(last = true)]
    options: Vec<String>,
}

/// Tests that need the same of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Suite {
    /// Pure functions of every crate, on the host.
    Unit,
    /// Packets through the programs on the real verifier, by `BPF_PROG_TEST_RUN`.
    Program,
    /// Real sockets between network namespaces.
    Netns,
    /// The agent against a fake API server.
    Agent,
    /// Services behave as kube-proxy's: every row of the rules is a test.
    Parity,
    /// What operators fear: a server that goes, watches that lie, objects that mean harm.
    Scenarios,
}

impl Suite {
    /// The suites whose programs run on a kernel, in the order of their cost.
    pub(crate) const ON_KERNEL: [Self; 5] = [Self::Program, Self::Netns, Self::Agent, Self::Parity, Self::Scenarios];

    /// The name on the command line, with which the names of its test programs begin.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Unit => "unit",
            Self::Program => "program",
            Self::Netns => "netns",
            Self::Agent => "agent",
            Self::Parity => "parity",
            Self::Scenarios => "scenarios",
        }
    }

    /// The test programs of the suite: `program.rs`, `program_nat.rs` or `program_nat/main.rs` for `program`.
    pub(crate) fn targets(self, workspace: &Workspace) -> Result<Vec<String>> {
        let mut targets: Vec<String> =
            test_targets(&workspace.root.join("tests/tests"))?.into_iter().filter(|name| self.owns(name)).collect();
        targets.sort();
        Ok(targets)
    }

    /// How many of its tests may run at once, if that matters.
    pub(crate) fn threads(self) -> Option<usize> {
        // Each test of the others builds networks, and measures what happens in them.
        (!matches!(self, Self::Unit | Self::Program)).then_some(1)
    }

    fn owns(self, target: &str) -> bool {
        target.strip_prefix(self.name()).is_some_and(|rest| rest.is_empty() || rest.starts_with('_'))
    }
}

pub(crate) fn run(workspace: &Workspace, arguments: &Arguments) -> Result<ExitCode> {
    if let Some(suite) = arguments.suite {
        ensure!(suite == Suite::Unit || machine::is_root(), "{}", needs_root(suite));
    }
    // The others have no lab, or look at files that such an agent does not read.
    ensure!(!arguments.installed || arguments.suite == Some(Suite::Netns), "--installed is for the netns suite");
    setup::ensure(workspace, &[setup::BPF, setup::KERNEL, setup::RULES])?;
    let mut totals = Totals::default();
    for suite in chosen(workspace, arguments.suite)? {
        println!("== {}", suite.name());
        totals += run_suite(workspace, suite, arguments)?;
    }
    if totals.ignored > 0 {
        println!("{} tests are marked `#[ignore]` and did not run", totals.ignored);
    }
    println!("{totals}");
    Ok(if totals.is_success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn chosen(workspace: &Workspace, named: Option<Suite>) -> Result<Vec<Suite>> {
    if let Some(suite) = named {
        return Ok(vec![suite]);
    }
    let mut suites = vec![Suite::Unit];
    for suite in Suite::ON_KERNEL {
        if !suite.targets(workspace)?.is_empty() {
            suites.push(suite);
        }
    }
    Ok(suites)
}

fn run_suite(workspace: &Workspace, suite: Suite, arguments: &Arguments) -> Result<Totals> {
    if suite == Suite::Unit {
        return unit(workspace, arguments);
    }
    if !machine::is_root() {
        eprintln!("error: {}", needs_root(suite));
        return Ok(Totals::ONE_FAILURE);
    }
    let targets = suite.targets(workspace)?;
    if targets.is_empty() {
        eprintln!("error: the {0} suite has no test: there is no tests/tests/{0}*.rs", suite.name());
        return Ok(Totals::default());
    }
    machine::mount_bpf(&workspace.shell)?;
    if suite == Suite::Scenarios {
        return with_table(workspace, &targets, arguments);
    }
    count(on_kernel(workspace, suite, &targets, arguments)?, |_| ())
}

/// The scenarios suite, and what came of each scenario.
fn with_table(workspace: &Workspace, targets: &[String], arguments: &Arguments) -> Result<Totals> {
    let mut table = Table::open(workspace)?;
    let command = on_kernel(workspace, Suite::Scenarios, targets, arguments)?.env(scenarios::NOTES, table.notes());
    let mut totals = count(command, |line| table.read(line))?;
    print!("{table}");
    for number in table.missing() {
        eprintln!("error: scenario {number} has neither a test nor a reason in tests/scenarios.yaml");
        totals += Totals::ONE_FAILURE;
    }
    Ok(totals)
}

fn needs_root(suite: Suite) -> String {
    format!("the {0} suite needs root: run `cargo xtask test {0}` as root", suite.name())
}

/// Every library and program, then the examples in their documentation.
fn unit(workspace: &Workspace, arguments: &Arguments) -> Result<Totals> {
    let mut totals = Totals::default();
    for kind in [["--lib", "--bins"].as_slice(), &["--doc"]] {
        let cargo = workspace.cargo(&["test", "--workspace", "--no-fail-fast"]).args(kind);
        totals += count(cargo.arg("--").args(options(Suite::Unit, arguments)), |_| ())?;
    }
    Ok(totals)
}

/// Runs the test programs of a suite, with the agent that they start.
fn on_kernel<'a>(workspace: &'a Workspace, suite: Suite, targets: &[String], arguments: &Arguments) -> Result<Cmd<'a>> {
    let profile: &[&str] = if arguments.release { &["--release"] } else { &[] };
    if suite == Suite::Scenarios {
        build_other_layout(workspace, profile)?;
    }
    let agent = build_agent(workspace, profile)?;
    let named = targets.iter().flat_map(|target| ["--test", target]);
    let cargo = workspace.cargo(&["test", "--package", "tests", "--no-fail-fast"]).args(named);
    let cargo = if arguments.installed { cargo.env(INSTALL, "manifest") } else { cargo };
    let cargo = if arguments.release { cargo.env(RELEASE, "1") } else { cargo };
    for (test, reason) in NOT_INSTALLED.iter().filter(|_| arguments.installed) {
        println!("left out: {test}: {reason}");
    }
    Ok(cargo.env(AGENT, agent).arg("--").args(options(suite, arguments)))
}

/// The variable that tells labs how to start agents.
const INSTALL: &str = "SLUICE_TEST_INSTALL";

/// The variable that tells tests that the agent is built as it is shipped.
const RELEASE: &str = "SLUICE_TEST_RELEASE";

/// Tests of the netns suite that say nothing of agents that are installed, and why.
const NOT_INSTALLED: [(&str, &str); 2] = [
    ("a_broken_document_is_named_and_the_others_are_served", "it is about the files of --source=file:DIR"),
    (
        "a_connection_to_a_backend_that_has_gone_is_ended_on_the_node_and_in_pods",
        "in pods only with the chart's endPodSockets, which the manifest leaves off",
    ),
];

/// The variable that tells tests where the agent is.
pub(crate) const AGENT: &str = "SLUICE_BIN";

/// Builds the agent that tests start. `profile` is what cargo is told besides.
pub(crate) fn build_agent(workspace: &Workspace, profile: &[&str]) -> Result<PathBuf> {
    let arguments = [&["build", "--package", "proxy-userspace", "--bin", "sluice"], profile].concat();
    let built = workspace.executables(&arguments)?;
    let agent = built.into_iter().next().context("building the agent made no program")?;
    Ok(agent.path)
}

/// Builds an agent whose maps have another layout, for tests of upgrades, and puts it where that of [`build_agent`] will be. All but
/// the crates that know the maps is built once for both.
pub(crate) fn build_other_layout(workspace: &Workspace, profile: &[&str]) -> Result<PathBuf> {
    let arguments = ["build", "--package", "proxy-userspace", "--bin", "sluice", "--features", "other-layout"];
    let arguments = [&arguments, profile].concat();
    let built = workspace.executables(&arguments)?;
    let agent = built.into_iter().next().context("building the agent with another layout made no program")?;
    let path = agent.path.with_file_name("sluice-other-layout");
    fs::copy(&agent.path, &path)?;
    Ok(path)
}

/// Builds test programs, and the programs they start.
pub(crate) fn build(workspace: &Workspace, targets: &[String]) -> Result<Vec<Executable>> {
    let mut arguments = vec!["test", "--no-run", "--package", "tests"];
    arguments.extend(targets.iter().flat_map(|target| ["--test", target]));
    workspace.executables(&arguments)
}

fn options(suite: Suite, arguments: &Arguments) -> Vec<String> {
    let threads = arguments.test_threads.or(suite.threads());
    let mut options: Vec<String> = threads.map(|threads| format!("--test-threads={threads}")).into_iter().collect();
    if arguments.installed {
        options.extend(NOT_INSTALLED.iter().map(|(test, _)| format!("--skip={test}")));
    }
    options.extend_from_slice(&arguments.options);
    options
}

/// Runs a command that runs tests, shows its output as it comes and to whoever else wants it, and counts the results in it.
fn count(command: Cmd<'_>, mut show: impl FnMut(&str)) -> Result<Totals> {
    println!("$ {command}");
    let mut child = Command::from(command).stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
    let mut totals = Totals::default();
    let output = child.stdout.take().context("the output is not captured")?;
    for line in BufReader::new(output).split(b'\n') {
        let line = line?;
        let line = String::from_utf8_lossy(&line);
        println!("{line}");
        totals.read(&line);
        show(&line);
    }
    Ok(totals.ended(child.wait()?.success()))
}

/// The names of the test programs in `directory`, by cargo's rules.
fn test_targets(directory: &Path) -> Result<Vec<String>> {
    if !directory.exists() {
        return Ok(Vec::new());
    }
    let entries = fs::read_dir(directory)?.map(|entry| Ok(entry?.path()));
    Ok(entries.collect::<Result<Vec<_>>>()?.iter().filter_map(|path| test_target(path)).collect())
}

fn test_target(path: &Path) -> Option<String> {
    let is_target = path.extension().is_some_and(|extension| extension == "rs") || path.join("main.rs").exists();
    is_target.then(|| path.file_stem().map(|name| name.to_string_lossy().into_owned()))?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_test_program_belongs_to_the_suite_it_is_named_after() {
        for (target, owned) in [("program", true), ("program_nat", true), ("programs", false), ("netns_udp", false)] {
            assert_eq!(Suite::Program.owns(target), owned, "{target}");
        }
    }

    #[test]
    fn suites_are_named_on_the_command_line_as_their_programs_are() {
        for suite in Suite::value_variants() {
            let value = suite.to_possible_value().unwrap();
            assert_eq!(value.get_name(), suite.name());
        }
    }
}
