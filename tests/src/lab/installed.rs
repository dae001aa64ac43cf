//! Agents of the lab that are started by the rendered manifest: the whole suite of the lab is true of what is shipped then.

use std::{
    collections::BTreeMap,
    env,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};

use anyhow::{Result, bail};

use super::{Node, agent};
use crate::install::{Container, Feed, Host, Manifest};

/// Set to `manifest` where agents are to be started so.
pub const INSTALL: &str = "SLUICE_TEST_INSTALL";

static EVERY_LAB: AtomicBool = AtomicBool::new(false);

/// From now on the agents of this process's labs are started by the manifest.
pub fn install_all() {
    EVERY_LAB.store(true, Ordering::Relaxed);
}

/// Whether the lab's agents are started by the manifest, and ask an API server.
pub fn is_installed() -> bool {
    EVERY_LAB.load(Ordering::Relaxed) || env::var_os(INSTALL).is_some()
}

/// An agent's container, and the API server that it asks.
#[derive(Debug)]
pub(super) struct Installed {
    // Ends before its server.
    pub(super) container: Container,
    _feed: Feed,
}

impl Installed {
    /// Starts the container. A node's directories on bpffs and in the cgroup hierarchy are what the real paths lead to; further
    /// arguments follow those of the manifest, as the chart's `extraArgs` do.
    pub(super) fn start(node: &Node, source: &Path, arguments: &[String]) -> Result<Self> {
        if env::var_os(INSTALL).is_some_and(|mode| mode != "manifest") {
            bail!("{INSTALL} is none of: manifest");
        }
        let feed = Feed::start(node.host.namespace(), source)?;
        let host = Host {
            name: node.plan.name.into(),
            namespace: node.host.namespace().path(),
            cgroup: node.host.cgroup().into(),
            address: IpAddr::V4(node.addresses().v4),
            paths: paths(node),
            config_maps: BTreeMap::new(),
            api: feed.access(),
        };
        let container = Container::start(&Manifest::shipped()?, &host, &agent::sluice_program()?, arguments)?;
        Ok(Self { container, _feed: feed })
    }
}

/// What of a node lies where.
fn paths(node: &Node) -> BTreeMap<PathBuf, PathBuf> {
    let paths =
        [("/sys/fs/bpf", node.pins.path()), ("/sys/fs/cgroup", node.cgroup()), ("/var/lib/sluice", node.state.path())];
    paths.into_iter().map(|(path, stands_for)| (path.into(), stands_for.into())).collect()
}
