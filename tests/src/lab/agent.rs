//! A Sluice agent on a node of the lab.

use std::{
    env,
    io::{BufRead as _, BufReader, Read},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::{prctl, signal::Signal};

use super::{
    Between, Node, POD_DEVICES,
    installed::{Installed, is_installed},
};
use crate::{install::Container, patience::wait_until};

/// What the agent logs once the first complete picture is in the kernel and every program is attached.
pub const IN_SYNC: &str = "in sync";

/// Whose sockets are translated by the cgroup hooks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SocketLb {
    /// The node's processes and the pods'.
    #[default]
    All,
    /// The node's processes.
    Host,
    /// Nobody's.
    Off,
}

impl SocketLb {
    /// As on the agent's command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::All => "all",
            Self::Host => "host",
            Self::Off => "off",
        }
    }
}

/// What can be chosen about an agent.
#[derive(Clone, Debug, Default)]
pub struct AgentOptions {
    /// Whose sockets are translated.
    pub socket_lb: SocketLb,
    /// More flags, as they are.
    pub more: Vec<String>,
    /// Another binary than [`sluice_program`].
    pub program: Option<PathBuf>,
}

/// A running agent. Dropping the handle kills it with SIGKILL. It does not outlive the thread that started it.
#[derive(Debug)]
pub struct Agent {
    process: Mutex<Process>,
    id: u32,
    log: Log,
}

/// How it was started.
#[derive(Debug)]
enum Process {
    /// As a program of the node.
    Program(Child),
    /// By the rendered manifest.
    Installed(Box<Installed>),
}

impl Process {
    fn child(&mut self) -> &mut Child {
        match self {
            Self::Program(child) => child,
            Self::Installed(installed) => &mut installed.container.child,
        }
    }

    /// How often its liveness probe has failed for good while it ran.
    fn restarts(&mut self) -> u32 {
        match self {
            Self::Program(_) => 0,
            Self::Installed(installed) => {
                let Container { child, probes, .. } = &mut installed.container;
                if matches!(child.try_wait(), Ok(None)) { probes.restarts() } else { 0 }
            }
        }
    }
}

/// What a process has said so far.
#[derive(Clone, Debug, Default)]
pub struct Log(Arc<Mutex<Vec<String>>>);

static PROGRAM: OnceLock<PathBuf> = OnceLock::new();

/// Names the agent's binary, before the first agent is started.
pub fn use_program(path: &Path) -> Result<()> {
    let path = path.canonicalize().with_context(|| format!("no agent at {}", path.display()))?;
    PROGRAM.set(path).ok().context("the agent's binary was named twice")
}

/// The agent's binary: the one that was named, `SLUICE_BIN`, or the one that lies beside or above the running program, as cargo puts it.
pub fn sluice_program() -> Result<PathBuf> {
    if let Some(path) = PROGRAM.get() {
        return Ok(path.clone());
    }
    if let Some(path) = env::var_os("SLUICE_BIN") {
        return Ok(path.into());
    }
    let own = env::current_exe().context("cannot tell which program this is")?;
    let beside = own.ancestors().skip(1).take(2).map(|directory| directory.join("sluice"));
    let found = beside.into_iter().find(|path| path.is_file());
    found.context("the agent is not built: cargo build -p proxy-userspace --bin sluice, or set SLUICE_BIN")
}

/// An agent whose maps have another layout, which `cargo xtask test` builds beside the usual one.
pub fn other_layout_program() -> Result<PathBuf> {
    let path = sluice_program()?.with_file_name("sluice-other-layout");
    ensure!(path.is_file(), "there is no {}: run the test by `cargo xtask test`, which builds it", path.display());
    Ok(path)
}

impl Agent {
    pub(super) fn start(node: &Node, source: &Path, options: &AgentOptions) -> Result<Self> {
        let mut process = if is_installed() {
            Process::Installed(Box::new(Installed::start(node, source, &arguments(node, options))?))
        } else {
            let mut command = run_command(node, source, options)?;
            command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
            Process::Program(command.spawn().context("cannot run sluice")?)
        };
        let log = Log::of(process.child())?;
        Ok(Self { id: process.child().id(), process: Mutex::new(process), log })
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Ends it with SIGKILL, unless it has ended.
    ///
    /// # Panics
    ///
    /// If its liveness probe has failed so often that kubelet would have started it anew.
    pub fn kill(&self) {
        let mut process = self.process.lock().unwrap_or_else(PoisonError::into_inner);
        let restarts = process.restarts();
        assert!(restarts == 0 || thread::panicking(), "kubelet would have started it anew {restarts} times");
        let child = process.child();
        if let Err(error) = child.kill().and_then(|()| child.wait()) {
            eprintln!("an agent stays behind: {error}");
        }
    }

    /// Waits until it has said so.
    pub fn wait_until_in_sync(&self) -> Result<()> {
        self.wait_for_line(IN_SYNC, Duration::from_secs(20))
    }

    /// Waits for a line with these words; `usual` as in [`wait_until`].
    pub fn wait_for_line(&self, words: &str, usual: Duration) -> Result<()> {
        let said = || (self.says(words) || self.has_ended()).then_some(());
        let waited = wait_until(&format!("the agent to say {words:?}"), usual, said);
        if waited.is_ok() && self.says(words) {
            return Ok(());
        }
        let reason =
            waited.err().map_or_else(|| format!("the agent ended before it said {words:?}"), |e| e.to_string());
        bail!("{reason}; its log:\n{}", self.log());
    }

    /// Waits for it to end by itself: its exit code; none if it was killed.
    pub fn ended(&self) -> Result<Option<i32>> {
        wait_until("the agent to end", Duration::from_secs(20), || {
            let mut process = self.process.lock().unwrap_or_else(PoisonError::into_inner);
            process.child().try_wait().ok().flatten().map(|status| status.code())
        })
    }

    /// Whether a line with these words was logged.
    pub fn says(&self, words: &str) -> bool {
        self.log.lines().iter().any(|line| line.contains(words))
    }

    /// Everything it has logged.
    pub fn log(&self) -> String {
        self.log.lines().join("\n")
    }

    /// Its process is a zombie or gone.
    fn has_ended(&self) -> bool {
        let status = std::fs::read_to_string(format!("/proc/{}/stat", self.id())).unwrap_or_default();
        status.rsplit(") ").next().is_none_or(|rest| rest.is_empty() || rest.starts_with('Z'))
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.kill();
        if thread::panicking() {
            eprintln!("log of the agent that was process {}:\n{}", self.id(), self.log());
        }
    }
}

impl Log {
    /// Of a process whose output is piped.
    pub fn of(child: &mut Child) -> Result<Self> {
        let log = Self::default();
        log.collect(child.stdout.take().context("the agent has no stdout")?);
        log.collect(child.stderr.take().context("the agent has no stderr")?);
        Ok(log)
    }

    /// Its lines.
    pub fn lines(&self) -> MutexGuard<'_, Vec<String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes lines until the pipe closes.
    fn collect(&self, pipe: impl Read + Send + 'static) {
        let log = self.clone();
        thread::spawn(move || {
            for line in BufReader::new(pipe).lines().map_while(Result::ok) {
                log.lines().push(line);
            }
        });
    }
}

fn run_command(node: &Node, source: &Path, options: &AgentOptions) -> Result<Command> {
    let program = options.program.clone().map_or_else(sluice_program, Ok)?;
    let mut command = node.host.command(program)?;
    // SAFETY: between fork and exec the closure makes one system call.
    unsafe { command.pre_exec(|| Ok(prctl::set_pdeathsig(Signal::SIGKILL)?)) };
    // As with residents: an interrupt from the terminal is not for it.
    command.process_group(0);
    command.arg("run").arg("--source").arg(format!("file:{}", source.display()));
    command.args(["--hostname-override", node.plan.name]);
    command.arg("--pin-path").arg(node.pins()).arg("--cgroup").arg(node.cgroup());
    command.args(arguments(node, options));
    Ok(command)
}

/// What every agent of the node is told, however it is started.
fn arguments(node: &Node, options: &AgentOptions) -> Vec<String> {
    let uplinks = if node.between == Between::Wire { ["--uplinks", "uplink"].as_slice() } else { &[] };
    let devices = ["--pod-devices", POD_DEVICES, "--uplink-mode", node.uplink.name()];
    let traffic = ["--socket-lb", options.socket_lb.name(), "--node-port-range", "30000-32767"];
    let own = devices.iter().chain(uplinks).chain(&traffic).map(|word| (*word).to_owned());
    own.chain(options.more.iter().cloned()).collect()
}

/// Runs `sluice cleanup` on a node.
pub fn clean_up(node: &Node) -> Result<Output> {
    let mut command = node.host.command(sluice_program()?)?;
    command.arg("cleanup").arg("--pin-path").arg(node.pins()).arg("--cgroup").arg(node.cgroup());
    command.output().context("cannot run sluice cleanup")
}
