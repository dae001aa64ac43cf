//! `traps`: whether a test notices when the handling of a trap is removed. In comes the table of `tests/traps.yaml`; a
//! scratch copy of the repository is changed by one entry after the other, and the entry's test has to fail each time.

use std::{
    collections::BTreeSet,
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
use xshell::{Cmd, Shell, cmd};

use crate::{
    machine,
    mutation::Mutation,
    setup,
    summary::Totals,
    test,
    workspace::{Executable, Workspace},
};

/// Remove the handling of traps that other proxies fell into, one by one, and see a test fail each time.
#[derive(Args)]
pub(crate) struct Arguments {
    /// Numbers of traps; all if none is named.
    traps: Vec<u32>,
    /// Leave what was built for the next time.
    #[arg(long)]
    keep: bool,
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
    let sound = scratch.sound(&mutations);
    let mut noticed = 0;
    for mutation in &mutations {
        let verdict = if sound.contains(&mutation.test) {
            scratch.try_out(mutation)
        } else {
            Err(anyhow!("{} of {} fails as it is, too", mutation.test, mutation.source))
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

    /// The tests that pass as long as nothing is removed; all at once, so that everything is built once for it.
    fn sound(&self, mutations: &[Mutation]) -> BTreeSet<String> {
        let mut tried = BTreeSet::new();
        let first = mutations.iter().filter(|mutation| tried.insert(&mutation.test));
        let sound = first.filter(|mutation| matches!(self.run(mutation), Ok(Verdict::Passed)));
        sound.map(|mutation| mutation.test.clone()).collect()
    }

    /// What the test says to the copy without the handling.
    fn try_out(&self, mutation: &Mutation) -> Result<Verdict> {
        let file = self.copy.root.join(&mutation.file);
        let (whole, changed) = (fs::read_to_string(&file)?, mutation.applied(&self.copy.root)?);
        fs::write(&file, changed)?;
        let verdict = self.run(mutation);
        fs::write(&file, whole)?;
        verdict
    }

    fn run(&self, mutation: &Mutation) -> Result<Verdict> {
        let program = self.build(mutation).context("it was not built")?;
        let shell = &self.copy.shell;
        let (path, name) = (&program.path, &mutation.test);
        let _package = shell.push_dir(self.copy.root.join(package(mutation)));
        let mut command: Cmd<'_> = cmd!(shell, "{path} {name} --test-threads=1").quiet().ignore_status();
        if needs_agent(mutation) {
            command = command.env(test::AGENT, test::build_agent(&self.copy)?);
        }
        let output = command.output()?;
        let text = [output.stdout, output.stderr].concat();
        Ok(Verdict::of(&String::from_utf8_lossy(&text)))
    }

    fn build(&self, mutation: &Mutation) -> Result<Executable> {
        let built = match target(mutation) {
            Some(target) => {
                test::build(&self.copy, &[target.to_owned()])?.into_iter().find(|executable| executable.name == target)
            }
            None => self
                .copy
                .executables(&["test", "--no-run", "--package", package(mutation), "--lib"])?
                .into_iter()
                .next(),
        };
        built.with_context(|| format!("{} belongs to no test program", mutation.source))
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

/// Tests of pure functions and those of programs alone start no agent.
fn needs_agent(mutation: &Mutation) -> bool {
    target(mutation).is_some_and(|target| !target.starts_with("program"))
}

/// What became of a test.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// It failed, and said this.
    Noticed(String),
    Passed,
    /// The kernel did not take the changed program, so that its behaviour was never seen.
    NotLoaded(String),
    NotRun(String),
}

impl Verdict {
    /// Reads it in what a test program has said.
    fn of(output: &str) -> Self {
        const NOT_LOADED: [&str; 3] = ["BPF_PROG_LOAD", "Verifier output", "verifier log"];
        let mut totals = Totals::default();
        output.lines().for_each(|line| totals.read(line));
        if totals.failed + totals.passed == 0 {
            Self::NotRun(output.to_owned())
        } else if totals.failed == 0 {
            Self::Passed
        } else if NOT_LOADED.iter().any(|words| output.contains(words)) {
            Self::NotLoaded(output.to_owned())
        } else {
            Self::Noticed(complaint(output))
        }
    }
}

/// The first line of what a failed test complains about.
fn complaint(output: &str) -> String {
    let mut lines = output.lines().skip_while(|line| !line.contains("panicked at") && !line.starts_with("Error: "));
    let first = lines.next().unwrap_or("it says nothing");
    if first.contains("panicked at") { lines.next().unwrap_or(first).to_owned() } else { first.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::{Verdict, complaint};

    #[test]
    fn a_failure_is_told_from_what_proves_nothing() {
        let failed = "thread 'a' panicked at a.rs:1:\nassertion failed: b\ntest result: FAILED. 0 passed; 1 failed;";
        assert_eq!(Verdict::of(failed), Verdict::Noticed("assertion failed: b".into()));
        assert_eq!(Verdict::of("test result: ok. 1 passed; 0 failed;"), Verdict::Passed);
        assert!(matches!(Verdict::of("test result: ok. 0 passed; 0 failed;"), Verdict::NotRun(_)));
        assert!(matches!(Verdict::of(""), Verdict::NotRun(_)));
        let refused = "Error: the BPF_PROG_LOAD syscall failed\ntest result: FAILED. 0 passed; 1 failed;";
        assert!(matches!(Verdict::of(refused), Verdict::NotLoaded(_)));
    }

    #[test]
    fn what_a_test_returns_is_a_complaint() {
        assert_eq!(complaint("---- stdout ----\nError: waited in vain\n\nCaused by:"), "Error: waited in vain");
    }
}
