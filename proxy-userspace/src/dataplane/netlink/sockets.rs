//! The kernel's list of sockets (`sock_diag(7))`: who is connected to a port, and the end of such a connection. It speaks of
//! the network namespace of the thread that opened it.

use std::io;

pub(in crate::dataplane) use netlink_packet_sock_diag::inet::SocketId;
use netlink_packet_sock_diag::{
    AF_INET, AF_INET6, SockDiagDestroy, SockDiagMessage,
    inet::{ExtensionFlags, InetRequest, StateFlags},
};
use proxy_common::addr::Protocol;
use rtnetlink::{
    packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST},
    sys::protocols::NETLINK_SOCK_DIAG,
};

use super::exchange::Exchange;

/// Which sockets are meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::dataplane) struct Kind {
    /// Sockets of IPv6, which may talk to IPv4 by mapped addresses.
    pub(in crate::dataplane) is_v6: bool,
    /// TCP or UDP.
    pub(in crate::dataplane) protocol: Protocol,
}

impl Kind {
    fn request(self, socket_id: SocketId) -> InetRequest {
        InetRequest {
            family: if self.is_v6 { AF_INET6 } else { AF_INET },
            protocol: self.protocol as u8,
            extensions: ExtensionFlags::empty(),
            states: talking(),
            socket_id,
        }
    }
}

/// States of sockets that talk to somebody. A connected UDP socket is called established, too.
fn talking() -> StateFlags {
    StateFlags::ESTABLISHED
        | StateFlags::SYN_SENT
        | StateFlags::FIN_WAIT1
        | StateFlags::FIN_WAIT2
        | StateFlags::CLOSE_WAIT
        | StateFlags::LAST_ACK
        | StateFlags::CLOSING
}

/// A connection to the kernel's list.
#[derive(Debug)]
pub(in crate::dataplane) struct SocketList(Exchange);

impl SocketList {
    /// Of the calling thread's network namespace.
    pub(in crate::dataplane) fn open() -> io::Result<Self> {
        Exchange::open(NETLINK_SOCK_DIAG).map(Self)
    }

    /// The connected sockets of a kind; with a port, those whose peer has it.
    pub(in crate::dataplane) fn connected(&self, kind: Kind, port: Option<u16>) -> io::Result<Vec<SocketId>> {
        let unspecified = if kind.is_v6 { SocketId::new_v6() } else { SocketId::new_v4() };
        let asked = SocketId { destination_port: port.unwrap_or(0), ..unspecified };
        self.0.send(NLM_F_REQUEST | NLM_F_DUMP, SockDiagMessage::InetRequest(kind.request(asked)))?;
        let mut found = Vec::new();
        self.0.receive::<SockDiagMessage>(|message| {
            if let SockDiagMessage::InetResponse(socket) = message {
                found.push(socket.header.socket_id);
            }
        })?;
        Ok(found)
    }

    /// Ends a connection: its next system call fails with ECONNABORTED. The cookie in the id keeps another socket of the
    /// same addresses safe.
    pub(in crate::dataplane) fn destroy(&self, kind: Kind, socket: SocketId) -> io::Result<()> {
        let request = SockDiagMessage::InetRequest(kind.request(socket));
        self.0.send(NLM_F_REQUEST | NLM_F_ACK, SockDiagDestroy::new(request))?;
        self.0.receive::<SockDiagMessage>(|_| {})
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream, UdpSocket};

    use proxy_common::addr::Protocol;

    use super::{Kind, SocketList};

    #[test]
    fn a_connected_socket_is_listed_by_its_peers_port() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let client = TcpStream::connect(address).unwrap();
        let list = SocketList::open().unwrap();
        let kind = Kind { is_v6: false, protocol: Protocol::Tcp };
        let ports =
            |port| -> Vec<u16> { list.connected(kind, port).unwrap().iter().map(|id| id.source_port).collect() };
        let own = client.local_addr().unwrap().port();
        assert_eq!(ports(Some(address.port())), [own]);
        assert!(ports(None).contains(&own), "without a port all are listed");
    }

    #[test]
    fn a_socket_that_is_connected_to_nobody_is_not_listed() {
        let socket = UdpSocket::bind("[::1]:0").unwrap();
        let list = SocketList::open().unwrap();
        let kind = Kind { is_v6: true, protocol: Protocol::Udp };
        let port = socket.local_addr().unwrap().port();
        let is_listed = || list.connected(kind, None).unwrap().iter().any(|id| id.source_port == port);
        assert!(!is_listed());
        socket.connect("[::1]:9").unwrap();
        assert!(is_listed());
    }
}
