//! A `KubeProxyConfiguration` in Sluice's words. In: the file's text. Out: the settings in it that mean something here,
//! and a note on each that is set and means nothing.

mod file;
mod ignored;

use std::{
    fmt, fs,
    net::IpAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::de::DeserializeOwned;

use self::file::{File, Mode};
use super::{BindAddress, BindAddressError, DetectLocal};
use crate::{
    addresses::{NodePortAddresses, NodePortAddressesError},
    algorithm::AlgorithmName,
};

const API_VERSION: &str = "kubeproxy.config.k8s.io/v1alpha1";
const KIND: &str = "KubeProxyConfiguration";

/// What a file says. What it does not say is none; flags and defaults decide then.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KubeProxyConfiguration {
    /// For the API server.
    pub kubeconfig: Option<PathBuf>,
    /// Name of the Node object.
    pub hostname_override: Option<String>,
    /// For `/healthz`.
    pub healthz_bind_address: Option<BindAddress>,
    /// For metrics.
    pub metrics_bind_address: Option<BindAddress>,
    /// What is served by default is served on IPv6 addresses.
    pub prefers_ipv6: bool,
    /// Where NodePorts are served.
    pub node_port_addresses: Option<NodePortAddresses>,
    /// Whether all that goes to a ClusterIP is masqueraded.
    pub masquerade_all: bool,
    /// Which devices lead to pods.
    pub detect_local: DetectLocal,
    /// How often what others may have undone is put right.
    pub sync_period: Option<Duration>,
    /// How connections are spread.
    pub algorithm: Option<AlgorithmName>,
    /// As after kube-proxy's `-v`.
    pub verbosity: u32,
    /// Whether the log is JSON.
    pub logs_json: bool,
    /// What is set and means nothing, or something else than the operator may think.
    pub notes: Vec<Note>,
}

/// A remark on a field.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    /// Its path.
    pub field: String,
    /// What happens instead of what it says.
    pub instead: String,
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} is ignored: {}", self.field, self.instead)
    }
}

/// Why a file cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("the configuration {path} cannot be used: {problem}; correct --config", path = .path.display())]
pub struct ReadError {
    path: PathBuf,
    problem: Problem,
}

/// What is wrong with a file.
#[derive(Debug, thiserror::Error)]
pub enum Problem {
    /// It cannot be read.
    #[error(transparent)]
    Unreadable(#[from] std::io::Error),
    /// It is no YAML.
    #[error("it is not YAML: {0}")]
    Yaml(String),
    /// A field that is not known or does not have the shape it should have.
    #[error("{path}: {reason}")]
    Field {
        /// Where.
        path: String,
        /// What.
        reason: String,
    },
    /// Another object, or another version of it.
    #[error("it is {found}, not {KIND} of {API_VERSION}")]
    Kind {
        /// What it says it is.
        found: String,
    },
    /// A field whose text means nothing.
    #[error("{field}: {reason}")]
    Value {
        /// Its path.
        field: &'static str,
        /// What is wrong.
        reason: String,
    },
}

impl KubeProxyConfiguration {
    /// Reads a file.
    pub fn read(path: &Path) -> Result<Self, ReadError> {
        let text = fs::read_to_string(path).map_err(Problem::Unreadable);
        text.and_then(|text| Self::parse(&text)).map_err(|problem| ReadError { path: path.into(), problem })
    }

    /// Reads a file's text.
    pub fn parse(text: &str) -> Result<Self, Problem> {
        let file: File = deserialize(text)?;
        check_kind(&file)?;
        let mut notes = ignored::notes(&file);
        notes.extend(usual_node_ports(&file));
        notes.extend(unknown_scheduler(&file));
        Ok(Self {
            kubeconfig: given(file.client_connection.kubeconfig.as_ref()).map(PathBuf::from),
            healthz_bind_address: bind_address("healthzBindAddress", file.healthz_bind_address.as_ref())?,
            metrics_bind_address: bind_address("metricsBindAddress", file.metrics_bind_address.as_ref())?,
            prefers_ipv6: prefers_ipv6(file.bind_address.as_ref())?,
            node_port_addresses: node_port_addresses(file.node_port_addresses.as_deref())?,
            masquerade_all: masquerade_all(&file),
            sync_period: sync_period(&file)?,
            algorithm: algorithm(&file),
            verbosity: file.logging.verbosity.unwrap_or_default(),
            logs_json: logs_json(file.logging.format.as_ref())?,
            detect_local: DetectLocal {
                mode: file.detect_local_mode,
                cluster_cidr: given(file.cluster_cidr.as_ref()).cloned(),
                bridge: given(file.detect_local.bridge_interface.as_ref()).cloned(),
                prefix: given(file.detect_local.interface_name_prefix.as_ref()).cloned(),
            },
            hostname_override: file.hostname_override.filter(|name| !name.is_empty()),
            notes,
        })
    }
}

/// Reads YAML, or JSON, which is YAML too. What is wrong is told with the path of the field.
fn deserialize<T: DeserializeOwned>(text: &str) -> Result<T, Problem> {
    let options = serde_saphyr::options! { with_snippet: false };
    let mut field = None;
    let read = serde_saphyr::with_deserializer_from_str_with_options(text, options, |deserializer| {
        serde_path_to_error::deserialize(deserializer).map_err(|error| {
            field = Some(error.path().to_string()).filter(|path| ![".", "?"].contains(&path.as_str()));
            error.into_inner()
        })
    });
    read.map_err(|error| {
        let reason = first_line(&error.to_string());
        match field.take() {
            Some(path) => Problem::Field { path, reason },
            None => Problem::Yaml(reason),
        }
    })
}

fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().to_owned()
}

fn check_kind(file: &File) -> Result<(), Problem> {
    let (kind, version) = (file.kind.as_deref().unwrap_or_default(), file.api_version.as_deref().unwrap_or_default());
    if (kind, version) == (KIND, API_VERSION) {
        return Ok(());
    }
    Err(Problem::Kind { found: format!("{kind:?} of {version:?}") })
}

fn given(text: Option<&String>) -> Option<&String> {
    text.filter(|text| !text.is_empty())
}

/// Nothing means the default here, and not nowhere, as after the flag.
fn bind_address(field: &'static str, text: Option<&String>) -> Result<Option<BindAddress>, Problem> {
    let parsed = given(text).map(|text| text.parse()).transpose();
    parsed.map_err(|error: BindAddressError| Problem::Value { field, reason: error.to_string() })
}

fn prefers_ipv6(bind_address: Option<&String>) -> Result<bool, Problem> {
    let Some(text) = given(bind_address) else { return Ok(false) };
    let address = text.parse::<IpAddr>();
    let address = address.map_err(|error| Problem::Value { field: "bindAddress", reason: error.to_string() })?;
    Ok(address.is_ipv6())
}

fn node_port_addresses(list: Option<&[String]>) -> Result<Option<NodePortAddresses>, Problem> {
    let Some(list) = list.filter(|list| !list.is_empty()) else { return Ok(None) };
    let parsed = list.join(",").parse().map(Some);
    parsed.map_err(|error: NodePortAddressesError| Problem::Value {
        field: "nodePortAddresses",
        reason: error.to_string(),
    })
}

/// Mode ipvs has it from the section of iptables.
fn masquerade_all(file: &File) -> bool {
    let section = if file.mode == Mode::NfTables { file.nftables.masquerade_all } else { file.iptables.masquerade_all };
    section.unwrap_or_default()
}

fn sync_period(file: &File) -> Result<Option<Duration>, Problem> {
    let (field, text) = match file.mode {
        Mode::NfTables => ("nftables.syncPeriod", &file.nftables.sync_period),
        Mode::Ipvs => ("ipvs.syncPeriod", &file.ipvs.sync_period),
        Mode::Unset | Mode::IpTables | Mode::KernelSpace => ("iptables.syncPeriod", &file.iptables.sync_period),
    };
    let Some(text) = given(text.as_ref()) else { return Ok(None) };
    let wrong = |reason: String| Problem::Value { field, reason };
    let period: jiff::SignedDuration = text.parse().map_err(|error: jiff::Error| wrong(error.to_string()))?;
    let period = Duration::try_from(period).map_err(|error| wrong(error.to_string()))?;
    Ok(Some(period).filter(|period| !period.is_zero()))
}

/// The algorithm most like a scheduler of IPVS. All endpoints weigh the same there.
fn algorithm(file: &File) -> Option<AlgorithmName> {
    if file.mode != Mode::Ipvs {
        return None;
    }
    match given(file.ipvs.scheduler.as_ref()).map_or("rr", String::as_str) {
        "rr" | "wrr" => Some(AlgorithmName::RoundRobin),
        "lc" | "wlc" | "sed" | "nq" => Some(AlgorithmName::LeastConnections),
        "sh" => Some(AlgorithmName::SourceHash),
        "mh" => Some(AlgorithmName::Maglev),
        _ => None,
    }
}

/// A scheduler for which there is no algorithm.
fn unknown_scheduler(file: &File) -> Option<Note> {
    let is_unknown = file.mode == Mode::Ipvs && algorithm(file).is_none();
    let instead = "there is no such algorithm here; --algorithm names the ones there are";
    is_unknown.then(|| Note { field: "ipvs.scheduler".into(), instead: instead.into() })
}

fn logs_json(format: Option<&String>) -> Result<bool, Problem> {
    match given(format).map(String::as_str) {
        None | Some("text") => Ok(false),
        Some("json") => Ok(true),
        Some(other) => {
            Err(Problem::Value { field: "logging.format", reason: format!("{other:?} is neither text nor json") })
        }
    }
}

/// What kube-proxy does when nothing is said depends on its mode.
fn usual_node_ports(file: &File) -> Option<Note> {
    let is_said = file.node_port_addresses.as_ref().is_some_and(|list| !list.is_empty());
    let is_primary = file.mode == Mode::NfTables;
    (!is_said && !is_primary).then(|| Note {
        field: "the lack of nodePortAddresses".into(),
        instead:
            "NodePorts are served on the node's primary addresses, as in mode nftables; for all its addresses, as in \
                  the other modes, write `all`"
                .into(),
    })
}

#[cfg(test)]
mod tests;
