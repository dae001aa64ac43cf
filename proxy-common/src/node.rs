//! What the programs must know of the node itself: the one entry of `NODE`, and the value of `LOCAL_ADDRS_V4/6`.

use crate::{
    addr::{Address, Ipv4, Ipv6, Port},
    lifetime::is_to_come,
};

/// Version of all map types together. Entries of another one are converted by the names of their fields: see
/// [`crate::description`].
pub const LAYOUT: u32 = if cfg!(feature = "other-layout") { 8 } else { 7 };

/// The oldest layout whose readers understand the entries of this one, so far as they know its fields. Raised to [`LAYOUT`] with a
/// change by which a version before it would send packets to the wrong place: it then leaves such maps alone.
pub const READABLE_BY: u32 = 7;

/// How many addresses of each family there may be for masqueraded flows besides the first.
pub const FURTHER: usize = 3;

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
    /// What masqueraded IPv6 flows bear when that one's ports run out; unspecified where there is none.
    pub further_v6: [Ipv6; FURTHER],
    /// Source address of masqueraded IPv4 flows; unspecified when the node has none.
    pub masquerade_v4: Ipv4,
    /// What masqueraded IPv4 flows bear when that one's ports run out; unspecified where there is none.
    pub further_v4: [Ipv4; FURTHER],
    /// First NodePort.
    pub node_port_first: Port,
    /// Last NodePort.
    pub node_port_last: Port,
    /// First source port given to masqueraded flows.
    pub source_port_first: Port,
    /// Last source port given to masqueraded flows.
    pub source_port_last: Port,
    /// First source port given to flows between the families, which are masqueraded as well: none of the others'.
    pub cross_port_first: Port,
    /// Last source port given to them.
    pub cross_port_last: Port,
    /// What the kernel calls HZ, measured by the agent.
    pub jiffies_per_second: u32,
    /// Bits of [`masquerade`] and [`newcomers`], and [`TUNNELS`].
    pub flags: u32,
    /// Low 32 bits of jiffies until which [`newcomers::HOLD`] means something.
    pub held_until: u32,
}

impl Node {
    /// Whether packets that no flow knows are dropped, in low 32 bits of jiffies.
    #[inline(always)]
    pub const fn is_held(&self, now: u32) -> bool {
        self.flags & newcomers::HOLD != 0 && is_to_come(now, self.held_until)
    }
}

/// A bit of [`Node::flags`]: other nodes take what is dispatched to them also behind an IP header to them.
pub const TUNNELS: u32 = 4;

/// Bits of [`Node::flags`].
pub mod masquerade {
    /// Whatever goes to a ClusterIP bears the node's address, as with kube-proxy's `masqueradeAll`.
    pub const ALL: u32 = 1;
    /// What goes to a NodePort or an external address bears it also when its backend is on this node, as with kube-proxy.
    pub const LOCAL_BACKENDS: u32 = 2;
}

/// Bits of [`Node::flags`]: what becomes of packets to a Service that no flow knows. None of them: they open flows.
pub mod newcomers {
    /// They are left to the proxy beside us, and noted in `FOREIGN_*` with [`LOOK`]. Known flows go on.
    pub const LEAVE: u32 = 8;
    /// Those that stand in `FOREIGN_*` as what a client sends are left to the proxy beside us.
    pub const LOOK: u32 = 16;
    /// They are dropped, so that nothing opens a flow while the flow table is copied into another one. Senders try again. Until
    /// [`Node::held_until`](super::Node::held_until): who was to end that may have been killed.
    pub const HOLD: u32 = 32;
    /// No agent has yet found out whether there is a proxy beside us. The programs go by the others.
    pub const UNDECIDED: u32 = 64;
    /// All of them.
    pub const ALL: u32 = LEAVE | LOOK | HOLD | UNDECIDED;
}

/// What a tuple in `FOREIGN_*` is to a connection of another proxy.
pub mod foreign {
    /// As its client sends.
    pub const SENT: u32 = 1;
    /// As its backend answers: no flow of ours may get replies by the same.
    pub const ANSWERED: u32 = 2;
}

/// How many ranges of `ServiceCIDRs` there may be of each family.
pub const SERVICE_CIDRS: usize = 4;

/// A range of addresses. One that is not in use has an address of zeros and a mask of ones, and so holds no destination.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Cidr<A> {
    /// First address.
    pub addr: A,
    /// Ones where the address counts.
    pub mask: A,
}

impl<A: Address> Cidr<A> {
    /// Whether an address is in the range. An entry of zeros, which nobody has written yet, holds none either.
    #[inline(always)]
    pub fn contains(&self, addr: &A) -> bool {
        self.addr != A::ANY && addr.is_in(&self.addr, &self.mask)
    }
}

/// The one entry of `SERVICE_CIDRS`: where ClusterIPs are taken from. Packets to an address in them that no Service has are
/// dropped, because a default route would send them in circles.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ServiceCidrs {
    /// Of IPv6.
    pub v6: [Cidr<Ipv6>; SERVICE_CIDRS],
    /// Of IPv4.
    pub v4: [Cidr<Ipv4>; SERVICE_CIDRS],
}

impl ServiceCidrs {
    /// None.
    pub const NONE: Self = Self {
        v6: [Cidr { addr: Ipv6 { octets: [0; 16] }, mask: Ipv6 { octets: [0xff; 16] } }; SERVICE_CIDRS],
        v4: [Cidr { addr: Ipv4 { octets: [0; 4] }, mask: Ipv4 { octets: [0xff; 4] } }; SERVICE_CIDRS],
    };
}

/// A VLAN: key of `VLANS`, whose value is the index of the VLAN's own device.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Vlan {
    /// Index of the device whose frames bear the tag.
    pub parent: u32,
    /// 802.1Q or 802.1ad, network order.
    pub protocol: u16,
    /// Its number.
    pub number: u16,
}

/// Bits of the value of `LOCAL_ADDRS_V4` and `LOCAL_ADDRS_V6`.
pub mod local {
    /// NodePorts are served on this address.
    pub const NODE_PORTS: u32 = 1;
}

crate::no_padding!(Node: u32, u32, Ipv6, [Ipv6; FURTHER], Ipv4, [Ipv4; FURTHER], Port, Port, Port, Port, Port, Port, u32, u32, u32);
crate::no_padding!(ServiceCidrs: [Cidr<Ipv6>; SERVICE_CIDRS], [Cidr<Ipv4>; SERVICE_CIDRS]);
crate::no_padding!(Vlan: u32, u16, u16);
crate::map_type!(Node, ServiceCidrs, Vlan);
