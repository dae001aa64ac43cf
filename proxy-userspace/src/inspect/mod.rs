//! What the kernel's maps say, in people's words. In: the pins of an agent, which need not run any more. Out: plain data, to be
//! shown as a table, JSON or YAML. Nothing here changes anything but [`Inspector::flush`].

mod affinity;
mod backend;
mod event;
mod flow;
pub mod meaning;
mod names;
mod rates;
mod roster;
mod service;
mod status;

use std::{
    fs, io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use proxy_common::{
    addr::{Ipv6, Port, Protocol},
    node::LAYOUT,
    tuple::{Stage, Tuple},
};
use rustix::fs::{Access, access};
use serde::Serialize;

#[cfg(test)]
pub(crate) use self::event::tests::opened;
pub use self::{
    affinity::Affinity,
    backend::{Backend, State},
    event::{End, Event, EventFilter, HookName, Kind as EventKind},
    flow::{Flow, FlowFilter},
    names::{Names, PortName},
    rates::{Counts, Rate, Rates},
    roster::Roster,
    service::{Empty, Frontend, Kind, Range, ServicePort, Share},
    status::{AgentStatus, Attached, NodeStatus, Status},
};
pub(crate) use self::{flow::phase, service::algorithm};
use crate::dataplane::{self, Observer};

/// Why the maps cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum InspectError {
    /// No pins.
    #[error(
        "nothing of Sluice is pinned under {path}: no agent has run on this node since it was booted or cleaned up; start one, or name its --pin-path", path = .path.display()
    )]
    NothingPinned {
        /// Where pins were looked for.
        path: PathBuf,
    },
    /// Not allowed to.
    #[error("the pins under {path} cannot be opened: run as root, or with the capabilities BPF and NET_ADMIN", path = .path.display())]
    NotAllowed {
        /// Where they are.
        path: PathBuf,
    },
    /// An agent has just made them.
    #[error("the maps under {path} hold nothing yet: an agent is starting; try again in a moment", path = .path.display())]
    Empty {
        /// Where they are.
        path: PathBuf,
    },
    /// Other types.
    #[error(
        "the maps have layout {found}, and this version reads {LAYOUT}: use the `sluice` of the agent that made them"
    )]
    Layout {
        /// What they have.
        found: u32,
    },
    /// The kernel.
    #[error(transparent)]
    Access(#[from] dataplane::Error),
}

impl InspectError {
    /// The exit code of a command that ends with this error.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::NothingPinned { .. } | Self::NotAllowed { .. } | Self::Layout { .. } => 78,
            Self::Empty { .. } | Self::Access(_) => 1,
        }
    }
}

/// An address family, in words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// IPv4.
    Ipv4,
    /// IPv6.
    Ipv6,
}

impl Family {
    fn of(address: IpAddr) -> Self {
        if address.is_ipv4() { Self::Ipv4 } else { Self::Ipv6 }
    }
}

/// Whether there are maps of this version's under a path.
pub(crate) fn check(pin_path: &Path) -> Result<(), InspectError> {
    let maps = dataplane::maps_directory(pin_path);
    match maps.join("NODE").symlink_metadata() {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            return Err(InspectError::NotAllowed { path: pin_path.into() });
        }
        Err(_) => return Err(InspectError::NothingPinned { path: pin_path.into() }),
        Ok(_) => {}
    }
    if access(maps.join("NODE"), Access::READ_OK | Access::WRITE_OK).is_err() {
        return Err(InspectError::NotAllowed { path: pin_path.into() });
    }
    match dataplane::pinned_layout(pin_path)? {
        LAYOUT => Ok(()),
        0 => Err(InspectError::Empty { path: pin_path.into() }),
        found => Err(InspectError::Layout { found }),
    }
}

/// The agent that keeps what is pinned under a path, if one runs.
pub fn agent_at_work(pin_path: &Path) -> Option<AgentStatus> {
    let agent = Inspector::open(pin_path).and_then(|inspector| inspector.agent()).ok()?;
    agent.is_running.then_some(agent)
}

/// Its process, if it is of this very executable. The number is one of the agent's own namespace of processes: in another one it is
/// somebody else's, which began at another time, or this command's own.
pub fn own_agent_at_work(pin_path: &Path) -> Option<u32> {
    let agent = agent_at_work(pin_path).filter(|agent| agent.pid != std::process::id())?;
    let file = |process: &str| {
        let file = fs::metadata(format!("/proc/{process}/exe")).ok()?;
        Some((file.dev(), file.ino()))
    };
    let process = agent.pid.to_string();
    let is_own = file("self").is_some_and(|own| file(&process) == Some(own));
    // It says that it has started once it has loaded its programs, so that the one before would be the older.
    let age = dataplane::seconds_since_boot().checked_sub(started(&process)?)?;
    (is_own && agent.started_seconds_ago? <= age + 1).then_some(agent.pid)
}

/// When a process began, in seconds since boot (`man 5 proc_pid_stat`: the 22nd field, in hundredths).
fn started(process: &str) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    // The second field is a name in parentheses, which may hold anything.
    let (_, fields) = stat.rsplit_once(')')?;
    let hundredths: u64 = fields.split_whitespace().nth(19)?.parse().ok()?;
    Some(hundredths / 100)
}

/// Reads the maps.
#[derive(Debug)]
pub struct Inspector {
    observer: Observer,
    pin_path: PathBuf,
}

impl Inspector {
    /// Opens what is pinned under a path.
    pub fn open(pin_path: &Path) -> Result<Self, InspectError> {
        check(pin_path)?;
        Ok(Self { observer: Observer::open(pin_path)?, pin_path: pin_path.into() })
    }

    /// Every port of every Service, by name.
    pub fn services(&self) -> Result<Vec<ServicePort>, InspectError> {
        let slots = self.observer.slot_values()?;
        let mut ports = service::ports(self.observer.v4(), &slots)?;
        ports.extend(service::ports(self.observer.v6(), &slots)?);
        ports.sort();
        Ok(ports)
    }

    /// Every backend, by address.
    pub fn backends(&self) -> Result<Vec<Backend>, InspectError> {
        let slots = self.observer.slot_values()?;
        let mut backends = backend::all(self.observer.v4(), &slots)?;
        backends.extend(backend::all(self.observer.v6(), &slots)?);
        backends.sort();
        Ok(backends)
    }

    /// The flows that a filter lets through, the latest first.
    pub fn flows(&self, filter: &FlowFilter) -> Result<Vec<Flow>, InspectError> {
        let mut flows = flow::all(self.observer.v4(), filter)?;
        flows.extend(flow::all(self.observer.v6(), filter)?);
        flows.sort_by_key(|flow| (flow.idle_seconds, flow.client, flow.destination));
        Ok(flows)
    }

    /// What the kernel holds of the connection whose packets go, at any hook, from one address to another: the entry that they
    /// meet, its other half, and those by which its source is replaced later. Empty if there is no such connection.
    pub fn connection(
        &self,
        protocol: Protocol,
        source: SocketAddr,
        destination: SocketAddr,
    ) -> Result<Vec<Flow>, InspectError> {
        let (sport, dport) = (Port::new(source.port()), Port::new(destination.port()));
        let mut flows = Vec::new();
        let mapped = |address: Ipv4Addr| Ipv6::mapped(address.into());
        let (from, to) = match (source.ip(), destination.ip()) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                let ends = Tuple::new(from.into(), to.into(), sport, dport, protocol, Stage::FromPod);
                flows = flow::connection(self.observer.v4(), &ends)?;
                (mapped(from), mapped(to))
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => (from.into(), to.into()),
            // A reply of a backend of the other family, before it is translated, has both ends of its own family.
            _ => return Ok(flows),
        };
        flows.extend(flow::connection(
            self.observer.v6(),
            &Tuple::new(from, to, sport, dport, protocol, Stage::FromPod),
        )?);
        Ok(flows)
    }

    /// Takes those out of the kernel, both halves of each; returns how many entries that were. Their connections are unknown
    /// from then on: what comes next of a TCP connection is given a backend like any other.
    pub fn flush(&self, filter: &FlowFilter) -> Result<u64, InspectError> {
        let filter = FlowFilter { halves: true, ..filter.clone() };
        let v4 = flow::chosen(self.observer.v4(), &filter)?;
        let v6 = flow::chosen(self.observer.v6(), &filter)?;
        Ok(self.observer.remove_flows(&v4, &v6)?)
    }

    /// Clients that stay with a backend, by Service.
    pub fn affinities(&self) -> Result<Vec<Affinity>, InspectError> {
        let mut affinities = affinity::all(self.observer.v4())?;
        affinities.extend(affinity::all(self.observer.v6())?);
        affinities.sort();
        Ok(affinities)
    }

    /// How the node's dataplane is.
    pub fn status(&self) -> Result<Status, InspectError> {
        status::read(&self.observer, &self.pin_path)
    }

    /// Who keeps the maps: of [`Self::status`] what takes no time.
    pub fn agent(&self) -> Result<AgentStatus, InspectError> {
        status::agent(&self.observer, &self.pin_path)
    }

    /// The maps themselves.
    pub fn observer(&self) -> &Observer {
        &self.observer
    }
}
