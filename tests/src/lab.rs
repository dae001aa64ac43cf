//! Two nodes, their pods and a client outside: network namespaces on one wire, with real sockets in all of them.
//!
//! ```text
//!   client ──┐                    ┌── uplink [node-a] ── a veth and a route per pod ── a1 a2 client-a
//!            ├─ bridge in "wire" ─┤
//!  gateway ──┘                    └── uplink [node-b] ── bridge cni0 ─────────────── b1 b2 client-b
//! ```
//!
//! Each node has a cgroup (its own processes in `host`, its pods' beside it), a directory on bpffs, and at most one
//! agent. Everything goes away with the [`Lab`].

pub mod address;
pub mod agent;
pub mod cgroup;
pub mod changed;
pub mod cluster;
pub mod device;
pub mod errors;
pub mod installed;
pub mod kube_proxy;
mod leftover;
pub mod load;
pub mod manifest;
mod maps;
pub mod memory;
pub mod pins;
mod queues;
pub mod succession;
pub mod survey;
mod topology;
pub mod tunnel;

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
};

use anyhow::{Context as _, Result};
use tempfile::TempDir;

use self::{
    address::{Addresses, NODES, NodePlan},
    agent::{Agent, AgentOptions},
    cgroup::Cgroup,
    device::XdpPass,
    installed::is_installed,
    pins::PinDirectory,
};
use crate::{
    netns::Namespace,
    traffic::{place::Place, server::NO_CHECKSUM_PORT},
};

/// What every pod listens on, TCP and UDP.
pub const POD_PORTS: [u16; 4] = [7007, 8080, 9090, NO_CHECKSUM_PORT];

/// Name globs of the devices that lead to pods, on every node.
pub const POD_DEVICES: &str = "pod-*";

/// How a node's uplink is translated, and what its neighbours do to suit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UplinkMode {
    /// By native XDP: frames reach the node with complete checksums, as from a physical card, and the device at the
    /// other end of the veth takes frames that were sent without an skb.
    Xdp,
    /// By TC: checksums and segmentation are left to devices on the way, so that frames arrive unfinished.
    Tc,
}

impl UplinkMode {
    /// As on the agent's command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Xdp => "xdp",
            Self::Tc => "tc",
        }
    }
}

/// What can be chosen about a lab.
#[derive(Clone, Copy, Debug)]
pub struct LabOptions {
    /// Uplinks of node-a and node-b.
    pub uplinks: [UplinkMode; 2],
    /// How pods reach those of the other node.
    pub between: Between,
}

/// How pods reach those of another node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Between {
    /// By routes over the wire.
    #[default]
    Wire,
    /// By routes over a VXLAN device, as flannel makes it.
    Overlay,
}

impl Default for LabOptions {
    fn default() -> Self {
        Self { uplinks: [UplinkMode::Xdp, UplinkMode::Tc], between: Between::default() }
    }
}

/// The whole lab. Fields are dropped in this order: agents and residents before the cgroups they are in.
#[derive(Debug)]
pub struct Lab {
    /// The nodes, in the order of [`NODES`].
    pub nodes: [Node; 2],
    /// The client on the wire.
    pub client: Place,
    /// The switch, and everybody's default gateway. Nothing listens there unless it is told to.
    pub gateway: Place,
    _cgroup: Cgroup,
}

/// A node with its pods.
#[derive(Debug)]
pub struct Node {
    /// Its place in the address plan.
    pub plan: &'static NodePlan,
    /// How its uplink is translated.
    pub uplink: UplinkMode,
    /// How its pods reach those of the other node.
    pub between: Between,
    /// Where its own processes are.
    pub host: Place,
    /// Its pods, in the order of the plan.
    pub pods: Vec<Place>,
    agent: Mutex<Option<Arc<Agent>>>,
    pins: PinDirectory,
    pin_path: PathBuf,
    /// What agents that are installed keep for each other.
    state: TempDir,
    cgroup: PathBuf,
    _port: Option<XdpPass>,
}

impl Lab {
    /// Builds it, with servers in every pod.
    pub fn new(options: LabOptions) -> Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        crate::netns::require_root()?;
        let cgroup = Cgroup::new(number)?;
        let wire = topology::wire()?;
        let client = Place::new(topology::client(&wire)?, cgroup.child("outside")?)?;
        let [a, b] = [0, 1].map(|index| Node::new(&NODES[index], options, &wire, &cgroup, number));
        let gateway = Place::new(wire, cgroup.child("gateway")?)?;
        Ok(Self { nodes: [a?, b?], client, gateway, _cgroup: cgroup })
    }

    /// Starts an agent on each node and waits until both are in sync.
    pub fn start_agents(&self, source: &Path, options: &AgentOptions) -> Result<()> {
        for node in &self.nodes {
            node.launch_agent(source, options)?;
        }
        self.nodes.iter().try_for_each(|node| node.agent()?.wait_until_in_sync())
    }

    /// A node by name.
    pub fn node(&self, name: &str) -> Result<&Node> {
        self.nodes.iter().find(|node| node.plan.name == name).with_context(|| format!("the lab has no node {name}"))
    }

    /// A pod, a node's host or the client by name.
    pub fn place(&self, name: &str) -> Result<&Place> {
        self.places().find(|place| place.name() == name).with_context(|| format!("the lab has no {name}"))
    }

    /// All places: the client, the nodes, the pods.
    pub fn places(&self) -> impl Iterator<Item = &Place> {
        let pods = self.nodes.iter().flat_map(|node| &node.pods);
        std::iter::once(&self.client).chain(self.nodes.iter().map(|node| &node.host)).chain(pods)
    }
}

impl Node {
    fn new(plan: &'static NodePlan, options: LabOptions, wire: &Namespace, parent: &Cgroup, lab: u32) -> Result<Self> {
        let uplink = options.uplinks[usize::from(plan.number) - 1];
        let namespace = topology::node(plan, options.between, wire)?;
        let port = topology::ready_port(plan, uplink, wire)?;
        let host = Place::new(namespace, parent.child(&format!("{}/host", plan.name))?)?;
        let pods = plan.pods.iter().map(|(pod, number)| {
            let namespace = topology::pod(plan, pod, *number, host.namespace())?;
            let place = Place::new(namespace, parent.child(&format!("{}/{pod}", plan.name))?)?;
            place.serve(&POD_PORTS)?;
            Ok(place)
        });
        let pods = pods.collect::<Result<_>>()?;
        let pins = PinDirectory::new(lab, plan.name)?;
        // Below what the manifest's agent takes for the root of the BPF file system.
        let pin_path = if is_installed() { pins.path().join("sluice") } else { pins.path().into() };
        let cgroup = parent.child(plan.name)?;
        Ok(Self {
            plan,
            uplink,
            between: options.between,
            host,
            pods,
            agent: Mutex::default(),
            pins,
            pin_path,
            state: tempfile::tempdir()?,
            cgroup,
            _port: port,
        })
    }

    /// Its addresses on the wire.
    pub fn addresses(&self) -> Addresses {
        address::on_wire(self.plan.host)
    }

    /// Where its agent pins.
    pub fn pins(&self) -> &Path {
        &self.pin_path
    }

    /// The cgroup that holds its own processes and its pods'.
    pub fn cgroup(&self) -> &Path {
        &self.cgroup
    }

    /// The agent, if one was started and not killed.
    pub fn agent(&self) -> Result<Arc<Agent>> {
        let agent = self.agent.lock().unwrap_or_else(PoisonError::into_inner);
        agent.clone().with_context(|| format!("{} has no agent", self.plan.name))
    }

    /// Starts an agent, after killing the one before, and does not wait for it.
    pub fn launch_agent(&self, source: &Path, options: &AgentOptions) -> Result<()> {
        self.kill_agent();
        let agent = Agent::start(self, source, options)?;
        *self.agent.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(agent));
        Ok(())
    }

    /// Starts an agent, after killing the one before, and waits until it is in sync.
    pub fn start_agent(&self, source: &Path, options: &AgentOptions) -> Result<()> {
        self.launch_agent(source, options)?;
        self.agent()?.wait_until_in_sync()
    }

    /// Kills the agent as SIGKILL does, if there is one; the kernel keeps what it has made.
    pub fn kill_agent(&self) {
        if let Some(agent) = self.agent.lock().unwrap_or_else(PoisonError::into_inner).take() {
            agent.kill();
        }
    }
}
