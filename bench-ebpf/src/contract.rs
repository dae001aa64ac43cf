//! What lies in the maps of the bench, shared by its programs and by who runs them. Addresses and ports in network order.

use proxy_common::addr::{Ipv4, Ipv6, Mac, Port};

/// The node of the floor.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Node {
    /// The address that masqueraded packets bear.
    pub v6: Ipv6,
    /// The same in IPv4.
    pub v4: Ipv4,
    /// Explicit zero.
    pub pad: u32,
}

/// Whom a packet is addressed to: key of `SERVICES_V4` and `SERVICES_V6`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frontend<A> {
    /// Address.
    pub addr: A,
    /// Port.
    pub port: Port,
    /// IANA number of the protocol.
    pub proto: u16,
    /// Explicit zero.
    pub pad: u32,
}

/// A frontend's slots of its Maglev table, in `SLOTS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Service {
    /// The first one.
    pub first: u32,
    /// How many.
    pub count: u32,
    /// Where it is counted.
    pub index: u32,
}

/// A backend, with the way to it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Backend<A> {
    /// Address.
    pub addr: A,
    /// Port.
    pub port: Port,
    /// The next hop.
    pub dmac: Mac,
    /// The device that leads there.
    pub smac: Mac,
    /// Explicit zeros.
    pub pad: [u8; 2],
}

/// Key of a flow.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tuple<A> {
    /// Source.
    pub saddr: A,
    /// Destination.
    pub daddr: A,
    /// Source port.
    pub sport: Port,
    /// Destination port.
    pub dport: Port,
    /// IANA number of the protocol.
    pub proto: u32,
}

/// A flow, under the client's tuple and under that of the replies.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Flow<A> {
    /// Who asks.
    pub client: A,
    /// Whom it named.
    pub service: A,
    /// The client's port.
    pub client_port: Port,
    /// The Service's port.
    pub service_port: Port,
    /// The port that the backend sees.
    pub source_port: Port,
    /// Where packets to the client go.
    pub mac: Mac,
    /// Index of the backend.
    pub backend: u32,
    /// Where the Service is counted.
    pub index: u32,
    /// Explicit zero.
    pub pad: u32,
}

/// What a CPU has counted of a Service.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// Packets.
    pub packets: u64,
    /// Bytes.
    pub bytes: u64,
}

/// Bytes that are restored before each run.
pub const RESTORED: usize = 96;

/// How the packet is restored.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// The packet's first bytes.
    pub bytes: [u8; RESTORED],
    /// The first of its flows in `CLIENTS`.
    pub first: u32,
    /// Behind the last one. That being the first, every packet is of a flow never seen.
    pub end: u32,
    /// The flow of the next packet.
    pub next: u32,
    /// How many were new.
    pub fresh: u32,
    /// 1 for IPv6.
    pub is_v6: u32,
    /// Explicit zero.
    pub pad: u32,
}

/// What tells one flow of the bench from another. IPv4 addresses lie in the first four bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Ends {
    /// Source.
    pub saddr: Ipv6,
    /// Destination.
    pub daddr: Ipv6,
    /// Source port.
    pub sport: Port,
    /// Destination port.
    pub dport: Port,
    /// Explicit zero.
    pub pad: u32,
}

/// What a program answers that could not be called.
pub const NOT_CALLED: u32 = 77;

/// What lets a reader and a writer of a map's bytes take each other's word for them.
macro_rules! map_type {
    ($($type:ty: $($field:ty),+;)+) => {$(
        const _: () = assert!(size_of::<$type>() == 0 $(+ size_of::<$field>())+, "padding");
        // SAFETY: `repr(C)`, `Copy` and without padding, as was just computed; any bytes are a value.
        #[cfg(feature = "user")]
        unsafe impl aya::Pod for $type {}
    )+};
}
map_type! {
    Node: Ipv6, Ipv4, u32;
    Frontend<Ipv4>: Ipv4, Port, u16, u32;
    Frontend<Ipv6>: Ipv6, Port, u16, u32;
    Service: u32, u32, u32;
    Backend<Ipv4>: Ipv4, Port, Mac, Mac, [u8; 2];
    Backend<Ipv6>: Ipv6, Port, Mac, Mac, [u8; 2];
    Tuple<Ipv4>: Ipv4, Ipv4, Port, Port, u32;
    Tuple<Ipv6>: Ipv6, Ipv6, Port, Port, u32;
    Flow<Ipv4>: Ipv4, Ipv4, Port, Port, Port, Mac, u32, u32, u32;
    Flow<Ipv6>: Ipv6, Ipv6, Port, Port, Port, Mac, u32, u32, u32;
    Count: u64, u64;
    Plan: [u8; RESTORED], u32, u32, u32, u32, u32, u32;
    Ends: Ipv6, Ipv6, Port, Port, u32;
}
