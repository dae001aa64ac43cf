//! What happens next, at random: packets of clients that begin, packets of flows that are known, errors about them, fragments,
//! the same spoilt; time goes by, entries are evicted, Services and backends change.

use std::net::IpAddr;

use proxy_common::{addr::Protocol, outcome::Hook, service::flag, tuple::Stage};

use super::{
    chance::Chance,
    packet::{Blueprint, icmp, internet, spoil},
    scene::{self, BALANCER, CLIENT2, LOOPBACK, SECOND, UNALLOCATED},
};
use crate::{
    between::{Between, ROUTING},
    frame::Family,
    model::{End, Key, Model, World},
    testbed::{CLIENT, NODE, NODE_PORT, OTHER_NODE_MAC, OTHER_SERVICE, POD, POD2, PORT, REMOTE, SERVICE, UNRESOLVED},
};

/// What kind of packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// A client to an address that may be a frontend.
    Opening,
    /// On the tuple of a flow that is known, either way.
    Known,
    /// An ICMP error about one of those.
    Related,
    /// A fragment of one of them.
    Fragment,
    /// One of them with options or extension headers.
    Extended,
    /// Another protocol, or another ICMP message.
    Other,
}

/// What happens.
#[derive(Clone)]
pub enum Event {
    /// A packet comes to a hook; some were spoilt.
    Packet(Kind, bool, Hook, Vec<u8>),
    /// So many jiffies go by.
    Time(u32),
    /// An entry is evicted.
    Eviction(Key),
    /// The agent writes something else.
    Change(Box<World>),
}

/// The next event.
pub fn event(chance: &mut Chance, model: &Model) -> Event {
    match chance.below(1_000) {
        0..4 => Event::Time(time(chance)),
        4..8 => match some_key(chance, model) {
            Some(key) => Event::Eviction(key),
            None => packet(chance, model),
        },
        8..13 => Event::Change(Box::new(change(chance, &model.world))),
        _ => packet(chance, model),
    }
}

/// Never so many that a boundary is met exactly: the real clock goes on, too.
fn time(chance: &mut Chance) -> u32 {
    let tenths = chance.weighted(&[(4, 3), (8, 3), (14, 6), (22, 4), (60, 2), (310, 3), (1_210, 2), (900_010, 1)]);
    tenths * (SECOND / 10) + 1
}

fn some_key(chance: &mut Chance, model: &Model) -> Option<Key> {
    let (confirmed, embryos) = (&model.table.confirmed, &model.table.embryos);
    let all = confirmed.len() + embryos.len();
    if all == 0 {
        return None;
    }
    confirmed.keys().chain(embryos.keys()).nth(chance.below(all)).copied()
}

fn family(chance: &mut Chance) -> Family {
    if chance.percent(60) { Family::V4 } else { Family::V6 }
}

fn packet(chance: &mut Chance, model: &Model) -> Event {
    use Kind::{Extended, Fragment, Known, Opening, Other, Related};
    let kinds = [(Opening, 26), (Known, 46), (Related, 8), (Fragment, 9), (Extended, 7), (Other, 4)];
    let kind = chance.weighted(&kinds);
    let (hook, mut bytes) = match kind {
        Opening => plain(opening(chance)),
        Known => plain(known(chance, model)),
        Related => related(chance, model),
        Fragment => fragment(chance, model),
        Extended => extended(chance, model),
        Other => other(chance),
    };
    if chance.percent(2) {
        let macs = [OTHER_NODE_MAC, [0x33, 0x33, 0, 0, 0, 1]];
        bytes[..6].copy_from_slice(&chance.of(&macs));
    }
    let is_spoilt = chance.percent(15);
    if is_spoilt {
        spoil(&mut bytes, chance);
    }
    Event::Packet(kind, is_spoilt, hook, bytes)
}

fn plain((hook, blueprint): (Hook, Blueprint)) -> (Hook, Vec<u8>) {
    let bytes = blueprint.bytes();
    (hook, bytes)
}

fn blueprint(chance: &mut Chance, source: End, destination: End, proto: Protocol) -> Blueprint {
    const ACK: u8 = 16;
    let flags = [(2, 22), (ACK, 30), (ACK | 8, 8), (ACK | 2, 12), (ACK | 1, 14), (4, 4), (ACK | 4, 3)];
    let length = if chance.percent(1) { 1_250 } else { chance.weighted(&[(0, 2), (11, 2), (40, 1)]) };
    Blueprint {
        source,
        destination,
        proto,
        flags: if chance.percent(98) { chance.weighted(&flags) } else { chance.word() as u8 },
        life: chance.weighted(&[(64, 90), (2, 3), (1, 4), (0, 1), (255, 2)]),
        is_checked: chance.percent(85),
        payload: (0..length).map(|_| chance.word() as u8).collect(),
    }
}

fn opening(chance: &mut Chance) -> (Hook, Blueprint) {
    let family = family(chance);
    let proto = chance.of(&[Protocol::Tcp, Protocol::Udp]);
    let hook = chance.weighted(&[
        (Hook::PodIn, 8),
        (Hook::UplinkXdp, 8),
        (Hook::UplinkIn, 6),
        (Hook::PodOut, 1),
        (Hook::UplinkOut, 1),
    ]);
    let hosts = [(CLIENT, 6), (CLIENT2, 6), (POD, 6), (POD2, 6), (REMOTE, 2), (NODE, 1), (SERVICE, 1), (LOOPBACK, 1)];
    let source = chance.weighted(&hosts).address(family);
    let sport = chance.of(&[4_000, 4_001, 10_000, 10_001, 15_000, 50_000]);
    let to = [
        (SERVICE.address(family), 6),
        (OTHER_SERVICE.address(family), 4),
        (BALANCER.address(family), 4),
        (NODE.address(family), 8),
        (UNALLOCATED.address(family), 1),
        (LOOPBACK.address(family), 1),
        (POD.address(family), 1),
        (UNRESOLVED.address(family), 1),
        (scene::any(family), 1),
    ];
    let destination = chance.weighted(&to);
    let dport = if destination == NODE.address(family) {
        chance.weighted(&[(NODE_PORT, 6), (NODE_PORT + 1, 6), (22, 1), (NODE_PORT + 2, 1)])
    } else {
        chance.weighted(&[(PORT, 8), (PORT + 1, 3), (443, 1)])
    };
    (hook, blueprint(chance, (source, sport), (destination, dport), proto))
}

/// The hook of a flow's stage.
fn hook(chance: &mut Chance, stage: Stage) -> Hook {
    match stage {
        Stage::FromPod => Hook::PodIn,
        Stage::ToPod => Hook::PodOut,
        Stage::UplinkOut => Hook::UplinkOut,
        Stage::UplinkIn | Stage::Cross => chance.of(&[Hook::UplinkXdp, Hook::UplinkIn]),
    }
}

fn known(chance: &mut Chance, model: &Model) -> (Hook, Blueprint) {
    match some_key(chance, model) {
        Some(key) => (hook(chance, key.stage), blueprint(chance, key.source, key.destination, key.proto)),
        None => opening(chance),
    }
}

/// An error that somebody beyond the receiver, or the receiver itself, sends about a packet of the flow's other half.
fn related(chance: &mut Chance, model: &Model) -> (Hook, Vec<u8>) {
    let Some(key) = some_key(chance, model) else { return plain(opening(chance)) };
    let family = if key.source.0.is_ipv4() { Family::V4 } else { Family::V6 };
    let quoted = blueprint(chance, key.destination, key.source, key.proto);
    let is_cut = quoted.payload.len() > 8 && chance.percent(15);
    let which = usize::from(chance.percent(20));
    let whole = if is_cut { quoted.fragments(1, 16).swap_remove(which) } else { quoted.bytes() };
    let mut quote = whole[14..].to_vec();
    let header = if family == Family::V4 { 20 } else { 40 } + if is_cut && family == Family::V6 { 8 } else { 0 };
    let length =
        chance.weighted(&[(header + 8, 4), (quote.len(), 4), (header + 7, 1), (header + 17, 1), (header + 18, 1)]);
    quote.truncate(length);
    let reporter = if chance.percent(40) { key.source.0 } else { CLIENT2.address(family) };
    let kind = match family {
        Family::V4 => chance.of(&[[3, 4], [3, 3], [11, 0], [12, 0], [5, 1], [8, 0]]),
        Family::V6 => chance.of(&[[1, 4], [2, 0], [3, 0], [4, 1], [128, 0], [137, 0]]),
    };
    let life = chance.weighted(&[(64, 90), (2, 3), (1, 4)]);
    let addressee = if chance.percent(95) { key.destination.0 } else { NODE.address(family) };
    (hook(chance, key.stage), icmp(reporter, addressee, life, kind, &quote))
}

fn fragment(chance: &mut Chance, model: &Model) -> (Hook, Vec<u8>) {
    let (hook, mut whole) = if chance.percent(50) { known(chance, model) } else { opening(chance) };
    whole.payload = vec![0x5a; 60];
    // Of two sizes, so that one that follows another packet's first one may overlap it.
    let size = chance.of(&[24, 24, 32]);
    let mut pieces = whole.fragments(chance.below(3) as u16, size);
    let which = if chance.percent(40) { 0 } else { chance.below(pieces.len()) };
    (hook, pieces.swap_remove(which))
}

fn extended(chance: &mut Chance, model: &Model) -> (Hook, Vec<u8>) {
    let (hook, blueprint) = if chance.percent(70) { known(chance, model) } else { opening(chance) };
    let usual = Between::usual(if blueprint.source.0.is_ipv4() { Family::V4 } else { Family::V6 });
    let route = match blueprint.source.0 {
        IpAddr::V4(_) => Between::Options(vec![chance.of(&[131, 137]), 3, 4, 0]),
        IpAddr::V6(_) => Between::Extensions(vec![(ROUTING, vec![2, 1, 0, 0, 0, 0])]),
    };
    let between = if chance.percent(10) { &route } else { &usual[chance.below(usual.len())].1 };
    (hook, between.put_into(&blueprint.bytes()))
}

fn other(chance: &mut Chance) -> (Hook, Vec<u8>) {
    let (hook, blueprint) = opening(chance);
    let (source, destination, life) = (blueprint.source.0, blueprint.destination.0, blueprint.life);
    let mut bytes = match chance.below(4) {
        0 => internet(source, destination, chance.of(&[47, 50, 33, 2]), life, &blueprint.payload),
        1 => {
            let kind = if source.is_ipv4() { chance.of(&[8, 0, 13]) } else { chance.of(&[128, 129, 135]) };
            icmp(source, destination, life, [kind, 0], &blueprint.payload)
        }
        2 => {
            let mut bytes = blueprint.bytes();
            let tag = chance.of(&[[0x81, 0, 0, 5], [0x88, 0xa8, 0, 7]]);
            bytes.splice(12..12, tag);
            bytes
        }
        _ => {
            let mut bytes = blueprint.bytes();
            extend(&mut bytes, chance);
            bytes
        }
    };
    if chance.percent(3) {
        bytes[12..14].copy_from_slice(&[0x08, 0x06]);
    }
    (hook, bytes)
}

/// Puts options into an IPv4 header, or an extension header behind an IPv6 header.
fn extend(bytes: &mut Vec<u8>, chance: &mut Chance) {
    if bytes[12] == 0x08 {
        bytes[14] = 0x46;
        lengthen(bytes, 16, 4);
        bytes.splice(34..34, [1, 1, 1, 0]);
        bytes[24..26].fill(0);
        let sum = crate::model::checksum(&[&bytes[14..38]]);
        bytes[24..26].copy_from_slice(&sum.to_be_bytes());
    } else {
        let number = chance.of(&[0, 43, 60, 51, 135]);
        let next = std::mem::replace(&mut bytes[20], number);
        lengthen(bytes, 18, 8);
        bytes.splice(54..54, [next, 0, 1, 4, 0, 0, 0, 0]);
    }
}

/// Adds to the length that stands somewhere.
fn lengthen(bytes: &mut [u8], at: usize, by: u16) {
    let length = u16::from_be_bytes([bytes[at], bytes[at + 1]]) + by;
    bytes[at..at + 2].copy_from_slice(&length.to_be_bytes());
}

/// The world after the agent has written something else.
fn change(chance: &mut Chance, world: &World) -> World {
    let mut world = world.clone();
    let family = family(chance);
    let id = 1 + chance.below(scene::BACKENDS as usize) as u32;
    let backend = (family == Family::V4, id);
    match chance.below(10) {
        0..5 => {
            if let Some(target) = world.backends.get_mut(&backend) {
                target.state = scene::state(chance);
            }
        }
        5 => {
            let generation = world.backends.get(&backend).map_or(1, |target| target.generation + 1);
            scene::set_backend(&mut world, chance, family, id, generation);
        }
        6 => world.node.route_generation += 1,
        7 => {
            let frontend = chance.of(&scene::frontends(family));
            world.services.remove(&frontend);
        }
        _ => {
            let frontend = chance.of(&scene::frontends(family));
            if let Some(old) = world.services.get(&frontend).copied() {
                let sources = world.sources.clone();
                let mut service = scene::service(&mut world, chance, family, frontend, old.index);
                // Ranges of clients are written at the beginning only.
                world.sources = sources;
                service.flags = service.flags & !flag::SOURCE_RANGES | old.flags & flag::SOURCE_RANGES;
                scene::set_service(&mut world, frontend, service);
            }
        }
    }
    world
}
