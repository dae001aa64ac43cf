//! ICMP errors. What a router or a host says of a packet we translated quotes the translated one, which its sender does not
//! know: the quote is turned back into what was sent, and the error goes to who sent it. Path MTU discovery lives of that.

use proxy_common::{
    addr::{Address as _, Protocol},
    flow::{Direction, Output},
    outcome::{Hook, Outcome},
    tuple::{Stage, Tuple},
};

use crate::{
    checksum,
    counters::count,
    family::Family,
    flow,
    output::{self, Verdict},
    packet::Packet,
    parse::{IcmpHeader, TCP_CSUM, UdpHeader},
};

/// Length of the quote that counts: its IP header goes before, and TCP's checksum is the last of it, if it is there.
const QUOTE: usize = TCP_CSUM + 2;

/// Sends an ICMP message on. An error about a packet of a known flow is translated; all else stays as it is. The quote has
/// source and destination the other way round than the flow's other half, which is looked up at this very hook.
#[inline(never)]
pub(crate) fn relate<P: Packet, F: Family>(hook: Hook, stage: Stage, packet: &mut P) -> Verdict {
    let message = P::NETWORK + size_of::<F::Header>();
    let quote = message + size_of::<IcmpHeader>();
    let transport = quote + size_of::<F::Header>();
    packet.linearize(transport + QUOTE);
    let Some(ip) = packet.at::<F::Header>(P::NETWORK) else { return Verdict::PASS };
    let (Some(icmp), Some(quoted)) = (packet.at::<IcmpHeader>(message), packet.at::<F::Header>(quote)) else {
        return Verdict::PASS;
    };
    // The first eight bytes of TCP and SCTP have their ports where UDP has them.
    let Some(ports) = packet.at::<UdpHeader>(transport) else { return Verdict::PASS };
    let Ok(payload) = F::payload(ip) else { return Verdict::PASS };
    // What follows the message in the frame is none of it, and its checksum does not cover that.
    let end = message + usize::from(payload.length);
    if !F::is_icmp_error(icmp.kind) || !packet.holds(end) || end < transport + size_of::<UdpHeader>() {
        return Verdict::PASS;
    }
    let proto = match F::payload(quoted) {
        Ok(payload) if payload.protocol == Protocol::Tcp as u8 => Protocol::Tcp,
        Ok(payload) if payload.protocol == Protocol::Udp as u8 => Protocol::Udp,
        Ok(payload) if payload.protocol == Protocol::Sctp as u8 => Protocol::Sctp,
        _ => return Verdict::PASS,
    };
    let (reporter, addressee) = F::addresses(ip);
    let (sender, receiver) = F::addresses(quoted);
    let key = Tuple::new(receiver, sender, ports.dport, ports.sport, proto, stage);
    let Some(entry) = flow::half::<F>(&key) else { return Verdict::PASS };
    let flow = entry.flow();
    if flow.direction == Direction::Transit || F::words(addressee) != F::words(key.daddr) {
        return Verdict::PASS;
    }
    let to = &flow.rewrite;
    let leaves = flow.output == Output::Forward && output::knows_way::<P, F>(packet, flow, ip);
    // A host that reports on itself is known by the flow's other name, too.
    let is_own = F::words(reporter) == F::words(key.saddr) && (leaves || flow.output != Output::Forward);
    let saddr = if is_own { to.saddr } else { reporter };
    let outer = checksum::delta(reporter.sum() + addressee.sum(), saddr.sum() + to.daddr.sum());
    F::set_addresses(ip, saddr, to.daddr, outer);

    // The quoted IPv4 header makes up for its own change; in IPv6 addresses count, those of the error in its pseudo-header.
    let mut change = u32::from(to.port_delta);
    if F::IS_V6 {
        change += u32::from(to.addr_delta) + u32::from(outer);
    }
    F::set_addresses(quoted, to.daddr, to.saddr, to.addr_delta);
    ports.sport = to.dport;
    ports.dport = to.sport;
    let both = u32::from(to.addr_delta) + u32::from(to.port_delta);
    let quoted_csum = match proto {
        Protocol::Udp if ports.csum != 0 => Some(&mut ports.csum),
        // SCTP's covers all of a packet that is quoted in part: nobody can check it.
        Protocol::Udp | Protocol::Sctp => None,
        _ if end < transport + QUOTE => None,
        _ => packet.at::<u16>(transport + TCP_CSUM),
    };
    if let Some(csum) = quoted_csum {
        let old = *csum;
        *csum = checksum::update(old, both);
        change += u32::from(checksum::delta(u32::from(old), u32::from(*csum)));
    }
    icmp.csum = checksum::update(icmp.csum, change);
    count(hook, Outcome::Related);

    let verdict = match flow.output {
        Output::Hairpin => output::hairpin::<P, F>(packet),
        Output::Forward if leaves => output::forward::<P, F>(packet, &flow.next_hop),
        _ => None,
    };
    verdict.unwrap_or(Verdict::PASS)
}
