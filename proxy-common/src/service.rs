//! Services as the kernel sees them: a frontend leads to ranges of slots, a slot to a backend.

use crate::addr::{Ipv4, Ipv6, Port, Protocol};

/// What a packet is addressed to: key of `SERVICES_V4` and `SERVICES_V6`. A NodePort has the unspecified address.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Frontend<A> {
    /// Service address, or [`crate::addr::Address::ANY`] for "any address NodePorts are served on".
    pub addr: A,
    /// Service port or NodePort.
    pub port: Port,
    /// Transport protocol.
    pub proto: Protocol,
    /// Zero.
    pub pad: [u8; 5],
}

impl<A> Frontend<A> {
    /// A frontend.
    #[inline(always)]
    pub const fn new(addr: A, port: Port, proto: Protocol) -> Self {
        Self { addr, port, proto, pad: [0; 5] }
    }
}

/// A contiguous range of `SLOTS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Range {
    /// Index of the first slot.
    pub first: u32,
    /// How many slots; 0 means that there is nothing to send to.
    pub count: u32,
}

/// How an index into a range is made.
#[repr(u8)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Pick {
    /// A random one, anew for each flow.
    #[default]
    Random = 0,
}

/// What happens to a new flow whose range is empty.
#[repr(u8)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum WhenEmpty {
    /// The client is told that nothing listens.
    #[default]
    Reject = 0,
    /// The client is left to time out (traffic policy Local without a local endpoint).
    Drop = 1,
}

/// Value of `SERVICES_V4` and `SERVICES_V6`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Service {
    /// Number of the Service port this frontend belongs to, shared by all its frontends of one family.
    pub index: u32,
    /// How a slot is chosen.
    pub pick: Pick,
    /// For an empty `internal` range.
    pub internal_empty: WhenEmpty,
    /// For an empty `external` range.
    pub external_empty: WhenEmpty,
    /// Zero.
    pub pad: u8,
    /// Slots for clients on this node: its pods and its own processes.
    pub internal: Range,
    /// Slots for clients whose packets came in by an uplink.
    pub external: Range,
}

crate::no_padding!(Frontend<Ipv4>: Ipv4, Port, Protocol, [u8; 5]);
crate::no_padding!(Frontend<Ipv6>: Ipv6, Port, Protocol, [u8; 5]);
crate::no_padding!(Service: u32, Pick, WhenEmpty, WhenEmpty, u8, Range, Range);
crate::map_type!(Frontend<Ipv4>, Frontend<Ipv6>, Range, Service);
