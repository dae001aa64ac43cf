//! The agent's flags, and what becomes of them: a flag decides, then the file of `--config`, then the default.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use clap::{ArgAction, Args, ValueEnum};

use crate::{
    addresses::NodePortAddresses,
    algorithm::AlgorithmName,
    cli::logging::{LogFormat, Verbosity},
    config::{
        ApiServer, BindAddress, Config, DetectLocal, DetectLocalError, DetectLocalMode, KubeProxyConfiguration,
        Masquerade, PortRange, Source, SourceName,
    },
    dataplane::{self, DevicePattern, FlowTableSize},
    desired::ExternalIps,
    metrics::PerBackend,
    node_port_mode::NodePortMode,
    reconcile,
};

/// The usual ports of `/healthz` and of metrics.
const PORTS: (u16, u16) = (10_256, 10_249);
/// The usual time between looks at what others may have undone.
const SYNC_PERIOD: Duration = Duration::from_secs(30);

/// The agent's flags.
#[derive(Debug, Args)]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag of its own")]
pub(in crate::cli) struct Arguments {
    /// A `KubeProxyConfiguration` (v1alpha1); flags decide before it
    #[arg(long, value_name = "FILE")]
    pub(super) config: Option<PathBuf>,
    /// Where Services and their endpoints come from: `kubernetes`, or `file:DIR`, a directory of YAML files
    #[arg(long, value_name = "SOURCE", default_value = "kubernetes")]
    source: SourceName,
    /// Kubeconfig file; without it the agent talks to its API server as pods do
    #[arg(long, value_name = "FILE", env = "KUBECONFIG")]
    kubeconfig: Option<PathBuf>,
    /// URLs of the API server's replicas, before that of the kubeconfig: when one does not answer the next one is asked
    #[arg(long, value_name = "URL,…", value_delimiter = ',', visible_alias = "api-servers")]
    master: Vec<String>,
    /// Kubeconfig file whose server a pod asks, too, with its own credentials: that of kube-proxy or kubelet; it need not exist
    #[arg(long, value_name = "FILE", default_value = "/run/sluice/bootstrap/kubeconfig.conf")]
    bootstrap_kubeconfig: PathBuf,
    /// Directory in which the API server's endpoints are kept for the next agent, which asks them before its ClusterIP, and in which
    /// `sluice verify` finds this one
    #[arg(long, value_name = "DIR")]
    pub(in crate::cli) state_dir: Option<PathBuf>,
    /// Seconds after which an API server that acknowledges nothing is given up; an answer may take twice as long to begin
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u16).range(1..))]
    api_silence: u16,
    /// Name of this node's Node object, if it is not the host's name
    #[arg(long, value_name = "NAME", env = "NODE_NAME")]
    hostname_override: Option<String>,
    /// Devices that lead to pods, by name or shell pattern [default: every veth whose peer is in another namespace and
    /// that carries no default route]
    #[arg(long, value_name = "PATTERN,…", value_delimiter = ',')]
    pod_devices: Vec<DevicePattern>,
    /// How kube-proxy was told which traffic comes from pods. By addresses: accepted, and without meaning, because pods are
    /// known by their devices. By devices: those of --pod-bridge-interface or --pod-interface-name-prefix
    #[arg(long, value_name = "MODE")]
    detect_local_mode: Option<DetectLocalMode>,
    /// The pods' network; accepted, and without meaning, because pods are known by their devices
    #[arg(long, value_name = "CIDR")]
    cluster_cidr: Option<String>,
    /// A bridge whose ports lead to pods, for --detect-local-mode=BridgeInterface
    #[arg(long, value_name = "NAME")]
    pod_bridge_interface: Option<String>,
    /// How the names of devices that lead to pods begin, for --detect-local-mode=InterfaceNamePrefix
    #[arg(long, value_name = "PREFIX")]
    pod_interface_name_prefix: Option<String>,
    /// Devices that lead to other nodes and to the outside [default: those that carry a default route; vxlan, geneve, ipip, sit, ip6tnl,
    /// gre, wireguard and tun devices; network cards, VLANs and bonds that have an address]
    #[arg(long, value_name = "PATTERN,…", value_delimiter = ',')]
    uplinks: Vec<DevicePattern>,
    /// How programs attach to uplinks
    #[arg(long, value_enum, default_value_t)]
    uplink_mode: UplinkMode,
    /// Directory on a BPF file system for maps and links
    #[arg(long, value_name = "DIR", default_value = "/sys/fs/bpf/sluice")]
    pub(super) pin_path: PathBuf,
    /// Directory of the cgroup v2 whose sockets are balanced [default: the root of the hierarchy]
    #[arg(long, value_name = "DIR")]
    cgroup: Option<PathBuf>,
    /// Whose sockets are balanced when they connect
    #[arg(long, value_enum, default_value_t)]
    socket_lb: SocketLb,
    /// Addresses of the node that serve NodePorts: `primary`, `all`, `localhost`, networks, or several of them; loopback
    /// addresses, which the first two mean too, for the node's own processes alone [default: primary]
    #[arg(long, value_name = "WHICH,…")]
    nodeport_addresses: Option<NodePortAddresses>,
    /// Ports that may be NodePorts, as the API server has them
    #[arg(long, value_name = "FIRST-LAST", default_value_t = PortRange(30000..=32767))]
    node_port_range: PortRange,
    /// Source ports given to masqueraded flows: no NodePorts, and no ephemeral ports of the host
    #[arg(long, value_name = "FIRST-LAST", default_value_t = PortRange(10_000..=29_999))]
    source_port_range: PortRange,
    /// Connections and flows that are kept of each address family: a number, or `auto`, half a percent of the node's memory;
    /// a table that is in the kernel already keeps its size
    #[arg(long, value_name = "NUMBER", default_value_t)]
    flow_table_size: FlowTableSize,
    /// How connections are spread to Services without the annotation service.sluice.dev/algorithm [default: random]
    #[arg(long, value_enum)]
    algorithm: Option<AlgorithmName>,
    /// How packets from outside for NodePorts, external IPs and addresses of load balancers get to a backend on another node,
    /// for Services without the annotation service.sluice.dev/nodeport-mode; the same on every node
    #[arg(long, value_enum, default_value_t)]
    nodeport_mode: NodePortMode,
    /// Serve Services with addresses of one family and the annotation service.sluice.dev/nat46x64=true to clients of the other
    /// one, too, by NodePorts, external IPs and addresses of load balancers: translates between IPv4 and IPv6
    #[arg(long)]
    nat46x64: bool,
    /// How packets that are not masqueraded get to a node that is not on the same link; the same on every node
    #[arg(long, value_enum, default_value_t)]
    dsr_dispatch: DsrDispatch,
    /// Masquerade all that goes to a ClusterIP
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    masquerade_all: Option<bool>,
    /// Masquerade also what goes to a NodePort or an external address and has its backend on this node, as kube-proxy does
    #[arg(long)]
    masquerade_local_backends: bool,
    /// Which addresses Services may name in `spec.externalIPs`: `allow` (any), `deny` (none), or networks
    #[arg(long, value_name = "WHICH", default_value_t)]
    external_ips: ExternalIps,
    /// Where /healthz and /livez are served; empty: nowhere [default: 0.0.0.0:10256]
    #[arg(long, value_name = "ADDRESS[:PORT]")]
    healthz_bind_address: Option<BindAddress>,
    /// Where metrics are served; empty: nowhere [default: 127.0.0.1:10249]
    #[arg(long, value_name = "ADDRESS[:PORT]")]
    metrics_bind_address: Option<BindAddress>,
    /// Whether each backend has metrics of its own, of which there may be very many
    #[arg(long, value_name = "BOOL", action = clap::ArgAction::Set, default_value_t = true)]
    metrics_per_backend: bool,
    /// Leave new connections to another proxy on this node, and go on with those that are known: the way back to kube-proxy
    #[arg(long)]
    handover: bool,
    /// Give up, before anything else is done, capabilities, system calls and files that the agent has no use for
    #[arg(long, value_name = "BOOL", action = ArgAction::Set, default_value_t = true)]
    confine: bool,
    /// Take everything out of the kernel that agents have put there, and end: the same as the command `cleanup`
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub(super) cleanup: Option<bool>,
    /// Log more; twice and thrice even more. -v=N and --v=N are understood as kube-proxy does
    #[arg(short, long = "v", value_name = "LEVEL", action = ArgAction::Append, num_args = 0..=1, require_equals = true,
          default_missing_value = "more")]
    verbosity: Vec<Verbosity>,
    /// Form of the log [default: text]
    #[arg(long, value_enum)]
    log_format: Option<LogFormat>,
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

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum DsrDispatch {
    /// Not at all: they are masqueraded
    #[default]
    Link,
    /// Behind an IP header to that node (IPIP, and IPv6 in IPv6); needs the kernel's modules `ipip` and `ip6_tunnel`
    Ipip,
}

/// Settings that contradict each other, or do not suffice.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConfigError {
    #[error("the host has no name: name the Node object with --hostname-override")]
    Nameless,
    #[error(
        "the source ports {source_ports} overlap the NodePorts {node_ports}: a masqueraded flow would take the port of a \
         Service; set --source-port-range and --node-port-range apart"
    )]
    Overlap { source_ports: PortRange, node_ports: PortRange },
    #[error(transparent)]
    DetectLocal(#[from] DetectLocalError),
}

impl Arguments {
    pub(super) fn log_format(&self, file: &KubeProxyConfiguration) -> LogFormat {
        self.log_format.unwrap_or(if file.logs_json { LogFormat::Json } else { LogFormat::Text })
    }

    pub(super) fn verbosity(&self, file: &KubeProxyConfiguration) -> u8 {
        let file = Verbosity::of_kube_proxy(file.verbosity);
        if self.verbosity.is_empty() { file.level() } else { Verbosity::sum(&self.verbosity) }
    }

    pub(super) fn into_config(self, file: KubeProxyConfiguration) -> Result<Config, ConfigError> {
        if self.source_port_range.overlaps(&self.node_port_range) {
            return Err(ConfigError::Overlap {
                source_ports: self.source_port_range,
                node_ports: self.node_port_range,
            });
        }
        Ok(Config {
            healthz: self.healthz(&file),
            metrics: self.metrics(&file),
            metrics_per_backend: if self.metrics_per_backend { PerBackend::Yes } else { PerBackend::No },
            masquerade: Masquerade {
                all: self.masquerade_all.unwrap_or(file.masquerade_all),
                local_backends: self.masquerade_local_backends,
            },
            sync_period: file.sync_period.unwrap_or(SYNC_PERIOD),
            dataplane: dataplane::Options {
                // Nobody could ask for the counts.
                counts_traffic: self.metrics(&file).is_some(),
                ..self.dataplane(self.detect_local(file.detect_local))?
            },
            node: reconcile::Settings {
                name: node_name(self.hostname_override.or(file.hostname_override))?,
                node_port_addresses: self.nodeport_addresses.or(file.node_port_addresses).unwrap_or_default(),
                algorithm: self.algorithm.or(file.algorithm).unwrap_or_default(),
                external_ips: self.external_ips,
                node_port_mode: self.nodeport_mode,
                crosses: self.nat46x64,
                uplinks: self.uplinks,
                node_ports: Some(self.node_port_range.0.clone()),
            },
            source: match self.source {
                SourceName::Kubernetes => Source::Kubernetes(ApiServer {
                    kubeconfig: self.kubeconfig.or(file.kubeconfig),
                    urls: self.master,
                    bootstrap: Some(self.bootstrap_kubeconfig),
                    state: self.state_dir.clone(),
                    silence: Duration::from_secs(self.api_silence.into()),
                }),
                SourceName::Files(directory) => Source::Files(directory),
            },
            node_ports: self.node_port_range,
            source_ports: self.source_port_range,
            hands_over: self.handover,
            state_dir: self.state_dir,
            confined: 0,
        })
    }

    /// Whether it gives up what it has no use for.
    pub(in crate::cli) fn confines(&self) -> bool {
        self.confine
    }

    fn healthz(&self, file: &KubeProxyConfiguration) -> Option<SocketAddr> {
        let usual = BindAddress::everywhere(file.prefers_ipv6);
        self.healthz_bind_address.or(file.healthz_bind_address).unwrap_or(usual).resolve(PORTS.0)
    }

    fn metrics(&self, file: &KubeProxyConfiguration) -> Option<SocketAddr> {
        let usual = BindAddress::loopback(file.prefers_ipv6);
        self.metrics_bind_address.or(file.metrics_bind_address).unwrap_or(usual).resolve(PORTS.1)
    }

    fn detect_local(&self, file: DetectLocal) -> DetectLocal {
        let flags = DetectLocal {
            mode: self.detect_local_mode.unwrap_or_default(),
            cluster_cidr: self.cluster_cidr.clone(),
            bridge: self.pod_bridge_interface.clone(),
            prefix: self.pod_interface_name_prefix.clone(),
        };
        flags.or(file)
    }

    /// Devices that are named decide before a mode.
    fn dataplane(&self, detect_local: DetectLocal) -> Result<dataplane::Options, ConfigError> {
        let is_named = !self.pod_devices.is_empty();
        if detect_local.goes_by_addresses() {
            tracing::info!("pods are known by the devices they are behind; their networks are not used");
        }
        let detect_local = if is_named { DetectLocal::default() } else { detect_local };
        Ok(dataplane::Options {
            cgroup: self.cgroup.clone(),
            socket_lb: self.socket_lb.into(),
            uplink_mode: self.uplink_mode.into(),
            uplinks: self.uplinks.clone(),
            pod_devices: self.pod_devices.iter().cloned().chain(detect_local.pod_devices()?).collect(),
            pod_bridge: detect_local.pod_bridge()?,
            flow_table: self.flow_table_size,
            crosses: self.nat46x64,
            tunnels: self.dsr_dispatch == DsrDispatch::Ipip,
            ..dataplane::Options::new(self.pin_path.clone())
        })
    }
}

impl From<SocketLb> for dataplane::SocketLb {
    fn from(which: SocketLb) -> Self {
        match which {
            SocketLb::All => Self::All,
            SocketLb::Host => Self::Host,
            SocketLb::Off => Self::Off,
        }
    }
}

impl From<UplinkMode> for dataplane::UplinkMode {
    fn from(mode: UplinkMode) -> Self {
        match mode {
            UplinkMode::Xdp => Self::Xdp,
            UplinkMode::XdpGeneric => Self::XdpGeneric,
            UplinkMode::Tc => Self::Tc,
        }
    }
}

/// As kubelet makes it: the host's name in lower case.
fn node_name(given: Option<String>) -> Result<String, ConfigError> {
    let host = || rustix::system::uname().nodename().to_string_lossy().into_owned();
    let name = given.unwrap_or_else(host).trim().to_lowercase();
    if name.is_empty() { Err(ConfigError::Nameless) } else { Ok(name) }
}

#[cfg(test)]
mod tests;
