//! Frames by hand: what no socket sends, as bytes of a device.

use std::{
    io::{self, Read as _, Write as _},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use socket2::{Domain, Protocol, SockAddr, SockAddrStorage, Socket, Type};

use crate::netns::Namespace;

/// A device whose frames are written, and read, as they are.
#[derive(Debug)]
pub struct Wire(Socket);

impl Wire {
    /// Opens a device, for writing alone.
    pub fn of(namespace: &Namespace, device: &str) -> Result<Self> {
        namespace.run(|| packet_socket(device, 0).map(Self))?
    }

    /// Opens a device, and listens to whatever comes by it from now on.
    pub fn listening(namespace: &Namespace, device: &str) -> Result<Self> {
        namespace.run(|| packet_socket(device, libc::ETH_P_ALL as u16).map(Self))?
    }

    /// Sends a frame. An error is that of the device's queue, too, which may be full.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        (&self.0).write_all(frame)
    }

    /// The first frame within that time that is as it should be.
    pub fn receive(&self, within: Duration, is_right: impl Fn(&[u8]) -> bool) -> Result<Option<Vec<u8>>> {
        let deadline = Instant::now() + within;
        let mut buffer = vec![0; 1 << 16];
        while let Some(left) = deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
            self.0.set_read_timeout(Some(left))?;
            match (&self.0).read(&mut buffer) {
                Ok(length) if is_right(&buffer[..length]) => return Ok(Some(buffer[..length].to_vec())),
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error.into()),
                _ => {}
            }
        }
        Ok(None)
    }
}

/// The MAC address of a device.
pub fn mac(namespace: &Namespace, device: &str) -> Result<[u8; 6]> {
    let output = namespace.command("ip")?.args(["-brief", "link", "show", "dev", device]).output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let octets: Option<Vec<u8>> = text
        .split_whitespace()
        .nth(2)
        .and_then(|mac| mac.split(':').map(|octet| u8::from_str_radix(octet, 16).ok()).collect());
    octets.and_then(|octets| octets.try_into().ok()).with_context(|| format!("no MAC of {device} in {text:?}"))
}

fn packet_socket(device: &str, protocol: u16) -> Result<Socket> {
    let kind = Protocol::from(i32::from(protocol.to_be()));
    let socket = Socket::new(Domain::PACKET, Type::RAW, Some(kind)).context("no packet socket")?;
    let index = nix::net::if_::if_nametoindex(device).with_context(|| format!("no device {device}"))?;
    let mut storage = SockAddrStorage::zeroed();
    // SAFETY: a `sockaddr_ll` is one of the types that a storage has room for.
    let place = unsafe { storage.view_as::<libc::sockaddr_ll>() };
    place.sll_family = libc::AF_PACKET as libc::sa_family_t;
    place.sll_protocol = protocol.to_be();
    place.sll_ifindex = i32::try_from(index)?;
    // SAFETY: the storage was filled as the family asks for, to that length.
    let address = unsafe { SockAddr::new(storage, size_of::<libc::sockaddr_ll>() as libc::socklen_t) };
    socket.bind(&address).with_context(|| format!("cannot bind to {device}"))?;
    Ok(socket)
}
