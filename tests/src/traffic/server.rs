//! Servers: a thread per listening socket and per TCP connection.

use std::{
    io::{self, BufRead as _, BufReader, IoSlice, IoSliceMut, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsRawFd as _,
    thread,
};

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, RecvMsg, SockaddrStorage, recvmsg, sendmsg};

use super::socket::{accept_no_checksum, datagram, listen, skip_checksum, tell_destinations};

/// The port whose UDP server takes and sends datagrams with checksum 0. Everywhere else such a datagram over IPv6 would
/// mean that somebody on the way has damaged it.
pub const NO_CHECKSUM_PORT: u16 = 6935;

/// A connection needs little stack, and there may be thousands.
const STACK: usize = 128 << 10;

const TRANSFER: &str = "transfer ";

/// Listens on TCP and UDP on each of the ports. The threads end with the process.
pub fn serve(name: &str, ports: &[u16]) -> io::Result<()> {
    for &port in ports {
        for any in [IpAddr::from(Ipv4Addr::UNSPECIFIED), Ipv6Addr::UNSPECIFIED.into()] {
            let listener = listen(any, port)?;
            let socket = datagram(SocketAddr::new(any, port))?;
            tell_destinations(&socket)?;
            if port == NO_CHECKSUM_PORT {
                accept_no_checksum(&socket)?;
                skip_checksum(&socket, true)?;
            }
            let (tcp_name, udp_name) = (name.to_owned(), name.to_owned());
            spawn(move || accept(&listener, &tcp_name))?;
            spawn(move || answer_datagrams(&socket, &udp_name))?;
        }
    }
    Ok(())
}

fn spawn(body: impl FnOnce() + Send + 'static) -> io::Result<()> {
    thread::Builder::new().stack_size(STACK).spawn(body).map(drop)
}

fn accept(listener: &TcpListener, name: &str) {
    while let Ok((stream, peer)) = listener.accept() {
        let name = name.to_owned();
        // A client that goes away is none of the server's business.
        let converse = move || drop(converse(&stream, peer, &name));
        if spawn(converse).is_err() {
            eprintln!("no thread left for a connection from {peer}");
        }
    }
}

/// Answers each line until the client closes.
fn converse(stream: &TcpStream, peer: SocketAddr, name: &str) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let port = stream.local_addr()?.port();
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    while reader.read_line(&mut line)? > 0 {
        let mut writer = stream;
        writer.write_all(answer(name, peer, None, port, &line).as_bytes())?;
        if let Some(bytes) = line.trim_end().strip_prefix(TRANSFER).and_then(|count| count.parse().ok()) {
            io::copy(&mut io::Read::take(&mut reader, bytes), &mut writer)?;
        }
        line.clear();
    }
    Ok(())
}

fn answer(name: &str, peer: SocketAddr, ttl: Option<u8>, port: u16, request: &str) -> String {
    let ttl = ttl.map_or_else(|| "-".to_owned(), |ttl| ttl.to_string());
    format!("{name} {peer} {ttl} {port} {}\n", request.trim_end())
}

/// The first line of a transfer.
pub fn transfer_request(bytes: u64) -> String {
    format!("{TRANSFER}{bytes}\n")
}

fn answer_datagrams(socket: &UdpSocket, name: &str) {
    let Ok(local) = socket.local_addr() else { return };
    let mut buffer = vec![0; 1 << 16];
    loop {
        let Ok(Datagram { length, from: Some(peer), to, ttl }) = receive(socket, &mut buffer) else { continue };
        let request = String::from_utf8_lossy(&buffer[..length]);
        let line = answer(name, peer, ttl, local.port(), &request);
        // An answer that cannot be sent is one the client misses and reports.
        let _ = send_from(socket, to, peer, line.as_bytes());
    }
}

/// What is known of a datagram that was received.
#[derive(Clone, Copy, Debug)]
pub struct Datagram {
    /// Its length.
    pub length: usize,
    /// Its sender.
    pub from: Option<SocketAddr>,
    /// The address it was sent to, if the socket was told to say so.
    pub to: Option<IpAddr>,
    /// TTL or hop limit.
    pub ttl: Option<u8>,
}

/// Receives a datagram.
pub fn receive(socket: &UdpSocket, buffer: &mut [u8]) -> io::Result<Datagram> {
    let mut control = nix::cmsg_space!(libc::c_int, libc::c_int, libc::in_pktinfo, libc::in6_pktinfo);
    let mut slices = [IoSliceMut::new(buffer)];
    let message: RecvMsg<'_, '_, SockaddrStorage> =
        recvmsg(socket.as_raw_fd(), &mut slices, Some(&mut control), MsgFlags::empty())?;
    let from = message.address.as_ref().and_then(standard);
    let mut datagram = Datagram { length: message.bytes, from, to: None, ttl: None };
    for control in message.cmsgs()? {
        match control {
            ControlMessageOwned::Ipv4Ttl(ttl) | ControlMessageOwned::Ipv6HopLimit(ttl) => {
                datagram.ttl = u8::try_from(ttl).ok();
            }
            ControlMessageOwned::Ipv4PacketInfo(to) => {
                datagram.to = Some(Ipv4Addr::from(to.ipi_addr.s_addr.to_ne_bytes()).into());
            }
            ControlMessageOwned::Ipv6PacketInfo(to) => datagram.to = Some(Ipv6Addr::from(to.ipi6_addr.s6_addr).into()),
            _ => {}
        }
    }
    Ok(datagram)
}

fn standard(address: &SockaddrStorage) -> Option<SocketAddr> {
    let v4 = address.as_sockaddr_in().map(|v4| SocketAddr::new(v4.ip().into(), v4.port()));
    v4.or_else(|| address.as_sockaddr_in6().map(|v6| SocketAddr::new(v6.ip().into(), v6.port())))
}

/// Sends from the address that was asked, which the kernel would not choose by itself on a host that has several.
fn send_from(socket: &UdpSocket, from: Option<IpAddr>, to: SocketAddr, bytes: &[u8]) -> io::Result<()> {
    let slices = [IoSlice::new(bytes)];
    let to = SockaddrStorage::from(to);
    let send = |control: &[ControlMessage<'_>]| {
        sendmsg(socket.as_raw_fd(), &slices, control, MsgFlags::empty(), Some(&to)).map(drop)
    };
    match from {
        Some(IpAddr::V4(from)) => {
            let ipi_spec_dst = libc::in_addr { s_addr: u32::from_ne_bytes(from.octets()) };
            let source = libc::in_pktinfo { ipi_ifindex: 0, ipi_spec_dst, ipi_addr: libc::in_addr { s_addr: 0 } };
            send(&[ControlMessage::Ipv4PacketInfo(&source)])?;
        }
        Some(IpAddr::V6(from)) => {
            let ipi6_addr = libc::in6_addr { s6_addr: from.octets() };
            send(&[ControlMessage::Ipv6PacketInfo(&libc::in6_pktinfo { ipi6_addr, ipi6_ifindex: 0 })])?;
        }
        None => send(&[])?,
    }
    Ok(())
}
