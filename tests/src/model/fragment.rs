//! Fragments: the first one has the ports and goes the way of any packet; the others follow its flow with addresses alone. One
//! that nobody but us could make sense of, and we cannot, is dropped, as is one that would write over the first.

use std::net::IpAddr;

use proxy_common::{addr::Protocol, flow::Output, outcome::Outcome, tuple::Stage};

use super::{
    Expected, Key, Model, Objection, Oracle, Packet, bit, ported,
    wire::{self, Payload, Rewriting, Segment, half},
};

/// What all fragments of a packet have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Fragmented {
    /// Source.
    pub source: IpAddr,
    /// Destination.
    pub destination: IpAddr,
    /// Identification.
    pub id: u32,
    /// Transport protocol.
    pub proto: Protocol,
    /// Where it was seen.
    pub stage: Stage,
}

/// What is known of a first fragment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct First {
    /// Source and destination.
    pub ports: (u16, u16),
    /// How much of the packet it has.
    pub length: usize,
}

/// What a fragment says of itself.
struct Fragment {
    id: u32,
    protocol: u8,
    /// Where in the packet its part belongs.
    offset: usize,
    /// Where its part of the payload begins and ends.
    start: usize,
    end: usize,
}

impl Model {
    pub(super) fn fragment(
        &mut self,
        packet: &Packet<'_>,
        payload: Payload,
        oracle: &mut dyn Oracle,
    ) -> Result<Expected, Objection> {
        let Some(fragment) = read(packet, payload).filter(|it| it.start <= it.end && it.end <= packet.bytes.len())
        else {
            return Ok(self.pass(packet.hook, packet.bytes, Outcome::PassMalformed));
        };
        if fragment.protocol == Protocol::Sctp as u8 {
            return Err(Objection::Unknowable);
        }
        let Some(proto) = ported(fragment.protocol) else {
            return Ok(self.pass(packet.hook, packet.bytes, Outcome::PassProtocol));
        };
        let (source, destination) = (packet.ip.source, packet.ip.destination);
        let whole = Fragmented { source, destination, id: fragment.id, proto, stage: packet.stage };
        if fragment.offset != 0 {
            return Ok(self.follow(packet, &whole, fragment.offset));
        }
        let ports = (half(packet.bytes, fragment.start), half(packet.bytes, fragment.start + 2));
        let (Some(from), Some(to), true) = (ports.0, ports.1, fragment.end - fragment.start >= 8) else {
            return Ok(self.pass(packet.hook, packet.bytes, Outcome::PassMalformed));
        };
        match segment(packet.bytes, &fragment, proto, (from, to)) {
            Some(segment) => {
                let length = fragment.end - fragment.start;
                self.fragmented.insert(whole, First { ports: (from, to), length });
                self.converse(packet, segment, oracle)
            }
            None => Ok(self.pass(packet.hook, packet.bytes, Outcome::PassMalformed)),
        }
    }

    /// Sends a later fragment where the first one went.
    fn follow(&mut self, packet: &Packet<'_>, whole: &Fragmented, offset: usize) -> Expected {
        let first = self.fragmented.get(whole).copied();
        let flow = first.and_then(|first| {
            self.table.half(&Key {
                source: (whole.source, first.ports.0),
                destination: (whole.destination, first.ports.1),
                proto: whole.proto,
                stage: whole.stage,
            })
        });
        let (Some(first), Some(flow)) = (first, flow) else {
            let is_early = first.is_none() && packet.stage == Stage::UplinkOut;
            let would_leave = is_early && self.world.outbound.may_have(bit(whole.source));
            return if would_leave || packet.is_way_in() && self.world.is_virtual(whole.destination) {
                self.drop(packet.hook, Outcome::DropFragment)
            } else {
                self.pass(packet.hook, packet.bytes, Outcome::PassFragment)
            };
        };
        if offset < first.length {
            return self.drop(packet.hook, Outcome::DropOverlap);
        }
        let next_hop = self.knows_way(&flow, &packet.ip);
        let mut rewriting = Rewriting::of(packet.bytes);
        // What the kernel has to route keeps its source until it leaves, as its first fragment did.
        let keeps_source = flow.output == Output::Forward && next_hop.is_none();
        let source = if keeps_source { whole.source } else { flow.source.0 };
        rewriting.set_addresses(&packet.ip, source, flow.destination.0);
        self.send_on(packet, rewriting, flow.output, next_hop)
    }
}

/// Reads what a packet that is known to be a fragment says of itself.
fn read(packet: &Packet<'_>, payload: Payload) -> Option<Fragment> {
    let (bytes, ip, start) = (packet.bytes, &packet.ip, payload.start);
    let end = start + payload.length;
    if ip.is_v4 {
        return Some(Fragment {
            id: half(bytes, wire::ETHERNET + 4)?.into(),
            protocol: ip.protocol(),
            offset: usize::from(half(bytes, wire::ETHERNET + 6)? & 0x1fff) * 8,
            start,
            end,
        });
    }
    let id = u32::from(half(bytes, start + 4)?) << 16 | u32::from(half(bytes, start + 6)?);
    Some(Fragment {
        id,
        protocol: *bytes.get(start)?,
        offset: usize::from(half(bytes, start + 2)? & 0xfff8),
        start: start + 8,
        end,
    })
}

/// The transport header of a first fragment. A datagram's length is the whole one's, which nobody knows yet.
fn segment(bytes: &[u8], fragment: &Fragment, proto: Protocol, ports: (u16, u16)) -> Option<Segment> {
    let payload = fragment.end - fragment.start;
    let is_tcp = proto == Protocol::Tcp;
    let flags = if is_tcp {
        let header = usize::from(bytes.get(fragment.start + 12)? >> 4) * 4;
        bytes.get(fragment.start..fragment.start + 20).filter(|_| (20..=payload).contains(&header))?[13]
    } else {
        half(bytes, fragment.start + 4).filter(|length| *length >= 8)?;
        0
    };
    Some(Segment {
        proto,
        start: fragment.start,
        length: payload,
        payload,
        source: ports.0,
        destination: ports.1,
        flags,
    })
}
