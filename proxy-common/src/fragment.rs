//! Which ports a fragmented packet has: key and value of `FRAGMENTS_V4` and `FRAGMENTS_V6`. Only a packet's first fragment says
//! so; it leaves an entry for the others.

use crate::{
    addr::{Ipv4, Ipv6, Port, Protocol},
    tuple::Stage,
};

/// What all fragments of a packet have in common.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Fragmented<A> {
    /// Source address.
    pub saddr: A,
    /// Destination address.
    pub daddr: A,
    /// Identification, as on the wire; in IPv4 its two bytes come first.
    pub id: u32,
    /// Transport protocol.
    pub proto: Protocol,
    /// Where it was seen.
    pub stage: Stage,
    /// Zero.
    pub pad: [u8; 2],
}

/// What the first fragment says.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ports {
    /// Source port.
    pub sport: Port,
    /// Destination port.
    pub dport: Port,
    /// How many bytes behind the IP headers the first fragment has.
    pub length: u16,
    /// Zero.
    pub pad: u16,
}

crate::no_padding!(Fragmented<Ipv4>: Ipv4, Ipv4, u32, Protocol, Stage, [u8; 2]);
crate::no_padding!(Fragmented<Ipv6>: Ipv6, Ipv6, u32, Protocol, Stage, [u8; 2]);
crate::no_padding!(Ports: Port, Port, u16, u16);
crate::map_type!(Fragmented<Ipv4>, Fragmented<Ipv6>, Ports);
