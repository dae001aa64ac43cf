//! What a rehearsal is asked, and what it has seen: plain data, for those who put it into words.

use std::net::{IpAddr, SocketAddr};

use proxy_common::{
    addr::{Ipv4, Ipv6, Port, Protocol},
    backend::{BackendId, BackendState},
    flow::{NextHop, Output, Tier},
    names::ServiceName,
    outcome::Outcome,
    rehearsal::one_way,
    service::Service,
};

use super::{changing::Found, run::Action};
use crate::dataplane::{flow_table::silence, program::ProgramName};

/// Who calls whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call<A> {
    /// The client's address.
    pub saddr: A,
    /// Its port; none for one that no connection has.
    pub sport: Option<Port>,
    /// Where it calls.
    pub daddr: A,
    /// The port there.
    pub dport: Port,
    /// By what.
    pub protocol: Protocol,
}

/// A call of either family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AnyCall {
    /// IPv4.
    V4(Call<Ipv4>),
    /// IPv6.
    V6(Call<Ipv6>),
}

impl AnyCall {
    /// What a program has to be loaded for, to be tried on its packets.
    pub(super) fn way(&self) -> u16 {
        match self {
            Self::V4(call) => one_way(false, call.protocol),
            Self::V6(call) => one_way(true, call.protocol),
        }
    }
}

/// Where a packet is met.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// By which program: one on a way in.
    pub program: ProgramName,
    /// Index of the device it came by; 0 for none.
    pub ifindex: u32,
}

/// Which packet of a connection is tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// The first one.
    First,
    /// One of a connection that goes on.
    Later,
}

/// An entry of the flow table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SeenFlow {
    /// What its packets get as their source.
    pub source: SocketAddr,
    /// What they get as their destination.
    pub destination: SocketAddr,
    /// The backend that was chosen.
    pub backend: BackendId,
    /// Its generation then.
    pub generation: u32,
    /// [`Service::index`]
    pub service: u32,
    /// Where its packets go.
    pub output: Output,
    /// By which way, if they do not go through the kernel.
    pub next_hop: NextHop,
    /// Bits of [`proxy_common::flow::state`].
    pub state: u8,
    /// It stands among the confirmed.
    pub is_confirmed: bool,
    /// Seconds since its last packet.
    pub silence: u32,
}

/// A backend, as its entry says now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SeenBackend {
    /// Its id.
    pub id: BackendId,
    /// Where it is.
    pub address: SocketAddr,
    /// Address of its node, where that matters.
    pub node: Option<IpAddr>,
    /// What may be sent to it.
    pub state: BackendState,
    /// It is on this node.
    pub is_local: bool,
    /// How often the id was given to another one.
    pub generation: u32,
}

/// The entry of `SERVICES_*` that a destination leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SeenService {
    /// Its address; none for a NodePort.
    pub address: Option<IpAddr>,
    /// Its port.
    pub port: u16,
    /// Its value.
    pub value: Service,
}

/// A client's affinity, before the packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SeenAffinity {
    /// Whom the client stays with.
    pub backend: BackendId,
    /// Seconds since its last new connection.
    pub silence: u32,
}

/// What became of the packet, and what that went by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rehearsal {
    /// The client, with the port that was tried.
    pub client: SocketAddr,
    /// Which packet was tried.
    pub moment: Moment,
    /// What the program said.
    pub action: Action,
    /// The packet as the program left it.
    pub bytes: Vec<u8>,
    /// What the program counted, in the order of [`Outcome::ALL`].
    pub outcomes: Vec<Outcome>,
    /// The connection's entry before.
    pub known: Option<SeenFlow>,
    /// Its entry after.
    pub flow: Option<SeenFlow>,
    /// The entry that replaces its source where it leaves the node, if there is one.
    pub second_step: Option<SeenFlow>,
    /// The Service that is called.
    pub service: Option<SeenService>,
    /// What its port is called, if the agent has said so.
    pub name: Option<ServiceName>,
    /// The backend of the flow.
    pub backend: Option<SeenBackend>,
    /// Those that it was chosen from, with how many slots each has.
    pub candidates: Vec<(SeenBackend, u32)>,
    /// Whom the client stayed with before.
    pub affinity: Option<SeenAffinity>,
}

/// An end of a connection.
pub(super) fn socket<A: Into<IpAddr>>(address: A, port: Port) -> SocketAddr {
    SocketAddr::new(address.into(), port.number())
}

/// An entry as others see it.
pub(super) fn seen_flow<A: Copy + Into<IpAddr>>((tier, flow): &Found<A>) -> SeenFlow {
    SeenFlow {
        source: socket(flow.rewrite.saddr, flow.rewrite.sport),
        destination: socket(flow.rewrite.daddr, flow.rewrite.dport),
        backend: flow.backend,
        generation: flow.backend_generation,
        service: flow.service,
        output: flow.output,
        next_hop: flow.next_hop,
        state: flow.state,
        is_confirmed: *tier == Tier::Flows,
        silence: silence(flow.last_seen),
    }
}
