//! Servers: a thread per listening socket and per TCP connection.

use std::{
    io::{self, BufRead as _, BufReader, IoSliceMut, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsRawFd as _,
    thread,
};

use nix::sys::socket::{ControlMessageOwned, MsgFlags, RecvMsg, SockaddrStorage, recvmsg};

use super::socket::{accept_no_checksum, datagram, listen, skip_checksum};

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
    let mut buffer = [0; 2048];
    loop {
        let Ok((length, Some(peer), ttl)) = receive(socket, &mut buffer) else { continue };
        let request = String::from_utf8_lossy(&buffer[..length]);
        // An answer that cannot be sent is one the client misses and reports.
        let _ = socket.send_to(answer(name, peer, ttl, local.port(), &request).as_bytes(), peer);
    }
}

/// A datagram's length, sender, and TTL or hop limit.
pub fn receive(socket: &UdpSocket, buffer: &mut [u8]) -> io::Result<(usize, Option<SocketAddr>, Option<u8>)> {
    let mut control = nix::cmsg_space!(libc::c_int, libc::c_int);
    let mut slices = [IoSliceMut::new(buffer)];
    let message: RecvMsg<'_, '_, SockaddrStorage> =
        recvmsg(socket.as_raw_fd(), &mut slices, Some(&mut control), MsgFlags::empty())?;
    let ttl = message.cmsgs()?.find_map(|control| match control {
        ControlMessageOwned::Ipv4Ttl(ttl) | ControlMessageOwned::Ipv6HopLimit(ttl) => u8::try_from(ttl).ok(),
        _ => None,
    });
    Ok((message.bytes, message.address.as_ref().and_then(standard), ttl))
}

fn standard(address: &SockaddrStorage) -> Option<SocketAddr> {
    let v4 = address.as_sockaddr_in().map(|v4| SocketAddr::new(v4.ip().into(), v4.port()));
    v4.or_else(|| address.as_sockaddr_in6().map(|v6| SocketAddr::new(v6.ip().into(), v6.port())))
}
