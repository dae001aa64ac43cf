//! ICMP errors. What a router or a host says of a packet we translated quotes the translated one, which its sender does not
//! know: the quote is turned back into what was sent, and the error goes to who sent it. Path MTU discovery lives of that.

use core::{ffi::c_void, mem, ptr};

use proxy_common::{
    addr::{Address as _, Protocol},
    flow::{Direction, Flow, Output},
    outcome::{Hook, Outcome},
    tuple::{Stage, Tuple},
};

use crate::{
    checksum,
    counters::count,
    datapath, dispatch, echo, event,
    family::Family,
    flow::{self, Entry},
    host,
    output::{self, Verdict},
    packet::Packet,
    parse::{FragmentHeader, IcmpHeader, TCP_CSUM, UdpHeader},
};

/// Length of the quote that counts: its IP header goes before, and TCP's checksum is the last of it, if it is there.
const QUOTE: usize = TCP_CSUM + 2;

/// Sends an ICMP message on. An error about a packet of a known flow is translated, a ping to a Service answered; all else
/// stays as it is.
#[inline(never)]
pub(crate) fn relate<P: Packet, F: Family>(hook: Hook, stage: Stage, packet: &mut P) -> Verdict {
    packet.linearize(quote::<P, F>() + size_of::<F::Header>() + size_of::<FragmentHeader>() + QUOTE);
    let Some(icmp) = packet.at::<IcmpHeader>(message::<P, F>()) else { return Verdict::PASS };
    if end::<P, F>(packet).is_none_or(|end| end < quote::<P, F>()) {
        return Verdict::PASS;
    }
    if icmp.kind == F::ECHO.0 && matches!(stage, Stage::FromPod | Stage::UplinkIn) {
        if stage == Stage::UplinkIn && host::is_another::<P>(packet.context()) {
            return Verdict::PASS;
        }
        return echo::answer::<P, F>(hook, packet.context());
    }
    if !F::is_icmp_error(icmp.kind) {
        return Verdict::PASS;
    }
    match find::<P, F>(packet.context(), stage) {
        Some(entry) => {
            // On its way out it is where it has to be; and behind tags it does not leave by another way.
            let may_leave = stage != Stage::UplinkOut && !packet.is_tagged();
            translate::<P, F>(packet.context(), hook, may_leave, entry.address())
        }
        None => Verdict::PASS,
    }
}

/// Where the ICMP message begins.
#[inline(always)]
const fn message<P: Packet, F: Family>() -> usize {
    P::NETWORK + size_of::<F::Header>()
}

/// Where the packet it quotes begins.
#[inline(always)]
const fn quote<P: Packet, F: Family>() -> usize {
    message::<P, F>() + size_of::<IcmpHeader>()
}

/// Where the message ends. What follows it in the frame is none of it, and its checksum does not cover that.
#[inline(always)]
fn end<P: Packet, F: Family>(packet: &P) -> Option<usize> {
    let payload = F::payload(packet.at::<F::Header>(P::NETWORK)?).ok()?;
    let end = message::<P, F>() + usize::from(payload.length);
    packet.holds(end).then_some(end)
}

/// Where the transport header of the quote begins, and what it is of. The first eight bytes of TCP and SCTP have their ports
/// where UDP has them.
#[inline(always)]
fn quoted_transport<P: Packet, F: Family>(packet: &P) -> Option<(Protocol, usize)> {
    let (protocol, between) = F::quoted(packet, quote::<P, F>())?;
    let proto = match protocol {
        datapath::TCP => Protocol::Tcp,
        datapath::UDP => Protocol::Udp,
        datapath::SCTP => Protocol::Sctp,
        _ => return None,
    };
    Some((proto, quote::<P, F>() + size_of::<F::Header>() + between))
}

/// The flow of the quoted packet, if it was sent by whom the error is for. The quote has source and destination the other way
/// round than the flow's other half, which is looked up at this very hook.
#[inline(always)]
fn find<P: Packet, F: Family>(context: *mut c_void, stage: Stage) -> Option<Entry<F::Addr>> {
    let flow = look_up::<P, F>(context, stage);
    (!flow.is_null()).then_some(Entry::at(flow))
}

/// Out of line, for the room its keys take on the stack.
#[inline(never)]
fn look_up<P: Packet, F: Family>(context: *mut c_void, stage: Stage) -> *mut Flow<F::Addr> {
    let packet = P::from_context(context);
    let (Some(ip), Some(quoted)) = (packet.at::<F::Header>(P::NETWORK), packet.at::<F::Header>(quote::<P, F>())) else {
        return ptr::null_mut();
    };
    let Some((proto, transport)) = quoted_transport::<P, F>(&packet) else { return ptr::null_mut() };
    let Some(ports) = packet.at::<UdpHeader>(transport) else { return ptr::null_mut() };
    if end::<P, F>(&packet).is_none_or(|end| end < transport + size_of::<UdpHeader>()) {
        return ptr::null_mut();
    }
    let (sender, receiver) = F::addresses(quoted);
    if F::words(F::addresses(ip).1) != F::words(sender) {
        return ptr::null_mut();
    }
    let mut key = Tuple::new(receiver, sender, ports.dport, ports.sport, proto, stage);
    // The second step of what goes the other way has that key, too.
    let found = match flow::half::<F>(&key).filter(|entry| entry.flow().direction != Direction::Transit) {
        None if stage == Stage::UplinkOut => beyond_transit::<F>(&mut key),
        found => found,
    };
    found.map_or(ptr::null_mut(), Entry::address)
}

/// The flow of a packet that the kernel had to route and could not: its quote has the backend's name already and still the
/// client's. The second step, which was made for it, has the name it would have got; and under that the reply is known.
#[inline(always)]
fn beyond_transit<F: Family>(key: &mut Tuple<F::Addr>) -> Option<Entry<F::Addr>> {
    mem::swap(&mut key.saddr, &mut key.daddr);
    mem::swap(&mut key.sport, &mut key.dport);
    let transit = flow::half::<F>(key)?.flow();
    let to = &transit.rewrite;
    let client = F::words(key.saddr);
    *key = Tuple::new(to.daddr, to.saddr, to.dport, to.sport, key.proto, Stage::UplinkIn);
    let reply = flow::half::<F>(key)?;
    let is_its = transit.direction == Direction::Transit && F::words(reply.flow().rewrite.daddr) == client;
    is_its.then_some(reply)
}

/// Translates an error about a packet of a flow, whose other half is given.
#[inline(never)]
fn translate<P: Packet, F: Family>(
    context: *mut c_void,
    hook: Hook,
    may_leave: bool,
    flow: *mut Flow<F::Addr>,
) -> Verdict {
    let mut packet = P::from_context(context);
    let flow = Entry::at(flow).flow();
    if flow.output.is_dispatch() {
        // It is about a reply, which did not come this way: who translated that translates this, too.
        return dispatch_on::<P, F>(hook, &mut packet, may_leave, flow);
    }
    let Some(change) = turn_quote::<P, F>(context, flow) else { return Verdict::PASS };
    let (Some(ip), Some(icmp)) = (packet.at::<F::Header>(P::NETWORK), packet.at::<IcmpHeader>(message::<P, F>()))
    else {
        return Verdict::PASS;
    };
    let to = &flow.rewrite;
    let leaves = may_leave && flow.output == Output::Forward && output::knows_way::<P, F>(&packet, flow, ip);
    // A host that reports on itself is known by the flow's other name, too.
    let (reporter, addressee) = F::addresses(ip);
    let is_own = change.is_own && (leaves || flow.output != Output::Forward);
    let saddr = if is_own { to.saddr } else { reporter };
    let outer = checksum::delta(reporter.sum() + addressee.sum(), saddr.sum() + to.daddr.sum());
    event::packet::<P>(hook, Outcome::Related, context);
    F::set_addresses(ip, saddr, to.daddr, outer);
    // In IPv6 the addresses of the error count, in its pseudo-header.
    let change = change.sum + if F::IS_V6 { u32::from(outer) } else { 0 };
    icmp.csum = checksum::update(icmp.csum, change);
    count(hook, Outcome::Related);

    let (is_ready, ifindex) = match flow.output {
        Output::Hairpin => (output::hairpin::<P, F>(&mut packet), packet.ifindex()),
        Output::Forward if leaves => (output::forward::<P, F>(&mut packet, &flow.next_hop), flow.next_hop.ifindex),
        _ => return Verdict::PASS,
    };
    if is_ready { Verdict::redirect(ifindex) } else { Verdict::PASS }
}

/// Sends an error to where its flow goes, as it is. One that cannot go there is passed on: nobody here is meant by it.
#[inline(always)]
fn dispatch_on<P: Packet, F: Family>(hook: Hook, packet: &mut P, may_leave: bool, flow: &Flow<F::Addr>) -> Verdict {
    if !may_leave {
        return Verdict::PASS;
    }
    match dispatch::forward::<P, F>(packet, flow) {
        Ok(verdict) => {
            count(hook, Outcome::Related);
            event::packet::<P>(hook, Outcome::Related, packet.context());
            verdict
        }
        Err(_) => Verdict::PASS,
    }
}

/// What became of a quote.
struct Change {
    /// What it does to the sum of the message.
    sum: u32,
    /// Whether the error is the receiver's, whom the quote names.
    is_own: bool,
}

/// Makes the quote what was sent.
#[inline(always)]
fn turn_quote<P: Packet, F: Family>(context: *mut c_void, flow: &Flow<F::Addr>) -> Option<Change> {
    let packet = P::from_context(context);
    let (ip, quoted) = (packet.at::<F::Header>(P::NETWORK)?, packet.at::<F::Header>(quote::<P, F>())?);
    let (proto, transport) = quoted_transport::<P, F>(&packet)?;
    let ports = packet.at::<UdpHeader>(transport)?;
    let to = &flow.rewrite;
    let (sender, receiver) = F::addresses(quoted);
    let is_own = F::words(F::addresses(ip).0) == F::words(receiver);
    let addresses = checksum::delta(receiver.sum() + sender.sum(), to.saddr.sum() + to.daddr.sum());
    let of_ports = checksum::delta(
        u32::from(ports.sport.word()) + u32::from(ports.dport.word()),
        u32::from(to.sport.word()) + u32::from(to.dport.word()),
    );
    F::set_addresses(quoted, to.daddr, to.saddr, addresses);
    ports.sport = to.dport;
    ports.dport = to.sport;
    // The quoted IPv4 header makes up for its own change.
    let mut sum = u32::from(of_ports) + if F::IS_V6 { u32::from(addresses) } else { 0 };
    let csum = match proto {
        Protocol::Udp if ports.csum != 0 => Some(&mut ports.csum),
        // SCTP's covers all of a packet that is quoted in part: nobody can check it.
        Protocol::Udp | Protocol::Sctp => None,
        _ if end::<P, F>(&packet)? < transport + QUOTE => None,
        _ => packet.at::<u16>(transport + TCP_CSUM),
    };
    if let Some(csum) = csum {
        let old = *csum;
        *csum = checksum::update(old, u32::from(addresses) + u32::from(of_ports));
        sum += u32::from(checksum::delta(u32::from(old), u32::from(*csum)));
    }
    Some(Change { sum, is_own })
}
