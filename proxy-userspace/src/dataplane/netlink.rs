//! The node's own network, as netlink tells it: links, addresses and which links carry a default route. A watcher
//! turns the kernel's notifications into [`NetworkEvent`]s. And the kernel's lists of sockets and connections.

pub mod conntrack;
mod dump;
mod exchange;
mod messages;
pub(crate) mod netfilter;
mod peers;
mod route;
pub(super) mod sockets;
pub mod tunnels;
mod watcher;

use ipnet::IpNet;
use proxy_common::node::Vlan;

pub use self::{
    dump::dump,
    peers::{LinkLayerAddress, Reach, watch_peers},
    route::device_towards,
    watcher::{SERVICE_DEVICE, snapshot, snapshot_blocking, watch},
};

/// The node's links and addresses at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeNetwork {
    /// Every link of this network namespace, by interface index.
    pub links: Vec<Link>,
    /// Every address, by link and then by address.
    pub addresses: Vec<LinkAddress>,
}

impl NodeNetwork {
    /// The link of a name.
    pub fn link(&self, name: &str) -> Option<&Link> {
        self.links.iter().find(|link| link.name == name)
    }

    /// Takes over from before which links carry a default route, when none does any more: the route may come back in a
    /// moment, and what is attached to its link need not go meanwhile. Another default route, or the link's end, ends that.
    #[must_use]
    pub fn or_default_routes_of(mut self, before: Option<&Self>) -> Self {
        let is_known = self.links.iter().any(|link| link.has_default_route);
        for old in before.into_iter().flat_map(|before| &before.links).filter(|old| !is_known && old.has_default_route)
        {
            let same = |link: &&mut Link| link.ifindex == old.ifindex;
            if let Some(link) = self.links.iter_mut().find(same) {
                link.has_default_route = true;
            }
        }
        self
    }
}

/// A network device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own about the device")]
pub struct Link {
    /// Interface index.
    pub ifindex: u32,
    /// Name.
    pub name: String,
    /// The kernel's name of its kind (`veth`, `bridge`, `vxlan`); empty for a physical device.
    pub kind: String,
    /// It is administratively up.
    pub is_up: bool,
    /// It is the loopback device.
    pub is_loopback: bool,
    /// It is a veth whose other end is in another network namespace.
    pub is_pod_veth: bool,
    /// A default route of either family leads out of it.
    pub has_default_route: bool,
    /// Its address in Ethernet.
    pub mac: Option<[u8; 6]>,
    /// Its frames have an Ethernet header.
    pub has_ethernet: bool,
    /// Its packets begin with their IP header.
    pub is_layer3: bool,
    /// The tag that brings frames of another device here.
    pub vlan: Option<Vlan>,
    /// Interface index of the bridge, bond or VRF it belongs to.
    pub master: Option<u32>,
    /// Id of the XDP program on it.
    pub xdp_program: Option<u32>,
    /// That program runs after the kernel has made an skb, not in the driver.
    pub has_generic_xdp: bool,
}

/// Kinds of devices by which pods of other nodes are reached without Ethernet headers. Of most the kernel has one everywhere that nobody
/// has asked for and that is down.
const LAYER3_TUNNELS: [&str; 7] = ["ipip", "sit", "ip6tnl", "gre", "ip6gre", "wireguard", "tun"];

impl Link {
    /// Whether it is a tunnel in which pods of other nodes may be reached.
    pub fn is_overlay(&self) -> bool {
        ["vxlan", "geneve"].contains(&self.kind.as_str()) || self.is_up && LAYER3_TUNNELS.contains(&self.kind.as_str())
    }
}

/// An address of the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own about the address")]
pub struct LinkAddress {
    /// Interface index of its link.
    pub ifindex: u32,
    /// The address with the length of its prefix.
    pub net: IpNet,
    /// The kernel calls its scope global: neither link-local nor of the host alone.
    pub is_global: bool,
    /// It was added after another one of the same subnet, or is a temporary one (RFC 8981).
    pub is_secondary: bool,
    /// It can be used: duplicate address detection is over and did not fail.
    pub is_usable: bool,
    /// It is not to be the source of what is new: its preferred lifetime is over, or there was none, as for what keepalived adds.
    pub is_deprecated: bool,
}

/// What changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NetworkEvent {
    /// Links, addresses or default routes are now these. The first event of a watcher.
    Changed(NodeNetwork),
    /// Routes, neighbours or links changed: a next hop found before may be wrong.
    RoutesChanged,
}

/// Why the network could not be read.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// No socket.
    #[error("cannot open a netlink socket: {0}")]
    Socket(#[from] std::io::Error),
    /// A request failed.
    #[error("cannot list {what}: {source}")]
    List {
        /// `links`, `addresses`, `routes`, `rules` or `neighbours`.
        what: &'static str,
        /// What the kernel said.
        source: rtnetlink::Error,
    },
}

#[cfg(test)]
mod tests {
    use super::{Link, NodeNetwork};

    /// Links by index, and whether they carry a default route.
    fn network(links: &[(u32, bool)]) -> NodeNetwork {
        let link = |&(ifindex, has_default_route)| Link { ifindex, has_default_route, ..Link::default() };
        NodeNetwork { links: links.iter().map(link).collect(), addresses: Vec::new() }
    }

    #[test]
    fn a_default_route_that_is_lost_is_remembered_until_there_is_another_or_its_link_is_gone() {
        let before = network(&[(1, false), (2, true), (3, true)]);
        let cases = [
            ("lost", network(&[(1, false), (2, false), (3, false)]), vec![2, 3]),
            ("one of two lost", network(&[(1, false), (2, true), (3, false)]), vec![2]),
            ("moved", network(&[(1, true), (2, false), (3, false)]), vec![1]),
            ("lost, and a link gone", network(&[(1, false), (3, false), (4, false)]), vec![3]),
        ];
        for (name, after, expected) in cases {
            let after = after.or_default_routes_of(Some(&before));
            let uplinks = after.links.iter().filter(|link| link.has_default_route);
            assert_eq!(uplinks.map(|link| link.ifindex).collect::<Vec<_>>(), expected, "{name}");
        }
        assert_eq!(network(&[(1, false)]).or_default_routes_of(None), network(&[(1, false)]));
    }
}
