//! The lab's address plan. The objects in `examples/` are written for it.
//!
//! | | IPv4 | IPv6 |
//! |---|---|---|
//! | wire | 192.0.2.0/24 | `2001:db8::/64` |
//! | pods of node n | 10.244.n.0/24 | `fd00:10:244:n::/64` |
//! | Services (routed nowhere) | 10.96.0.0/16 | `fd00:10:96::/112` |
//! | load balancers (routed nowhere) | 198.51.100.0/24 | `2001:db8:100::/64` |
//! | external addresses (routed nowhere) | 203.0.113.0/24 | `2001:db8:113::/64` |
//!
//! The last part of an IPv6 address has the digits of its IPv4 sibling: 10.244.1.11 and `fd00:10:244:1::11`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// An address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// IPv4
    V4,
    /// IPv6
    V6,
}

impl Family {
    /// Both, for loops.
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// The family of an address.
    pub fn of(address: IpAddr) -> Self {
        if address.is_ipv4() { Self::V4 } else { Self::V6 }
    }

    /// `IPv4` or `IPv6`, as in an `EndpointSlice`'s `addressType`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        }
    }
}

/// An address of each family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Addresses {
    /// IPv4
    pub v4: Ipv4Addr,
    /// IPv6
    pub v6: Ipv6Addr,
}

impl Addresses {
    /// The one of a family.
    pub fn of(self, family: Family) -> IpAddr {
        match family {
            Family::V4 => self.v4.into(),
            Family::V6 => self.v6.into(),
        }
    }

    /// Whether it is one of the two.
    pub fn has(self, address: IpAddr) -> bool {
        address == self.v4 || address == self.v6
    }
}

/// The host number in decimal digits read as hexadecimal ones.
fn digits(host: u8) -> u16 {
    u16::from(host / 100) << 8 | u16::from(host / 10 % 10) << 4 | u16::from(host % 10)
}

/// A host on the wire.
pub fn on_wire(host: u8) -> Addresses {
    Addresses { v4: Ipv4Addr::new(192, 0, 2, host), v6: Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, digits(host)) }
}

/// A pod, or the gateway, of a node.
pub fn of_pod(node: u8, host: u8) -> Addresses {
    Addresses {
        v4: Ipv4Addr::new(10, 244, node, host),
        v6: Ipv6Addr::new(0xfd00, 0x10, 0x244, u16::from(node), 0, 0, 0, digits(host)),
    }
}

/// A Service.
pub fn of_service(host: u8) -> Addresses {
    Addresses { v4: Ipv4Addr::new(10, 96, 0, host), v6: Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, digits(host)) }
}

/// A load balancer's virtual address.
pub fn of_balancer(host: u8) -> Addresses {
    Addresses {
        v4: Ipv4Addr::new(198, 51, 100, host),
        v6: Ipv6Addr::new(0x2001, 0xdb8, 0x100, 0, 0, 0, 0, digits(host)),
    }
}

/// An external address.
pub fn external(host: u8) -> Addresses {
    Addresses {
        v4: Ipv4Addr::new(203, 0, 113, host),
        v6: Ipv6Addr::new(0x2001, 0xdb8, 0x113, 0, 0, 0, 0, digits(host)),
    }
}

/// The gateway to everywhere else, where packets are swallowed.
pub const GATEWAY: u8 = 1;

/// A node's end of the tunnel to the other one, among the addresses of its pods.
pub const TUNNEL: u8 = 250;

/// The client outside.
pub const CLIENT: u8 = 100;

/// How a node's pods hang on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PodNetwork {
    /// A veth and a host route per pod, proxy ARP, no bridge.
    Routed,
    /// Ports of the bridge `cni0`, which is the pods' gateway.
    Bridged,
}

/// A node of the lab.
#[derive(Clone, Copy, Debug)]
pub struct NodePlan {
    /// Its Kubernetes name.
    pub name: &'static str,
    /// Its topology zone.
    pub zone: &'static str,
    /// The third part of its pods' addresses.
    pub number: u8,
    /// The last part of its address on the wire.
    pub host: u8,
    /// How its pods hang on it.
    pub pod_network: PodNetwork,
    /// Its pods: name and last part of the address. The last one is nobody's backend.
    pub pods: [(&'static str, u8); 3],
}

/// The nodes.
pub const NODES: [NodePlan; 2] = [
    NodePlan {
        name: "node-a",
        zone: "zone-a",
        number: 1,
        host: 11,
        pod_network: PodNetwork::Routed,
        pods: [("a1", 11), ("a2", 12), ("client-a", 100)],
    },
    NodePlan {
        name: "node-b",
        zone: "zone-b",
        number: 2,
        host: 12,
        pod_network: PodNetwork::Bridged,
        pods: [("b1", 11), ("b2", 12), ("client-b", 100)],
    },
];

/// The plan of the node by that name.
pub fn node(name: &str) -> Option<&'static NodePlan> {
    NODES.iter().find(|node| node.name == name)
}

/// The addresses of the pod by that name, and its node. A pod named like a node is in the node's own network.
pub fn pod(name: &str) -> Option<(&'static NodePlan, Addresses)> {
    NODES.iter().find_map(|node| {
        if node.name == name {
            return Some((node, on_wire(node.host)));
        }
        let (_, host) = node.pods.iter().find(|(pod, _)| *pod == name)?;
        Some((node, of_pod(node.number, *host)))
    })
}

/// The name of the pod that has the address.
pub fn pod_at(address: IpAddr) -> Option<&'static str> {
    let pods =
        NODES.iter().flat_map(|node| node.pods.iter().map(move |(name, host)| (*name, of_pod(node.number, *host))));
    pods.into_iter().find_map(|(name, addresses)| addresses.has(address).then_some(name))
}

#[cfg(test)]
mod tests {
    use super::{of_pod, of_service, on_wire, pod_at};

    #[test]
    fn both_families_end_in_the_same_digits() {
        assert_eq!(on_wire(100).v6.to_string(), "2001:db8::100");
        assert_eq!(of_pod(1, 11).v6.to_string(), "fd00:10:244:1::11");
        assert_eq!(of_service(80).v6.to_string(), "fd00:10:96::80");
    }

    #[test]
    fn a_pod_is_found_by_either_address() {
        assert_eq!(pod_at(of_pod(2, 12).v4.into()), Some("b2"));
        assert_eq!(pod_at(of_pod(2, 12).v6.into()), Some("b2"));
        assert_eq!(pod_at(on_wire(12).v4.into()), None);
    }
}
