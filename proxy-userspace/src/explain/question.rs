//! What is asked, as it is written on the command line: `10.244.1.5:40000 10.96.0.10:80/tcp`.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    str::FromStr,
};

use clap::ValueEnum;
use proxy_common::addr::{Port, Protocol};
use serde::Serialize;

use super::place::Stand;
use crate::dataplane::{AnyCall, Call, netlink::NodeNetwork};

/// Where a packet comes from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// By the client's address and the node's routes
    #[default]
    Auto,
    /// From a pod of this node
    Pod,
    /// From outside, by an uplink
    Uplink,
    /// From a process of the node itself
    Node,
}

/// A client: an address, and a port for one connection of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Client {
    address: IpAddr,
    port: Option<u16>,
}

/// What it calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Destination {
    address: SocketAddr,
    protocol: Protocol,
}

/// Why text is no question.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QuestionError {
    /// No address.
    #[error(
        "`{0}` is no client: an address, or ADDRESS:PORT for one connection, as in 10.244.1.5:40000 or [fd00::5]:40000"
    )]
    Client(String),
    /// No destination.
    #[error("`{0}` is no destination: ADDRESS:PORT/PROTOCOL, as in 10.96.0.10:80/tcp or [fd00::10]:53/udp")]
    Destination(String),
    /// Two families.
    #[error("{client} and {destination} are of two families: no packet bears both")]
    Families {
        /// The client's address.
        client: IpAddr,
        /// The destination's.
        destination: IpAddr,
    },
}

impl FromStr for Client {
    type Err = QuestionError;

    fn from_str(text: &str) -> Result<Self, QuestionError> {
        if let Ok(address) = text.parse::<IpAddr>() {
            return Ok(Self { address, port: None });
        }
        let socket: SocketAddr = text.parse().ok().ok_or_else(|| QuestionError::Client(text.into()))?;
        Ok(Self { address: socket.ip(), port: Some(socket.port()) })
    }
}

impl FromStr for Destination {
    type Err = QuestionError;

    fn from_str(text: &str) -> Result<Self, QuestionError> {
        let error = || QuestionError::Destination(text.into());
        let (address, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
        let protocol = match protocol.to_ascii_lowercase().as_str() {
            "tcp" => Protocol::Tcp,
            "udp" => Protocol::Udp,
            "sctp" => Protocol::Sctp,
            _ => return Err(error()),
        };
        Ok(Self { address: address.parse().ok().ok_or_else(error)?, protocol })
    }
}

impl Client {
    /// Its address and port, if one connection is meant.
    pub(crate) fn socket(self) -> Option<SocketAddr> {
        self.port.map(|port| SocketAddr::new(self.address, port))
    }
}

impl Destination {
    /// Its address and port.
    pub(crate) fn socket(self) -> SocketAddr {
        self.address
    }

    /// By which it is called.
    pub(crate) fn protocol(self) -> Protocol {
        self.protocol
    }
}

/// Who calls whom, from where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    client: Client,
    destination: Destination,
    /// Where the packet comes from.
    pub(super) origin: Origin,
    /// The device that it comes by, if it is named.
    pub(super) device: Option<String>,
}

impl Question {
    /// A question, if both ends are of one family.
    pub fn new(
        client: Client,
        destination: Destination,
        origin: Origin,
        device: Option<String>,
    ) -> Result<Self, QuestionError> {
        let (from, to) = (client.address, destination.address.ip());
        if from.is_ipv4() != to.is_ipv4() {
            return Err(QuestionError::Families { client: from, destination: to });
        }
        Ok(Self { client, destination, origin, device })
    }

    /// The client's address.
    pub fn client(&self) -> IpAddr {
        self.client.address
    }

    /// Whether one connection of the client is meant.
    pub(super) fn has_port(&self) -> bool {
        self.client.port.is_some()
    }

    /// Where the client calls.
    pub(super) fn destination(&self) -> SocketAddr {
        self.destination.address
    }

    /// The call that is tried. A process of the node may call a loopback address, which no packet may bear: what stands for
    /// it is an address of the node, at which the same NodePorts are served.
    pub(super) fn call(&self, stand: &Stand, network: &NodeNetwork) -> AnyCall {
        let (mut from, mut to) = (self.client.address, self.destination.address.ip());
        if stand.origin == Origin::Node {
            let own = own_address(network, to.is_ipv4());
            from = if from.is_loopback() { own.unwrap_or(from) } else { from };
            to = if to.is_loopback() { own.unwrap_or(to) } else { to };
        }
        let (sport, dport) = (self.client.port.map(Port::new), Port::new(self.destination.address.port()));
        let protocol = self.destination.protocol;
        match (from, to) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                AnyCall::V4(Call { saddr: from.into(), sport, daddr: to.into(), dport, protocol })
            }
            (from, to) => AnyCall::V6(Call { saddr: v6(from).into(), sport, daddr: v6(to).into(), dport, protocol }),
        }
    }
}

/// An address by which others know the node.
fn own_address(network: &NodeNetwork, is_v4: bool) -> Option<IpAddr> {
    let addresses =
        network.addresses.iter().filter(|address| address.is_global && address.is_usable && !address.is_deprecated);
    let mut addresses = addresses.map(|address| address.net.addr());
    addresses.find(|address| address.is_ipv4() == is_v4 && !address.is_loopback())
}

/// Questions are of one family.
fn v6(address: IpAddr) -> Ipv6Addr {
    match address {
        IpAddr::V4(v4) => Ipv4Addr::to_ipv6_mapped(&v4),
        IpAddr::V6(v6) => v6,
    }
}

#[cfg(test)]
mod tests {
    use super::{Client, Destination, Origin, Question};

    #[test]
    fn a_client_is_an_address_with_or_without_a_port() {
        let cases = [
            ("10.0.0.5", "10.0.0.5", None),
            ("10.0.0.5:40000", "10.0.0.5", Some(40_000)),
            ("fd00::5", "fd00::5", None),
            ("[fd00::5]:40000", "fd00::5", Some(40_000)),
        ];
        for (text, address, port) in cases {
            assert_eq!(text.parse(), Ok(Client { address: address.parse().unwrap(), port }), "{text}");
        }
        for text in ["", "web", "10.0.0.5:", "10.0.0.5:70000", "fd00::5:", "10.0.0"] {
            assert!(text.parse::<Client>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_destination_says_its_protocol_or_means_tcp() {
        let protocol = |text: &str| text.parse::<Destination>().map(|found| found.protocol.to_string());
        let cases = [
            ("10.96.0.10:80", "TCP"),
            ("10.96.0.10:80/tcp", "TCP"),
            ("10.96.0.10:53/UDP", "UDP"),
            ("[fd00::a]:9/sctp", "SCTP"),
        ];
        for (text, expected) in cases {
            assert_eq!(protocol(text).as_deref(), Ok(expected), "{text}");
        }
        for text in ["10.96.0.10", "10.96.0.10/tcp", "10.96.0.10:80/icmp", "fd00::a:9/udp/x", ":80/tcp"] {
            let error = text.parse::<Destination>().unwrap_err().to_string();
            assert!(error.contains(&format!("`{text}`")), "{error}");
        }
    }

    #[test]
    fn both_ends_are_of_one_family() {
        let error = Question::new("10.0.0.5".parse().unwrap(), "[fd00::a]:80".parse().unwrap(), Origin::Auto, None)
            .unwrap_err();
        assert!(error.to_string().contains("two families"), "{error}");
    }
}
