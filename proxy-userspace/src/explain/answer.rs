//! The answer as data: what `-o json` prints. Fields are added, and stay what they are.

use std::net::{IpAddr, SocketAddr};

use serde::Serialize;

use super::question::Origin;
use crate::inspect::{Kind, PortName, Share, State};

/// What becomes of a packet, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Answer {
    /// The packet, as it is tried.
    pub packet: Packet,
    /// Where it comes from: `pod`, `uplink` or `node`.
    pub from: Origin,
    /// The program that meets it.
    pub program: &'static str,
    /// The device it comes by; none for one of the node's own.
    pub device: Option<String>,
    /// What becomes of it.
    pub result: Fate,
    /// Why.
    pub reason: Reason,
    /// What else was noted of it.
    pub also: Vec<Reason>,
    /// The Service that it is addressed to.
    pub service: Option<Frontend>,
    /// How its backend is chosen.
    pub choice: Option<Choice>,
    /// Its backend.
    pub backend: Option<Backend>,
    /// The connection that it belongs to, if that was known before.
    pub connection: Option<Connection>,
    /// The packet as it goes on, or the answer to it.
    pub after: Option<Packet>,
    /// Where that goes.
    pub way: Option<Way>,
    /// What becomes of it where it leaves the node.
    pub second_step: Option<SecondStep>,
    /// What is to be known of this answer.
    pub notes: Vec<String>,
}

/// A packet, by what its headers say.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Packet {
    /// `TCP SYN`, `UDP datagram`.
    pub kind: String,
    /// Address, and port if it has one.
    pub source: String,
    /// The same.
    pub destination: String,
}

/// What becomes of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Fate {
    /// It begins a connection, and gets its backend's address.
    Translated,
    /// It belongs to a connection that is known, and goes where that goes.
    Known,
    /// It goes to the node of its backend as it is.
    Dispatched,
    /// It is not touched.
    PassedOn,
    /// It ends here.
    Dropped,
    /// The client is told that nobody serves.
    Rejected,
}

/// Why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Reason {
    /// The series that counts it, and the value of its label: `sluice_drops_total/source`; none where nothing is counted.
    pub counted_as: Option<String>,
    /// In a sentence.
    pub sentence: String,
}

/// A port of a Service, and the address by which it was called.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own about the Service")]
pub struct Frontend {
    /// The Service port.
    #[serde(flatten)]
    pub name: PortName,
    /// Its number in the maps.
    pub index: u32,
    /// What kind of address it is.
    pub kind: Kind,
    /// Its address; none for a NodePort.
    pub frontend_address: Option<IpAddr>,
    /// Its port.
    pub frontend_port: u16,
    /// externalTrafficPolicy Local: backends see the client's address.
    pub keeps_source: bool,
    /// Only clients in certain ranges are served.
    pub has_source_ranges: bool,
    /// Clients outside are answered by the backend's node.
    pub is_dispatched: bool,
    /// Its backends are of the other family.
    pub is_crossed: bool,
}

/// Whose list a backend is chosen from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Clients {
    /// That for pods and processes of this node: internalTrafficPolicy, for a ClusterIP.
    Internal,
    /// That for clients outside: externalTrafficPolicy.
    External,
}

/// How a backend is chosen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Choice {
    /// Whose list it is.
    pub clients: Clients,
    /// `random`, `maglev`, `source-hash`, `round-robin` or `least-connections`.
    pub algorithm: &'static str,
    /// Whether another connection of the same client may get another backend.
    pub varies: bool,
    /// Places in the list.
    pub slots: u32,
    /// How many backends stand in them.
    pub backends: usize,
    /// The first ten of them.
    pub candidates: Vec<Share>,
    /// Whether the client stays with a backend.
    pub affinity: Option<Affinity>,
}

/// Session affinity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Affinity {
    /// For how long, after its last new connection.
    pub seconds: u32,
    /// The backend is the one that the client had.
    pub is_kept: bool,
    /// Seconds since its last new connection, if there was one.
    pub idle_seconds: Option<u32>,
}

/// A backend.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Backend {
    /// Its number in the maps.
    pub id: u32,
    /// Where it is.
    pub address: SocketAddr,
    /// Whether it serves.
    pub state: State,
    /// It is on this node.
    pub is_local: bool,
    /// Address of its node, where that matters.
    pub node: Option<IpAddr>,
    /// How often its number was given to another one.
    pub generation: u32,
}

/// A connection that was known before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Connection {
    /// `opening`, `established`, `closing` or `reset`.
    pub phase: &'static str,
    /// Seconds since its last packet.
    pub idle_seconds: u32,
    /// Its backend's number in the maps.
    pub backend: u32,
    /// Where its packets go.
    pub destination: SocketAddr,
    /// Whether the packet goes there still.
    pub is_kept: bool,
}

/// Where a packet goes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Way {
    /// How.
    pub kind: WayKind,
    /// The device that it leaves by, if it leaves at once.
    pub device: Option<String>,
    /// Who gets it there.
    pub mac: Option<String>,
}

/// How a packet goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum WayKind {
    /// The kernel routes it.
    Stack,
    /// It leaves at once.
    Forward,
    /// Back where it came from: a pod that picked itself.
    Hairpin,
    /// To the node of its backend, on the link or in a tunnel.
    Dispatch,
    /// Back to the client, as an answer.
    Answer,
    /// A socket of the node connects there.
    Socket,
}

/// What becomes of a packet where it leaves the node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SecondStep {
    /// The source that it gets.
    pub source: SocketAddr,
}
