//! Which addresses are the node's: what NodePorts are served on, and where masqueraded flows come from. In: the node's
//! network, its Node object, the operator's choice. Out: tables.

use std::{
    collections::BTreeMap,
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

use ipnet::IpNet;
use proxy_common::node::local;

use crate::{
    dataplane::{
        DevicePattern,
        netlink::{Link, LinkAddress, NodeNetwork},
    },
    model::Node,
};

/// On which of the node's addresses NodePorts are served: on those any of these means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodePortAddresses(Vec<NodePortAddress>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum NodePortAddress {
    /// The primary address of each family, and the loopback addresses for the node's own processes.
    Primary,
    /// All of them.
    All,
    /// The loopback addresses.
    Localhost,
    /// Those within this network.
    Within(IpNet),
}

/// Why text is not [`NodePortAddresses`].
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not one of `primary`, `all` and `localhost`, nor a network like 192.0.2.0/24")]
pub struct NodePortAddressesError(String);

impl Default for NodePortAddresses {
    fn default() -> Self {
        Self(vec![NodePortAddress::Primary])
    }
}

impl FromStr for NodePortAddress {
    type Err = NodePortAddressesError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "primary" => Ok(Self::Primary),
            "all" => Ok(Self::All),
            "localhost" => Ok(Self::Localhost),
            network => network
                .parse()
                .map(Self::Within)
                .map_err(|_error: ipnet::AddrParseError| NodePortAddressesError(network.into())),
        }
    }
}

impl FromStr for NodePortAddresses {
    type Err = NodePortAddressesError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.split(',').map(|part| part.trim().parse()).collect::<Result<_, _>>().map(Self)
    }
}

impl fmt::Display for NodePortAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Primary => f.write_str("primary"),
            Self::All => f.write_str("all"),
            Self::Localhost => f.write_str("localhost"),
            Self::Within(network) => network.fmt(f),
        }
    }
}

impl fmt::Display for NodePortAddresses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let texts: Vec<String> = self.0.iter().map(ToString::to_string).collect();
        f.write_str(&texts.join(","))
    }
}

impl NodePortAddresses {
    /// Networks of one family say nothing of the other one, all of whose addresses are meant, as with kube-proxy.
    fn means(&self, address: IpAddr, primary: Primary) -> bool {
        let is_of_other_family = |choice: &NodePortAddress| match choice {
            NodePortAddress::Within(network) => network.addr().is_ipv4() != address.is_ipv4(),
            _ => false,
        };
        let is_loopback = address.is_loopback();
        self.0.iter().any(|choice| choice.means(address, primary))
            || !self.0.is_empty() && !is_loopback && self.0.iter().all(is_of_other_family)
    }
}

impl NodePortAddress {
    fn means(&self, address: IpAddr, primary: Primary) -> bool {
        match self {
            Self::Primary => primary.has(address) || address.is_loopback(),
            Self::All => true,
            Self::Localhost => address.is_loopback(),
            Self::Within(network) => network.contains(&address),
        }
    }
}

/// The primary addresses of the node: source of masqueraded flows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Primary {
    /// IPv4.
    pub v4: Option<Ipv4Addr>,
    /// IPv6.
    pub v6: Option<Ipv6Addr>,
}

impl Primary {
    /// What the Node object says, as far as the node really has it; else the first global address of an uplink.
    pub fn of(network: &NodeNetwork, node: Option<&Node>, uplinks: &[DevicePattern]) -> Self {
        let has = |address: IpAddr| network.addresses.iter().any(|known| known.net.addr() == address);
        let said = node.cloned().unwrap_or_default();
        let found: Vec<IpAddr> = uplink_addresses(network, uplinks);
        Self {
            v4: said.ipv4.filter(|v4| has((*v4).into())).or_else(|| found.iter().find_map(as_v4)),
            v6: said.ipv6.filter(|v6| has((*v6).into())).or_else(|| found.iter().find_map(as_v6)),
        }
    }

    /// Those that masqueraded flows may bear, too: the Node object names them and they are on the device of the primary one.
    /// Others come and go with who announces them (keepalived, kube-vip), and would take the flows with them.
    pub fn further(&self, network: &NodeNetwork, node: Option<&Node>) -> Vec<IpAddr> {
        let Some(node) = node else { return Vec::new() };
        let device = |address: IpAddr| {
            let is_meant = |known: &&LinkAddress| known.net.addr() == address;
            let is_source = |known: &&LinkAddress| known.is_usable && !known.is_deprecated;
            let mut found = network.addresses.iter().filter(is_meant).filter(is_source);
            found.next().map(|known| known.ifindex)
        };
        let primary =
            |address: &IpAddr| if address.is_ipv4() { self.v4.map(Into::into) } else { self.v6.map(Into::into) };
        let is_beside = |address: &IpAddr| {
            let own = device(*address);
            own.is_some() && own == primary(address).and_then(device)
        };
        node.addresses.iter().copied().filter(|address| !self.has(*address) && is_beside(address)).collect()
    }

    fn has(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(v4) => self.v4 == Some(v4),
            IpAddr::V6(v6) => self.v6 == Some(v6),
        }
    }
}

/// Content of `LOCAL_ADDRS_*`: every address of the node but the link-local ones, which no Service is reached by.
pub fn local_addresses(network: &NodeNetwork, primary: Primary, choice: &NodePortAddresses) -> BTreeMap<IpAddr, u32> {
    let addresses = network.addresses.iter().filter(|known| known.is_usable).map(|known| known.net.addr());
    let served = |address: IpAddr| choice.means(address, primary);
    let bits = |address: IpAddr| if served(address) { local::NODE_PORTS } else { 0 };
    addresses.filter(|address| !is_link_local(*address)).map(|address| (address, bits(address))).collect()
}

/// What the devices of the node have but its loopback addresses and link-local ones.
pub fn on_devices(network: &NodeNetwork) -> impl Iterator<Item = IpAddr> {
    let addresses = network.addresses.iter().filter(|known| known.is_usable).map(|known| known.net.addr());
    addresses.filter(|address| !is_link_local(*address) && !address.is_loopback())
}

/// Adds the IPv4 addresses as they stand among those of IPv6, for packets between the families. Those never come by loopback.
pub fn add_mapped(addresses: &mut BTreeMap<IpAddr, u32>) {
    let ipv4 = addresses.iter().filter_map(|(address, bits)| Some((as_v4(address)?, *bits)));
    let mapped: Vec<_> = ipv4.filter(|(v4, _)| !v4.is_loopback()).collect();
    addresses.extend(mapped.into_iter().map(|(v4, bits)| (v4.to_ipv6_mapped().into(), bits)));
}

fn is_link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    }
}

/// Global addresses of the uplinks, the kernel's favourites first.
fn uplink_addresses(network: &NodeNetwork, uplinks: &[DevicePattern]) -> Vec<IpAddr> {
    let is_uplink = |link: &&Link| match uplinks {
        [] => link.has_default_route,
        patterns => patterns.iter().any(|pattern| pattern.matches(&link.name)),
    };
    let indexes: Vec<u32> = network.links.iter().filter(is_uplink).map(|link| link.ifindex).collect();
    let is_candidate = |known: &&LinkAddress| {
        known.is_global && known.is_usable && !known.is_deprecated && indexes.contains(&known.ifindex)
    };
    let mut candidates: Vec<&LinkAddress> = network.addresses.iter().filter(is_candidate).collect();
    candidates.sort_by_key(|known| known.is_secondary);
    candidates.iter().map(|known| known.net.addr()).collect()
}

fn as_v4(address: &IpAddr) -> Option<Ipv4Addr> {
    match address {
        IpAddr::V4(v4) => Some(*v4),
        IpAddr::V6(_) => None,
    }
}

fn as_v6(address: &IpAddr) -> Option<Ipv6Addr> {
    match address {
        IpAddr::V4(_) => None,
        IpAddr::V6(v6) => Some(*v6),
    }
}

#[cfg(test)]
mod tests {
    use proxy_common::node::local::NODE_PORTS;

    use super::{NodePortAddresses, Primary, local_addresses};
    use crate::{
        dataplane::netlink::{Link, LinkAddress, NodeNetwork},
        model::Node,
    };

    fn network() -> NodeNetwork {
        let address = |ifindex, net: &str, is_secondary| LinkAddress {
            ifindex,
            net: net.parse().unwrap(),
            is_global: !net.starts_with("127") && !net.starts_with("fe80"),
            is_secondary,
            is_usable: true,
            is_deprecated: false,
        };
        NodeNetwork {
            links: vec![
                Link { ifindex: 1, name: "lo".into(), is_loopback: true, ..Link::default() },
                Link { ifindex: 2, name: "eth0".into(), has_default_route: true, ..Link::default() },
                Link { ifindex: 3, name: "eth1".into(), ..Link::default() },
            ],
            addresses: vec![
                address(1, "127.0.0.1/8", false),
                address(2, "192.0.2.7/24", true),
                address(2, "192.0.2.9/24", false),
                address(2, "fe80::9/64", false),
                address(3, "198.51.100.9/24", false),
                address(3, "2001:db8::9/64", false),
            ],
        }
    }

    #[test]
    fn the_node_object_decides_unless_the_node_does_not_have_the_address() {
        let node = Node { ipv4: "198.51.100.9".parse().ok(), ipv6: "2001:db8::77".parse().ok(), ..Node::default() };
        let primary = Primary::of(&network(), Some(&node), &[]);
        assert_eq!(primary, Primary { v4: "198.51.100.9".parse().ok(), v6: None });
    }

    #[test]
    fn without_a_node_object_the_uplink_decides() {
        assert_eq!(Primary::of(&network(), None, &[]), Primary { v4: "192.0.2.9".parse().ok(), v6: None });
        let uplinks = ["eth1".parse().unwrap()];
        let primary = Primary::of(&network(), None, &uplinks);
        assert_eq!(primary, Primary { v4: "198.51.100.9".parse().ok(), v6: "2001:db8::9".parse().ok() });
    }

    #[test]
    fn further_addresses_are_those_the_node_object_names_beside_the_primary_one() {
        let mut network = network();
        for net in ["192.0.2.10/24", "192.0.2.77/32"] {
            network.addresses.push(LinkAddress { net: net.parse().unwrap(), ..network.addresses[2] });
        }
        let named = ["192.0.2.9", "192.0.2.10", "192.0.2.88", "198.51.100.9", "2001:db8::9"];
        let addresses = named.iter().map(|address| address.parse().unwrap()).collect();
        let node = Node { ipv4: "192.0.2.9".parse().ok(), addresses, ..Node::default() };
        let primary = Primary::of(&network, Some(&node), &[]);
        assert_eq!(primary.further(&network, Some(&node)), ["192.0.2.10".parse::<std::net::IpAddr>().unwrap()]);
        assert_eq!(primary.further(&network, None), [] as [std::net::IpAddr; 0]);
    }

    #[test]
    fn node_ports_are_served_where_the_operator_wants_them() {
        let cases = [
            ("primary", vec!["127.0.0.1", "192.0.2.9"]),
            ("all", vec!["127.0.0.1", "192.0.2.7", "192.0.2.9", "198.51.100.9", "2001:db8::9"]),
            ("198.51.100.0/24,2001:db8::/32", vec!["198.51.100.9", "2001:db8::9"]),
            ("localhost", vec!["127.0.0.1"]),
            ("localhost, 198.51.100.0/24", vec!["127.0.0.1", "198.51.100.9"]),
            ("primary,198.51.100.0/24", vec!["127.0.0.1", "192.0.2.9", "198.51.100.9"]),
            ("198.51.100.0/24", vec!["198.51.100.9", "2001:db8::9"]),
            ("2001:db8:1::/48", vec!["192.0.2.7", "192.0.2.9", "198.51.100.9"]),
        ];
        for (choice, expected) in cases {
            let primary = Primary::of(&network(), None, &[]);
            let choice: NodePortAddresses = choice.parse().unwrap();
            let addresses = local_addresses(&network(), primary, &choice);
            assert_eq!(addresses.len(), 5, "{choice}");
            let served = addresses.iter().filter(|(_, bits)| **bits == NODE_PORTS);
            let served: Vec<String> = served.map(|(address, _)| address.to_string()).collect();
            assert_eq!(served, expected, "{choice}");
        }
    }

    #[test]
    fn nonsense_is_no_choice() {
        for nonsense in ["", "primary,10.0.0.0/33", "all,", "public", "10.0.0.1"] {
            assert!(nonsense.parse::<NodePortAddresses>().is_err(), "{nonsense}");
        }
    }
}
