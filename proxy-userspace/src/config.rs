//! What the operator decides: from the command line to settings that have been checked.

use std::{fmt, num::ParseIntError, ops::RangeInclusive, path::PathBuf, str::FromStr};

use crate::{dataplane, reconcile};

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
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ApiServer {
    /// A kubeconfig file.
    pub kubeconfig: Option<PathBuf>,
    /// Its URL, before that of the kubeconfig.
    pub master: Option<String>,
}

/// A range of ports, both ends included, none of them 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortRange(pub RangeInclusive<u16>);

/// Why text is not a [`PortRange`].
#[derive(Debug, thiserror::Error)]
pub enum PortRangeError {
    /// Not two parts.
    #[error("expected FIRST-LAST, as in 30000-32767")]
    Form,
    /// Not a port.
    #[error("not a port: {0}")]
    Number(#[from] ParseIntError),
    /// Nothing in it, or 0.
    #[error("the first port must not be 0 nor above the last")]
    Empty,
}

impl FromStr for PortRange {
    type Err = PortRangeError;

    fn from_str(text: &str) -> Result<Self, PortRangeError> {
        let (first, last) = text.split_once('-').ok_or(PortRangeError::Form)?;
        let range = first.trim().parse()?..=last.trim().parse()?;
        if *range.start() == 0 || range.is_empty() {
            return Err(PortRangeError::Empty);
        }
        Ok(Self(range))
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.0.start(), self.0.end())
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
    use super::{PortRange, SourceName};

    #[test]
    fn a_range_has_a_first_and_a_last_port() {
        assert_eq!("30000-32767".parse::<PortRange>().unwrap(), PortRange(30000..=32767));
        for nonsense in ["30000", "2-1", "0-5", "1-65536", "a-b", ""] {
            assert!(nonsense.parse::<PortRange>().is_err(), "{nonsense}");
        }
    }

    #[test]
    fn a_source_is_kubernetes_or_a_directory() {
        assert_eq!("kubernetes".parse::<SourceName>().unwrap(), SourceName::Kubernetes);
        assert_eq!("file:/a:b".parse::<SourceName>().unwrap(), SourceName::Files("/a:b".into()));
        for nonsense in ["file:", "files:/a", "k8s", ""] {
            assert!(nonsense.parse::<SourceName>().is_err(), "{nonsense}");
        }
    }
}
