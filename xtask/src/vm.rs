//! `vm`: the suites that need a kernel, on kernels other than the running one, and a table of what came of it.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use clap::Args;

use crate::{
    guest::{Accelerator, Guest, quoted, quoted_path},
    kernel::{self, Kernel},
    report::{Report, table},
    rootfs::Rootfs,
    setup,
    test::{self, Suite},
    workspace::Workspace,
};

/// Run the suites that need a kernel, or a command, in virtual machines.
#[derive(Args)]
pub(crate) struct Arguments {
    /// 6.1, 6.12, 7.2, the path of a bzImage, or `all` for the supported ones.
    #[arg(required = true)]
    kernels: Vec<String>,
    /// Where the modules of a bzImage are.
    #[arg(long)]
    modules: Option<PathBuf>,
    /// Only this suite; may be repeated.
    #[arg(long = "suite")]
    suites: Vec<Suite>,
    /// Only this test program of them, by its name; may be repeated.
    #[arg(long = "test")]
    programs: Vec<String>,
    /// How long a machine may take, in seconds.
    #[arg(long, default_value_t = 2400)]
    limit: u64,
    /// A command to run instead; where suites are named, what is passed to their test programs: a part of a test's name, `--nocapture`, …
    #[arg(last = true)]
    command: Vec<String>,
}

/// What runs if no suite is named. Tests of the agent are about links, which kernels before 6.6 have few of.
const USUAL: [Suite; 2] = [Suite::Program, Suite::Netns];

/// How much longer than on hardware a test may wait for something.
const SLOWNESS: u32 = 10;

pub(crate) fn run(workspace: &Workspace, arguments: &Arguments) -> Result<ExitCode> {
    setup::ensure(workspace, &[setup::BPF, setup::KERNEL, setup::VM])?;
    let kernels = kernels(workspace, arguments)?;
    let mut rootfs = Rootfs::new(workspace)?;
    let suites = if arguments.command.is_empty() || !arguments.suites.is_empty() {
        tests(workspace, &mut rootfs, arguments)?
    } else {
        command(workspace, &mut rootfs, &arguments.command)?;
        Vec::new()
    };
    let limit = Duration::from_secs(arguments.limit);
    let reports = kernels.iter().map(|kernel| on_kernel(workspace, kernel, &rootfs, &suites, limit));
    let reports = reports.collect::<Result<Vec<_>>>()?;
    print!("{}", table(&suites, &reports));
    Ok(if reports.iter().all(Report::is_success) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn kernels(workspace: &Workspace, arguments: &Arguments) -> Result<Vec<Kernel>> {
    let expand = |name: &String| if name == "all" { kernel::supported().collect() } else { vec![name.clone()] };
    arguments
        .kernels
        .iter()
        .flat_map(expand)
        .map(|name| Kernel::find(workspace, &name, arguments.modules.as_deref()))
        .collect()
}

/// A machine that runs one command.
fn command(workspace: &Workspace, rootfs: &mut Rootfs<'_>, words: &[String]) -> Result<()> {
    let agent = test::build_agent(workspace, &[])?;
    rootfs.program(&agent)?;
    rootfs.read_by_tests()?;
    let words: Vec<String> = words.iter().map(|word| quoted(word)).collect();
    rootfs.job(&format!("{}{}\n", prelude(workspace, &agent), words.join(" ")));
    Ok(())
}

/// A machine that runs the test programs of suites, and says which one it is at. Returns the suites that have any.
fn tests(workspace: &Workspace, rootfs: &mut Rootfs<'_>, arguments: &Arguments) -> Result<Vec<Suite>> {
    let (named, only) = (arguments.suites.as_slice(), &arguments.programs);
    if named.contains(&Suite::Scenarios) {
        rootfs.program(&test::build_other_layout(workspace, &[])?)?;
    }
    let agent = test::build_agent(workspace, &[])?;
    rootfs.program(&agent)?;
    rootfs.read_by_tests()?;
    let mut script = prelude(workspace, &agent) + "failed=0\n";
    let (mut suites, mut found) = (Vec::new(), Vec::new());
    for suite in if named.is_empty() { &USUAL } else { named } {
        let mut targets = suite.targets(workspace)?;
        targets.retain(|target| only.is_empty() || only.contains(target));
        ensure!(named.is_empty() || !only.is_empty() || !targets.is_empty(), "the {} suite has no test", suite.name());
        if targets.is_empty() {
            continue;
        }
        suites.push(*suite);
        found.extend(targets.iter().cloned());
        for program in test::build(workspace, &targets)? {
            rootfs.program(&program.path)?;
            if targets.contains(&program.name) {
                script += &one_program(*suite, &program.name, &program.path, &arguments.command);
            }
        }
    }
    let missing = only.iter().find(|name| !found.contains(*name));
    ensure!(missing.is_none(), "no such test program in these suites: {}", missing.map_or("", String::as_str));
    ensure!(!suites.is_empty(), "there is no test for a virtual machine in tests/tests");
    rootfs.job(&(script + "exit $failed\n"));
    Ok(suites)
}

/// Runs one test program between the two lines by which its output is told apart.
fn one_program(suite: Suite, name: &str, path: &Path, options: &[String]) -> String {
    let threads = suite.threads().unwrap_or(2);
    let options: Vec<String> = options.iter().map(|option| quoted(option)).collect();
    let options = options.join(" ");
    let path = quoted_path(path);
    let suite = suite.name();
    format!(
        "echo '::begin {suite} {name}'\n\
         {path} --test-threads={threads} {options}\n\
         status=$?; [ $status = 0 ] || failed=1\n\
         echo \"::end $status\"\n"
    )
}

/// What cargo would have set for a test, and the agent in the path.
fn prelude(workspace: &Workspace, agent: &Path) -> String {
    let root = quoted_path(&workspace.root);
    let tests = quoted_path(&workspace.root.join("tests"));
    let lab = quoted_path(&agent.with_file_name("lab"));
    let agent = quoted_path(agent);
    format!(
        "export {}={agent} SLUICE_LAB={lab} {}={SLOWNESS} RUST_BACKTRACE=1\n\
         export INSTA_WORKSPACE_ROOT={root} INSTA_UPDATE=no\n\
         ln -s {agent} /usr/local/bin/sluice\n\
         mkdir -p {tests} && cd {tests}\n",
        test::AGENT,
        test::SLOWNESS
    )
}

fn on_kernel(
    workspace: &Workspace,
    kernel: &Kernel,
    rootfs: &Rootfs<'_>,
    suites: &[Suite],
    limit: Duration,
) -> Result<Report> {
    let accelerator = Accelerator::find(workspace, kernel)?;
    let guest = Guest::new(workspace, kernel, rootfs, accelerator)?;
    let name = &kernel.name;
    println!("{name}: boots");
    let start = Instant::now();
    let mut report = Report::new(name, suites);
    let status = guest.run(limit, |line| {
        println!("{name}| {line}");
        report.read(line);
    });
    println!("{name}: ended after {} s", start.elapsed().as_secs());
    report.end(status);
    Ok(report)
}
