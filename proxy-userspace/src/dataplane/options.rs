//! What the operator decides about the dataplane: where it is pinned, what it attaches to, and how.

use std::{collections::BTreeMap, fmt, path::PathBuf, str::FromStr};

use glob::Pattern;

use super::{flow_table::FlowTableSize, program::ProgramName};

/// Settings of the dataplane. [`Options::new`] has the defaults.
#[derive(Clone, Debug)]
pub struct Options {
    /// Directory on a BPF file system that holds `maps/` and `links/`.
    pub pin_path: PathBuf,
    /// Directory of the cgroup whose sockets are balanced; none means the root of the cgroup v2 hierarchy.
    pub cgroup: Option<PathBuf>,
    /// Which sockets are balanced.
    pub socket_lb: SocketLb,
    /// How programs attach to uplinks.
    pub uplink_mode: UplinkMode,
    /// Uplinks; empty means every device that carries a default route, is a tunnel, or a card with an address.
    pub uplinks: Vec<DevicePattern>,
    /// Pod-facing devices; empty means every veth whose peer is in another namespace and that carries no default route.
    pub pod_devices: Vec<DevicePattern>,
    /// A bridge whose ports, but for uplinks, are the pod-facing devices.
    pub pod_bridge: Option<String>,
    /// Whether nodes dispatch packets to each other also behind an IP header, where they are not on one link.
    pub tunnels: bool,
    /// How TC programs are attached.
    pub classifiers: ClassifierMode,
    /// Whether packets are translated between the families.
    pub crosses: bool,
    /// Whether packets and bytes are counted per Service and backend.
    pub counts_traffic: bool,
    /// How many flows are kept.
    pub flow_table: FlowTableSize,
    /// Entries of maps that shall not have their default size, by the map's name.
    pub sizes: BTreeMap<String, u32>,
}

impl Options {
    /// The defaults, pinned under a directory.
    pub fn new(pin_path: impl Into<PathBuf>) -> Self {
        Self {
            pin_path: pin_path.into(),
            cgroup: None,
            socket_lb: SocketLb::default(),
            uplink_mode: UplinkMode::default(),
            uplinks: Vec::new(),
            pod_devices: Vec::new(),
            pod_bridge: None,
            tunnels: false,
            classifiers: ClassifierMode::default(),
            crosses: false,
            counts_traffic: true,
            flow_table: FlowTableSize::default(),
            sizes: BTreeMap::new(),
        }
    }

    /// The programs that are loaded.
    pub(super) fn programs(&self) -> impl Iterator<Item = ProgramName> {
        ProgramName::ALL.into_iter().filter(|program| self.crosses || !program.crosses())
    }
}

/// Which sockets are balanced when they connect.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SocketLb {
    /// Those of the node's own processes, and TCP of pods.
    #[default]
    All,
    /// Those of the node's own processes.
    Host,
    /// None: no program is attached to the cgroup.
    Off,
}

/// How programs attach to uplinks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum UplinkMode {
    /// XDP in the driver; a device that cannot gets TC.
    #[default]
    Xdp,
    /// XDP after the kernel has made an skb: slower than TC, for testing.
    XdpGeneric,
    /// TC.
    Tc,
}

/// How TC programs are attached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ClassifierMode {
    /// TCX where the kernel has it (6.6 and later), else a filter of the clsact qdisc.
    #[default]
    Auto,
    /// A filter of the clsact qdisc, on every kernel.
    Clsact,
}

/// The name of a device, or a shell pattern (`veth*`, `eth[01]`) for names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DevicePattern(Pattern);

/// Why text is not a [`DevicePattern`].
#[derive(Debug, thiserror::Error)]
pub enum PatternError {
    /// Nothing there.
    #[error("a device name is empty")]
    Empty,
    /// Not a shell pattern.
    #[error("`{text}` is not a pattern for device names: {source}")]
    Malformed {
        /// What was given.
        text: String,
        /// What is wrong with it.
        source: glob::PatternError,
    },
}

impl FromStr for DevicePattern {
    type Err = PatternError;

    fn from_str(text: &str) -> Result<Self, PatternError> {
        if text.is_empty() {
            return Err(PatternError::Empty);
        }
        let pattern = Pattern::new(text).map_err(|source| PatternError::Malformed { text: text.into(), source })?;
        Ok(Self(pattern))
    }
}

impl DevicePattern {
    /// Whether a device of this name is meant.
    pub fn matches(&self, name: &str) -> bool {
        self.0.matches(name)
    }

    /// The one name that is meant; none for a pattern.
    pub fn as_name(&self) -> Option<&str> {
        let text = self.0.as_str();
        (!text.contains(['*', '?', '['])).then_some(text)
    }
}

impl fmt::Display for DevicePattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::DevicePattern;

    #[test]
    fn a_pattern_matches_names_and_a_name_only_itself() {
        let pattern: DevicePattern = "veth*".parse().unwrap();
        assert!(pattern.matches("veth12") && !pattern.matches("eth0"));
        assert_eq!(pattern.as_name(), None);
        let name: DevicePattern = "eth0.100".parse().unwrap();
        assert!(name.matches("eth0.100") && !name.matches("eth0x100"));
        assert_eq!(name.as_name(), Some("eth0.100"));
    }

    #[test]
    fn what_is_no_pattern_is_refused_by_name() {
        let error = "eth[".parse::<DevicePattern>().unwrap_err();
        assert!(error.to_string().contains("`eth[`"), "{error}");
        assert!("".parse::<DevicePattern>().is_err());
    }
}
