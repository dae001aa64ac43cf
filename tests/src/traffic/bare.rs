//! A socket that does what it is told, one system call at a time, for what no ordinary client does: connects twice, names a peer
//! that it is connected to already, sends with the SYN.

use std::{
    io::{self, Read as _},
    net::SocketAddr,
    time::Duration,
};

use serde::{Deserialize, Serialize};
use socket2::{Domain, Socket, Type};

use super::{Failure, Protocol, client::WHO, socket::disconnect};

/// What kind of socket.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Kind {
    /// Its protocol.
    pub protocol: Protocol,
    /// It is of IPv6.
    pub is_v6: bool,
    /// It takes no mapped addresses.
    pub only_v6: bool,
    /// It shares its port with others that do.
    pub shares_port: bool,
    /// How long a call may take.
    pub timeout: Duration,
}

impl Kind {
    /// One with nothing special about it.
    pub fn new(is_v6: bool, protocol: Protocol) -> Self {
        let timeout = crate::patience::patience(Duration::from_secs(2));
        Self { protocol, is_v6, only_v6: false, shares_port: false, timeout }
    }
}

/// A system call.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub enum Call {
    /// `bind`
    Bind(SocketAddr),
    /// `connect`
    Connect(SocketAddr),
    /// `connect` that does not wait.
    Begin(SocketAddr),
    /// `connect` to nobody.
    Disconnect,
    /// `send` of a request.
    Send,
    /// `sendto` of a request.
    SendTo(SocketAddr),
    /// `sendto` of a request, with the SYN if the kernel can.
    SendFast(SocketAddr),
    /// `recvfrom` of an answer.
    Receive,
    /// `getpeername`
    PeerName,
}

/// What came of a call.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Heard {
    /// It is done.
    Done,
    /// An address.
    Address(SocketAddr),
    /// The pod that has answered, and under which address. A connected socket is not told the latter.
    Answer(String, Option<SocketAddr>),
}

/// The socket.
#[derive(Debug)]
pub struct Bare {
    socket: Socket,
    protocol: Protocol,
}

impl Bare {
    /// Makes it.
    pub fn new(kind: Kind) -> Result<Self, Failure> {
        let domain = if kind.is_v6 { Domain::IPV6 } else { Domain::IPV4 };
        let socket = match kind.protocol {
            Protocol::Tcp => Socket::new(domain, Type::STREAM, None)?,
            Protocol::Udp => Socket::new(domain, Type::DGRAM, None)?,
        };
        if kind.is_v6 {
            socket.set_only_v6(kind.only_v6)?;
        }
        socket.set_reuse_port(kind.shares_port)?;
        socket.set_read_timeout(Some(kind.timeout))?;
        socket.set_write_timeout(Some(kind.timeout))?;
        Ok(Self { socket, protocol: kind.protocol })
    }

    /// Makes a call. The error is its number, as in errno(3).
    pub fn call(&mut self, call: Call) -> Result<Heard, i32> {
        self.try_call(call).map_err(|error| error.raw_os_error().unwrap_or_default())
    }

    fn try_call(&mut self, call: Call) -> io::Result<Heard> {
        let socket = &self.socket;
        let done = match call {
            Call::Bind(address) => socket.bind(&address.into()),
            Call::Connect(address) => socket.connect(&address.into()),
            Call::Begin(address) => self.begin(address),
            Call::Disconnect => disconnect(socket),
            Call::Send => socket.send(&self.request()).map(|_| ()),
            Call::SendTo(address) => socket.send_to(&self.request(), &address.into()).map(|_| ()),
            Call::SendFast(address) => {
                socket.send_to_with_flags(&self.request(), &address.into(), libc::MSG_FASTOPEN).map(|_| ())
            }
            Call::Receive => return self.receive(),
            Call::PeerName => return standard(&socket.peer_addr()?).map(Heard::Address),
        };
        done.map(|()| Heard::Done)
    }

    fn begin(&self, address: SocketAddr) -> io::Result<()> {
        self.socket.set_nonblocking(true)?;
        let begun = self.socket.connect(&address.into());
        self.socket.set_nonblocking(false)?;
        begun
    }

    fn request(&self) -> Vec<u8> {
        match self.protocol {
            Protocol::Tcp => format!("{WHO}\n").into(),
            Protocol::Udp => WHO.into(),
        }
    }

    fn receive(&mut self) -> io::Result<Heard> {
        let mut buffer = [0; 512];
        let (length, from) = match self.protocol {
            Protocol::Tcp => (self.socket.read(&mut buffer)?, None),
            Protocol::Udp => {
                let socket = std::net::UdpSocket::from(self.socket.try_clone()?);
                let (length, from) = socket.recv_from(&mut buffer)?;
                (length, Some(from))
            }
        };
        let line = String::from_utf8_lossy(&buffer[..length]);
        Ok(Heard::Answer(line.split(' ').next().unwrap_or_default().to_owned(), from))
    }
}

fn standard(address: &socket2::SockAddr) -> io::Result<SocketAddr> {
    address.as_socket().ok_or_else(|| io::ErrorKind::InvalidData.into())
}
