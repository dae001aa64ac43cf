//! What the agent tells the programs: Services, slots, backends, the node. And what the kernel knows: routes.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use proxy_common::{
    addr::{Ipv4, Ipv6, Protocol},
    backend::BackendState,
    filter::Filter,
    node::{Node, local},
    service::{Service, flag},
};

/// As it stands in maps.
pub fn address_v4(address: Ipv4Addr) -> Ipv4 {
    Ipv4 { octets: address.octets() }
}

/// As it stands in maps.
pub fn address_v6(address: Ipv6Addr) -> Ipv6 {
    Ipv6 { octets: address.octets() }
}

/// A backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// Address of the pod.
    pub address: IpAddr,
    /// Its port.
    pub port: u16,
    /// What may be sent to it.
    pub state: BackendState,
    /// Whether it is on this node.
    pub is_local: bool,
    /// Counts how often the id was given to another.
    pub generation: u32,
}

/// Where packets to a backend go next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hop {
    /// Whose MAC they get.
    pub mac: [u8; 6],
    /// The longest IP packet that may go there.
    pub mtu: u16,
}

/// Everything the agent has told.
#[derive(Clone)]
pub struct World {
    /// Of the node.
    pub node: Node,
    /// By frontend. Protocol `Any` and port 0 stand for all ports of an address.
    pub services: BTreeMap<(IpAddr, u16, Protocol), Service>,
    /// Ids of backends.
    pub slots: Vec<u32>,
    /// By family (IPv4?) and id.
    pub backends: BTreeMap<(bool, u32), Target>,
    /// The node's addresses, and whether NodePorts are served on them.
    pub local: BTreeMap<IpAddr, u32>,
    /// Prefixes of `ServiceCIDRs`.
    pub service_cidrs: BTreeSet<(IpAddr, u32)>,
    /// Prefixes from which a Service port, by its index, may be used.
    pub sources: BTreeSet<(u32, IpAddr, u32)>,
    /// Addresses that packets on the way in may have.
    pub inbound: Box<Filter>,
    /// Addresses that packets on the way out may have.
    pub outbound: Box<Filter>,
    /// Next hops by prefix, longest first; `None` where the kernel has to find it.
    pub routes: Vec<(IpAddr, u32, Option<Hop>)>,
    /// MACs of the node's devices.
    pub macs: Vec<[u8; 6]>,
    /// MAC of the uplink.
    pub uplink_mac: [u8; 6],
}

impl World {
    /// The address that masqueraded flows bear.
    pub fn masquerade(&self, is_v4: bool) -> Option<IpAddr> {
        let address: IpAddr = if is_v4 { self.node.masquerade_v4.into() } else { self.node.masquerade_v6.into() };
        (!address.is_unspecified()).then_some(address)
    }

    /// Whether source ports may be taken from the node's range at this number.
    pub fn is_source_port(&self, port: u16) -> bool {
        (self.node.source_port_first.number()..=self.node.source_port_last.number()).contains(&port)
    }

    /// Whether an address is the node's own.
    pub fn is_of_node(&self, address: IpAddr) -> bool {
        self.local.contains_key(&address)
    }

    /// Whether an address is a ClusterIP in use.
    pub fn is_cluster_ip(&self, address: IpAddr) -> bool {
        self.services.get(&(address, 0, Protocol::Any)).is_some_and(|it| it.flags & flag::EXTERNAL == 0)
    }

    /// Whether an address is a Service's and nobody else's.
    pub fn is_virtual(&self, address: IpAddr) -> bool {
        self.services.contains_key(&(address, 0, Protocol::Any)) && !self.is_of_node(address)
    }

    /// Whether an address is in a ServiceCIDR.
    pub fn is_in_service_cidrs(&self, address: IpAddr) -> bool {
        self.service_cidrs.iter().any(|(prefix, bits)| is_in(address, *prefix, *bits))
    }

    /// Whether an address could be a ClusterIP, and is none.
    pub fn is_unallocated(&self, address: IpAddr) -> bool {
        self.is_in_service_cidrs(address) && !self.is_cluster_ip(address) && !self.is_of_node(address)
    }

    /// The Service of a destination: its own, else that of a NodePort.
    pub fn service(&self, address: IpAddr, port: u16, proto: Protocol) -> Option<Service> {
        if address.is_unspecified() {
            return None;
        }
        if let Some(service) = self.services.get(&(address, port, proto)) {
            return Some(*service);
        }
        let range = self.node.node_port_first.number()..=self.node.node_port_last.number();
        let serves = self.local.get(&address).is_some_and(|flags| flags & local::NODE_PORTS != 0);
        if !range.contains(&port) || !serves {
            return None;
        }
        let any: IpAddr = if address.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        self.services.get(&(any, port, proto)).copied()
    }

    /// Whether a client may use a Service port that has source ranges. One that uses the frontend's own address may if the
    /// node may.
    pub fn is_allowed(&self, service: u32, client: IpAddr, frontend: IpAddr) -> bool {
        let has = |address| {
            self.sources.iter().any(|(index, prefix, bits)| *index == service && is_in(address, *prefix, *bits))
        };
        has(client) || client == frontend && self.masquerade(client.is_ipv4()).is_some_and(has)
    }

    /// A backend by its id.
    pub fn backend(&self, is_v4: bool, id: u32) -> Option<Target> {
        self.backends.get(&(is_v4, id)).copied()
    }

    /// Whether a flow's backend may get packets of flows that can choose again.
    pub fn still_serves(&self, is_v4: bool, id: u32, generation: u32) -> bool {
        self.backend(is_v4, id).is_some_and(|it| it.generation == generation && it.state == BackendState::Serving)
    }

    /// Whether a flow's backend has left for good.
    pub fn is_gone(&self, is_v4: bool, id: u32, generation: u32) -> bool {
        self.backend(is_v4, id)
            .is_none_or(|it| it.generation != generation || matches!(it.state, BackendState::Gone | BackendState::Free))
    }

    /// The next hop to an address, if the model knows the route.
    pub fn route(&self, address: IpAddr) -> Option<Option<Hop>> {
        self.routes.iter().find(|(prefix, bits, _)| is_in(address, *prefix, *bits)).map(|(_, _, hop)| *hop)
    }
}

/// Whether an address is in a prefix.
fn is_in(address: IpAddr, prefix: IpAddr, bits: u32) -> bool {
    let shift = |width: u32| width - bits.min(width);
    match (address, prefix) {
        (IpAddr::V4(address), IpAddr::V4(prefix)) => {
            let differ = u64::from(address.to_bits() ^ prefix.to_bits());
            differ >> shift(32) == 0
        }
        (IpAddr::V6(address), IpAddr::V6(prefix)) => {
            let differ = address.to_bits() ^ prefix.to_bits();
            bits == 0 || differ >> shift(128) == 0
        }
        _ => false,
    }
}
