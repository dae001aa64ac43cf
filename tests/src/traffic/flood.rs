//! A flood of first packets from anywhere: what an attacker sends who forges his address and waits for no answer.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    num::Wrapping,
    thread,
    time::{Duration, Instant},
};

use anyhow::Result;

use super::{Target, wire::Wire};
use crate::{
    frame::{ETHERNET, Flags, Frame, Transport},
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
    /// What each packet says, if anything: a server answers a request.
    pub payload: &'a [u8],
    /// How many packets.
    pub packets: u64,
}

/// Packets that are sent without a pause, of which the queues between here and there have room for several times as many: what a
/// queue drops no program sees, and the questions of a test's clients are dropped with it.
const BURST: u64 = 64;

/// A burst begins so long after the last one, at the earliest.
const PERIOD: Duration = Duration::from_millis(1);

impl FloodPlan<'_> {
    /// Sends at most 64,000 packets per second, each from another address and port; returns how long it took.
    pub fn send(&self) -> Result<Duration> {
        let wire = Wire::of(self.namespace, self.device)?;
        let mut stranger = Stranger::new(&first_packet(self.dmac, self.target, self.payload));
        let begin = Instant::now();
        let (mut sent, mut random) = (0, Wrapping(0x9e37_79b9_7f4a_7c15_u64));
        while sent < self.packets {
            let next = Instant::now() + PERIOD;
            for _ in 0..BURST.min(self.packets - sent) {
                random = random * Wrapping(0x5851_f42d_4c95_7f2d) + Wrapping(1);
                stranger.become_another((random >> 16).0);
                // The device's queue may be full: that is as fast as it gets.
                sent += u64::from(wire.send(&stranger.frame).is_ok());
            }
            thread::sleep(next.saturating_duration_since(Instant::now()));
        }
        Ok(begin.elapsed())
    }
}

/// A first packet from nobody in particular.
fn first_packet(dmac: [u8; 6], target: Target, payload: &[u8]) -> Frame {
    let saddr = match target.address {
        SocketAddr::V4(_) => IpAddr::V4(Ipv4Addr::from(NETWORK_V4)),
        SocketAddr::V6(_) => IpAddr::V6(Ipv6Addr::from(NETWORK_V6)),
    };
    let transport = match target.protocol {
        super::Protocol::Tcp => Transport::Tcp(Flags::SYN),
        super::Protocol::Udp => Transport::Udp,
    };
    let mut frame = Frame::new((saddr, 0), (target.address.ip(), target.address.port()), transport);
    frame.macs.0 = dmac;
    frame.payload = payload.to_vec();
    frame
}

/// 20.0.0.0/7, where nobody of the lab is.
const NETWORK_V4: u32 = 0x1400_0000;
const HOSTS_V4: u32 = 0x01ff_ffff;
const NETWORK_V6: u128 = 0x2001_0db8_000f_0000 << 64;

/// Where it stands in UDP's header.
const UDP_CHECKSUM: usize = 6;

/// A frame whose sender is replaced again and again, and its checksums mended (RFC 1624, eq. 3): to build each one anew takes a
/// program that is not optimised a hundred times as long.
struct Stranger {
    frame: Vec<u8>,
    /// Where the last four bytes of the sender's address are, his port, and the checksums that both or the first are part of.
    address: usize,
    port: usize,
    transport_checksum: usize,
    header_checksum: Option<usize>,
}

impl Stranger {
    fn new(frame: &Frame) -> Self {
        let is_v6 = frame.source.0.is_ipv6();
        let port = ETHERNET + if is_v6 { 40 } else { 20 };
        Self {
            frame: frame.bytes(),
            address: ETHERNET + if is_v6 { 20 } else { 12 },
            port,
            transport_checksum: port + if matches!(frame.transport, Transport::Tcp(_)) { 16 } else { UDP_CHECKSUM },
            header_checksum: (!is_v6).then_some(ETHERNET + 10),
        }
    }

    fn become_another(&mut self, random: u64) {
        let (low, high) = (random as u32, (random >> 32) as u16);
        let low = if self.header_checksum.is_some() { NETWORK_V4 | low & HOSTS_V4 } else { low };
        for (place, word) in [(self.address, (low >> 16) as u16), (self.address + 2, low as u16)] {
            let places = [Some(self.transport_checksum), self.header_checksum];
            self.replace(place, word, places.into_iter().flatten());
        }
        self.replace(self.port, 1_024 + high % 60_000, std::iter::once(self.transport_checksum));
    }

    fn replace(&mut self, place: usize, word: u16, checksums: impl Iterator<Item = usize>) {
        let old = self.word(place);
        self.set_word(place, word);
        for checksum in checksums {
            let sum = u32::from(!self.word(checksum)) + u32::from(!old) + u32::from(word);
            let sum = (sum & 0xffff) + (sum >> 16);
            let mended = !((sum & 0xffff) + (sum >> 16)) as u16;
            // The other zero, where this one means none.
            let is_none = mended == 0 && checksum == self.port + UDP_CHECKSUM;
            self.set_word(checksum, if is_none { 0xffff } else { mended });
        }
    }

    fn word(&self, place: usize) -> u16 {
        u16::from_be_bytes([self.frame[place], self.frame[place + 1]])
    }

    fn set_word(&mut self, place: usize, word: u16) {
        self.frame[place..place + 2].copy_from_slice(&word.to_be_bytes());
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::{Stranger, first_packet};
    use crate::{
        frame::Frame,
        traffic::{Protocol, Target},
    };

    #[test]
    fn strangers_differ_and_their_checksums_are_right() {
        for address in ["192.0.2.11:30031", "[2001:db8::11]:30031"] {
            for protocol in Protocol::ALL {
                let target = Target { address: address.parse().unwrap(), protocol };
                let mut stranger = Stranger::new(&first_packet([2; 6], target, b"who"));
                let mut sources = BTreeSet::new();
                for random in (1..2_000_u64).map(|number| number.wrapping_mul(0x9e37_79b9_7f4a_7c15)) {
                    stranger.become_another(random);
                    // Reading checks the sums.
                    let frame = Frame::read(&stranger.frame);
                    assert_eq!(frame.destination, (target.address.ip(), target.address.port()));
                    assert_eq!(frame.payload, b"who");
                    sources.insert(frame.source);
                }
                assert!(sources.len() > 1_990, "{} sources", sources.len());
            }
        }
    }
}
