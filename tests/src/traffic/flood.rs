//! A flood of first packets from anywhere: what an attacker sends who forges his address and waits for no answer.

use std::{
    io::Write as _,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    num::Wrapping,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use socket2::{Domain, Protocol, SockAddr, SockAddrStorage, Socket, Type};

use super::Target;
use crate::{
    frame::{Flags, Frame, Transport},
    netns::Namespace,
};

/// A flood.
#[derive(Clone, Copy, Debug)]
pub struct FloodPlan<'a> {
    /// Where it is sent from, and by which device.
    pub namespace: &'a Namespace,
    /// The device.
    pub device: &'a str,
    /// The MAC address it goes to.
    pub dmac: [u8; 6],
    /// Whom it hits. TCP gets SYNs.
    pub target: Target,
    /// How many packets.
    pub packets: u64,
}

impl FloodPlan<'_> {
    /// Sends as fast as this thread can, every packet from another address and port; returns how long it took.
    pub fn send(&self) -> Result<Duration> {
        self.namespace.run(|| self.send_here())?
    }

    fn send_here(&self) -> Result<Duration> {
        let mut socket = packet_socket(self.device)?;
        let begin = Instant::now();
        let (mut sent, mut random) = (0, Wrapping(0x9e37_79b9_7f4a_7c15_u64));
        while sent < self.packets {
            random = random * Wrapping(0x5851_f42d_4c95_7f2d) + Wrapping(1);
            let bytes = self.frame((random >> 16).0).bytes();
            // The device's queue may be full: that is as fast as it gets.
            sent += u64::from(socket.write(&bytes).is_ok());
        }
        Ok(begin.elapsed())
    }

    fn frame(&self, random: u64) -> Frame {
        let (low, high) = (random as u32, (random >> 32) as u16);
        let saddr = match self.target.address {
            // 20.0.0.0/7, where nobody of the lab is.
            SocketAddr::V4(_) => IpAddr::V4(Ipv4Addr::from(0x1400_0000 | low & 0x01ff_ffff)),
            SocketAddr::V6(_) => IpAddr::V6(Ipv6Addr::from(0x2001_0db8_000f_0000 << 64 | u128::from(low))),
        };
        let transport = match self.target.protocol {
            super::Protocol::Tcp => Transport::Tcp(Flags::SYN),
            super::Protocol::Udp => Transport::Udp,
        };
        let source = (saddr, 1_024 + high % 60_000);
        let mut frame = Frame::new(source, (self.target.address.ip(), self.target.address.port()), transport);
        frame.macs.0 = self.dmac;
        frame.payload.clear();
        frame
    }
}

/// A socket whose writes are frames of a device.
fn packet_socket(device: &str) -> Result<Socket> {
    let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(0))).context("no packet socket")?;
    let index = nix::net::if_::if_nametoindex(device).with_context(|| format!("no device {device}"))?;
    let mut storage = SockAddrStorage::zeroed();
    // SAFETY: a `sockaddr_ll` is one of the types that a storage has room for.
    let place = unsafe { storage.view_as::<libc::sockaddr_ll>() };
    place.sll_family = libc::AF_PACKET as libc::sa_family_t;
    place.sll_ifindex = i32::try_from(index)?;
    // SAFETY: the storage was filled as the family asks for, to that length.
    let address = unsafe { SockAddr::new(storage, size_of::<libc::sockaddr_ll>() as libc::socklen_t) };
    socket.bind(&address).with_context(|| format!("cannot bind to {device}"))?;
    Ok(socket)
}
