//! What the programs count, per hook and per CPU, in `COUNTERS`. Packets of known flows and packets that are not ours
//! are not counted here: these are the events worth a question.

/// Where something happened.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Hook {
    /// XDP on an uplink.
    UplinkXdp = 0,
    /// TC ingress of an uplink.
    UplinkIn = 1,
    /// TC egress of an uplink.
    UplinkOut = 2,
    /// TC ingress of a pod's device.
    PodIn = 3,
    /// TC egress of a pod's device.
    PodOut = 4,
    /// `connect4` and `connect6`.
    Connect = 5,
    /// `sendmsg4` and `sendmsg6`.
    Sendmsg = 6,
    /// `recvmsg4` and `recvmsg6`.
    Recvmsg = 7,
    /// `getpeername4` and `getpeername6`.
    Getpeername = 8,
    /// `post_bind4` and `post_bind6`.
    PostBind = 9,
    /// Between the families, at TC ingress of an uplink.
    CrossUplinkIn = 10,
    /// The same at TC ingress of a pod's device.
    CrossPodIn = 11,
}

/// What happened.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Outcome {
    /// A new flow (or a new socket) was given a backend.
    Opened = 0,
    /// A flow was confirmed.
    Confirmed = 1,
    /// A UDP flow left a backend that no longer serves.
    Moved = 2,
    /// The missing half of a pair was rebuilt from the other.
    Repaired = 3,
    /// A new flow needed another source port, because its reply would not have been told from another flow's.
    PortChanged = 4,
    /// An ICMP error about a packet of a known flow was translated with what it quotes.
    Related = 5,
    /// A ping to an address of a Service was answered.
    Echoed = 6,
    /// A new flow was given to the node of its backend, which answers the client itself.
    Dispatched = 7,
    /// A new flow was masqueraded and not dispatched, though its Service asks for it: its backend's node is not known or no
    /// neighbour, or has sent the packet itself.
    NotDispatched = 8,
    /// A packet between the families that is too long for its way, or whose life ends here, was answered with an ICMP error.
    Returned = 9,
    /// Passed on: the frame has a VLAN tag that no device of the node is for, or more than two.
    PassVlan = 16,
    /// Passed on: an IP header that lies about itself, or ends early.
    PassMalformed = 17,
    /// Passed on: a fragment.
    PassFragment = 18,
    /// Passed on: an IPv4 header that names a route, so that the destination may not be the last one.
    PassOptions = 19,
    /// Passed on: an IPv6 packet with extension headers that are not walked, with too many of them, or with a route.
    PassExtension = 20,
    /// Passed on: neither TCP nor UDP nor SCTP, or a fragment of the last; addressed to one of ours.
    PassProtocol = 21,
    /// Passed on: the frame is addressed to another host, and only came here because a switch or a card did not know better.
    PassOtherHost = 22,
    /// Passed on: a packet to a Service that belongs to a connection of another proxy on this node.
    PassForeign = 23,
    /// Dropped: the Service's slot or backend entry was not there.
    DropNoBackend = 33,
    /// Dropped: no source port was free for the flow.
    DropNoPort = 34,
    /// Dropped: the packet could not be written to.
    DropNotWritable = 35,
    /// Dropped: the node has no address to masquerade with.
    DropNoMasquerade = 36,
    /// Dropped: the Service's policy is Local and no endpoint is on this node.
    DropNoLocalEndpoint = 37,
    /// Dropped: the new flow could not be entered into the flow table.
    DropTableFull = 38,
    /// Dropped: a loopback address on a packet that came from elsewhere (CVE-2020-8558). Refused: a socket that is bound to
    /// one and was to talk to somebody who is not on the node.
    DropMartian = 39,
    /// Dropped: the client's address is in none of the Service's source ranges.
    DropSource = 40,
    /// Dropped: an address of a ServiceCIDR that no Service has.
    DropUnallocated = 41,
    /// Dropped: a fragment that came before the first one of its packet, or whose first one belongs to no flow: to an address
    /// that is a Service's alone, or from a backend on its way out.
    DropFragment = 42,
    /// Dropped: a fragment that would write over the first one of its packet (RFC 1858, RFC 5722).
    DropOverlap = 43,
    /// Dropped: a packet of a dispatched flow that cannot be sent to its node: its life ends here, or that node sent it.
    DropNotDispatched = 44,
    /// Dropped: a packet between the families that cannot be translated or sent. A UDP datagram without a checksum (RFC 7915
    /// §4.5), one that is segmented later, a backend that is the node itself, or one that no route leads to.
    DropNotCrossed = 45,
    /// Dropped: longer than what the way to the node it is dispatched to takes. TCP and UDP are told of the path MTU.
    DropTooLong = 46,
    /// Dropped: it would have opened a flow while the flow table was copied into that of another version.
    DropHeld = 47,
    /// Rejected: the Service has no endpoint. TCP got a RST, SCTP an ABORT, UDP an ICMP error, a socket ECONNREFUSED.
    RejectNoEndpoint = 48,
    /// Rejected, in the same ways: a port of a ClusterIP that its Service does not define.
    RejectNoPort = 49,
    /// Answered with a RST or an ABORT: the connection's backend has left every slice.
    ResetGone = 50,
    /// A socket was refused a port that is a NodePort.
    RefuseBind = 51,
}

/// Places for each hook in `COUNTERS`.
pub const OUTCOMES: u32 = 64;
/// Places in all.
pub const COUNTERS: u32 = OUTCOMES * 12;

/// The index in `COUNTERS`.
#[inline(always)]
pub const fn counter(hook: Hook, outcome: Outcome) -> u32 {
    hook as u32 * OUTCOMES + outcome as u32
}

impl Hook {
    /// Every hook, in the order of `COUNTERS`.
    pub const ALL: [Self; 12] = [
        Self::UplinkXdp,
        Self::UplinkIn,
        Self::UplinkOut,
        Self::PodIn,
        Self::PodOut,
        Self::Connect,
        Self::Sendmsg,
        Self::Recvmsg,
        Self::Getpeername,
        Self::PostBind,
        Self::CrossUplinkIn,
        Self::CrossPodIn,
    ];
}

impl Outcome {
    /// Every outcome.
    pub const ALL: [Self; 37] = [
        Self::Opened,
        Self::Confirmed,
        Self::Moved,
        Self::Repaired,
        Self::PortChanged,
        Self::Related,
        Self::Echoed,
        Self::Dispatched,
        Self::NotDispatched,
        Self::Returned,
        Self::PassVlan,
        Self::PassMalformed,
        Self::PassFragment,
        Self::PassOptions,
        Self::PassExtension,
        Self::PassProtocol,
        Self::PassOtherHost,
        Self::PassForeign,
        Self::DropNoBackend,
        Self::DropNoPort,
        Self::DropNotWritable,
        Self::DropNoMasquerade,
        Self::DropNoLocalEndpoint,
        Self::DropTableFull,
        Self::DropMartian,
        Self::DropSource,
        Self::DropUnallocated,
        Self::DropFragment,
        Self::DropOverlap,
        Self::DropNotDispatched,
        Self::DropNotCrossed,
        Self::DropTooLong,
        Self::DropHeld,
        Self::RejectNoEndpoint,
        Self::RejectNoPort,
        Self::ResetGone,
        Self::RefuseBind,
    ];
}
