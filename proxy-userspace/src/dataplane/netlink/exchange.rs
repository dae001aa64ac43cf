//! Questions to the kernel and its answers, one after the other, on a netlink socket of the network namespace of the thread that
//! opened it. For protocols other than rtnetlink's own.

use std::io;

use rtnetlink::{
    packet_core::{NetlinkDeserializable, NetlinkHeader, NetlinkMessage, NetlinkPayload, NetlinkSerializable},
    sys::{Socket, SocketAddr},
};

/// A connection to a part of the kernel.
#[derive(Debug)]
pub(super) struct Exchange(Socket);

impl Exchange {
    /// Speaks a netlink protocol, by its number.
    pub(super) fn open(protocol: isize) -> io::Result<Self> {
        let mut socket = Socket::new(protocol)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self(socket))
    }

    pub(super) fn send<T: NetlinkSerializable + Into<NetlinkPayload<T>>>(
        &self,
        flags: u16,
        request: T,
    ) -> io::Result<()> {
        self.0.send(&bytes(flags, request), 0).map(drop)
    }

    /// Sends several, each with its flags, in one piece.
    pub(super) fn send_together<T: NetlinkSerializable + Into<NetlinkPayload<T>>>(
        &self,
        requests: impl IntoIterator<Item = (u16, T)>,
    ) -> io::Result<()> {
        let together: Vec<u8> = requests.into_iter().flat_map(|(flags, request)| bytes(flags, request)).collect();
        self.0.send(&together, 0).map(drop)
    }

    /// Takes messages until the kernel says that it was the last one.
    pub(super) fn receive<T: NetlinkDeserializable>(&self, mut take: impl FnMut(T)) -> io::Result<()> {
        loop {
            let (bytes, _) = self.0.recv_from_full()?;
            let mut rest = &bytes[..];
            while !rest.is_empty() {
                let message = NetlinkMessage::<T>::deserialize(rest).map_err(io::Error::other)?;
                // Each message begins at a multiple of four.
                let length = (message.header.length as usize).next_multiple_of(4);
                rest = rest.get(length..).unwrap_or_default();
                match message.payload {
                    NetlinkPayload::InnerMessage(inner) => take(inner),
                    NetlinkPayload::Done(done) if done.code == 0 => return Ok(()),
                    NetlinkPayload::Done(done) => return Err(io::Error::from_raw_os_error(done.code.abs())),
                    NetlinkPayload::Error(answer) if answer.code.is_none() => return Ok(()),
                    NetlinkPayload::Error(answer) => return Err(answer.to_io()),
                    _ => {}
                }
            }
        }
    }
}

/// A message as it goes over the socket, filled up to a multiple of four.
fn bytes<T: NetlinkSerializable + Into<NetlinkPayload<T>>>(flags: u16, request: T) -> Vec<u8> {
    let mut header = NetlinkHeader::default();
    header.flags = flags;
    let mut message = NetlinkMessage::new(header, request.into());
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}
