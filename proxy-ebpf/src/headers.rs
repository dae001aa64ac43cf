//! What may stand between an IP header and that of the transport: IPv4's options, and IPv6's extension headers. They stay as
//! they are; all that counts is where they end. What lies about its length, goes on for too long, or says that the packet's
//! destination is not its last one (RFC 791 §3.1, RFC 8200 §4.4) is passed on.

use core::ops::ControlFlow;

use proxy_common::{
    outcome::{Hook, Outcome},
    tuple::Stage,
};

use crate::{
    counters::count,
    datapath::Extent,
    event,
    family::Family,
    fragment,
    kernel::forgotten,
    output::Verdict,
    packet::{Packet, bounded},
    parse::{ExtensionHeader, Ipv4Header, Ipv6Header, JumboHeader, TcpHeader, option, protocol},
};

/// As many extension headers are looked through; nobody sends more of those that may come before a transport header.
const MOST: usize = 6;

/// Where the last of them may end: less is known of larger numbers, and the verifier wants a bound.
const END: usize = 0x7ff;

/// The most options an IPv4 header has room for.
const OPTIONS: usize = 40;

/// Where a walk has ended.
pub struct Walked {
    /// What comes next; [`protocol::FRAGMENT`] for a fragment, in IPv4 too.
    pub protocol: u8,
    /// Where it stands.
    pub offset: usize,
    /// Where the packet ends by its own account.
    pub end: usize,
}

/// Goes on to what is behind options or extension headers, and deals with fragments that are not the first.
#[inline(always)]
pub(crate) fn run<P: Packet, F: Family>(
    hook: Hook,
    stage: Stage,
    packet: &mut P,
) -> Result<ControlFlow<Verdict, (u8, Extent)>, Outcome> {
    let found = walk::<P, F>(hook, packet);
    if found.is_passed != 0 {
        return Ok(ControlFlow::Break(Verdict::PASS));
    }
    let (mut protocol, mut offset, mut payload, mut bytes) = (found.protocol, found.offset, found.payload, found.bytes);
    if protocol == u32::from(protocol::FRAGMENT) {
        // Linux 7.2 knows by how much the offset misses a multiple of eight, and is at odds with itself about its bound.
        let at = bounded::<END>(forgotten(offset.into()) as usize);
        match fragment::run::<P, F>(hook, stage, packet, at)? {
            ControlFlow::Continue(first) => {
                protocol = first.0.into();
                offset = first.1.offset as u32;
                payload = first.1.payload.into();
                bytes = first.1.bytes;
            }
            ControlFlow::Break(verdict) => return Ok(ControlFlow::Break(verdict)),
        }
    }
    let extent = Extent {
        offset: bounded::<END>(forgotten(offset.into()) as usize),
        payload: forgotten(payload.into()) as u16,
        bytes: forgotten(bytes.into()) as u32,
    };
    Ok(ControlFlow::Continue((forgotten(protocol.into()) as u8, extent)))
}

/// What [`walk`] has found, in whole words.
struct Found {
    is_passed: u32,
    protocol: u32,
    offset: u32,
    /// Bytes behind it, as many as fit sixteen bits.
    payload: u32,
    /// Bytes from the IP header on.
    bytes: u32,
}

#[inline(never)]
fn walk<P: Packet, F: Family>(hook: Hook, packet: &mut P) -> Found {
    let reason = match F::walk(packet) {
        Ok(walked) if walked.offset > END - F::FRAGMENT_HEADER => Outcome::PassExtension,
        Ok(walked) if walked.offset > walked.end || !packet.holds(walked.end) => Outcome::PassMalformed,
        Ok(Walked { protocol, offset, end }) => {
            packet.linearize(offset + size_of::<TcpHeader>());
            return Found {
                is_passed: 0,
                protocol: protocol.into(),
                offset: offset as u32,
                payload: (end - offset).min(usize::from(u16::MAX)) as u32,
                bytes: (end - P::NETWORK) as u32,
            };
        }
        Err(reason) => reason,
    };
    count(hook, reason);
    event::packet::<P>(hook, reason, packet.context());
    Found { is_passed: 1, protocol: 0, offset: 0, payload: 0, bytes: 0 }
}

/// Walks IPv4's options.
#[inline(always)]
pub(crate) fn ipv4<P: Packet>(packet: &mut P) -> Result<Walked, Outcome> {
    let header = packet.at::<Ipv4Header>(P::NETWORK).ok_or(Outcome::PassMalformed)?;
    let is_fragment = header.fragment & 0x3fff_u16.to_be() != 0;
    let protocol = if is_fragment { protocol::FRAGMENT } else { header.protocol };
    let end = P::NETWORK + usize::from(u16::from_be(header.total_length));
    let offset = P::NETWORK + usize::from(header.version_ihl & 15) * 4;
    packet.linearize(offset);
    let mut option = P::NETWORK + size_of::<Ipv4Header>();
    for _ in 0..OPTIONS {
        // Else each way of getting here would be followed to the end of the loop.
        option = bounded::<END>(forgotten(option as u64) as usize);
        if option >= offset {
            break;
        }
        match *packet.at::<u8>(option).ok_or(Outcome::PassMalformed)? {
            option::END => break,
            option::NOTHING => option += 1,
            option::LOOSE_ROUTE | option::STRICT_ROUTE => return Err(Outcome::PassOptions),
            _ => {
                let length = usize::from(*packet.at::<u8>(option + 1).ok_or(Outcome::PassMalformed)?);
                option += length;
                if length < 2 || option > offset {
                    return Err(Outcome::PassMalformed);
                }
            }
        }
    }
    Ok(Walked { protocol, offset, end })
}

/// Walks IPv6's extension headers, as far as those go that every router may look at and the fragment's.
#[inline(always)]
pub(crate) fn ipv6<P: Packet>(packet: &mut P) -> Result<Walked, Outcome> {
    let header = packet.at::<Ipv6Header>(P::NETWORK).ok_or(Outcome::PassMalformed)?;
    let start = P::NETWORK + size_of::<Ipv6Header>();
    let mut protocol = header.next_header;
    let mut offset = start;
    let mut end = start + usize::from(u16::from_be(header.payload_length));
    if end == start {
        end = start + jumbo::<P>(packet, protocol, start)?;
    }
    for _ in 0..MOST {
        match protocol {
            protocol::HOP_BY_HOP if offset != start => return Err(Outcome::PassMalformed),
            protocol::HOP_BY_HOP | protocol::ROUTING | protocol::DESTINATION => {}
            _ => break,
        }
        packet.linearize(offset + size_of::<ExtensionHeader>());
        let header = packet.at::<ExtensionHeader>(offset).ok_or(Outcome::PassMalformed)?;
        if protocol == protocol::ROUTING && header.segments_left != 0 {
            return Err(Outcome::PassExtension);
        }
        protocol = header.next_header;
        offset += (usize::from(header.length) + 1) * size_of::<ExtensionHeader>();
    }
    if protocol::is_extension(protocol) { Err(Outcome::PassExtension) } else { Ok(Walked { protocol, offset, end }) }
}

/// How much follows the IP header of a jumbogram (RFC 2675). The kernel's own, BIG TCP's, has the option where it is looked
/// for here; frames are never that long.
#[inline(always)]
fn jumbo<P: Packet>(packet: &mut P, protocol: u8, start: usize) -> Result<usize, Outcome> {
    let header = packet.at::<JumboHeader>(start).ok_or(Outcome::PassMalformed)?;
    let [high, low] = header.payload_length.map(u16::from_be).map(usize::from);
    let is_jumbo =
        protocol == protocol::HOP_BY_HOP && header.kind_and_length == JumboHeader::KIND_AND_LENGTH && high != 0;
    if is_jumbo && !P::IS_FRAME { Ok(high << 16 | low) } else { Err(Outcome::PassMalformed) }
}
