//! Fragments. The first one has the ports and goes the way of any packet; it leaves word of them, and the others follow its
//! flow with addresses alone. One that comes before the first is passed on: nobody knows yet where it belongs.

use aya_ebpf::bindings::BPF_ANY;
use proxy_common::{
    addr::{Address as _, Protocol},
    flow::Output,
    fragment::{Fragmented, Ports},
    outcome::{Hook, Outcome},
    tuple::{Stage, Tuple},
};

use crate::{
    checksum, datapath,
    family::Family,
    flow,
    output::{self, Verdict},
    packet::Packet,
    parse::{ETHERNET, Tcp, Udp, UdpHeader},
};

/// What a fragment says of itself.
pub struct Fragment {
    /// Identification, as on the wire.
    pub id: u32,
    /// Transport protocol.
    pub protocol: u8,
    /// Whether it is the one with the transport header.
    pub is_first: bool,
    /// How long the packet is by its own account, Ethernet included.
    pub end: usize,
}

/// The length an UDP header of a fragment may speak of: that of the whole packet, which nobody knows yet.
const ANY_LENGTH: u16 = u16::MAX;

/// Sends a fragment on.
#[inline(never)]
pub(crate) fn run<P: Packet, F: Family>(hook: Hook, stage: Stage, packet: &mut P) -> Result<Verdict, Outcome> {
    let (Some(header), Some(fragment)) = (packet.at::<F::Header>(ETHERNET), F::fragment(packet)) else {
        return datapath::pass(hook, Outcome::PassMalformed);
    };
    if !packet.holds(fragment.end) {
        return datapath::pass(hook, Outcome::PassMalformed);
    }
    let proto = match fragment.protocol {
        datapath::TCP => Protocol::Tcp,
        datapath::UDP => Protocol::Udp,
        _ => return datapath::pass(hook, Outcome::PassProtocol),
    };
    let (saddr, daddr) = F::addresses(header);
    let key = Fragmented { saddr, daddr, id: fragment.id, proto, stage, pad: [0; 2] };
    if !fragment.is_first {
        return follow::<P, F>(hook, packet, &key);
    }
    // TCP has its ports where UDP has them.
    let (Some(first), Some(length)) =
        (packet.at::<UdpHeader>(F::FRAGMENT_TRANSPORT), fragment.end.checked_sub(F::FRAGMENT_TRANSPORT))
    else {
        return datapath::pass(hook, Outcome::PassMalformed);
    };
    if length < size_of::<UdpHeader>() {
        return datapath::pass(hook, Outcome::PassMalformed);
    }
    let ports = Ports { sport: first.sport, dport: first.dport };
    let _ = F::fragments().insert(&key, &ports, u64::from(BPF_ANY));
    if proto == Protocol::Tcp {
        datapath::transport::<P, F, Tcp>(hook, stage, packet, saddr, daddr, length as u16, F::FRAGMENT_TRANSPORT)
    } else {
        datapath::transport::<P, F, Udp>(hook, stage, packet, saddr, daddr, ANY_LENGTH, F::FRAGMENT_TRANSPORT)
    }
}

/// Sends a later fragment where the first one went.
#[inline(always)]
fn follow<P: Packet, F: Family>(hook: Hook, packet: &mut P, key: &Fragmented<F::Addr>) -> Result<Verdict, Outcome> {
    // SAFETY: an entry may be given to another packet after an eviction, not one looked up a moment ago.
    let Some(ports) = (unsafe { F::fragments().get(key) }) else {
        return datapath::pass(hook, Outcome::PassFragment);
    };
    let tuple = Tuple::new(key.saddr, key.daddr, ports.sport, ports.dport, key.proto, key.stage);
    let Some(entry) = flow::half::<F>(&tuple) else { return datapath::pass(hook, Outcome::PassFragment) };
    let flow = entry.flow();
    let Some(header) = packet.at::<F::Header>(ETHERNET) else { return Err(Outcome::DropNotWritable) };
    let to = &flow.rewrite;
    let leaves = output::knows_way::<F>(flow, header);
    // What the kernel has to route keeps its source until it leaves, as its first fragment did.
    let saddr = if flow.output == Output::Forward && !leaves { key.saddr } else { to.saddr };
    let change = checksum::delta(key.saddr.sum() + key.daddr.sum(), saddr.sum() + to.daddr.sum());
    F::set_addresses(header, saddr, to.daddr, change);
    if F::IS_V6 {
        packet.account(change);
    }
    let verdict = match flow.output {
        Output::Stack => return Ok(Verdict::PASS),
        Output::Hairpin => output::hairpin::<P, F>(packet),
        Output::Forward if leaves => output::forward::<P, F>(packet, &flow.next_hop),
        Output::Forward => return Ok(Verdict::PASS),
    };
    verdict.ok_or(Outcome::DropNotWritable)
}
