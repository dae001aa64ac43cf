//! A node without a lab around it, whose agent is started by the manifest: for what can be seen of the agent itself.

use std::{
    collections::BTreeMap,
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result};
use tempfile::TempDir;

use super::{ApiAccess, Container, Host, Manifest, TOKEN};
use crate::{
    api::{
        ApiServer, Authority,
        object::{NODE, node, service, slice},
    },
    lab::agent::{IN_SYNC, Log, sluice_program},
    patience::wait_until,
    picture::{Maps, Picture},
    sandbox::Sandbox,
};

const USUAL: Duration = Duration::from_mins(1);

/// A node and an API server.
#[derive(Debug)]
pub struct Node {
    /// Its network, its cgroup and what is pinned.
    pub sandbox: Sandbox,
    /// The API server. It has a Service `web`.
    pub server: ApiServer,
    /// What is shipped.
    pub manifest: Manifest,
    /// The node, as its kubelet knows it.
    pub host: Host,
    /// What the agent keeps on it.
    pub state: TempDir,
}

/// The agent's pod.
#[derive(Debug)]
pub struct Pod {
    /// Its container.
    pub container: Container,
    /// What it says.
    pub log: Log,
}

impl Node {
    /// A node whose API server listens on a loopback address.
    pub fn new() -> Result<Self> {
        Self::with_server_at((Ipv4Addr::LOCALHOST, 0).into())
    }

    /// A node whose API server listens on an address of the node, which it is given.
    pub fn with_server_at(address: SocketAddr) -> Result<Self> {
        let sandbox = Sandbox::new()?;
        if !address.ip().is_loopback() {
            sandbox.namespace.ip(&format!("address add {} dev lo", address.ip()))?;
        }
        let server = sandbox.namespace.run(|| ApiServer::start_at(address))??;
        let authority = Authority::new()?;
        server.secure(&authority);
        server.require_token(TOKEN);
        server.apply(node())?;
        server.apply(service("web", "10.96.0.2"))?;
        server.apply(slice("web", &["10.0.0.1"]))?;
        let state = tempfile::tempdir()?;
        let paths = [
            ("/sys/fs/bpf", sandbox.pins.path()),
            ("/sys/fs/cgroup", sandbox.cgroup.path()),
            ("/var/lib/sluice", state.path()),
        ];
        let host = Host {
            name: NODE.into(),
            namespace: sandbox.namespace.path(),
            cgroup: sandbox.cgroup.child("pod")?,
            address: IpAddr::V4(Ipv4Addr::LOCALHOST),
            paths: paths.into_iter().map(|(path, stands_for)| (path.into(), stands_for.into())).collect(),
            config_maps: BTreeMap::new(),
            api: ApiAccess { address: server.address(), authority: authority.pem().into() },
        };
        Ok(Self { sandbox, server, manifest: Manifest::shipped()?, host, state })
    }

    /// Starts the agent, with further arguments.
    pub fn start(&self, more: &[&str]) -> Result<Pod> {
        self.run(&sluice_program()?, more)
    }

    /// Starts another program in the agent's place.
    pub fn run(&self, program: &Path, more: &[&str]) -> Result<Pod> {
        let more: Vec<String> = more.iter().map(|word| (*word).to_owned()).collect();
        let mut container = Container::start(&self.manifest, &self.host, program, &more)?;
        let log = Log::of(&mut container.child)?;
        Ok(Pod { container, log })
    }

    /// What the Services in its kernel mean; nothing as long as there are no maps.
    pub fn picture(&self) -> Result<Picture> {
        let pins = self.pins();
        if pins.join("maps/SLOTS").exists() { Maps::open(&pins)?.picture() } else { Ok(Picture::new()) }
    }

    /// Waits until the kernel sends a frontend to an endpoint, and to no other.
    pub fn wait_for_endpoints(&self, frontend: &str, endpoints: &[&str]) -> Result<()> {
        let leads_there = |picture: Picture| {
            let internal = &picture.get(frontend)?.internal;
            internal.iter().eq(endpoints.iter()).then_some(())
        };
        let waited =
            wait_until(&format!("{frontend} to lead to {endpoints:?}"), USUAL, || leads_there(self.picture().ok()?));
        waited.with_context(|| format!("the kernel holds {:#?}", self.picture()))
    }

    /// Takes away what a reboot does: everything that is pinned.
    pub fn reboot(&self) -> Result<()> {
        fs::remove_dir_all(self.pins()).context("what is pinned stays")
    }

    fn pins(&self) -> PathBuf {
        self.sandbox.pins.path().join("sluice")
    }
}

impl Pod {
    /// Waits until it has said so.
    pub fn wait_for(&self, words: &str) -> Result<()> {
        let waited = wait_until(&format!("the agent to say {words:?}"), USUAL, || self.says(words).then_some(()));
        waited.with_context(|| self.text())
    }

    /// Waits until the first complete picture is in the kernel.
    pub fn wait_until_in_sync(&self) -> Result<()> {
        self.wait_for(IN_SYNC)
    }

    /// Whether it has said so.
    pub fn says(&self, words: &str) -> bool {
        self.log.lines().iter().any(|line| line.contains(words))
    }

    /// Everything it has said.
    pub fn text(&self) -> String {
        self.log.lines().join("\n")
    }
}
