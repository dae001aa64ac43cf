//! A place for agents without a lab around them, and an agent that runs in it: for what can be seen in its maps and its log.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use aya::maps::{HashMap, Map, MapData};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use proxy_common::{
    addr::{Ipv4, Protocol},
    service::{Frontend, Service},
};
use tempfile::TempDir;

use crate::{
    api::ApiServer,
    lab::{agent::sluice_program, cgroup::Cgroup, pins::PinDirectory},
    netns::Namespace,
    patience::wait_until,
    picture::{Maps, Picture},
};

const USUAL: Duration = Duration::from_secs(20);

/// A network namespace, a cgroup and a pin path for agents, one after the other.
#[derive(Debug)]
pub struct Sandbox {
    /// Where agents and servers run.
    pub namespace: Namespace,
    /// Whose sockets are translated.
    pub cgroup: Cgroup,
    /// Where agents pin.
    pub pins: PinDirectory,
    /// For files of the test's, and for the agents' log.
    pub directory: TempDir,
}

impl Sandbox {
    /// An empty one.
    pub fn new() -> Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let namespace = Namespace::new("agent")?;
        Ok(Self {
            namespace,
            cgroup: Cgroup::new(1000 + number)?,
            pins: PinDirectory::new(1000 + number, "agent")?,
            directory: TempDir::new()?,
        })
    }

    /// An API server in it.
    pub fn server(&self) -> Result<ApiServer> {
        self.namespace.run(ApiServer::start)?
    }

    /// Starts an agent with these arguments.
    pub fn agent(&self, source: &[&str]) -> Result<Agent> {
        let mut command = self.command(source)?;
        command.arg("--cgroup").arg(self.cgroup.path());
        self.start(command)
    }

    /// An agent's command line but for the cgroup.
    pub fn command(&self, arguments: &[&str]) -> Result<Command> {
        self.command_of(&sluice_program()?, arguments)
    }

    /// That of another binary.
    pub fn command_of(&self, program: &Path, arguments: &[&str]) -> Result<Command> {
        let mut command = self.namespace.command(program)?;
        command.args(["run", "-v", "--hostname-override", "here"]).args(arguments);
        command.arg("--pin-path").arg(self.pins.path());
        command.env_remove("KUBECONFIG").env_remove("NODE_NAME");
        Ok(command)
    }

    /// Runs a command. It inherits the capabilities and the mounts of the calling thread.
    pub fn start(&self, mut command: Command) -> Result<Agent> {
        let log = self.directory.path().join("log");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(File::create(&log)?);
        Ok(Agent { child: command.spawn().context("cannot run sluice")?, log })
    }

    /// What the Services in its kernel mean; nothing as long as there are no maps.
    pub fn picture(&self) -> Result<Picture> {
        if !self.pins.path().join("maps/SLOTS").exists() {
            return Ok(Picture::new());
        }
        Maps::open(self.pins.path())?.picture()
    }

    /// Waits until the picture is so.
    pub fn wait_for_picture(&self, what: &str, condition: impl Fn(&Picture) -> bool) -> Result<Picture> {
        let look = || self.picture().ok().filter(|picture| condition(picture));
        let waited = wait_until(what, USUAL, look);
        waited.with_context(|| format!("the kernel holds {:#?}", self.picture()))
    }

    /// `SERVICES_V4` as it is now, without what stands for undefined ports; empty as long as there is no map.
    pub fn services(&self) -> Result<Vec<(Frontend<Ipv4>, Service)>> {
        let path = self.pins.path().join("maps/SERVICES_V4");
        if !path.exists() {
            return Ok(Vec::new());
        }
        let map: HashMap<_, Frontend<Ipv4>, Service> = Map::HashMap(MapData::from_pin(path)?).try_into()?;
        let entries: Vec<_> = map.iter().collect::<Result<_, _>>()?;
        Ok(entries.into_iter().filter(|(frontend, _)| frontend.proto != Protocol::Any).collect())
    }

    /// Waits until `SERVICES_V4` is so; returns how long it took.
    pub fn wait_for_services(&self, what: &str, condition: impl Fn(&[Service]) -> bool) -> Result<Duration> {
        let began = Instant::now();
        wait_until(what, USUAL, || {
            let services: Vec<Service> = self.services().ok()?.into_iter().map(|(_, service)| service).collect();
            condition(&services).then_some(())
        })?;
        Ok(began.elapsed())
    }
}

/// A running agent; killed when dropped.
#[derive(Debug)]
pub struct Agent {
    child: Child,
    log: PathBuf,
}

impl Agent {
    /// Everything it has said.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// How often it has said so.
    pub fn count(&self, words: &str) -> usize {
        self.log().matches(words).count()
    }

    /// Its process.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits until it has said so.
    pub fn wait_for(&self, words: &str) -> Result<()> {
        self.wait_for_count(words, 1)
    }

    /// Waits until it has said so that often.
    pub fn wait_for_count(&self, words: &str, count: usize) -> Result<()> {
        let waited =
            wait_until(&format!("the agent to say {words:?}"), USUAL, || (self.count(words) >= count).then_some(()));
        waited.with_context(|| format!("its log:\n{}", self.log()))
    }

    /// Waits for it to end by itself: its exit code.
    pub fn ended(&mut self) -> Result<i32> {
        let waited = wait_until("the agent to end", USUAL, || self.child.try_wait().ok().flatten());
        let status = waited.with_context(|| format!("its log:\n{}", self.log()))?;
        status.code().context("the agent was killed")
    }

    /// Ends it with SIGTERM: its exit code.
    pub fn terminate(mut self) -> Result<i32> {
        self.signal(Signal::SIGTERM)?;
        self.ended()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(Pid::from_raw(self.child.id().cast_signed()), signal)?)
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("{}", self.log());
        }
    }
}

/// What a process has in memory that no file backs, in KiB.
pub fn anonymous_memory(process: u32) -> Result<u64> {
    let path = format!("/proc/{process}/status");
    let status = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).context("no RssAnon")?;
    Ok(line.trim().trim_end_matches("kB").trim().parse()?)
}
