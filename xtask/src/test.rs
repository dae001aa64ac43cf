//! `test`: the suites on this machine and its running kernel, what failed, and one line that sums them up.

mod lanes;

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context as _, Result, ensure};
use clap::{Args, ValueEnum};

use self::lanes::{Report, Run};
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
    /// Two suites at a time, in two thirds of the time. Tests of packet rates may fail: the floods of others fill the kernel's queues.
    #[arg(long)]
    lanes: bool,
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
    let mut report = Report::default();
    let mut suites = chosen(workspace, arguments.suite)?;
    if suites.first() == Some(&Suite::Unit) {
        report.run(vec![unit(workspace, arguments)])?;
        suites.remove(0);
    }
    if !suites.is_empty() && machine::is_root() {
        run_on_kernel(workspace, &suites, arguments, &mut report)?;
    } else if !suites.is_empty() {
        eprintln!("error: all suites but unit need root: run `cargo xtask test` as root");
        report.totals += Totals::ONE_FAILURE;
    }
    Ok(summarize(report))
}

/// The last lines, of which the very last is what scripts look for.
fn summarize(mut report: Report) -> ExitCode {
    if let Some(table) = &report.table {
        print!("{table}");
        for number in table.missing() {
            eprintln!("error: scenario {number} has neither a test nor a reason in tests/scenarios.yaml");
            report.totals += Totals::ONE_FAILURE;
        }
    }
    print!("{}", report.failures);
    if report.totals.ignored > 0 {
        println!("{} tests are marked `#[ignore]` and did not run", report.totals.ignored);
    }
    println!("{}", report.totals);
    if report.totals.is_success() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
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

/// One suite, or all of them; in lanes if that is asked for.
fn run_on_kernel(workspace: &Workspace, suites: &[Suite], arguments: &Arguments, report: &mut Report) -> Result<()> {
    machine::mount_bpf(&workspace.shell)?;
    if suites.contains(&Suite::Scenarios) {
        report.table = Some(Table::open(workspace)?);
    }
    let runs = suites.iter().map(|suite| on_kernel(workspace, *suite, arguments, report.table.as_ref()));
    let mut runs = runs.collect::<Result<Vec<_>>>()?;
    if runs.len() < 2 || !arguments.lanes {
        return report.run(vec![runs]);
    }
    build_all(workspace, suites)?;
    let mut lane = |suites: &[Suite]| {
        let runs = runs.extract_if(.., |run| suites.contains(&run.suite()));
        runs.map(patient).collect::<Vec<_>>()
    };
    report.run(LANES.map(&mut lane).into())
}

/// Suites that run beside each other, those of a lane one after the other. `Program` has two processors meet, and scenario 18 takes one
/// of them away for a while: they must be in one lane.
const LANES: [&[Suite]; 2] = [&[Suite::Program, Suite::Scenarios], &[Suite::Netns, Suite::Agent, Suite::Parity]];

/// The variable that stretches the deadlines of tests.
pub(crate) const SLOWNESS: &str = "SLUICE_TEST_SLOWNESS";

/// Shares the processors with another lane. Who has set a slowness gets that.
fn patient(run: Run) -> Run {
    if env::var_os(SLOWNESS).is_some() { run } else { run.env(SLOWNESS, "3") }
}

fn needs_root(suite: Suite) -> String {
    format!("the {0} suite needs root: run `cargo xtask test {0}` as root", suite.name())
}

/// Every library and program, then the examples in their documentation.
fn unit(workspace: &Workspace, arguments: &Arguments) -> Vec<Run> {
    let run = |kind: &[&str]| {
        let cargo = workspace.cargo(&["test", "--workspace", "--no-fail-fast"]).args(kind);
        Run::new(Suite::Unit, cargo.arg("--").args(options(Suite::Unit, arguments)))
    };
    vec![run(&["--lib", "--bins"]), run(&["--doc"])]
}

/// The test programs of a suite, with the agent that they start.
fn on_kernel(workspace: &Workspace, suite: Suite, arguments: &Arguments, table: Option<&Table>) -> Result<Run> {
    let targets = suite.targets(workspace)?;
    ensure!(!targets.is_empty(), "the {0} suite has no test: there is no tests/tests/{0}*.rs", suite.name());
    let profile: &[&str] = if arguments.release { &["--release"] } else { &[] };
    if suite == Suite::Scenarios {
        build_other_layout(workspace, profile)?;
    }
    let agent = build_agent(workspace, profile)?;
    let cargo = workspace.cargo(&["test", "--package", "tests", "--no-fail-fast"]).args(named(&targets));
    let cargo = if arguments.installed { cargo.env(INSTALL, "manifest") } else { cargo };
    let cargo = if arguments.release { cargo.env(RELEASE, "1") } else { cargo };
    let cargo = table.iter().fold(cargo, |cargo, table| cargo.env(scenarios::NOTES, table.notes()));
    for (test, reason) in NOT_INSTALLED.iter().filter(|_| arguments.installed) {
        println!("left out: {test}: {reason}");
    }
    Ok(Run::new(suite, cargo.env(AGENT, agent).arg("--").args(options(suite, arguments))))
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
    arguments.extend(named(targets));
    workspace.executables(&arguments)
}

/// Builds what the suites will run, so that none of them waits for the build of another.
fn build_all(workspace: &Workspace, suites: &[Suite]) -> Result<()> {
    let targets = suites.iter().map(|suite| suite.targets(workspace)).collect::<Result<Vec<_>>>()?;
    build(workspace, &targets.concat()).map(drop)
}

/// Targets as cargo is told them.
fn named(targets: &[String]) -> impl Iterator<Item = &str> {
    targets.iter().flat_map(|target| ["--test", target])
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
    fn each_suite_on_a_kernel_has_its_place_in_one_lane() {
        let mut in_lanes = LANES.concat();
        in_lanes.sort_by_key(|suite| suite.name());
        let mut all = Suite::ON_KERNEL.to_vec();
        all.sort_by_key(|suite| suite.name());
        assert_eq!(in_lanes, all);
    }

    #[test]
    fn suites_are_named_on_the_command_line_as_their_programs_are() {
        for suite in Suite::value_variants() {
            let value = suite.to_possible_value().unwrap();
            assert_eq!(value.get_name(), suite.name());
        }
    }
}
