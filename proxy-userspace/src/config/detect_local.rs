//! How kube-proxy is told which traffic comes from pods, and what of it matters here: Sluice knows pods by the devices
//! they are behind.

use clap::ValueEnum;
use glob::Pattern;
use serde::{Deserialize, Serialize};

use crate::dataplane::{DevicePattern, PatternError};

/// The value of `--detect-local-mode`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, ValueEnum)]
pub enum DetectLocalMode {
    /// Nothing was said.
    #[default]
    #[serde(rename = "")]
    #[value(skip)]
    Unset,
    /// Pods have addresses of a network that all nodes share.
    #[serde(rename = "ClusterCIDR")]
    #[value(name = "ClusterCIDR")]
    ClusterCidr,
    /// Pods have addresses of the node's own network.
    #[serde(rename = "NodeCIDR")]
    #[value(name = "NodeCIDR")]
    NodeCidr,
    /// Pods are behind a bridge.
    #[value(name = "BridgeInterface")]
    BridgeInterface,
    /// Pods are behind devices whose names begin alike.
    #[value(name = "InterfaceNamePrefix")]
    InterfaceNamePrefix,
}

/// A mode and what goes with it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DetectLocal {
    /// How pods are told.
    pub mode: DetectLocalMode,
    /// For [`DetectLocalMode::ClusterCidr`].
    pub cluster_cidr: Option<String>,
    /// For [`DetectLocalMode::BridgeInterface`].
    pub bridge: Option<String>,
    /// For [`DetectLocalMode::InterfaceNamePrefix`].
    pub prefix: Option<String>,
}

/// A mode without what it needs.
#[derive(Debug, thiserror::Error)]
pub enum DetectLocalError {
    /// No bridge.
    #[error("the mode BridgeInterface needs the bridge's name: --pod-bridge-interface or detectLocal.bridgeInterface")]
    Bridge,
    /// No prefix.
    #[error(
        "the mode InterfaceNamePrefix needs a prefix: --pod-interface-name-prefix or detectLocal.interfaceNamePrefix"
    )]
    Prefix,
    /// No pattern can be made of the prefix.
    #[error("no device's name begins with {prefix:?}: {source}")]
    Pattern {
        /// As given.
        prefix: String,
        /// What is wrong with it.
        source: PatternError,
    },
}

impl DetectLocal {
    /// What is set here, and else what is set there.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        Self {
            mode: if self.mode == DetectLocalMode::Unset { other.mode } else { self.mode },
            cluster_cidr: self.cluster_cidr.or(other.cluster_cidr),
            bridge: self.bridge.or(other.bridge),
            prefix: self.prefix.or(other.prefix),
        }
    }

    /// The bridge whose ports lead to pods, in the mode that means one.
    pub fn pod_bridge(&self) -> Result<Option<String>, DetectLocalError> {
        match (self.mode, given(self.bridge.as_ref())) {
            (DetectLocalMode::BridgeInterface, None) => Err(DetectLocalError::Bridge),
            (DetectLocalMode::BridgeInterface, bridge) => Ok(bridge.cloned()),
            _ => Ok(None),
        }
    }

    /// The devices that lead to pods, in the mode that means some by name.
    pub fn pod_devices(&self) -> Result<Option<DevicePattern>, DetectLocalError> {
        if self.mode != DetectLocalMode::InterfaceNamePrefix {
            return Ok(None);
        }
        let prefix = given(self.prefix.as_ref()).ok_or(DetectLocalError::Prefix)?;
        let pattern = format!("{}*", Pattern::escape(prefix)).parse();
        pattern.map(Some).map_err(|source| DetectLocalError::Pattern { prefix: prefix.clone(), source })
    }

    /// Whether the operator may think that addresses tell pods from others.
    pub fn goes_by_addresses(&self) -> bool {
        matches!(self.mode, DetectLocalMode::ClusterCidr | DetectLocalMode::NodeCidr)
            || self.cluster_cidr.as_ref().is_some_and(|cidr| !cidr.is_empty())
    }
}

fn given(text: Option<&String>) -> Option<&String> {
    text.filter(|text| !text.is_empty())
}

#[cfg(test)]
mod tests {
    use super::{DetectLocal, DetectLocalMode};

    fn mode(mode: DetectLocalMode, name: &str) -> DetectLocal {
        let name = Some(name.to_owned());
        DetectLocal { mode, bridge: name.clone(), prefix: name, cluster_cidr: None }
    }

    #[test]
    fn modes_by_device_mean_devices_and_modes_by_address_none() {
        let bridge = mode(DetectLocalMode::BridgeInterface, "cbr0");
        assert_eq!(bridge.pod_bridge().unwrap().as_deref(), Some("cbr0"));
        assert!(bridge.pod_devices().unwrap().is_none());
        let prefix = mode(DetectLocalMode::InterfaceNamePrefix, "cali[");
        let pattern = prefix.pod_devices().unwrap().unwrap();
        assert!(pattern.matches("cali[1") && !pattern.matches("cali1"));
        assert!(prefix.pod_bridge().unwrap().is_none());
        for by_address in [DetectLocalMode::Unset, DetectLocalMode::ClusterCidr, DetectLocalMode::NodeCidr] {
            let by_address = mode(by_address, "eth");
            assert!(by_address.pod_devices().unwrap().is_none() && by_address.pod_bridge().unwrap().is_none());
        }
    }

    #[test]
    fn a_mode_without_its_name_is_refused() {
        assert!(mode(DetectLocalMode::BridgeInterface, "").pod_bridge().is_err());
        assert!(mode(DetectLocalMode::InterfaceNamePrefix, "").pod_devices().is_err());
    }
}
