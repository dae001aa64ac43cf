//! Tracked connections: values of `FLOWS_V4`, `FLOWS_V6` and of the `EMBRYOS_*` tables, where a flow lives until it is
//! confirmed. Original and reply direction are two entries of the same shape.

use crate::{
    addr::{Ipv4, Ipv6, Mac, Port},
    backend::BackendId,
    service::Service,
    tuple::{Stage, Tuple},
};

/// A ready-made rewrite: the addresses and ports a packet gets, with what that does to its checksums.
///
/// The deltas are folded one's-complement sums of (new − old), words in memory order: a checksum field becomes
/// `!(!field + delta)` (RFC 1624, eq. 3).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Rewrite<A> {
    /// New source address.
    pub saddr: A,
    /// New destination address.
    pub daddr: A,
    /// New source port.
    pub sport: Port,
    /// New destination port.
    pub dport: Port,
    /// What the addresses do to the sum: of the IPv4 header, and of the pseudo-header in TCP and UDP.
    pub addr_delta: u16,
    /// What the ports do to the sum of TCP and UDP.
    pub port_delta: u16,
}

/// Where a forwarded packet leaves, as found by the kernel's FIB.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct NextHop {
    /// Outgoing device; 0 when not resolved.
    pub ifindex: u32,
    /// The low half of [`crate::node::Node::route_generation`] at the time of the look-up. A flow that is silent for exactly
    /// 65,536 changes of routes goes the old way until the next one.
    pub generation: u16,
    /// The longest IP packet that may go this way; 0 when nobody said.
    pub mtu: u16,
    /// Destination MAC.
    pub dmac: Mac,
    /// Source MAC.
    pub smac: Mac,
}

/// What becomes of a packet after the rewrite.
#[repr(u8)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Output {
    /// It goes on its way through the kernel.
    #[default]
    Stack = 0,
    /// It is sent out at its next hop, without the kernel's routing.
    Forward = 1,
    /// It goes back to the device it came from (a pod that picked itself).
    Hairpin = 2,
    /// It is sent, as it is, to the node of its backend, which answers the client itself.
    Dispatch = 3,
    /// The same, behind another IP header: there are others on the way to that node.
    Tunnel = 4,
}

impl Output {
    /// Whether another node answers the client.
    #[inline(always)]
    pub const fn is_dispatch(self) -> bool {
        matches!(self, Self::Dispatch | Self::Tunnel)
    }
}

/// Which half of a pair an entry is.
#[repr(u8)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Direction {
    /// Client to Service.
    #[default]
    Original = 0,
    /// Backend to client.
    Reply = 1,
    /// The second step of a flow that takes the way through the kernel: has no other half, and is made anew by the first.
    Transit = 2,
}

/// Bits of [`Flow::state`], the same in both halves.
pub mod state {
    /// A packet in reply direction was seen.
    pub const REPLIED: u8 = 1;
    /// Confirmed (TCP: the handshake's last ACK; UDP: a reply) and living in `FLOWS_*`.
    pub const CONFIRMED: u8 = 2;
    /// The client has sent FIN.
    pub const FIN_ORIGINAL: u8 = 4;
    /// The backend has sent FIN.
    pub const FIN_REPLY: u8 = 8;
    /// Either side has sent RST.
    pub const RESET: u8 = 16;
    /// The pair only replaces the source of a flow that another pair is for: that one is counted, and starts anew.
    pub const MASK: u8 = 32;
    /// Replies do not come this way: the flow is one entry and no pair.
    pub const ONE_WAY: u8 = 64;
}

/// One direction of a tracked connection. The other half's key and rewrite follow from this entry's key and rewrite and
/// from [`Flow::twin_stage`].
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Flow<A> {
    /// A field that only the other layout has.
    #[cfg(feature = "other-layout")]
    pub mark: [u32; 2],
    /// What is written into the packet; of a dispatched flow the addresses of this node and of the other one.
    pub rewrite: Rewrite<A>,
    /// As below, at another place.
    #[cfg(feature = "other-layout")]
    pub backend: BackendId,
    /// For [`Output::Forward`], [`Output::Dispatch`] and [`Output::Tunnel`].
    pub next_hop: NextHop,
    /// The backend that was chosen.
    #[cfg(not(feature = "other-layout"))]
    pub backend: BackendId,
    /// [`crate::backend::Backend::generation`] when it was chosen.
    pub backend_generation: u32,
    /// [`crate::service::Service::index`].
    pub service: u32,
    /// Low 32 bits of jiffies; written at most once a second.
    pub last_seen: u32,
    /// Where the packet goes.
    pub output: Output,
    /// Where the other half's packets go.
    pub twin_output: Output,
    /// The stage of the other half's key.
    pub twin_stage: Stage,
    /// Which half this is.
    pub direction: Direction,
    /// Bits of [`state`].
    pub state: u8,
    /// That many packets more are added to `STATS_*` at once.
    pub eager: u8,
    /// Packets since they were last added to `STATS_*`. Two CPUs that count at the same instant may lose one.
    pub packets: u16,
    /// Bytes of these packets, from the IP header on.
    pub bytes: u32,
}

impl<A> Flow<A> {
    /// Whether the pair only replaces the source of another pair's flow.
    #[inline(always)]
    pub const fn is_mask(&self) -> bool {
        self.state & state::MASK != 0
    }

    /// Whether it is confirmed, and so lives in `FLOWS_*`.
    #[inline(always)]
    pub const fn is_confirmed(&self) -> bool {
        self.state & state::CONFIRMED != 0
    }

    /// Whether there is no other half, because replies do not come this way.
    #[inline(always)]
    pub const fn is_one_way(&self) -> bool {
        self.state & state::ONE_WAY != 0
    }
}

/// Room for a pair that is being made: value of `DRAFTS_V4` and `DRAFTS_V6`, one for each CPU. It is too large for a BPF
/// program's stack, and means nothing between two runs.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Draft<A> {
    /// Addresses and ports after the rewrite.
    pub to: Tuple<A>,
    /// One half.
    pub flow: Flow<A>,
    /// Key of the other half.
    pub twin_key: Tuple<A>,
    /// The other half.
    pub twin: Flow<A>,
    /// The Service of a flow that is being admitted.
    pub service: Service,
    /// Where the node's address takes the place of its source, if it is to.
    pub mask_stage: Stage,
    /// 1 when it is to.
    pub is_masked: u8,
    /// 1 when the pair has been entered into the table.
    pub is_settled: u8,
    /// 1 when another source port was tried.
    pub is_retry: u8,
    /// Who put the packet on its link; zeros where that has no addresses.
    pub sender: Mac,
    /// As what the packet could be given another link-layer header and leave: one of [`leaving`].
    pub leaves_as: u8,
    /// 1 when another node has sent it through its tunnel.
    pub is_tunnelled: u8,
}

/// As what a packet can leave at once.
pub mod leaving {
    /// It cannot.
    pub const NOTHING: u8 = 0;
    /// As an skb, by any device.
    pub const SKB: u8 = 1;
    /// As a bare frame, by devices that take such.
    pub const FRAME: u8 = 2;
}

/// A tier of the flow table: two maps, one for each family.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tier {
    /// `EMBRYOS_*`: flows that are not confirmed.
    Embryos = 0,
    /// `FLOWS_*`: those that are.
    Flows = 1,
}

/// Entries in `TURNOVER`: both tiers of both families.
pub const TIERS: u32 = 4;

/// What has entered a tier and left it since it was made: value of `TURNOVER`. What else is gone was evicted.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Turnover {
    /// Entries that were made.
    pub entered: u64,
    /// Entries that were taken out.
    pub left: u64,
}

impl Turnover {
    /// The index in `TURNOVER`.
    #[inline(always)]
    pub const fn index(tier: Tier, is_v6: bool) -> u32 {
        tier as u32 + if is_v6 { 2 } else { 0 }
    }
}

crate::no_padding!(Turnover: u64, u64);
crate::no_padding!(Draft<Ipv4>: Tuple<Ipv4>, Flow<Ipv4>, Tuple<Ipv4>, Flow<Ipv4>, Service, Stage, u8, u8, u8, Mac, u8, u8);
crate::no_padding!(Draft<Ipv6>: Tuple<Ipv6>, Flow<Ipv6>, Tuple<Ipv6>, Flow<Ipv6>, Service, Stage, u8, u8, u8, Mac, u8, u8);
crate::no_padding!(Rewrite<Ipv4>: Ipv4, Ipv4, Port, Port, u16, u16);
crate::no_padding!(Rewrite<Ipv6>: Ipv6, Ipv6, Port, Port, u16, u16);
crate::no_padding!(NextHop: u32, u16, u16, Mac, Mac);
#[cfg(not(feature = "other-layout"))]
crate::no_padding!(Flow<Ipv4>: Rewrite<Ipv4>, NextHop, u32, u32, u32, u32, Output, Output, Stage, Direction, u8, u8, u16, u32);
#[cfg(not(feature = "other-layout"))]
crate::no_padding!(Flow<Ipv6>: Rewrite<Ipv6>, NextHop, u32, u32, u32, u32, Output, Output, Stage, Direction, u8, u8, u16, u32);
#[cfg(feature = "other-layout")]
crate::no_padding!(Flow<Ipv4>: Rewrite<Ipv4>, NextHop, [u32; 6], Output, Output, Stage, Direction, u8, u8, u16, u32);
#[cfg(feature = "other-layout")]
crate::no_padding!(Flow<Ipv6>: Rewrite<Ipv6>, NextHop, [u32; 6], Output, Output, Stage, Direction, u8, u8, u16, u32);
crate::map_type!(Rewrite<Ipv4>, Rewrite<Ipv6>, NextHop, Flow<Ipv4>, Flow<Ipv6>, Draft<Ipv4>, Draft<Ipv6>, Turnover);
