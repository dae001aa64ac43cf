//! ICMP errors about packets of known flows: the quote becomes what was sent, and the error goes to who sent it.

use std::net::IpAddr;

use proxy_common::{
    flow::{Direction, Output},
    outcome::Outcome,
    tuple::Stage,
};

use super::{
    Expected, Flow, Key, Model, Packet, ported,
    wire::{Header, Payload, Rewriting, changed, half, pseudo, put, sum},
};

const ICMP: usize = 8;

/// An error with what it quotes, and where that is.
struct Report {
    /// Where the message begins and ends.
    message: usize,
    end: usize,
    quoted: Header,
    /// Where the quoted transport header begins.
    segment: usize,
    /// The quoted packet, as its sender's flow.
    key: Key,
}

impl Model {
    pub(super) fn relate(&mut self, packet: &Packet<'_>) -> Expected {
        let untouched = Expected::untouched(packet.bytes);
        let Some(report) = report(packet) else { return untouched };
        let (reporter, addressee) = (packet.ip.source, packet.ip.destination);
        if addressee != report.key.destination.0 {
            return untouched;
        }
        let Some(flow) = self.table.half(&report.key).filter(|flow| flow.direction != Direction::Transit) else {
            return match self.beyond_transit(&report.key) {
                Some(flow) => self.tell(packet, &report, &flow, reporter),
                None => untouched,
            };
        };
        self.tell(packet, &report, &flow, reporter)
    }

    /// The reply's flow of a packet that the kernel could not route: the quote is to the backend and still from the client.
    fn beyond_transit(&self, key: &Key) -> Option<Flow> {
        if key.stage != Stage::UplinkOut {
            return None;
        }
        let (client, backend) = (key.destination, key.source);
        let transit = self.table.half(&Key { source: client, destination: backend, ..*key })?;
        let stage = Stage::UplinkIn;
        let reply =
            self.table.half(&Key { source: transit.destination, destination: transit.source, stage, ..*key })?;
        (transit.direction == Direction::Transit && reply.destination.0 == client.0).then_some(reply)
    }

    /// Sends the error to who has sent what it is about.
    fn tell(&mut self, packet: &Packet<'_>, report: &Report, flow: &Flow, reporter: IpAddr) -> Expected {
        self.count(packet.hook, Outcome::Related);
        // On its way out it is where it has to be.
        let may_leave = flow.output == Output::Forward && packet.stage != Stage::UplinkOut;
        let next_hop = self.knows_way(flow, &packet.ip).filter(|_| may_leave);
        // Who reports on itself is known by the flow's other name; but not where the kernel has to route what bears it.
        let is_own = reporter == report.key.source.0 && (flow.output != Output::Forward || next_hop.is_some());
        let source = if is_own { flow.source.0 } else { reporter };

        let mut rewriting = Rewriting::of(packet.bytes);
        let before = message_sum(packet.bytes, &packet.ip, report);
        rewriting.set_addresses(&packet.ip, source, flow.destination.0);
        quote(&mut rewriting, report, flow.destination, flow.source);
        if let Some(outer) = Header::read(&rewriting.bytes, packet.ip.start, packet.ip.is_v4)
            && let Some(field) = half(packet.bytes, report.message + 2)
        {
            let after = message_sum(&rewriting.bytes, &outer, report);
            rewriting.doubtful.push(report.message + 2);
            put(&mut rewriting.bytes, report.message + 2, &changed(field, before, after).to_be_bytes());
        }
        self.send_on(packet, rewriting, flow.output, next_hop)
    }
}

/// Reads an error whose lengths are true, and which quotes at least the ports.
fn report(packet: &Packet<'_>) -> Option<Report> {
    let payload = packet.ip.payload().ok()?;
    let end = payload.start + payload.length;
    let kind = *packet.bytes.get(payload.start)?;
    let is_error = if packet.ip.is_v4 { matches!(kind, 3 | 11 | 12) } else { matches!(kind, 1..=4) };
    let quoted = Header::read(packet.bytes, payload.start + ICMP, packet.ip.is_v4)?;
    let inner = quoted_payload(packet.bytes, &quoted)?;
    if !is_error || end > packet.bytes.len() || inner.start + 8 > end {
        return None;
    }
    let proto = ported(inner.protocol)?;
    let (source, destination) = (half(packet.bytes, inner.start)?, half(packet.bytes, inner.start + 2)?);
    let key = Key {
        source: (quoted.destination, destination),
        destination: (quoted.source, source),
        proto,
        stage: packet.stage,
    };
    Some(Report { message: payload.start, end, quoted, segment: inner.start, key })
}

/// What follows the quoted header. A fragment has ports if it is the first of its packet.
fn quoted_payload(bytes: &[u8], quoted: &Header) -> Option<Payload> {
    let start = quoted.start + quoted.size();
    match quoted.payload() {
        Err(Outcome::PassFragment) if quoted.is_v4 => {
            quoted.is_first().then_some(Payload { protocol: quoted.protocol(), start, length: 0 })
        }
        Err(Outcome::PassFragment) => {
            let is_first = half(bytes, start + 2)? & 0xfff8 == 0;
            bytes.get(start + 7)?;
            is_first.then_some(Payload { protocol: bytes[start], start: start + 8, length: 0 })
        }
        other => other.ok(),
    }
}

/// What the error's checksum covers.
fn message_sum(bytes: &[u8], ip: &Header, report: &Report) -> u16 {
    let mut message = bytes[report.message..report.end].to_vec();
    put(&mut message, 2, &[0, 0]);
    if ip.is_v4 {
        return sum(&[&message]);
    }
    sum(&[&pseudo(ip.source, ip.destination, 58, message.len()), &message])
}

/// Turns the quote into what was sent. Of what its checksum covers only a part is there, so that it is changed by what the
/// part's sum is.
fn quote(rewriting: &mut Rewriting, report: &Report, source: super::End, destination: super::End) {
    let is_tcp = report.key.proto == proxy_common::addr::Protocol::Tcp;
    let at = report.segment + if is_tcp { 16 } else { 6 };
    let ports = |bytes: &[u8]| bytes[report.segment..report.segment + 4].to_vec();
    let old = &report.quoted;
    let before = sum(&[&pseudo(old.source, old.destination, 0, 0), &ports(&rewriting.bytes)]);
    rewriting.set_addresses(old, source.0, destination.0);
    put(&mut rewriting.bytes, report.segment, &source.1.to_be_bytes());
    put(&mut rewriting.bytes, report.segment + 2, &destination.1.to_be_bytes());
    let after = sum(&[&pseudo(source.0, destination.0, 0, 0), &ports(&rewriting.bytes)]);
    let Some(field) = half(&rewriting.bytes, at).filter(|_| at + 2 <= report.end) else { return };
    if is_tcp || field != 0 {
        rewriting.doubtful.push(at);
        put(&mut rewriting.bytes, at, &changed(field, before, after).to_be_bytes());
    }
}
