//! What the programs must know of the node itself: the one entry of `NODE`, and the value of `LOCAL_ADDRS_V4/6`.

use crate::addr::{Ipv4, Ipv6, Port};

/// Version of all map types together. A pin that carries another one is left alone.
pub const LAYOUT: u32 = 1;

/// The one entry of `NODE`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Node {
    /// [`LAYOUT`] of whoever wrote this entry.
    pub layout: u32,
    /// Raised by the agent at each change of routes, neighbours or links: next hops found before are looked up anew.
    pub route_generation: u32,
    /// Source address of masqueraded IPv6 flows; unspecified when the node has none.
    pub masquerade_v6: Ipv6,
    /// Source address of masqueraded IPv4 flows; unspecified when the node has none.
    pub masquerade_v4: Ipv4,
    /// First NodePort.
    pub node_port_first: Port,
    /// Last NodePort.
    pub node_port_last: Port,
    /// First source port given to masqueraded flows.
    pub source_port_first: Port,
    /// Last source port given to masqueraded flows.
    pub source_port_last: Port,
    /// What the kernel calls HZ, measured by the agent.
    pub jiffies_per_second: u32,
}

/// Bits of the value of `LOCAL_ADDRS_V4` and `LOCAL_ADDRS_V6`.
pub mod local {
    /// NodePorts are served on this address.
    pub const NODE_PORTS: u32 = 1;
}

crate::no_padding!(Node: u32, u32, Ipv6, Ipv4, Port, Port, Port, Port, u32);
crate::map_type!(Node);
