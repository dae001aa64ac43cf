//! The floor: what a stateful balancer cannot do without, and nothing else. Service by hash, flow by LRU, backend by index, two
//! addresses and two ports with incremental checksums, MACs, hop limit, a counter, and out where the packet came in. For a new
//! flow a slot of the Service's Maglev table and two entries.
//!
//! It has one kind of client (beyond the uplink), one of backend (on another node, with the way there known), no states, no
//! lifetimes but the LRU's, no options, fragments, errors, policies or refusals: what it does not know it passes on.

use aya_ebpf::bindings::{BPF_ANY, BPF_NOEXIST};
use proxy_common::addr::{Mac, Port};

use crate::{
    contract::{Count, Flow, Frontend, Node, Service, Tuple},
    family::{Family, V4, V6},
    maps::{COUNTERS, NODE, SLOTS},
    packet::Packet,
    wire::{Ethernet, Ports, TCP, TCP_CSUM, UDP, UDP_CSUM, change, mix},
};

const ETHERNET: usize = size_of::<Ethernet>();
/// Of masqueraded flows.
const FIRST_PORT: u16 = 10_000;
/// A power of two.
const PORTS: u16 = 16_384;
/// For a source port that is free.
const ATTEMPTS: u16 = 8;

/// Why a packet is not sent on.
enum Stop {
    /// Not for us.
    Pass,
    /// No source port is free.
    Drop,
}

/// What becomes of a packet.
#[inline(always)]
pub fn run<P: Packet>(packet: &P) -> P::Action {
    packet.pull(ETHERNET + 40 + 20);
    let Some(ethernet) = packet.at::<Ethernet>(0) else { return packet.pass() };
    let sent = match u16::from_be(ethernet.ethertype) {
        0x0800 => balance::<P, V4>(packet, ethernet),
        0x86dd => balance::<P, V6>(packet, ethernet),
        _ => Err(Stop::Pass),
    };
    match sent {
        Ok(()) => packet.transmit(),
        Err(Stop::Pass) => packet.pass(),
        Err(Stop::Drop) => packet.drop(),
    }
}

/// New addresses, ports and MACs of a packet.
struct Rewrite<A> {
    saddr: A,
    daddr: A,
    sport: Port,
    dport: Port,
    dmac: Mac,
    smac: Mac,
}

#[inline(always)]
fn balance<P: Packet, F: Family>(packet: &P, ethernet: &mut Ethernet) -> Result<(), Stop> {
    let header = packet.at::<F::Header>(ETHERNET).ok_or(Stop::Pass)?;
    let (saddr, daddr, proto) = F::read(header).ok_or(Stop::Pass)?;
    let offset = ETHERNET + size_of::<F::Header>();
    let csum = match proto {
        TCP => TCP_CSUM,
        UDP => UDP_CSUM,
        _ => return Err(Stop::Pass),
    };
    let ports = packet.at::<Ports>(offset).ok_or(Stop::Pass)?;
    let key = Tuple { saddr, daddr, sport: ports.sport, dport: ports.dport, proto: proto.into() };
    let node = NODE.get(0).ok_or(Stop::Pass)?;
    // SAFETY: entries are replaced, never written in place.
    let service = unsafe { F::services().get(&frontend(&key)) };
    let (flow, is_reply) = match service {
        Some(service) => (known_or_new::<F>(&key, service, node, ethernet.smac)?, false),
        None if daddr == F::node(node) => (find::<F>(&key).ok_or(Stop::Pass)?, true),
        None => return Err(Stop::Pass),
    };
    if !F::may_go_on(header) {
        return Err(Stop::Pass);
    }
    let rewrite = if is_reply { back::<F>(flow, ethernet) } else { there::<F>(flow, node)? };
    count(flow.index, F::length(header))?;
    ethernet.dmac = rewrite.dmac;
    ethernet.smac = rewrite.smac;
    let addresses = F::rewrite(header, rewrite.saddr, rewrite.daddr);
    let change = change(both(ports), words(rewrite.sport, rewrite.dport));
    ports.sport = rewrite.sport;
    ports.dport = rewrite.dport;
    if proto == UDP {
        let field = packet.at::<u16>(offset + UDP_CSUM).ok_or(Stop::Drop)?;
        packet.mend(field, offset + csum, addresses, change, true);
    } else {
        let field = packet.at::<u16>(offset + TCP_CSUM).ok_or(Stop::Drop)?;
        packet.mend(field, offset + csum, addresses, change, false);
    }
    Ok(())
}

#[inline(always)]
fn frontend<A: Copy>(key: &Tuple<A>) -> Frontend<A> {
    Frontend { addr: key.daddr, port: key.dport, proto: key.proto as u16, pad: 0 }
}

#[inline(always)]
fn words(first: Port, second: Port) -> u32 {
    u32::from(first.word()) + (u32::from(second.word()) << 16)
}

#[inline(always)]
fn both(ports: &Ports) -> u32 {
    words(ports.sport, ports.dport)
}

#[inline(always)]
fn find<F: Family>(key: &Tuple<F::Addr>) -> Option<&'static Flow<F::Addr>> {
    // SAFETY: the kernel reuses an entry only after it was the one looked up least recently.
    unsafe { F::flows().get(key) }
}

#[inline(always)]
fn known_or_new<F: Family>(
    key: &Tuple<F::Addr>,
    service: &Service,
    node: &Node,
    mac: Mac,
) -> Result<&'static Flow<F::Addr>, Stop> {
    match find::<F>(key) {
        Some(flow) => Ok(flow),
        None => open::<F>(key, service, node, mac),
    }
}

/// Gives a flow a backend and a source port, and enters both directions: the reply first, because it has to be free.
#[inline(always)]
fn open<F: Family>(
    key: &Tuple<F::Addr>,
    service: &Service,
    node: &Node,
    mac: Mac,
) -> Result<&'static Flow<F::Addr>, Stop> {
    let hash = hash::<F>(key);
    let slot = service.first + ((u64::from(hash) * u64::from(service.count)) >> 32) as u32;
    let backend_index = *SLOTS.get(slot).ok_or(Stop::Pass)?;
    let backend = F::backends().get(backend_index).ok_or(Stop::Pass)?;
    let mut flow = Flow {
        client: key.saddr,
        service: key.daddr,
        client_port: key.sport,
        service_port: key.dport,
        source_port: Port::new(0),
        mac,
        backend: backend_index,
        index: service.index,
        pad: 0,
    };
    let mut reply =
        Tuple { saddr: backend.addr, daddr: F::node(node), sport: backend.port, dport: Port::new(0), proto: key.proto };
    for attempt in 0..ATTEMPTS {
        let port = FIRST_PORT + ((hash as u16).wrapping_add(attempt.wrapping_mul(0x1357)) & (PORTS - 1));
        flow.source_port = Port::new(port);
        reply.dport = Port::new(port);
        if F::flows().insert(&reply, &flow, u64::from(BPF_NOEXIST)).is_ok() {
            let _ = F::flows().insert(key, &flow, u64::from(BPF_ANY));
            return find::<F>(key).ok_or(Stop::Drop);
        }
    }
    Err(Stop::Drop)
}

#[inline(always)]
fn hash<F: Family>(key: &Tuple<F::Addr>) -> u32 {
    let hash = mix(key.proto, words(key.sport, key.dport));
    let hash = F::mix(F::mix(hash, key.saddr), key.daddr);
    let hash = (hash ^ hash >> 16).wrapping_mul(0x85eb_ca6b);
    hash ^ hash >> 13
}

/// To the backend, in the node's name.
#[inline(always)]
fn there<F: Family>(flow: &Flow<F::Addr>, node: &Node) -> Result<Rewrite<F::Addr>, Stop> {
    let backend = F::backends().get(flow.backend).ok_or(Stop::Pass)?;
    Ok(Rewrite {
        saddr: F::node(node),
        daddr: backend.addr,
        sport: flow.source_port,
        dport: backend.port,
        dmac: backend.dmac,
        smac: backend.smac,
    })
}

/// To the client, in the Service's name, from the MAC that the reply was sent to.
#[inline(always)]
fn back<F: Family>(flow: &Flow<F::Addr>, ethernet: &Ethernet) -> Rewrite<F::Addr> {
    Rewrite {
        saddr: flow.service,
        daddr: flow.client,
        sport: flow.service_port,
        dport: flow.client_port,
        dmac: flow.mac,
        smac: ethernet.dmac,
    }
}

#[inline(always)]
fn count(index: u32, bytes: u64) -> Result<(), Stop> {
    let count: *mut Count = COUNTERS.get_ptr_mut(index).ok_or(Stop::Drop)?;
    // SAFETY: the pointer is to this CPU's own value, which stays as long as the map.
    let count = unsafe { &mut *count };
    count.packets += 1;
    count.bytes += bytes;
    Ok(())
}
