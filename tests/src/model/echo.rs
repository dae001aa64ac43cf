//! Pings of addresses that are a Service's and nobody else's.

use std::net::IpAddr;

use proxy_common::outcome::Outcome;

use super::{
    Expected, Model, Packet, Verdict,
    wire::{Rewriting, changed, half, put, sum},
};

const ICMP: usize = 8;

impl Model {
    /// The answer to an echo request; `None` where the packet is none, or not for us.
    pub(super) fn echo(&mut self, packet: &Packet<'_>) -> Option<Expected> {
        let payload = packet.ip.payload().ok()?;
        let message = packet.bytes.get(payload.start..payload.start + payload.length).filter(|it| it.len() >= ICMP)?;
        let (request, reply) = if packet.ip.is_v4 { (8, 0) } else { (128, 129) };
        let (client, frontend) = (packet.ip.source, packet.ip.destination);
        let is_for_one = packet.bytes[0] & 1 == 0 && !self.is_for_another_host(packet) && is_one_host(client);
        if !packet.is_way_in() || message[..2] != [request, 0] || !is_for_one || !self.world.is_virtual(frontend) {
            return None;
        }
        let mut rewriting = Rewriting::of(packet.bytes);
        rewriting.set_addresses(&packet.ip, frontend, client);
        rewriting.renew_life(&packet.ip);
        rewriting.swap_macs();
        put(&mut rewriting.bytes, payload.start, &[reply]);
        // What else the checksum covers stays, or changes places.
        let (before, after) = (sum(&[&[request, 0]]), sum(&[&[reply, 0]]));
        let field = half(packet.bytes, payload.start + 2)?;
        rewriting.doubtful.push(payload.start + 2);
        put(&mut rewriting.bytes, payload.start + 2, &changed(field, before, after).to_be_bytes());
        self.count(packet.hook, Outcome::Echoed);
        Some(rewriting.into_expected(Verdict::SendOut))
    }
}

/// Whether an address may be a client's: not unspecified, and not that of many.
fn is_one_host(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => (1..224).contains(&address.octets()[0]),
        IpAddr::V6(address) => !address.is_unspecified() && !address.is_multicast(),
    }
}
