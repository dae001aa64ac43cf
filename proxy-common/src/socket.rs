//! Socket load balancing: what a socket believes to talk to. Key and value of `SOCKETS_V4` and `SOCKETS_V6`.

use crate::{
    addr::{Ipv4, Ipv6, Port, Protocol},
    backend::BackendId,
};

/// Which way a socket entry translates.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SocketWay {
    /// From a backend (the key) to the frontend the application named (the value): `recvmsg`, `getpeername`.
    ToFrontend = 1,
    /// From a frontend (the key) to the backend this socket was given (the value): later `sendmsg` of an unconnected
    /// socket.
    ToBackend = 2,
    /// From a socket alone (the key names no peer) to the backend it is connected to (the value): what is to be forgotten
    /// when it connects to somebody else or is closed.
    Connection = 3,
}

/// Which system call gave a socket its peer. Only connected sockets may be destroyed when their backend has gone: others
/// choose again with their next datagram.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SocketOrigin {
    /// `connect`
    Connected = 1,
    /// `sendmsg`
    Sent = 2,
}

/// A socket and the peer it names or that names itself to it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SocketPeer<A> {
    /// The kernel's cookie of the socket, low word first. Words, because a double word would need padding in one family.
    pub cookie: [u32; 2],
    /// Address of the peer.
    pub addr: A,
    /// Port of the peer.
    pub port: Port,
    /// Which way the entry translates.
    pub way: SocketWay,
    /// Zero.
    pub pad: [u8; 5],
}

/// What the peer becomes.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SocketTarget<A> {
    /// Address put in its place.
    pub addr: A,
    /// Port put in its place.
    pub port: Port,
    /// Protocol of the socket.
    pub proto: Protocol,
    /// How it came to have this peer.
    pub origin: SocketOrigin,
    /// The backend in question.
    pub backend: BackendId,
    /// [`crate::backend::Backend::generation`] when it was chosen.
    pub backend_generation: u32,
    /// [`crate::service::Service::index`].
    pub service: u32,
    /// Cookie of the socket's network namespace, low word first.
    pub netns: [u32; 2],
}

impl<A> SocketPeer<A> {
    /// A key.
    #[inline(always)]
    pub const fn new(cookie: u64, addr: A, port: Port, way: SocketWay) -> Self {
        Self { cookie: [cookie as u32, (cookie >> 32) as u32], addr, port, way, pad: [0; 5] }
    }
}

crate::no_padding!(SocketPeer<Ipv4>: [u32; 2], Ipv4, Port, SocketWay, [u8; 5]);
crate::no_padding!(SocketPeer<Ipv6>: [u32; 2], Ipv6, Port, SocketWay, [u8; 5]);
crate::no_padding!(SocketTarget<Ipv4>: Ipv4, Port, Protocol, SocketOrigin, u32, u32, u32, [u32; 2]);
crate::no_padding!(SocketTarget<Ipv6>: Ipv6, Port, Protocol, SocketOrigin, u32, u32, u32, [u32; 2]);
crate::map_type!(SocketPeer<Ipv4>, SocketPeer<Ipv6>, SocketTarget<Ipv4>, SocketTarget<Ipv6>);
