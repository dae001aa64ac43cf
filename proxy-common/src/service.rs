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
    pub pad: [u8; PAD],
}

/// Bytes that make a frontend's size a multiple of eight.
const PAD: usize = if cfg!(feature = "other-layout") { 13 } else { 5 };

impl<A> Frontend<A> {
    /// A frontend.
    #[inline(always)]
    pub const fn new(addr: A, port: Port, proto: Protocol) -> Self {
        Self { addr, port, proto, pad: [0; PAD] }
    }

    /// The frontend that stands for all ports of an address. A ClusterIP's has empty ranges, so that ports nobody defined are
    /// rejected; that of an external address says nothing but that a Service has it.
    #[inline(always)]
    pub const fn whole(addr: A) -> Self {
        Self::new(addr, Port { octets: [0; 2] }, Protocol::Any)
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
    /// By a hash of the 5-tuple, or of the client's address when the Service has affinity.
    Hash = 1,
    /// By a hash of the client's address.
    SourceHash = 2,
    /// One after the other, on each CPU by itself.
    RoundRobin = 3,
    /// The one with fewer active flows of two random ones.
    LeastConnections = 4,
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

/// Bits of [`Service::flags`].
pub mod flag {
    /// The frontend is a NodePort, a load balancer's address or an external IP, and not a ClusterIP.
    pub const EXTERNAL: u8 = 1;
    /// externalTrafficPolicy Local: the client's address is never replaced, except for a pod that picked itself.
    pub const SOURCE_KEPT: u8 = 2;
    /// A client stays with its backend: `AFFINITY_*` is asked first.
    pub const AFFINITY: u8 = 4;
    /// Only clients that `SOURCES_*` knows for this index are served.
    pub const SOURCE_RANGES: u8 = 8;
    /// What comes from outside is dispatched to the node of its backend, if that is a neighbour, and answered from there.
    pub const DISPATCHED: u8 = 16;
    /// Its backends are of the other family. In `SERVICES_V6` alone, where an IPv4 address stands as a mapped one, and a
    /// NodePort of IPv4 addresses under the mapped unspecified one.
    pub const CROSS: u8 = 32;
}

/// A prefix from which a Service port may be used: the data of a key in the tries `SOURCES_V4` and `SOURCES_V6`, whose prefix
/// length is [`Source::BITS`] more than the prefix's own. Values are 1.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Source<A> {
    /// [`Service::index`]
    pub service: u32,
    /// Zero.
    pub pad: u32,
    /// The prefix.
    pub addr: A,
}

impl<A> Source<A> {
    /// Bits before the address, which always count.
    pub const BITS: u32 = 64;
}

/// A client of a Service port: key of `AFFINITY_V4` and `AFFINITY_V6`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Client<A> {
    /// Its address.
    pub addr: A,
    /// [`Service::index`]
    pub service: u32,
    /// Zero.
    pub pad: u32,
}

/// Whom a client stays with: value of `AFFINITY_V4` and `AFFINITY_V6`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Affinity {
    /// The backend.
    pub backend: u32,
    /// [`crate::backend::Backend::generation`] when it was chosen.
    pub backend_generation: u32,
    /// A slot that held it: while that slot is in the range of the client's next connection and still holds it, the backend
    /// is one that connection may have.
    pub slot: u32,
    /// Low 32 bits of jiffies at the client's last new connection.
    pub last_used: u32,
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
    /// Bits of [`flag`].
    pub flags: u8,
    /// With [`flag::AFFINITY`]: seconds after its last new connection until a client is forgotten.
    pub affinity_seconds: u32,
    /// Slots for clients on this node: its pods and its own processes.
    pub internal: Range,
    /// Slots for clients whose packets came in by an uplink.
    pub external: Range,
    /// With [`flag::DISPATCHED`]: slots of this node, for clients whose packets another node has dispatched to it.
    pub local: Range,
}

crate::no_padding!(Frontend<Ipv4>: Ipv4, Port, Protocol, [u8; PAD]);
crate::no_padding!(Frontend<Ipv6>: Ipv6, Port, Protocol, [u8; PAD]);
crate::no_padding!(Service: u32, Pick, WhenEmpty, WhenEmpty, u8, u32, Range, Range, Range);
crate::no_padding!(Source<Ipv4>: u32, u32, Ipv4);
crate::no_padding!(Source<Ipv6>: u32, u32, Ipv6);
crate::no_padding!(Client<Ipv4>: Ipv4, u32, u32);
crate::no_padding!(Client<Ipv6>: Ipv6, u32, u32);
crate::no_padding!(Affinity: u32, u32, u32, u32);
crate::map_type!(Frontend<Ipv4>, Frontend<Ipv6>, Range, Service);
crate::map_type!(Source<Ipv4>, Source<Ipv6>, Client<Ipv4>, Client<Ipv6>, Affinity);
