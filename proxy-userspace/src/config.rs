//! What the operator decides: from the command line to settings that have been checked.

mod bind_address;
mod detect_local;
mod kube_proxy;
mod port_range;

use std::{net::SocketAddr, path::PathBuf, str::FromStr, time::Duration};

pub use self::{
    bind_address::{BindAddress, BindAddressError},
    detect_local::{DetectLocal, DetectLocalError, DetectLocalMode},
    kube_proxy::{KubeProxyConfiguration, Note, ReadError},
    port_range::{PortRange, PortRangeError},
};
use crate::{dataplane, metrics::PerBackend, reconcile};

/// Everything an agent needs to know before it starts.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where objects come from.
    pub source: Source,
    /// The node.
    pub node: reconcile::Settings,
    /// The dataplane.
    pub dataplane: dataplane::Options,
    /// Ports that may be NodePorts.
    pub node_ports: PortRange,
    /// Source ports given to masqueraded flows.
    pub source_ports: PortRange,
    /// Where a source address is replaced that need not be.
    pub masquerade: Masquerade,
    /// Where `/healthz` and `/livez` are served; none means nowhere.
    pub healthz: Option<SocketAddr>,
    /// Where metrics are served; none means nowhere.
    pub metrics: Option<SocketAddr>,
    /// Whether each backend has series of its own.
    pub metrics_per_backend: PerBackend,
    /// How often what others may have undone is put right. A change that waits for twice as long is a sign of ill health.
    pub sync_period: Duration,
    /// New connections are left to another proxy on this node.
    pub hands_over: bool,
    /// Where files are kept, those for the next agent among them; none means nowhere.
    pub state_dir: Option<PathBuf>,
    /// What the process has given up: bits of [`proxy_common::names::confined`].
    pub confined: u32,
}

/// Where a source address is replaced that need not be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Masquerade {
    /// On all that goes to a ClusterIP.
    pub all: bool,
    /// On what goes to a NodePort or an external address and has its backend on this node, as kube-proxy does it.
    pub local_backends: bool,
}

/// Where objects come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A Kubernetes API server.
    Kubernetes(ApiServer),
    /// A directory of YAML files.
    Files(PathBuf),
}

/// How to reach a Kubernetes API server. Without a kubeconfig, as pods do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiServer {
    /// A kubeconfig file.
    pub kubeconfig: Option<PathBuf>,
    /// URLs of its replicas, before that of the kubeconfig. When one does not answer the next one is asked.
    pub urls: Vec<String>,
    /// A kubeconfig of which only the server counts, for pods; it need not exist.
    pub bootstrap: Option<PathBuf>,
    /// Where what is known of the API server itself is kept for the next agent; none keeps nothing.
    pub state: Option<PathBuf>,
    /// A peer that acknowledges nothing for this long is given up; an answer may take twice as long to begin.
    pub silence: Duration,
}

impl Default for ApiServer {
    fn default() -> Self {
        Self { kubeconfig: None, urls: Vec::new(), bootstrap: None, state: None, silence: Duration::from_secs(30) }
    }
}

/// The value of `--source`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceName {
    /// `kubernetes`
    Kubernetes,
    /// `file:DIR`
    Files(PathBuf),
}

/// Why text is not a [`SourceName`].
#[derive(Debug, thiserror::Error)]
#[error("expected `kubernetes` or `file:DIR`")]
pub struct SourceNameError;

impl FromStr for SourceName {
    type Err = SourceNameError;

    fn from_str(text: &str) -> Result<Self, SourceNameError> {
        match text.split_once(':') {
            None if text == "kubernetes" => Ok(Self::Kubernetes),
            Some(("file", directory)) if !directory.is_empty() => Ok(Self::Files(directory.into())),
            _ => Err(SourceNameError),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::SourceName;

    #[test]
    fn a_source_is_kubernetes_or_a_directory() {
        assert_eq!("kubernetes".parse::<SourceName>().unwrap(), SourceName::Kubernetes);
        assert_eq!("file:/a:b".parse::<SourceName>().unwrap(), SourceName::Files("/a:b".into()));
        for nonsense in ["file:", "files:/a", "k8s", ""] {
            assert!(nonsense.parse::<SourceName>().is_err(), "{nonsense}");
        }
    }
}
