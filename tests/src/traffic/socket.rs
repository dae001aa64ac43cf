//! Sockets with the few options that the standard library does not know.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsRawFd,
};

use socket2::{Domain, Socket, Type};

use super::{Ask, Protocol, Target};

/// Room for bursts, so that what is lost was lost on the way.
const BUFFER: libc::c_int = 8 << 20;

/// A TCP listener of one family on every address.
pub fn listen(any: IpAddr, port: u16) -> io::Result<TcpListener> {
    let socket = socket(any, Type::STREAM)?;
    socket.set_reuse_address(true)?;
    socket.bind(&SocketAddr::new(any, port).into())?;
    socket.listen(4096)?;
    Ok(socket.into())
}

/// Binds a socket and closes it again.
pub fn bind(target: Target) -> io::Result<()> {
    let kind = match target.protocol {
        Protocol::Tcp => Type::STREAM,
        Protocol::Udp => Type::DGRAM,
    };
    socket(target.address.ip(), kind)?.bind(&target.address.into())
}

/// A UDP socket of one family with large buffers; it says how far each datagram has come.
pub fn datagram(local: SocketAddr) -> io::Result<UdpSocket> {
    let socket = socket(local.ip(), Type::DGRAM)?;
    // Beyond `net.core.rmem_max`, which root may exceed.
    set_option(&socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, BUFFER)?;
    set_option(&socket, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, BUFFER)?;
    if local.is_ipv4() {
        set_option(&socket, libc::IPPROTO_IP, libc::IP_RECVTTL, 1)?;
    } else {
        set_option(&socket, libc::IPPROTO_IPV6, libc::IPV6_RECVHOPLIMIT, 1)?;
    }
    socket.bind(&local.into())?;
    Ok(socket.into())
}

/// Lets a UDP socket say where each datagram was sent to, from now on.
pub fn tell_destinations(socket: &UdpSocket) -> io::Result<()> {
    if socket.local_addr()?.is_ipv4() {
        return set_option(socket, libc::SOL_IP, libc::IP_PKTINFO, 1);
    }
    set_option(socket, libc::SOL_IPV6, libc::IPV6_RECVPKTINFO, 1)
}

/// Connects to the target of a request.
pub fn connect(ask: &Ask) -> io::Result<TcpStream> {
    let Ask { target, source, timeout, .. } = *ask;
    let socket = socket(target.address.ip(), Type::STREAM)?;
    if let Some(source) = source {
        socket.set_reuse_address(true)?;
        socket.bind(&source.into())?;
    }
    if ask.acknowledges_late {
        // What a process says that has data ready: the kernel waits for them.
        set_option(&socket, libc::IPPROTO_TCP, libc::TCP_QUICKACK, 0)?;
    }
    socket.connect_timeout(&target.address.into(), timeout)?;
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(timeout))?;
    stream.set_write_timeout(Some(timeout))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

fn socket(address: IpAddr, kind: Type) -> io::Result<Socket> {
    let domain = if address.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
    let socket = Socket::new(domain, kind, None)?;
    if let IpAddr::V6(address) = address {
        socket.set_only_v6(address.to_ipv4_mapped().is_none())?;
    }
    Ok(socket)
}

/// Connects to nobody: a UDP socket hears from everybody again, a TCP connection is cut off.
pub fn disconnect(socket: &impl AsRawFd) -> io::Result<()> {
    let nobody = libc::sockaddr { sa_family: libc::AF_UNSPEC as libc::sa_family_t, sa_data: [0; 14] };
    let length = size_of::<libc::sockaddr>() as libc::socklen_t;
    // SAFETY: the kernel reads one sockaddr, which outlives the call.
    let result = unsafe { libc::connect(socket.as_raw_fd(), &raw const nobody, length) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Sends datagrams with checksum 0 from now on; over IPv6 (RFC 6935) it also takes such datagrams.
pub fn skip_checksum(socket: &UdpSocket, skip: bool) -> io::Result<()> {
    if socket.local_addr()?.is_ipv4() {
        return set_option(socket, libc::SOL_SOCKET, libc::SO_NO_CHECK, skip.into());
    }
    set_option(socket, libc::SOL_UDP, libc::UDP_NO_CHECK6_TX, skip.into())
}

/// Takes IPv6 datagrams with checksum 0 from now on (RFC 6935); over IPv4 they are always taken.
pub fn accept_no_checksum(socket: &UdpSocket) -> io::Result<()> {
    if socket.local_addr()?.is_ipv4() {
        return Ok(());
    }
    set_option(socket, libc::SOL_UDP, libc::UDP_NO_CHECK6_RX, 1)
}

/// How many segments of the connection were sent again.
pub fn retransmits(stream: &TcpStream) -> io::Result<u64> {
    // SAFETY: tcp_info is plain memory, for which all zeroes are valid.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut length = size_of::<libc::tcp_info>() as libc::socklen_t;
    let (descriptor, buffer, size) = (stream.as_raw_fd(), (&raw mut info).cast(), &raw mut length);
    // SAFETY: the kernel writes at most `length` bytes, the size of `info`.
    let result = unsafe { libc::getsockopt(descriptor, libc::IPPROTO_TCP, libc::TCP_INFO, buffer, size) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(info.tcpi_total_retrans.into()) }
}

/// Lets no packet of the socket be cut into fragments: one that is too long is refused, as soon as that is known.
pub fn never_fragment(socket: &impl AsRawFd, is_v6: bool) -> io::Result<()> {
    if is_v6 {
        set_option(socket, libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_DO)
    } else {
        set_option(socket, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_DO)
    }
}

fn set_option(socket: &impl AsRawFd, level: libc::c_int, name: libc::c_int, value: libc::c_int) -> io::Result<()> {
    let length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the kernel reads one c_int, which outlives the call.
    let result = unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, (&raw const value).cast(), length) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The address that stands for all of a family.
pub fn any_like(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(address) if address.to_ipv4_mapped().is_some() => Ipv4Addr::UNSPECIFIED.to_ipv6_mapped().into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    }
}
