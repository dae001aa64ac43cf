//! Traffic with real sockets: what can be asked of a [`resident`], and what comes back.
//!
//! A resident is a process that stays in a network namespace and a cgroup (threads would do for the namespace, but cgroup
//! v2 places processes), serves there, and carries out [`Command`]s: one JSON document per line on its stdin, one
//! [`Reply`] per line on its stdout.
//!
//! Servers speak text, so that people can talk to them too. To `who` they answer
//! `<pod> <peer as seen by the server> <TTL or -> <server's port>` and repeat what else stood in the request.

pub mod bare;
pub mod churn;
pub mod client;
pub mod flood;
pub mod inquiry;
pub mod place;
pub mod rate;
pub mod resident;
pub mod server;
pub mod socket;
pub mod stream;
pub mod wire;

use std::{collections::BTreeMap, fmt, io, net::SocketAddr, time::Duration};

use serde::{Deserialize, Serialize};

/// A transport protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Protocol {
    /// TCP
    Tcp,
    /// UDP
    Udp,
}

impl Protocol {
    /// Both, for loops.
    pub const ALL: [Self; 2] = [Self::Tcp, Self::Udp];
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
        })
    }
}

/// What a request is addressed to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Target {
    /// Address and port.
    pub address: SocketAddr,
    /// Protocol.
    pub protocol: Protocol,
}

impl Target {
    /// A TCP target.
    pub fn tcp(address: impl Into<SocketAddr>) -> Self {
        Self { address: address.into(), protocol: Protocol::Tcp }
    }

    /// A UDP target.
    pub fn udp(address: impl Into<SocketAddr>) -> Self {
        Self { address: address.into(), protocol: Protocol::Udp }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.protocol)
    }
}

/// One request on a socket of its own.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Ask {
    /// Whom.
    pub target: Target,
    /// How long each step may take.
    pub timeout: Duration,
    /// Address and port to send from.
    pub source: Option<SocketAddr>,
    /// UDP: leave the socket unconnected, so that each datagram names its destination (`sendmsg`, not `connect`).
    pub unconnected: bool,
    /// UDP: send with checksum 0.
    pub without_checksum: bool,
    /// TCP: let the first request acknowledge the handshake, instead of an ACK of its own.
    pub acknowledges_late: bool,
}

impl Ask {
    /// A request with nothing special about it, whose deadline suits this machine.
    pub fn new(target: Target) -> Self {
        let timeout = crate::patience::patience(Duration::from_secs(3));
        Self { target, timeout, source: None, unconnected: false, without_checksum: false, acknowledges_late: false }
    }

    /// The same with another deadline, taken as it is.
    #[must_use]
    pub fn within(self, timeout: Duration) -> Self {
        Self { timeout, ..self }
    }

    /// The same from a given address and port.
    #[must_use]
    pub fn from(self, source: impl Into<SocketAddr>) -> Self {
        Self { source: Some(source.into()), ..self }
    }

    /// The same on an unconnected UDP socket.
    #[must_use]
    pub fn unconnected(self) -> Self {
        Self { unconnected: true, ..self }
    }

    /// The same with UDP checksum 0.
    #[must_use]
    pub fn without_checksum(self) -> Self {
        Self { without_checksum: true, ..self }
    }

    /// The same without an ACK between the handshake and the request. With both on two CPUs of a server at the same instant,
    /// its kernel (6.18) reset about one connection in several hundred thousand, and counted one established socket too many
    /// afterwards: as if it had looked for the second packet's socket while it was making it. That is inferred from counters.
    #[must_use]
    pub fn acknowledging_late(self) -> Self {
        Self { acknowledges_late: true, ..self }
    }
}

/// What a server said, and what the client saw around it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// Name of the pod.
    pub pod: String,
    /// The client's address as the server sees it.
    pub peer: SocketAddr,
    /// Time to live, or hop limit, of the request as it reached the server; UDP only.
    pub ttl: Option<u8>,
    /// The port the server listens on.
    pub server_port: u16,
    /// The client's own address.
    pub local: SocketAddr,
    /// Where the answer came from, as the client sees it: for TCP what `getpeername` says.
    pub from: SocketAddr,
    /// From before `connect` or the first `send` to the answer.
    pub latency: Duration,
}

/// Why a request has no answer.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, thiserror::Error)]
pub enum Failure {
    /// RST on a SYN, ICMP port unreachable, or the socket hook's word.
    #[error("connection refused")]
    Refused,
    /// Nothing came back.
    #[error("timed out")]
    TimedOut,
    /// RST on an established connection.
    #[error("connection reset")]
    Reset,
    /// No route, or ICMP host or network unreachable.
    #[error("unreachable")]
    Unreachable,
    /// The connection ended before the answer was complete.
    #[error("closed early")]
    ClosedEarly,
    /// Not what a server of ours says, or another payload than was sent.
    #[error("garbled answer")]
    Garbled,
    /// Any other error of a system call.
    #[error("error number {errno}")]
    System {
        /// As in errno(3).
        errno: i32,
    },
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::ConnectionRefused => Self::Refused,
            io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => Self::TimedOut,
            io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionAborted => {
                Self::Reset
            }
            io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable => Self::Unreachable,
            io::ErrorKind::UnexpectedEof => Self::ClosedEarly,
            io::ErrorKind::InvalidData => Self::Garbled,
            _ => Self::System { errno: error.raw_os_error().unwrap_or_default() },
        }
    }
}

/// Several requests for the same.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Inquiry {
    /// The first request. If it names its source, each further one comes from the next port.
    pub ask: Ask,
    /// How many, unless one fails before.
    pub times: u16,
}

/// What became of an [`Inquiry`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Findings {
    /// Answers until the first failure.
    pub answers: Vec<Answer>,
    /// The first failure, and how long it took to show.
    pub failure: Option<(Failure, Duration)>,
}

/// A stream of numbered UDP datagrams, each of which the server sends back.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct StreamPlan {
    /// Whom; UDP.
    pub target: Target,
    /// Datagrams per second.
    pub per_second: u32,
    /// How long to wait for the last answers once the stream is told to finish.
    pub linger: Duration,
}

/// What became of a stream.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamReport {
    /// Datagrams that left the socket.
    pub sent: u64,
    /// Different numbers that came back.
    pub answered: u64,
    /// Numbers that came back more than once.
    pub duplicated: u64,
    /// Numbers that came back after a higher one.
    pub reordered: u64,
    /// Errors of `send` and `recv`, ICMP errors among them.
    pub errors: u64,
    /// Where numbers are missing: the first of them and how many, the first sixteen times.
    pub gaps: Vec<(u64, u64)>,
    /// Who answered how often.
    pub pods: BTreeMap<String, u64>,
}

impl StreamReport {
    /// Numbers that never came back.
    pub fn lost(&self) -> u64 {
        self.sent - self.answered
    }
}

/// Short TCP connections at a steady rate: connect, one request, one answer, close.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct RatePlan {
    /// Whom; TCP.
    pub target: Target,
    /// Connections per second.
    pub per_second: u32,
    /// How long each step may take.
    pub timeout: Duration,
}

/// What became of the connections.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RateReport {
    /// Connections begun.
    pub begun: u64,
    /// Connections that had their answer.
    pub answered: u64,
    /// Failures by kind.
    pub failures: BTreeMap<String, u64>,
    /// Segments that had to be sent again before the connection stood: lost SYNs and SYN-ACKs.
    pub handshake_retransmits: u64,
    /// Segments that had to be sent again at all.
    pub retransmits: u64,
    /// The longest time from `connect` to the answer.
    pub slowest: Duration,
    /// From the first connection to the last.
    pub elapsed: Duration,
    /// Who answered how often.
    pub pods: BTreeMap<String, u64>,
}

/// As many TCP connections as there is time for, one after the other: connect, and close at once.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct ChurnPlan {
    /// Whom.
    pub target: SocketAddr,
    /// For so long.
    pub during: Duration,
}

/// What became of them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChurnReport {
    /// Nanoseconds of each `connect`.
    pub latencies: Vec<u32>,
    /// From the first to the end of the last.
    pub elapsed: Duration,
}

/// What became of a large transfer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransferReport {
    /// Who sent it back.
    pub pod: String,
    /// Bytes each way, compared one by one.
    pub bytes: u64,
    /// From before `connect` to the last byte.
    pub elapsed: Duration,
    /// Segments that the client had to send again.
    pub retransmits: u64,
}

/// What a resident can be told.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Command {
    /// Listen on TCP and UDP, both families, on each of the ports.
    Serve {
        /// Answers bear this name.
        name: String,
        /// Ports.
        ports: Vec<u16>,
    },
    /// Takes TCP connections to that port over IPv4, and closes them at once. → [`Reply::Done`]
    Accept(u16),
    /// Connections. → [`Reply::Churned`]
    Churn(ChurnPlan),
    /// Binds a socket to the address, and closes it. → [`Reply::Done`]
    Bind(Target),
    /// So many requests, one after the other, each on a socket of its own. → [`Reply::Answers`]
    Ask(Ask, u32),
    /// Inquiries, many at once. → [`Reply::Found`]
    Inquire(Vec<Inquiry>),
    /// Connects and keeps the connection, or the UDP socket. → [`Reply::Started`]
    Open(Ask),
    /// Makes a socket. → [`Reply::Started`]
    Make(bare::Kind),
    /// One call on such a socket. → [`Reply::Heard`]
    Call(u64, bare::Call),
    /// One more request on an open connection or socket. → [`Reply::Answers`], of one
    Again(u64),
    /// Closes an open connection or socket. → [`Reply::Done`]
    Close(u64),
    /// So many bytes to a server and back, compared byte by byte. → [`Reply::Transferred`]
    Transfer(Ask, u64),
    /// Begins a stream. → [`Reply::Started`]
    Stream(StreamPlan),
    /// Begins connections at a rate. → [`Reply::Started`]
    Rate(RatePlan),
    /// Ends a stream or a rate. → its report
    Finish(u64),
}

/// What a resident says.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Reply {
    /// Carried out.
    Done,
    /// Goes on in the background under this number.
    Started(u64),
    /// One per request.
    Answers(Vec<Result<Answer, Failure>>),
    /// What came of a call, or its error number.
    Heard(Result<bare::Heard, i32>),
    /// One per inquiry.
    Found(Vec<Findings>),
    /// The connections were made.
    Churned(ChurnReport),
    /// The transfer is complete.
    Transferred(TransferReport),
    /// The stream has ended.
    Streamed(StreamReport),
    /// The connections have ended.
    Rated(RateReport),
    /// The traffic went wrong.
    Failed(Failure),
    /// The command could not be carried out.
    Refused(String),
}
