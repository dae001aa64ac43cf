//! `run`: the demonstration. Two nodes with an agent each, traffic to the Services of `examples/`, and what came of it;
//! in a virtual machine, or on the running kernel.

use std::{
    io::{IsTerminal as _, stdin, stdout},
    os::unix::process::CommandExt as _,
    path::PathBuf,
    process::{Command, ExitCode},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Args;
use xshell::cmd;

use crate::{
    guest::{Accelerator, Guest, quoted},
    kernel::Kernel,
    machine,
    rootfs::Rootfs,
    setup, test,
    workspace::Workspace,
};

/// Show Sluice at work: two nodes, their agents, traffic and a report, then a shell in it.
#[derive(Args)]
pub(crate) struct Arguments {
    /// 6.1, 6.12, 7.2, or the path of a bzImage.
    #[arg(long, default_value = "6.12")]
    kernel: String,
    /// Where the modules of a bzImage are.
    #[arg(long)]
    modules: Option<PathBuf>,
    /// On the running kernel, in network namespaces, instead of in a virtual machine.
    #[arg(long, conflicts_with = "kernel")]
    here: bool,
    /// Pods reach those of the other node over VXLAN.
    #[arg(long)]
    overlay: bool,
    /// Leave after the report, even where there is a terminal.
    #[arg(long)]
    exit: bool,
}

/// How long the demonstration may take where nobody watches.
const LIMIT: Duration = Duration::from_mins(30);

pub(crate) fn run(workspace: &Workspace, arguments: &Arguments) -> Result<ExitCode> {
    let lab = Lab::build(workspace, arguments)?;
    if arguments.here { lab.here(workspace) } else { lab.in_machine(workspace, arguments) }
}

/// The lab's program, and the agent it starts.
struct Lab {
    program: PathBuf,
    agent: PathBuf,
    /// With the examples and the rest.
    words: Vec<String>,
    has_shell: bool,
}

impl Lab {
    fn build(workspace: &Workspace, arguments: &Arguments) -> Result<Self> {
        if arguments.here {
            ensure!(machine::is_root(), "namespaces and BPF programs need root: run `cargo xtask run --here` as root");
            setup::ensure(workspace, &[setup::BPF, setup::KERNEL])?;
        } else {
            setup::ensure(workspace, &[setup::BPF, setup::KERNEL, setup::VM])?;
        }
        let agent = test::build_agent(workspace, &[])?;
        let built = workspace.executables(&["build", "--package", "tests", "--bin", "lab"])?;
        let program = built.into_iter().next().context("building the lab made no program")?.path;
        let has_shell = !arguments.exit && stdin().is_terminal() && stdout().is_terminal();
        let mut words = vec![program.display().to_string(), "--sluice".into(), agent.display().to_string()];
        words.extend(["--examples".into(), workspace.root.join("examples").display().to_string()]);
        words.extend(arguments.overlay.then(|| "--overlay".into()));
        words.extend(has_shell.then(|| "--shell".into()));
        Ok(Self { program, agent, words, has_shell })
    }

    fn here(&self, workspace: &Workspace) -> Result<ExitCode> {
        machine::mount_bpf(&workspace.shell)?;
        let error = Command::new(&self.program).args(&self.words[1..]).exec();
        bail!("cannot run {}: {error}", self.program.display())
    }

    fn in_machine(&self, workspace: &Workspace, arguments: &Arguments) -> Result<ExitCode> {
        let kernel = Kernel::find(workspace, &arguments.kernel, arguments.modules.as_deref())?;
        let mut rootfs = Rootfs::new(workspace)?;
        rootfs.program(&self.program)?;
        rootfs.program(&self.agent)?;
        rootfs.read_by_tests()?;
        rootfs.job(&self.job(workspace));
        let guest = Guest::new(workspace, &kernel, &rootfs, Accelerator::find(workspace, &kernel)?)?;
        println!("run: booting kernel {}; to leave it by force, kill qemu", kernel.name);
        let status = if self.has_shell { guest.run_in_terminal() } else { guest.run(LIMIT, |line| println!("{line}")) };
        status.map(ExitCode::from)
    }

    /// The lab; with a terminal of its own if there is one, so that its shell can stop programs.
    fn job(&self, workspace: &Workspace) -> String {
        let words: Vec<String> = self.words.iter().map(|word| quoted(word)).collect();
        let words = words.join(" ");
        let agent = quoted(&self.agent.to_string_lossy());
        let path = format!("ln -s {agent} /usr/local/bin/sluice\nexport {}=10\n", test::SLOWNESS);
        if self.has_shell {
            format!("{path}{}setsid cttyhack {words}\n", terminal(workspace))
        } else {
            path + &words + "\n"
        }
    }
}

/// Makes the serial line what the terminal around it is: it has no other way to know.
fn terminal(workspace: &Workspace) -> String {
    let name = std::env::var("TERM").unwrap_or_else(|_| "vt100".into());
    let size = cmd!(workspace.shell, "stty --file=/dev/tty size").quiet().ignore_stderr().read().unwrap_or_default();
    let size =
        size.split_once(' ').map_or(String::new(), |(rows, columns)| format!("stty rows {rows} cols {columns}\n"));
    format!("export TERM={}\n{size}", quoted(&name))
}
