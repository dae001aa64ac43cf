//! Which backend a new flow gets: every pick, and session affinity, on the real verifier and real maps.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    thread,
};

use anyhow::Result;
use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};
use proxy_common::{
    addr::Protocol,
    backend::BackendState,
    outcome::{Hook, Outcome},
    service::{Affinity, Pick, Range, Service, flag},
};
use tests::{
    frame::{Family, Flags, Frame, Transport},
    testbed::{NODE, NODE_PORT, OTHER_SERVICE, POD, POD2, PORT, REMOTE, SERVICE, TARGET, Testbed, UNRESOLVED, action},
};

const SYN: Transport = Transport::Tcp(Flags::SYN);
const ACK: Transport = Transport::Tcp(Flags::ACK);
const FIN: Transport = Transport::Tcp(Flags::FIN);
const TCP: Protocol = Protocol::Tcp;
const HOUR: u32 = 3_600;

/// Backends in the order of their ids.
const BACKENDS: [tests::frame::Host; 3] = [POD2, REMOTE, UNRESOLVED];

/// A Service of one family whose flows come from a pod.
struct Choice {
    bed: Testbed,
    family: Family,
    all: Range,
}

impl Choice {
    fn new(family: Family) -> Result<Self> {
        let mut bed = Testbed::new()?;
        let mut ids = Vec::new();
        for host in BACKENDS {
            ids.push(bed.add_backend(host.address(family), false)?);
        }
        let all = bed.add_slots(&ids)?;
        Ok(Self { bed, family, all })
    }

    fn serve(&mut self, service: Service) -> Result<()> {
        self.bed.set_service(SERVICE.address(self.family), PORT, TCP, service)
    }

    /// A new connection from a port of the pod to the Service; returns the place in [`BACKENDS`] of who gets it.
    fn connect(&mut self, sport: u16) -> Result<usize> {
        self.connect_to((SERVICE.address(self.family), PORT), sport)
    }

    fn connect_to(&mut self, destination: (IpAddr, u16), sport: u16) -> Result<usize> {
        let request = Frame::new((POD.address(self.family), sport), destination, SYN);
        let sent = self.bed.expect(Hook::PodIn, &request, action::TC_NEXT)?;
        Ok(self.place(sent.destination.0))
    }

    fn place(&self, address: IpAddr) -> usize {
        BACKENDS.iter().position(|host| host.address(self.family) == address).expect("a backend")
    }
}

fn service(pick: Pick, range: Range) -> Service {
    Service { index: 1, pick, internal: range, external: range, ..Service::default() }
}

fn sticky(pick: Pick, range: Range) -> Service {
    Service { flags: flag::AFFINITY, affinity_seconds: HOUR, ..service(pick, range) }
}

#[test]
fn two_nodes_pick_the_same_backend_for_the_same_flow() -> Result<()> {
    for family in Family::BOTH {
        let mut nodes = [Choice::new(family)?, Choice::new(family)?];
        let mut seen = BTreeSet::new();
        for node in &mut nodes {
            node.serve(service(Pick::Hash, node.all))?;
        }
        for sport in 1_000..1_060 {
            let [one, other] = &mut nodes;
            let backend = one.connect(sport)?;
            assert_eq!(backend, other.connect(sport)?, "{family:?} {sport}");
            seen.insert(backend);
        }
        assert_eq!(seen.len(), 3, "{family:?}: the port is part of the hash");
    }
    Ok(())
}

/// Trap 23: Maglev, where affinity is asked for.
#[test]
fn a_pick_by_the_source_looks_at_nothing_but_the_clients_address() -> Result<()> {
    for family in Family::BOTH {
        for (name, flags, pick) in
            [("source hash", 0, Pick::SourceHash), ("Maglev with affinity", flag::AFFINITY, Pick::Hash)]
        {
            let mut choice = Choice::new(family)?;
            choice.serve(Service { flags, ..service(pick, choice.all) })?;
            let first = choice.connect(1_000)?;
            for sport in 1_001..1_020 {
                // Without what affinity remembers, which is forgotten after no second at all.
                assert_eq!(choice.connect(sport)?, first, "{name} {family:?}");
            }
        }
    }
    Ok(())
}

#[test]
fn round_robin_takes_one_after_the_other_on_whichever_cpu() -> Result<()> {
    let cpus = thread::available_parallelism()?.get();
    let mut choice = Choice::new(Family::V4)?;
    choice.serve(service(Pick::RoundRobin, choice.all))?;
    let mut picked = Vec::new();
    for sport in 1_000..1_007 {
        let mut cpu = CpuSet::new();
        cpu.set(usize::from(sport) % cpus)?;
        sched_setaffinity(Pid::from_raw(0), &cpu)?;
        picked.push(choice.connect(sport)?);
    }
    assert_eq!(picked, [0, 1, 2, 0, 1, 2, 0]);
    Ok(())
}

#[test]
fn least_connections_avoids_the_busiest() -> Result<()> {
    let mut choice = Choice::new(Family::V4)?;
    choice.serve(service(Pick::LeastConnections, choice.all))?;
    choice.bed.set_active(1, 1_000)?;
    let mut picked = BTreeMap::<usize, usize>::new();
    for sport in 1_000..1_060 {
        *picked.entry(choice.connect(sport)?).or_default() += 1;
    }
    assert_eq!(picked.get(&0), None, "of two different ones the busiest is never the lesser: {picked:?}");
    // The two others take turns, but for the third of all draws in which only one of them came up.
    assert!(picked.values().all(|count| *count > 10), "{picked:?}");
    Ok(())
}

#[test]
fn a_backend_has_as_many_active_flows_as_were_opened_and_not_closed() -> Result<()> {
    let mut choice = Choice::new(Family::V4)?;
    let one = choice.bed.add_slots(&[1])?;
    choice.serve(service(Pick::Random, one))?;
    for sport in [1_000, 1_001] {
        choice.connect(sport)?;
    }
    choice.connect(1_000)?;
    assert_eq!(choice.bed.active(1)?, 2, "a SYN that is sent again opens nothing");
    let request = |transport| Frame::new((POD.v4.into(), 1_000), (SERVICE.v4.into(), PORT), transport);
    let reply = |transport| Frame::new((POD2.v4.into(), TARGET), (POD.v4.into(), 1_000), transport);
    choice.bed.run(Hook::PodOut, &reply(Transport::Tcp(Flags::SYN_ACK)))?;
    choice.bed.run(Hook::PodIn, &request(ACK))?;
    choice.bed.run(Hook::PodIn, &request(FIN))?;
    assert_eq!(choice.bed.active(1)?, 2, "one side may still speak");
    choice.bed.run(Hook::PodOut, &reply(FIN))?;
    choice.bed.run(Hook::PodOut, &reply(FIN))?;
    assert_eq!(choice.bed.active(1)?, 1);
    choice.connect(1_000)?;
    assert_eq!(choice.bed.active(1)?, 2, "the port is used anew");
    choice.bed.run(Hook::PodIn, &request(Transport::Tcp(Flags::RST)))?;
    assert_eq!(choice.bed.active(1)?, 1);
    Ok(())
}

#[test]
fn a_flow_that_moves_is_active_at_its_new_backend_only() -> Result<()> {
    let mut choice = Choice::new(Family::V4)?;
    let (first, second) = (choice.bed.add_slots(&[1])?, choice.bed.add_slots(&[2])?);
    let to = (SERVICE.v4.into(), PORT);
    choice.bed.set_service(to.0, to.1, Protocol::Udp, service(Pick::Random, first))?;
    let request = Frame::new((POD.v4.into(), 1_000), to, Transport::Udp);
    choice.bed.run(Hook::PodIn, &request)?;
    assert_eq!((choice.bed.active(1)?, choice.bed.active(2)?), (1, 0));
    choice.bed.set_backend(1, POD2.v4.into(), false, BackendState::NotServing, 1)?;
    choice.bed.set_service(to.0, to.1, Protocol::Udp, service(Pick::Random, second))?;
    choice.bed.run(Hook::PodIn, &request)?;
    assert_eq!((choice.bed.active(1)?, choice.bed.active(2)?), (0, 1));
    Ok(())
}

#[test]
fn a_count_that_was_taken_too_low_stops_at_zero() -> Result<()> {
    let mut choice = Choice::new(Family::V4)?;
    let one = choice.bed.add_slots(&[1])?;
    choice.serve(service(Pick::Random, one))?;
    choice.connect(1_000)?;
    choice.bed.set_active(1, 0)?;
    choice
        .bed
        .run(Hook::PodIn, &Frame::new((POD.v4.into(), 1_000), (SERVICE.v4.into(), PORT), Transport::Tcp(Flags::RST)))?;
    assert_eq!(choice.bed.active(1)?, 0);
    Ok(())
}

#[test]
fn a_client_stays_with_its_backend_and_another_client_does_not_care() -> Result<()> {
    for family in Family::BOTH {
        let mut choice = Choice::new(family)?;
        choice.serve(sticky(Pick::Random, choice.all))?;
        let first = choice.connect(1_000)?;
        for sport in 1_001..1_020 {
            assert_eq!(choice.connect(sport)?, first, "{family:?}");
        }
        let others = (0..30_u16).map(|host| {
            let pod = match family {
                Family::V4 => IpAddr::from([10, 244, 9, host as u8]),
                Family::V6 => IpAddr::from([0x2001, 0xdb8, 0x2449, 0, 0, 0, 0, host]),
            };
            let request = Frame::new((pod, 1_000), (SERVICE.address(family), PORT), SYN);
            Ok(choice.bed.expect(Hook::PodIn, &request, action::TC_NEXT)?.destination.0)
        });
        let others = others.collect::<Result<BTreeSet<_>>>()?;
        assert_eq!(others.len(), 3, "{family:?}");
        let known = choice.bed.affinities()?.len() + choice.bed.affinities_v6()?.len();
        assert_eq!(known, 31, "{family:?}");
    }
    Ok(())
}

/// A client that stays with another backend than the one a hash of its address would pick.
fn contrary() -> Result<(Choice, usize, usize)> {
    let mut choice = Choice::new(Family::V4)?;
    choice.serve(sticky(Pick::Hash, choice.all))?;
    let hashed = choice.connect(1_000)?;
    let other = (hashed + 1) % 3;
    let (backend, slot) = (other as u32 + 1, choice.all.first + other as u32);
    choice.bed.change_affinities(|affinity| Affinity { backend, slot, ..affinity })?;
    assert_eq!(choice.connect(1_001)?, other);
    Ok((choice, hashed, other))
}

#[test]
fn a_client_is_forgotten_when_it_has_not_connected_for_the_services_time() -> Result<()> {
    for (name, seconds, is_kept) in [("a second less", HOUR - 1, true), ("a second more", HOUR + 1, false)] {
        let (mut choice, hashed, other) = contrary()?;
        let jiffies = seconds * choice.bed.jiffies_per_second();
        choice.bed.change_affinities(|affinity| Affinity {
            last_used: affinity.last_used.wrapping_sub(jiffies),
            ..affinity
        })?;
        assert_eq!(choice.connect(1_002)?, if is_kept { other } else { hashed }, "{name}");
    }
    Ok(())
}

#[test]
fn affinity_is_refreshed_by_new_connections_and_not_by_packets_of_old_ones() -> Result<()> {
    let (mut choice, ..) = contrary()?;
    let minute = 60 * choice.bed.jiffies_per_second();
    choice
        .bed
        .change_affinities(|affinity| Affinity { last_used: affinity.last_used.wrapping_sub(minute), ..affinity })?;
    let before = choice.bed.affinities()?[0].1.last_used;
    choice.connect(1_000)?;
    let ack = Frame::new((POD.v4.into(), 1_000), (SERVICE.v4.into(), PORT), ACK);
    choice.bed.expect(Hook::PodIn, &ack, action::TC_NEXT)?;
    assert_eq!(choice.bed.affinities()?[0].1.last_used, before);
    choice.connect(1_002)?;
    assert!(choice.bed.affinities()?[0].1.last_used.wrapping_sub(before) >= minute);
    Ok(())
}

/// Trap 23: a Service of several ports.
#[test]
fn affinity_is_shared_by_the_frontends_of_a_service_port_and_by_no_other_port() -> Result<()> {
    let (mut choice, hashed, other) = contrary()?;
    let all = choice.all;
    choice.bed.set_service(std::net::Ipv4Addr::UNSPECIFIED.into(), NODE_PORT, TCP, sticky(Pick::Hash, all))?;
    let second = Service { index: 2, ..sticky(Pick::Hash, all) };
    choice.bed.set_service(SERVICE.v4.into(), PORT + 1, TCP, second)?;
    assert_eq!(choice.connect_to((NODE.v4.into(), NODE_PORT), 1_002)?, other, "the NodePort of the same port");
    assert_eq!(choice.connect_to((SERVICE.v4.into(), PORT + 1), 1_003)?, hashed, "another port of the Service");
    assert_eq!(choice.connect(1_004)?, other);
    Ok(())
}

/// Trap 23: an endpoint that is not ready any more is in no range, and loses its clients although it still serves.
#[test]
fn an_endpoint_outside_the_range_loses_its_clients() -> Result<()> {
    let (mut choice, _, other) = contrary()?;
    let rest: Vec<u32> = (0..3).filter(|place| *place != other).map(|place| place as u32 + 1).collect();
    let range = choice.bed.add_slots(&rest)?;
    choice.serve(sticky(Pick::Hash, range))?;
    let moved = choice.connect(1_002)?;
    assert_ne!(moved, other);
    choice.serve(sticky(Pick::Hash, choice.all))?;
    assert_eq!(choice.connect(1_003)?, moved, "it has another backend now, and stays there");
    Ok(())
}

#[test]
fn affinity_holds_for_the_range_of_the_traffic_it_is_asked_for() -> Result<()> {
    let (mut choice, _, other) = contrary()?;
    let allowed = (other + 1) % 3;
    let external = choice.bed.add_slots(&[allowed as u32 + 1])?;
    choice.serve(Service { external, ..sticky(Pick::Hash, choice.all) })?;
    // The same client, by another way.
    let request = Frame::new((POD.v4.into(), 1_002), (SERVICE.v4.into(), PORT), SYN);
    choice.bed.run(Hook::UplinkIn, &request)?;
    assert_eq!(choice.bed.affinities()?[0].1.backend, allowed as u32 + 1);
    Ok(())
}

#[test]
fn a_backend_is_found_again_where_another_range_holds_it() -> Result<()> {
    let (mut choice, _, other) = contrary()?;
    let turned = choice.bed.add_slots(&[3, 1, 2, 3, 2, 1])?;
    choice.serve(sticky(Pick::Hash, turned))?;
    assert_eq!(choice.connect(1_002)?, other);
    let slot = choice.bed.affinities()?[0].1.slot;
    assert!((turned.first..turned.first + turned.count).contains(&slot), "the new slot is remembered");
    Ok(())
}

/// Trap 5: an id that was given to another endpoint holds no client of the one before.
#[test]
fn an_id_given_to_another_endpoint_holds_no_clients() -> Result<()> {
    let (mut choice, hashed, other) = contrary()?;
    choice.bed.set_backend(other as u32 + 1, OTHER_SERVICE.v4.into(), false, BackendState::Serving, 2)?;
    assert_eq!(choice.connect(1_002)?, hashed);
    assert_eq!(choice.bed.counter(Hook::PodIn, Outcome::Opened)?, 3);
    Ok(())
}
