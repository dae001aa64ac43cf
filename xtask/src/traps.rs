//! `traps`: whether a test notices when the handling of a trap is removed. In comes the table of `tests/traps.yaml`; a
//! scratch copy of the repository is changed by one entry after the other, and the entry's test has to fail each time.

mod verdict;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use anyhow::{Context as _, Result, anyhow, ensure};
use clap::Args;
use signal_hook::{consts::SIGINT, flag};
use xshell::{Shell, cmd};

use verdict::Verdict;

use crate::{machine, mutation::Mutation, setup, test, toolchain::Toolchain, workspace::Workspace};

/// Remove the handling of traps that other proxies fell into, one by one, and see a test fail each time.
#[derive(Args)]
pub(crate) struct Arguments {
    /// Numbers of traps; all if none is named.
    traps: Vec<u32>,
    /// Leave what was built for the next time.
    #[arg(long)]
    keep: bool,
    /// The tests have just passed: do not begin with running them as they are.
    #[arg(long)]
    passed: bool,
}

pub(crate) fn run(workspace: &Workspace, arguments: &Arguments) -> Result<ExitCode> {
    ensure!(machine::is_root(), "namespaces and BPF programs need root: run `cargo xtask traps` as root");
    let mut mutations = Mutation::all(&workspace.root)?;
    mutations.retain(|mutation| arguments.traps.is_empty() || arguments.traps.contains(&mutation.trap));
    ensure!(!mutations.is_empty(), "tests/traps.yaml has no entry for the traps {:?}", arguments.traps);
    setup::ensure(workspace, &[setup::BPF, setup::KERNEL])?;
    machine::mount_bpf(&workspace.shell)?;
    let stop = Arc::new(AtomicBool::new(false));
    flag::register(SIGINT, Arc::clone(&stop)).context("cannot look out for ctrl-c")?;
    let scratch = Scratch::new(workspace, arguments.keep)?;
    let sound = scratch.sound(&mutations, arguments.passed, &stop);
    let mut noticed = 0;
    for mutation in &mutations {
        let verdict = match sound.get(mutation.test.as_str()) {
            Some(program) => scratch.try_out(mutation, program),
            None => Err(anyhow!("{} of {} fails as it is, too", mutation.test, mutation.source)),
        };
        ensure!(!stop.load(Ordering::Relaxed), "stopped after {noticed} of {}", mutations.len());
        noticed += usize::from(matches!(verdict, Ok(Verdict::Noticed(_))));
        println!("trap {:2}: {}: {}", mutation.trap, mutation.what, tell(mutation, verdict));
    }
    println!("{noticed} of {} noticed", mutations.len());
    Ok(if noticed == mutations.len() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn tell(mutation: &Mutation, verdict: Result<Verdict>) -> String {
    match verdict {
        Ok(Verdict::Noticed(complaint)) => format!("noticed by {}: {complaint}", mutation.test),
        Ok(Verdict::Passed) => format!("NOT NOTICED: {} of {} passes without it", mutation.test, mutation.source),
        Ok(Verdict::NotLoaded(output)) => format!("NO PROOF: the program did not load\n{output}"),
        Ok(Verdict::NotRun(output)) => format!("NO PROOF: no test ran\n{output}"),
        Err(error) => format!("NO PROOF: {error:#}"),
    }
}

/// A copy of the repository and what is built of it.
struct Scratch {
    copy: Workspace,
    directory: PathBuf,
    keep: bool,
}

impl Scratch {
    /// Copies what git knows of, or would ask about, as it is now.
    fn new(workspace: &Workspace, keep: bool) -> Result<Self> {
        let directory = workspace.target.join("traps");
        let (root, target) = (directory.join("tree"), directory.join("target"));
        remove(&root)?;
        fs::create_dir_all(&root)?;
        let shell = Shell::new()?;
        shell.change_dir(&root);
        shell.set_var("CARGO_TARGET_DIR", &target);
        let scratch = Self { copy: Workspace { shell, root, target }, directory, keep };
        let outer = &workspace.shell;
        let files = cmd!(outer, "git ls-files --cached --others --exclude-standard").quiet().read()?;
        let files: Vec<_> = files.lines().filter(|file| workspace.root.join(file).exists()).collect();
        let into = &scratch.copy.root;
        cmd!(outer, "cp --parents --preserve=timestamps --target-directory={into} {files...}").quiet().run()?;
        Ok(scratch)
    }

    /// The tests that pass as long as nothing is removed, with the programs they are in.
    fn sound<'a>(&self, mutations: &'a [Mutation], is_known: bool, stop: &AtomicBool) -> BTreeMap<&'a str, PathBuf> {
        let mut sound = BTreeMap::new();
        for mutation in mutations {
            let test = mutation.test.as_str();
            if sound.contains_key(test) || stop.load(Ordering::Relaxed) {
                continue;
            }
            let verdict = |program: &Path| if is_known { Ok(Verdict::Passed) } else { self.run(mutation, program) };
            match self.build(mutation).and_then(|program| Ok((verdict(&program)?, program))) {
                Ok((Verdict::Passed, program)) => drop(sound.insert(test, program)),
                other => eprintln!("{test} as it is: {other:?}"),
            }
        }
        sound
    }

    /// What the test says to the copy without the handling. No more is built than what is changed and the test looks at.
    fn try_out(&self, mutation: &Mutation, program: &Path) -> Result<Verdict> {
        let file = self.copy.root.join(&mutation.file);
        let (whole, changed) = (fs::read_to_string(&file)?, mutation.applied(&self.copy.root)?);
        fs::write(&file, changed)?;
        let is_known = match tier(mutation) {
            Tier::Network => true,
            Tier::Program => mutation.file.starts_with("proxy-ebpf/"),
            Tier::Library => false,
        };
        let verdict = if is_known {
            self.run(mutation, program)
        } else {
            self.build(mutation).and_then(|program| self.run(mutation, &program))
        };
        fs::write(&file, whole)?;
        verdict
    }

    fn run(&self, mutation: &Mutation, program: &Path) -> Result<Verdict> {
        let (shell, name) = (&self.copy.shell, &mutation.test);
        let command = cmd!(shell, "{program} {name} --test-threads=1").quiet().ignore_status();
        let command = match tier(mutation) {
            Tier::Program => command.env("SLUICE_BPF_OBJECT", self.build_object()?),
            Tier::Network => command.env(test::AGENT, test::build_agent(&self.copy, &[])?),
            Tier::Library => command,
        };
        let _package = shell.push_dir(self.copy.root.join(package(mutation)));
        let output = command.output()?;
        let text = [output.stdout, output.stderr].concat();
        Ok(Verdict::of(&String::from_utf8_lossy(&text)))
    }

    /// The program that the test is in.
    fn build(&self, mutation: &Mutation) -> Result<PathBuf> {
        let built = match target(mutation) {
            Some(target) => test::build(&self.copy, &[target.to_owned()])?,
            None => self.copy.executables(&["test", "--no-run", "--package", package(mutation), "--lib"])?,
        };
        let name = target(mutation);
        let program = built.into_iter().find(|program| name.is_none_or(|name| program.name == name));
        Ok(program.with_context(|| format!("{} belongs to no test program", mutation.source))?.path)
    }

    /// The programs for the kernel, apart from the agent.
    fn build_object(&self) -> Result<PathBuf> {
        let target = self.copy.target.join("bpf");
        Toolchain::find()?.build(&self.copy.root, ("proxy-ebpf", "sluice-bpf"), &[], std::env::consts::ARCH, &target)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let leftover = if self.keep { &self.copy.root } else { &self.directory };
        if let Err(error) = remove(leftover) {
            eprintln!("error: {} is left behind: {error}", leftover.display());
        }
    }
}

fn remove(directory: &Path) -> std::io::Result<()> {
    if directory.exists() { fs::remove_dir_all(directory) } else { Ok(()) }
}

/// The directory of the test's crate.
fn package(mutation: &Mutation) -> &str {
    mutation.source.split('/').next().unwrap_or_default()
}

/// The name of the test program, or none for tests that stand beside the code.
fn target(mutation: &Mutation) -> Option<&str> {
    let rest = mutation.source.strip_prefix("tests/tests/")?;
    rest.split(['/', '.']).next()
}

/// What a test runs.
enum Tier {
    /// The code it is built with.
    Library,
    /// The programs for the kernel, alone.
    Program,
    /// The agent.
    Network,
}

fn tier(mutation: &Mutation) -> Tier {
    match target(mutation) {
        Some(target) if target.starts_with("program") => Tier::Program,
        Some(target) if target != "agent_dataplane" => Tier::Network,
        _ => Tier::Library,
    }
}
