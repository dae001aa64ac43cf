//! The key of the flow table: a 5-tuple and the kind of hook that sees it.

use crate::addr::{Ipv4, Ipv6, Port, Protocol};

/// Which kind of hook a packet is at. The same 5-tuple can mean different things at different hooks, so it is part of
/// the flow's key.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Stage {
    /// TC ingress of a pod's device: what the pod sends.
    FromPod = 1,
    /// TC egress of a pod's device: what the pod receives.
    ToPod = 2,
    /// XDP or TC ingress of an uplink: what the node receives.
    UplinkIn = 3,
    /// TC egress of an uplink: what the node sends.
    UplinkOut = 4,
    /// TC ingress of either, behind all else: between the families. Its addresses are IPv6's; IPv4's are mapped.
    Cross = 5,
}

/// A packet's 5-tuple as seen at one stage.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tuple<A> {
    /// Source address.
    pub saddr: A,
    /// Destination address.
    pub daddr: A,
    /// Source port.
    pub sport: Port,
    /// Destination port.
    pub dport: Port,
    /// Transport protocol.
    pub proto: Protocol,
    /// Where it was seen.
    pub stage: Stage,
    /// Zero.
    pub pad: [u8; 2],
}

impl<A> Tuple<A> {
    /// A tuple at a stage.
    #[inline(always)]
    pub const fn new(saddr: A, daddr: A, sport: Port, dport: Port, proto: Protocol, stage: Stage) -> Self {
        Self { saddr, daddr, sport, dport, proto, stage, pad: [0; 2] }
    }
}

crate::no_padding!(Tuple<Ipv4>: Ipv4, Ipv4, Port, Port, Protocol, Stage, [u8; 2]);
crate::no_padding!(Tuple<Ipv6>: Ipv6, Ipv6, Port, Port, Protocol, Stage, [u8; 2]);
crate::map_type!(Tuple<Ipv4>, Tuple<Ipv6>);
