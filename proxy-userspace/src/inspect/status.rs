//! How the dataplane of the node is: who keeps it, what is attached, how full the maps are.

use std::{net::IpAddr, path::Path};

use proxy_common::{
    addr::{Address as _, Ipv4, Ipv6, Port},
    node::{Node, TUNNELS, masquerade, newcomers},
};
use serde::Serialize;

use super::InspectError;
use crate::{
    confine,
    dataplane::{self, Fill, Observer, PinnedLink, Survey},
};

/// The node's dataplane.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Status {
    /// Who keeps the maps.
    pub agent: AgentStatus,
    /// Layout of the maps.
    pub layout: u32,
    /// Where the pins are.
    pub pin_path: String,
    /// What programs know of the node.
    pub node: NodeStatus,
    /// Programs that are attached. Filters of clsact (kernels before 6.6) have no pins and are not among them.
    pub attached: Vec<Attached>,
    /// How full the maps are.
    pub maps: Vec<MapFill>,
}

/// The agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct AgentStatus {
    /// It holds the lock of the pins. Without one, traffic goes on as the maps say, and nothing new is heard of.
    pub is_running: bool,
    /// Its version; empty if none has ever run.
    pub version: String,
    /// Its process, in its own namespace.
    pub pid: u32,
    /// Seconds since it started.
    pub started_seconds_ago: Option<u64>,
    /// Seconds since it was last seen at work; renewed every ten.
    pub alive_seconds_ago: Option<u64>,
    /// Seconds since its source had news.
    pub heard_seconds_ago: Option<u64>,
    /// Seconds since news was completely in the kernel.
    pub synced_seconds_ago: Option<u64>,
    /// Attempts that have failed since.
    pub failures: u32,
    /// The algorithm of Services that ask for none.
    pub algorithm: String,
    /// What it has given up.
    pub confined: Vec<&'static str>,
}

/// What programs know of the node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NodeStatus {
    /// Addresses that masqueraded flows bear.
    pub masquerade_addresses: Vec<IpAddr>,
    /// First and last port that may be a NodePort.
    pub node_ports: [u16; 2],
    /// First and last source port of masqueraded flows.
    pub source_ports: [u16; 2],
    /// Whatever goes to a ClusterIP is masqueraded.
    pub masquerades_all: bool,
    /// So is what goes to NodePorts and has its backend here.
    pub masquerades_local_backends: bool,
    /// Nodes dispatch packets to each other by tunnels.
    pub has_tunnels: bool,
    /// What becomes of new connections: `taken`, `left` to another proxy of this node, or `held` while another version takes over.
    pub new_connections: &'static str,
    /// Connections that another proxy goes on with.
    pub foreign_connections: usize,
    /// Changes of routes that flows have to follow.
    pub route_generation: u32,
}

/// A program that is attached.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Attached {
    /// Device, or `cgroup`.
    pub target: String,
    /// Which.
    pub program: String,
    /// `xdp`, `tcx` or `cgroup`.
    pub mechanism: String,
    /// Id of the program in the kernel.
    pub program_id: u32,
    /// Id of the link.
    pub link_id: u32,
    /// The device has gone, and an agent will take the link out.
    pub is_dead: bool,
}

/// How full a map is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MapFill {
    /// The map.
    #[serde(rename = "map")]
    pub name: String,
    /// Entries in use.
    pub entries: usize,
    /// Entries that fit.
    pub capacity: u32,
}

/// Looks at everything.
pub(super) fn read(observer: &Observer, pin_path: &Path) -> Result<Status, InspectError> {
    let node = observer.node()?;
    let mut attached: Vec<Attached> = dataplane::pinned_links(pin_path)?.into_iter().map(Attached::from).collect();
    attached.sort();
    let surveys = [observer.v4().survey()?, observer.v6().survey()?];
    let foreign_connections = surveys.iter().map(|survey| survey.foreign_connections).sum();
    Ok(Status {
        agent: agent(observer, pin_path)?,
        layout: node.layout,
        pin_path: pin_path.display().to_string(),
        node: describe(&node, foreign_connections),
        attached,
        maps: fills(observer, surveys)?,
    })
}

/// Who keeps the maps.
pub(super) fn agent(observer: &Observer, pin_path: &Path) -> Result<AgentStatus, InspectError> {
    let agent = observer.agent()?;
    let now = dataplane::seconds_since_boot();
    let ago = |time: u64| (time > 0).then(|| now.saturating_sub(time));
    Ok(AgentStatus {
        is_running: dataplane::is_kept(pin_path),
        version: agent.version.as_str().to_owned(),
        pid: agent.pid,
        started_seconds_ago: ago(agent.started),
        alive_seconds_ago: ago(agent.alive),
        heard_seconds_ago: ago(agent.heard),
        synced_seconds_ago: ago(agent.synced),
        failures: agent.failures,
        algorithm: agent.algorithm.as_str().to_owned(),
        confined: confine::describe(agent.confined),
    })
}

fn describe(node: &Node, foreign_connections: usize) -> NodeStatus {
    let v4 = std::iter::once(node.masquerade_v4).chain(node.further_v4);
    let v6 = std::iter::once(node.masquerade_v6).chain(node.further_v6);
    let v4 = v4.filter(|address| *address != Ipv4::ANY).map(IpAddr::from);
    let v6 = v6.filter(|address| *address != Ipv6::ANY).map(IpAddr::from);
    NodeStatus {
        masquerade_addresses: v4.chain(v6).collect(),
        node_ports: [node.node_port_first, node.node_port_last].map(Port::number),
        source_ports: [node.source_port_first, node.source_port_last].map(Port::number),
        masquerades_all: node.flags & masquerade::ALL != 0,
        masquerades_local_backends: node.flags & masquerade::LOCAL_BACKENDS != 0,
        has_tunnels: node.flags & TUNNELS != 0,
        new_connections: match node.flags {
            _ if node.is_held(dataplane::jiffies()) => "held",
            flags if flags & newcomers::LEAVE != 0 => "left",
            _ => "taken",
        },
        foreign_connections,
        route_generation: node.route_generation,
    }
}

fn fills(observer: &Observer, [v4, v6]: [Survey; 2]) -> Result<Vec<MapFill>, InspectError> {
    let fills = v4.flow_table.into_iter().chain(v6.flow_table).chain(v4.fills).chain(v6.fills);
    Ok(fills.chain([observer.slots()?]).map(MapFill::from).collect())
}

impl From<PinnedLink> for Attached {
    fn from(link: PinnedLink) -> Self {
        Self {
            is_dead: link.target_id == 0,
            target: link.target,
            program: link.program.to_string(),
            mechanism: link.mechanism,
            program_id: link.program_id,
            link_id: link.link,
        }
    }
}

impl From<Fill> for MapFill {
    fn from(fill: Fill) -> Self {
        Self { name: fill.map.into(), entries: fill.entries, capacity: fill.capacity }
    }
}
