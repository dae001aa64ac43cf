//! Fragments. The first one has the ports and goes the way of any packet; it leaves word of them, and the others follow its
//! flow with addresses alone. One that comes before the first belongs nowhere yet: it goes to whoever would put it together
//! if it is not ours, and is dropped where it would leave the node as it is.

use core::ops::ControlFlow;

use aya_ebpf::bindings::BPF_ANY;
use proxy_common::{
    addr::{Address as _, Protocol},
    flow::Output,
    fragment::{Fragmented, Ports},
    outcome::{Hook, Outcome},
    tuple::{Stage, Tuple},
};

use crate::{
    checksum,
    counters::count,
    datapath::{self, Extent},
    dispatch, embryo, event,
    family::Family,
    filter, newcomer,
    output::{self, Verdict},
    packet::Packet,
    parse::{Tcp, TcpHeader, Transport as _, Udp, UdpHeader},
    service, stats,
};

/// What a fragment says of itself.
pub struct Fragment {
    /// Identification, as on the wire.
    pub id: u32,
    /// Transport protocol.
    pub protocol: u8,
    /// Where its bytes belong behind the IP headers; the one at 0 has the transport header.
    pub offset: u16,
    /// How long the packet is by its own account, the header of the link included.
    pub end: usize,
}

/// The length an UDP header of a fragment may speak of: that of the whole packet, which nobody knows yet.
const ANY_LENGTH: u16 = u16::MAX;

/// What to do with a fragment, whose IP headers but that of the fragment end at an offset: the first one has a transport
/// header, and goes on as any packet does.
#[inline(always)]
pub(crate) fn run<P: Packet, F: Family>(
    hook: Hook,
    stage: Stage,
    packet: &mut P,
    at: usize,
) -> Result<ControlFlow<Verdict, (u8, Extent)>, Outcome> {
    let sorted = sort::<P, F>(hook, stage, packet, at);
    match sorted.dropped {
        0 => {}
        DROP_FRAGMENT => return Err(Outcome::DropFragment),
        DROP_OVERLAP => return Err(Outcome::DropOverlap),
        DROP_NOT_DISPATCHED => return Err(Outcome::DropNotDispatched),
        _ => return Err(Outcome::DropNotWritable),
    }
    if sorted.first == 0 {
        return Ok(ControlFlow::Break(sorted.verdict));
    }
    let protocol = sorted.first as u8;
    let offset = at + F::FRAGMENT_HEADER;
    let extent = Extent {
        offset,
        payload: if protocol == datapath::UDP { ANY_LENGTH } else { sorted.length as u16 },
        bytes: (offset - P::NETWORK) as u32 + sorted.length,
    };
    Ok(ControlFlow::Continue((protocol, extent)))
}

/// What is left to do with a fragment.
struct Sorted {
    /// The protocol of a first fragment, which goes the way of any packet; 0 for one that has been dealt with.
    first: u32,
    /// How many bytes of it follow the IP headers.
    length: u32,
    /// What became of a fragment that has been dealt with.
    verdict: Verdict,
    /// Why it is dropped, as a number; or 0.
    dropped: u32,
}

const DROP_FRAGMENT: u32 = Outcome::DropFragment as u32;
const DROP_OVERLAP: u32 = Outcome::DropOverlap as u32;
const DROP_NOT_DISPATCHED: u32 = Outcome::DropNotDispatched as u32;
const DROP_NOT_WRITABLE: u32 = Outcome::DropNotWritable as u32;

impl Sorted {
    const PASS: Self = Self { first: 0, length: 0, verdict: Verdict::PASS, dropped: 0 };

    #[inline(always)]
    const fn dropped(dropped: u32) -> Self {
        Self { dropped, ..Self::PASS }
    }
}

#[inline(always)]
fn pass<P: Packet>(hook: Hook, packet: &P, reason: Outcome) -> Sorted {
    count(hook, reason);
    event::packet::<P>(hook, reason, packet.context());
    Sorted::PASS
}

/// Remembers the ports of a first fragment, and deals with the others.
#[inline(never)]
fn sort<P: Packet, F: Family>(hook: Hook, stage: Stage, packet: &mut P, at: usize) -> Sorted {
    let (Some(header), Some(fragment)) = (packet.at::<F::Header>(P::NETWORK), F::fragment(packet, at)) else {
        return pass(hook, packet, Outcome::PassMalformed);
    };
    if !packet.holds(fragment.end) {
        return pass(hook, packet, Outcome::PassMalformed);
    }
    let proto = match fragment.protocol {
        datapath::TCP => Protocol::Tcp,
        datapath::UDP => Protocol::Udp,
        _ => return pass(hook, packet, Outcome::PassProtocol),
    };
    let (saddr, daddr) = F::addresses(header);
    let key = Fragmented { saddr, daddr, id: fragment.id, proto, stage, pad: [0; 2] };
    if fragment.offset != 0 {
        return follow::<P, F>(hook, stage, packet, &key, &fragment);
    }
    // TCP has its ports where UDP has them.
    let transport = at + F::FRAGMENT_HEADER;
    let (Some(first), Some(length)) = (packet.at::<UdpHeader>(transport), fragment.end.checked_sub(transport)) else {
        return pass(hook, packet, Outcome::PassMalformed);
    };
    // One without a whole transport header is not understood, and the others do not follow it (RFC 1858 §3).
    let is_sound = if fragment.protocol == datapath::TCP {
        packet.at::<TcpHeader>(transport).is_some_and(|header| Tcp::is_sound(packet, header, transport, length as u16))
    } else {
        length >= size_of::<UdpHeader>() && Udp::is_sound(packet, first, transport, ANY_LENGTH)
    };
    if !is_sound {
        return pass(hook, packet, Outcome::PassMalformed);
    }
    let ports = Ports { sport: first.sport, dport: first.dport, length: length as u16, pad: 0 };
    let _ = F::fragments().insert(&key, &ports, u64::from(BPF_ANY));
    Sorted { first: u32::from(fragment.protocol), length: length as u32, ..Sorted::PASS }
}

/// Sends a later fragment where the first one went.
#[inline(always)]
fn follow<P: Packet, F: Family>(
    hook: Hook,
    stage: Stage,
    packet: &mut P,
    key: &Fragmented<F::Addr>,
    fragment: &Fragment,
) -> Sorted {
    // SAFETY: an entry may be given to another packet after an eviction, not one looked up a moment ago.
    let Some(ports) = (unsafe { F::fragments().get(key) }) else {
        let is_lost = match key.stage {
            _ if newcomer::are_others_at_work() => false,
            Stage::UplinkOut => filter::may_be_reply(&key.saddr),
            _ => is_for_service::<F>(key),
        };
        return if is_lost { Sorted::dropped(DROP_FRAGMENT) } else { pass(hook, packet, Outcome::PassFragment) };
    };
    let tuple = Tuple::new(key.saddr, key.daddr, ports.sport, ports.dport, key.proto, key.stage);
    let Some(entry) = embryo::known::<F>(&tuple) else {
        let is_lost = is_for_service::<F>(key) && !newcomer::are_others_at_work();
        return if is_lost { Sorted::dropped(DROP_FRAGMENT) } else { pass(hook, packet, Outcome::PassFragment) };
    };
    if fragment.offset < ports.length {
        return Sorted::dropped(DROP_OVERLAP);
    }
    let flow = entry.flow();
    let Some(header) = packet.at::<F::Header>(P::NETWORK) else { return Sorted::PASS };
    let bytes = (fragment.end - P::NETWORK) as u32;
    if flow.is_confirmed() {
        stats::note::<F>(entry, bytes);
    } else {
        stats::note_at_once::<F>(entry, bytes);
    }
    // Of no use elsewhere, as the verifier sees; not so in the key.
    if stage == Stage::UplinkIn && flow.output.is_dispatch() {
        return match dispatch::forward::<P, F>(packet, flow) {
            Ok(verdict) => Sorted { verdict, ..Sorted::PASS },
            Err(reason) => Sorted::dropped(reason as u32),
        };
    }
    let to = &flow.rewrite;
    let leaves = output::knows_way::<P, F>(packet, flow, header);
    // What the kernel has to route keeps its source until it leaves, as its first fragment did.
    let saddr = if flow.output == Output::Forward && !leaves { key.saddr } else { to.saddr };
    let change = checksum::delta(key.saddr.sum() + key.daddr.sum(), saddr.sum() + to.daddr.sum());
    F::set_addresses(header, saddr, to.daddr, change);
    if F::IS_V6 {
        packet.account(change);
    }
    let (is_ready, ifindex) = match flow.output {
        Output::Hairpin => (output::hairpin::<P, F>(packet), packet.ifindex()),
        Output::Forward if leaves => (output::forward::<P, F>(packet, &flow.next_hop), flow.next_hop.ifindex),
        Output::Stack | Output::Forward | Output::Dispatch | Output::Tunnel => return Sorted::PASS,
    };
    if is_ready {
        Sorted { verdict: Verdict::redirect(ifindex), ..Sorted::PASS }
    } else {
        Sorted::dropped(DROP_NOT_WRITABLE)
    }
}

/// Whether a fragment on its way in is for a Service and for nobody else: the kernel does not put it together.
#[inline(always)]
fn is_for_service<F: Family>(key: &Fragmented<F::Addr>) -> bool {
    matches!(key.stage, Stage::FromPod | Stage::UplinkIn) && service::is_virtual::<F>(&key.daddr)
}
