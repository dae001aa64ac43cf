//! `sluice run`: from arguments to a configuration, and then the agent.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::{
    EX_CONFIG, Failure,
    logging::{self, LogFormat},
};
use crate::{
    addresses::NodePortAddresses,
    agent,
    config::{ApiServer, Config, PortRange, Source, SourceName},
    dataplane::{self, DevicePattern},
    reconcile,
};

/// The agent's flags.
#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// Where Services and their endpoints come from: `kubernetes`, or `file:DIR`, a directory of YAML files
    #[arg(long, value_name = "SOURCE", default_value = "kubernetes")]
    source: SourceName,
    /// Kubeconfig file; without it the agent talks to its API server as pods do
    #[arg(long, value_name = "FILE", env = "KUBECONFIG")]
    kubeconfig: Option<PathBuf>,
    /// URL of the API server, before that of the kubeconfig
    #[arg(long, value_name = "URL")]
    master: Option<String>,
    /// Name of this node's Node object, if it is not the host's name
    #[arg(long, value_name = "NAME", env = "NODE_NAME")]
    hostname_override: Option<String>,
    /// Devices that lead to pods, by name or shell pattern [default: every veth whose peer is in another namespace and
    /// that carries no default route]
    #[arg(long, value_name = "PATTERN,…", value_delimiter = ',')]
    pod_devices: Vec<DevicePattern>,
    /// Devices that lead to other nodes and to the outside [default: those that carry a default route]
    #[arg(long, value_name = "PATTERN,…", value_delimiter = ',')]
    uplinks: Vec<DevicePattern>,
    /// How programs attach to uplinks
    #[arg(long, value_enum, default_value_t)]
    uplink_mode: UplinkMode,
    /// Directory on a BPF file system for maps and links
    #[arg(long, value_name = "DIR", default_value = "/sys/fs/bpf/sluice")]
    pin_path: PathBuf,
    /// Directory of the cgroup v2 whose sockets are balanced [default: the root of the hierarchy]
    #[arg(long, value_name = "DIR")]
    cgroup: Option<PathBuf>,
    /// Whose sockets are balanced when they connect
    #[arg(long, value_enum, default_value_t)]
    socket_lb: SocketLb,
    /// Addresses of the node that serve NodePorts: `primary`, `all`, `localhost`, or networks
    #[arg(long, value_name = "WHICH", default_value_t)]
    nodeport_addresses: NodePortAddresses,
    /// Ports that may be NodePorts, as the API server has them
    #[arg(long, value_name = "FIRST-LAST", default_value_t = PortRange(30000..=32767))]
    node_port_range: PortRange,
    /// Source ports given to masqueraded flows; they should be no node ports and no ephemeral ports of the host
    #[arg(long, value_name = "FIRST-LAST", default_value_t = PortRange(10_000..=29_999))]
    source_port_range: PortRange,
    /// Log more; twice and thrice even more
    #[arg(short, action = clap::ArgAction::Count)]
    verbosity: u8,
    /// Form of the log
    #[arg(long, value_enum, default_value_t)]
    log_format: LogFormat,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum UplinkMode {
    /// XDP in the driver; a device that cannot gets TC
    #[default]
    Xdp,
    /// XDP on finished packets: slower than TC, for testing
    XdpGeneric,
    /// TC
    Tc,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum SocketLb {
    /// Those of the node's own processes, and TCP of pods
    #[default]
    All,
    /// Those of the node's own processes
    Host,
    /// None
    Off,
}

/// Why the agent cannot know which node it is on.
#[derive(Debug, thiserror::Error)]
#[error("the host has no name: name the Node object with --hostname-override")]
struct Nameless;

pub(super) fn execute(arguments: Arguments) -> Result<(), Failure> {
    logging::start(arguments.log_format, arguments.verbosity);
    let config = arguments.into_config().map_err(|error| Failure::new(error, EX_CONFIG))?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.map_err(|error| Failure::new(error, 1))?;
    let ended = runtime.block_on(agent::run(config));
    // A source that waits for its API server is not waited for.
    runtime.shutdown_background();
    ended.map_err(|error| {
        let code = error.exit_code();
        Failure::new(error, code)
    })
}

impl Arguments {
    fn into_config(self) -> Result<Config, Nameless> {
        Ok(Config {
            source: match self.source {
                SourceName::Kubernetes => {
                    Source::Kubernetes(ApiServer { kubeconfig: self.kubeconfig, master: self.master })
                }
                SourceName::Files(directory) => Source::Files(directory),
            },
            node: reconcile::Settings {
                name: node_name(self.hostname_override.as_deref())?,
                node_port_addresses: self.nodeport_addresses,
                uplinks: self.uplinks.clone(),
            },
            dataplane: dataplane::Options {
                cgroup: self.cgroup,
                socket_lb: match self.socket_lb {
                    SocketLb::All => dataplane::SocketLb::All,
                    SocketLb::Host => dataplane::SocketLb::Host,
                    SocketLb::Off => dataplane::SocketLb::Off,
                },
                uplink_mode: match self.uplink_mode {
                    UplinkMode::Xdp => dataplane::UplinkMode::Xdp,
                    UplinkMode::XdpGeneric => dataplane::UplinkMode::XdpGeneric,
                    UplinkMode::Tc => dataplane::UplinkMode::Tc,
                },
                uplinks: self.uplinks,
                pod_devices: self.pod_devices,
                ..dataplane::Options::new(self.pin_path)
            },
            node_ports: self.node_port_range,
            source_ports: self.source_port_range,
        })
    }
}

/// As kubelet makes it: the host's name in lower case.
fn node_name(given: Option<&str>) -> Result<String, Nameless> {
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let name = given.unwrap_or(&host).trim().to_lowercase();
    if name.is_empty() { Err(Nameless) } else { Ok(name) }
}
