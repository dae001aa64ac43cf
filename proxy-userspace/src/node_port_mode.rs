//! How packets from outside get to a backend on another node.

use std::{fmt, str::FromStr};

use clap::ValueEnum;
use proxy_common::addr::Protocol;

/// How packets from outside for NodePorts and external addresses get to a backend on another node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum NodePortMode {
    /// With this node's address as their source: replies come back through this node
    #[default]
    Snat,
    /// As they are, to a node on the same network, which answers the client itself
    Dsr,
    /// TCP as with `dsr`, the rest as with `snat`
    Hybrid,
}

/// Not the name of a mode.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is none of snat, dsr and hybrid")]
pub struct NodePortModeError(String);

impl NodePortMode {
    const ALL: [Self; 3] = [Self::Snat, Self::Dsr, Self::Hybrid];

    /// Whether packets of a protocol go to the other node as they are.
    pub fn dispatches(self, protocol: Protocol) -> bool {
        match self {
            Self::Snat => false,
            Self::Dsr => true,
            Self::Hybrid => protocol == Protocol::Tcp,
        }
    }
}

impl fmt::Display for NodePortMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Snat => "snat",
            Self::Dsr => "dsr",
            Self::Hybrid => "hybrid",
        })
    }
}

impl FromStr for NodePortMode {
    type Err = NodePortModeError;

    fn from_str(text: &str) -> Result<Self, NodePortModeError> {
        let named = Self::ALL.into_iter().find(|mode| mode.to_string() == text);
        named.ok_or_else(|| NodePortModeError(text.into()))
    }
}

#[cfg(test)]
mod tests {
    use clap::ValueEnum as _;
    use proxy_common::addr::Protocol::{Sctp, Tcp, Udp};

    use super::NodePortMode;

    #[test]
    fn the_flag_and_the_annotation_know_the_same_modes() {
        for mode in NodePortMode::value_variants() {
            assert_eq!(mode.to_possible_value().unwrap().get_name(), mode.to_string());
            assert_eq!(mode.to_string().parse(), Ok(*mode));
        }
        assert!("DSR".parse::<NodePortMode>().is_err());
    }

    #[test]
    fn a_hybrid_dispatches_tcp_alone() {
        let dispatched = |mode: NodePortMode| [Tcp, Udp, Sctp].map(|protocol| mode.dispatches(protocol));
        assert_eq!(dispatched(NodePortMode::Snat), [false; 3]);
        assert_eq!(dispatched(NodePortMode::Dsr), [true; 3]);
        assert_eq!(dispatched(NodePortMode::Hybrid), [true, false, false]);
    }
}
