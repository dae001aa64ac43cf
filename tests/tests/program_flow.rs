//! The flow table through the programs: tiers, pairs, lifetimes, dead backends, clashes, and every drop.

use std::net::{IpAddr, Ipv4Addr};

use anyhow::Result;
use proxy_common::{
    addr::{Ipv4, Port, Protocol},
    backend::BackendState,
    flow::{Direction, Flow, state},
    outcome::{Hook, Outcome},
    service::{Range, Service, WhenEmpty},
    tuple::Tuple,
};
use tests::{
    frame::{Flags, Frame, Host, Transport},
    testbed::{CLIENT, NODE, OTHER_SERVICE, POD, POD2, PORT, REMOTE, SERVICE, TARGET, Testbed, action},
};

const SYN: Transport = Transport::Tcp(Flags::SYN);
const SYN_ACK: Transport = Transport::Tcp(Flags::SYN_ACK);
const ACK: Transport = Transport::Tcp(Flags::ACK);
const FIN: Transport = Transport::Tcp(Flags::FIN);
const RST: Transport = Transport::Tcp(Flags::RST);

/// Another client beyond the router.
const OTHER_CLIENT: Host = Host { v4: Ipv4Addr::new(198, 51, 100, 8), ..CLIENT };

/// A pod, a Service with backends, and what the two say to each other.
struct Talk {
    bed: Testbed,
    backends: Vec<u32>,
}

impl Talk {
    fn new(proto: Protocol) -> Result<Self> {
        let mut bed = Testbed::new()?;
        let backends = vec![bed.add_backend(POD2.v4.into(), true)?, bed.add_backend(REMOTE.v4.into(), false)?];
        bed.add_service(SERVICE.v4.into(), PORT, proto, &backends)?;
        Ok(Self { bed, backends })
    }

    /// The pod speaks; returns who gets it.
    fn ask(&mut self, transport: Transport) -> Result<IpAddr> {
        let request = Frame::new((POD.v4.into(), 4_000), (SERVICE.v4.into(), PORT), transport);
        Ok(self.bed.expect(Hook::PodIn, &request, action::TC_NEXT)?.destination.0)
    }

    /// A backend answers; whether the pod sees the Service's address.
    fn answer(&mut self, from: IpAddr, transport: Transport) -> Result<bool> {
        let reply = Frame::new((from, TARGET), (POD.v4.into(), 4_000), transport);
        Ok(self.bed.expect(Hook::PodOut, &reply, action::TC_NEXT)?.source == (SERVICE.v4.into(), PORT))
    }

    fn establish(&mut self) -> Result<IpAddr> {
        let backend = self.ask(SYN)?;
        assert!(self.answer(backend, SYN_ACK)?);
        assert_eq!(self.ask(ACK)?, backend);
        Ok(backend)
    }

    fn sizes(&mut self) -> Result<(usize, usize)> {
        Ok((self.bed.flows("FLOWS_V4")?.len(), self.bed.flows("EMBRYOS_V4")?.len()))
    }

    /// Lets seconds pass for every flow.
    fn age(&mut self, seconds: u32) -> Result<()> {
        self.bed.age_flows(seconds)
    }

    fn set_state(&mut self, address: IpAddr, state: BackendState) -> Result<()> {
        let (id, local) = if address == POD2.v4 { (self.backends[0], true) } else { (self.backends[1], false) };
        self.bed.set_backend(id, address, local, state, 1)
    }
}

#[test]
fn a_tcp_flow_is_confirmed_by_the_third_packet_of_the_handshake() -> Result<()> {
    let mut talk = Talk::new(Protocol::Tcp)?;
    let backend = talk.ask(SYN)?;
    assert_eq!(talk.sizes()?, (0, 2));
    assert!(talk.answer(backend, SYN_ACK)?);
    assert_eq!(talk.sizes()?, (0, 2));
    assert_eq!(talk.ask(ACK)?, backend);
    assert_eq!(talk.sizes()?, (2, 0));
    assert!(talk.answer(backend, ACK)?);
    assert_eq!(talk.bed.counter(Hook::PodIn, Outcome::Confirmed)?, 1);
    Ok(())
}

#[test]
fn an_ack_that_answers_nothing_confirms_nothing() -> Result<()> {
    let mut talk = Talk::new(Protocol::Tcp)?;
    let backend = talk.ask(SYN)?;
    assert_eq!(talk.ask(ACK)?, backend);
    assert_eq!(talk.sizes()?, (0, 2));
    Ok(())
}

#[test]
fn a_udp_flow_is_confirmed_by_the_reply() -> Result<()> {
    let mut talk = Talk::new(Protocol::Udp)?;
    let backend = talk.ask(Transport::Udp)?;
    assert_eq!(talk.ask(Transport::Udp)?, backend);
    assert_eq!(talk.sizes()?, (0, 2));
    assert!(talk.answer(backend, Transport::Udp)?);
    assert_eq!(talk.sizes()?, (2, 0));
    assert_eq!(talk.ask(Transport::Udp)?, backend);
    Ok(())
}

/// Trap 11: half of a pair is evicted.
#[test]
fn the_half_of_a_pair_that_was_evicted_is_rebuilt_from_the_other_within_a_second() -> Result<()> {
    for lost in [Direction::Original, Direction::Reply] {
        let mut talk = Talk::new(Protocol::Tcp)?;
        let backend = talk.establish()?;
        let whole = talk.bed.flows("FLOWS_V4")?;
        talk.bed.change_flows("FLOWS_V4", |_, flow| (flow.direction != lost).then_some(flow))?;
        assert_eq!(talk.sizes()?, (1, 0));
        talk.age(1)?;
        if lost == Direction::Original {
            assert!(talk.answer(backend, ACK)?);
        } else {
            assert_eq!(talk.ask(ACK)?, backend);
        }
        let mut rebuilt = talk.bed.flows("FLOWS_V4")?;
        assert_eq!(rebuilt.len(), 2, "{lost:?}");
        for (key, flow) in &mut rebuilt {
            let (_, before) = whole.iter().find(|(other, _)| other == key).expect("the same key");
            (flow.last_seen, flow.packets, flow.bytes) = (before.last_seen, before.packets, before.bytes);
            flow.eager = before.eager;
            assert_eq!(flow, before, "{lost:?}");
        }
        let hook = if lost == Direction::Original { Hook::PodOut } else { Hook::PodIn };
        assert_eq!(talk.bed.counter(hook, Outcome::Repaired)?, 1);
    }
    Ok(())
}

/// Trap 11: and it is the one that chose the backend.
#[test]
fn an_original_half_that_was_evicted_finds_its_reply_half_again() -> Result<()> {
    let mut talk = Talk::new(Protocol::Tcp)?;
    let one = talk.bed.add_slots(&[1])?;
    let service = Service { index: 1, internal: one, external: one, ..Service::default() };
    talk.bed.set_service(SERVICE.v4.into(), PORT, Protocol::Tcp, service)?;
    let backend = talk.establish()?;
    talk.bed.change_flows("FLOWS_V4", |_, flow| (flow.direction == Direction::Reply).then_some(flow))?;
    assert_eq!(talk.ask(ACK)?, backend);
    assert!(talk.answer(backend, ACK)?);
    assert_eq!(talk.sizes()?, (2, 0));
    assert_eq!(talk.bed.counter(Hook::PodIn, Outcome::PortChanged)?, 0);
    Ok(())
}

#[test]
fn last_seen_is_written_once_a_second_and_in_both_halves() -> Result<()> {
    let mut talk = Talk::new(Protocol::Tcp)?;
    talk.establish()?;
    talk.age(5)?;
    let before = talk.bed.flows("FLOWS_V4")?;
    talk.ask(ACK)?;
    for (key, flow) in talk.bed.flows("FLOWS_V4")? {
        let (_, old) = before.iter().find(|(other, _)| *other == key).expect("the same key");
        assert!(flow.last_seen.wrapping_sub(old.last_seen) >= 4 * talk.bed.jiffies_per_second());
    }
    Ok(())
}

/// Trap 4: a client port that is used again before the old connection is forgotten.
#[test]
fn a_syn_on_a_connection_that_is_over_starts_afresh() -> Result<()> {
    for (name, ends) in [("two FINs", [Some(FIN), Some(FIN)]), ("a RST", [Some(RST), None])] {
        let mut talk = Talk::new(Protocol::Tcp)?;
        let backend = talk.establish()?;
        assert_eq!(talk.ask(SYN)?, backend, "a SYN on a live connection keeps its backend");
        if let Some(end) = ends[0] {
            assert_eq!(talk.ask(end)?, backend);
        }
        if let Some(end) = ends[1] {
            assert!(talk.answer(backend, end)?);
        }
        assert_eq!(talk.ask(ACK)?, backend, "{name}: what is still on the wire goes the old way");
        assert_eq!(talk.bed.counter(Hook::PodIn, Outcome::Opened)?, 1);
        talk.ask(SYN)?;
        assert_eq!(talk.bed.counter(Hook::PodIn, Outcome::Opened)?, 2, "{name}");
        assert_eq!(talk.sizes()?, (0, 2), "{name}: nothing of the old pair is left");
    }
    Ok(())
}

#[test]
fn a_fin_in_one_direction_does_not_end_the_connection() -> Result<()> {
    let mut talk = Talk::new(Protocol::Tcp)?;
    let backend = talk.establish()?;
    talk.ask(FIN)?;
    assert!(talk.bed.flows("FLOWS_V4")?.iter().all(|(_, flow)| flow.state & state::FIN_ORIGINAL != 0));
    assert_eq!(talk.ask(SYN)?, backend);
    assert_eq!(talk.bed.counter(Hook::PodIn, Outcome::Opened)?, 1);
    Ok(())
}

/// Trap 1: no window is checked, so whatever a backend sends on a live connection leaves under the frontend's name: flags that
/// make no sense, and a RST from nowhere too.
#[test]
fn every_packet_of_a_reply_is_translated_whatever_its_flags() -> Result<()> {
    // FIN is 1, SYN 2, RST 4, ACK 16.
    for flags in [0, 1, 2, 3, 4, 16 | 4] {
        let mut talk = Talk::new(Protocol::Tcp)?;
        let backend = talk.establish()?;
        assert!(talk.answer(backend, Transport::Tcp(Flags(flags)))?, "flags {flags:#04x}");
    }
    Ok(())
}

#[test]
fn a_flow_silent_for_longer_than_it_lives_is_a_new_one() -> Result<()> {
    let cases: [(&str, Protocol, bool, u32, bool); 6] = [
        ("UDP without a reply, 25 s", Protocol::Udp, false, 25, true),
        ("UDP without a reply, 35 s", Protocol::Udp, false, 35, false),
        ("UDP with a reply, 100 s", Protocol::Udp, true, 100, true),
        ("UDP with a reply, 125 s", Protocol::Udp, true, 125, false),
        ("TCP established, 23 h", Protocol::Tcp, true, 23 * 3600, true),
        ("TCP established, 25 h", Protocol::Tcp, true, 25 * 3600, false),
    ];
    for (name, proto, replied, seconds, is_kept) in cases {
        let mut talk = Talk::new(proto)?;
        let transport = if proto == Protocol::Udp { Transport::Udp } else { ACK };
        if proto == Protocol::Tcp {
            talk.establish()?;
        } else {
            let backend = talk.ask(transport)?;
            if replied {
                talk.answer(backend, transport)?;
            }
        }
        talk.age(seconds)?;
        talk.ask(transport)?;
        let opened = talk.bed.counter(Hook::PodIn, Outcome::Opened)?;
        assert_eq!(opened, if is_kept { 1 } else { 2 }, "{name}");
    }
    Ok(())
}

/// Trap 2: a flow that never ends would send into the void for ever.
#[test]
fn udp_leaves_a_backend_that_no_longer_serves_and_tcp_does_not() -> Result<()> {
    for state in [BackendState::NotServing, BackendState::Gone] {
        let mut talk = Talk::new(Protocol::Udp)?;
        let old = talk.ask(Transport::Udp)?;
        talk.answer(old, Transport::Udp)?;
        talk.set_state(old, state)?;
        let other = if old == POD2.v4 { talk.backends[1] } else { talk.backends[0] };
        let range = talk.bed.add_slots(&[other])?;
        let service = Service { index: 1, internal: range, external: range, ..Service::default() };
        talk.bed.set_service(SERVICE.v4.into(), PORT, Protocol::Udp, service)?;
        let new = talk.ask(Transport::Udp)?;
        assert_ne!(new, old);
        assert!(talk.answer(new, Transport::Udp)?);
        assert_eq!(talk.bed.counter(Hook::PodIn, Outcome::Moved)?, 1);

        let mut talk = Talk::new(Protocol::Tcp)?;
        let old = talk.establish()?;
        talk.set_state(old, state)?;
        assert_eq!(talk.ask(ACK)?, old);
        assert!(talk.answer(old, ACK)?);
    }
    Ok(())
}

#[test]
fn a_syn_leaves_a_backend_that_no_longer_serves() -> Result<()> {
    let mut talk = Talk::new(Protocol::Tcp)?;
    let old = talk.establish()?;
    talk.set_state(old, BackendState::NotServing)?;
    talk.ask(SYN)?;
    assert_eq!(talk.bed.counter(Hook::PodIn, Outcome::Opened)?, 2);
    Ok(())
}

/// Trap 5: a backend id that belongs to another Service now.
#[test]
fn an_id_given_to_another_backend_does_not_serve_an_old_flow() -> Result<()> {
    let mut talk = Talk::new(Protocol::Udp)?;
    let old = talk.ask(Transport::Udp)?;
    let (id, local) = if old == POD2.v4 { (talk.backends[0], true) } else { (talk.backends[1], false) };
    talk.bed.set_backend(id, OTHER_SERVICE.v4.into(), local, BackendState::Serving, 2)?;
    talk.ask(Transport::Udp)?;
    assert_eq!(talk.bed.counter(Hook::PodIn, Outcome::Moved)?, 1);
    Ok(())
}

#[test]
fn a_known_flow_outlives_its_service() -> Result<()> {
    let mut talk = Talk::new(Protocol::Tcp)?;
    let backend = talk.establish()?;
    talk.bed.remove_service(SERVICE.v4.into(), PORT, Protocol::Tcp)?;
    assert_eq!(talk.ask(ACK)?, backend);
    assert!(talk.answer(backend, ACK)?);
    Ok(())
}

#[test]
fn a_connection_that_is_over_does_not_translate_the_answer_to_another_handshake() -> Result<()> {
    for (name, ends) in [("two FINs", [Some(FIN), Some(FIN)]), ("a RST", [Some(RST), None])] {
        let mut talk = Talk::new(Protocol::Tcp)?;
        let backend = talk.establish()?;
        if let Some(end) = ends[0] {
            talk.ask(end)?;
        }
        if let Some(end) = ends[1] {
            talk.answer(backend, end)?;
        }
        assert!(talk.answer(backend, ACK)?, "{name}: what is still on the wire");
        // The pod has used its port again, for a connection to the backend itself.
        assert!(!talk.answer(backend, SYN_ACK)?, "{name}");
        assert!(!talk.answer(backend, ACK)?, "{name}");
    }
    Ok(())
}

#[test]
fn what_a_backend_sends_when_the_flow_is_over_is_not_translated() -> Result<()> {
    for (seconds, is_kept) in [(100, true), (125, false)] {
        let mut talk = Talk::new(Protocol::Udp)?;
        let backend = talk.ask(Transport::Udp)?;
        talk.answer(backend, Transport::Udp)?;
        talk.age(seconds)?;
        assert_eq!(talk.answer(backend, Transport::Udp)?, is_kept, "{seconds} s");
    }
    let mut talk = Talk::new(Protocol::Tcp)?;
    let backend = talk.establish()?;
    talk.age(25 * 3600)?;
    assert!(talk.answer(backend, ACK)?, "nobody has closed this connection");
    Ok(())
}

#[test]
fn a_flow_that_another_cpu_has_just_seen_is_not_an_old_one() -> Result<()> {
    let mut talk = Talk::new(Protocol::Tcp)?;
    talk.establish()?;
    // The clock of this packet was read before the other CPU read its own and wrote it.
    let soon = talk.bed.jiffies()?.wrapping_add(60 * talk.bed.jiffies_per_second());
    talk.bed.change_flows("FLOWS_V4", |_, flow| Some(Flow { last_seen: soon, ..flow }))?;
    talk.ask(ACK)?;
    assert_eq!(talk.bed.counter(Hook::PodIn, Outcome::Opened)?, 1);
    Ok(())
}

#[test]
fn a_new_connection_does_not_inherit_the_end_of_the_one_before() -> Result<()> {
    let mut talk = Talk::new(Protocol::Tcp)?;
    let one = talk.bed.add_slots(&[1])?;
    let service = Service { index: 1, internal: one, external: one, ..Service::default() };
    talk.bed.set_service(SERVICE.v4.into(), PORT, Protocol::Tcp, service)?;
    let backend = talk.establish()?;
    talk.ask(FIN)?;
    talk.answer(backend, FIN)?;
    talk.bed.change_flows("FLOWS_V4", |_, flow| (flow.direction == Direction::Reply).then_some(flow))?;
    talk.establish()?;
    assert_eq!(talk.sizes()?, (2, 0));
    assert!(
        talk.bed.flows("FLOWS_V4")?.iter().all(|(_, flow)| flow.state & (state::FIN_ORIGINAL | state::FIN_REPLY) == 0)
    );
    assert_eq!(talk.bed.counter(Hook::PodIn, Outcome::PortChanged)?, 0);
    Ok(())
}

#[test]
fn a_flow_whose_port_went_to_another_gets_one_of_its_own() -> Result<()> {
    let mut bed = Testbed::new()?;
    let backend = bed.add_backend(REMOTE.v4.into(), false)?;
    bed.add_service(SERVICE.v4.into(), PORT, Protocol::Tcp, &[backend])?;
    let client = |host: Host, transport| Frame::new((host.v4.into(), 12_345), (SERVICE.v4.into(), PORT), transport);
    bed.expect(Hook::UplinkXdp, &client(CLIENT, SYN), action::XDP_TX)?;
    bed.change_flows("EMBRYOS_V4", |_, flow| (flow.direction == Direction::Original).then_some(flow))?;
    let other = bed.expect(Hook::UplinkXdp, &client(OTHER_CLIENT, SYN), action::XDP_TX)?;
    assert_eq!(other.source.1, 12_345, "the port was free");

    let second = bed.jiffies_per_second();
    bed.change_flows("EMBRYOS_V4", |_, flow| Some(Flow { last_seen: flow.last_seen.wrapping_sub(second), ..flow }))?;
    let moved = bed.expect(Hook::UplinkXdp, &client(CLIENT, RST), action::XDP_TX)?;
    assert_ne!(moved.source.1, 12_345);
    let answer = Frame::new(other.destination, other.source, SYN_ACK);
    assert_eq!(bed.expect(Hook::UplinkXdp, &answer, action::XDP_TX)?.destination.0, OTHER_CLIENT.v4);
    let is_reset = |key: &Tuple<Ipv4>, flow: &Flow<Ipv4>| {
        [key.saddr, flow.rewrite.daddr].contains(&OTHER_CLIENT.v4.into()) && flow.state & state::RESET != 0
    };
    assert!(!bed.flows("EMBRYOS_V4")?.iter().any(|(key, flow)| is_reset(key, flow)));
    Ok(())
}

/// A packet that must be dropped for one reason, which must be counted once.
fn must_drop(bed: &mut Testbed, hook: Hook, frame: &Frame, outcome: Outcome) -> Result<()> {
    let dropped = if hook == Hook::UplinkXdp { action::XDP_DROP } else { action::TC_DROP };
    let before = bed.counter(hook, outcome)?;
    assert_eq!(bed.run(hook, frame)?.action, dropped, "{outcome:?}");
    assert_eq!(bed.counter(hook, outcome)?, before + 1, "{outcome:?}");
    Ok(())
}

#[test]
fn a_service_with_nothing_here_drops() -> Result<()> {
    let mut bed = Testbed::new()?;
    let service = Service { internal_empty: WhenEmpty::Drop, external_empty: WhenEmpty::Drop, ..Service::default() };
    bed.set_service(SERVICE.v4.into(), PORT, Protocol::Tcp, service)?;
    let request = Frame::new((POD.v4.into(), 4_000), (SERVICE.v4.into(), PORT), SYN);
    for hook in [Hook::PodIn, Hook::UplinkIn, Hook::UplinkXdp] {
        must_drop(&mut bed, hook, &request, Outcome::DropNoLocalEndpoint)?;
    }
    Ok(())
}

#[test]
fn a_slot_that_leads_nowhere_is_a_counted_drop() -> Result<()> {
    let mut bed = Testbed::new()?;
    bed.add_service(SERVICE.v4.into(), PORT, Protocol::Tcp, &[77])?;
    let request = Frame::new((POD.v4.into(), 4_000), (SERVICE.v4.into(), PORT), SYN);
    must_drop(&mut bed, Hook::PodIn, &request, Outcome::DropNoBackend)?;
    let range = Range { first: u32::MAX, count: 1 };
    let service = Service { internal: range, external: range, ..Service::default() };
    bed.set_service(SERVICE.v4.into(), PORT, Protocol::Tcp, service)?;
    must_drop(&mut bed, Hook::PodIn, &request, Outcome::DropNoBackend)
}

/// Trap 9: when every source port towards a backend is taken, the new flow is dropped and counted.
#[test]
fn a_flow_for_which_no_source_port_is_left_is_a_counted_drop_and_disturbs_nobody() -> Result<()> {
    let mut bed = Testbed::new()?;
    bed.set_node(|node| node.source_port_last = node.source_port_first)?;
    let backend = bed.add_backend(REMOTE.v4.into(), false)?;
    bed.add_service(SERVICE.v4.into(), PORT, Protocol::Udp, &[backend])?;
    let client = |port| Frame::new((POD.v4.into(), port), (SERVICE.v4.into(), PORT), Transport::Udp);
    let first = bed.expect(Hook::UplinkXdp, &client(1), action::XDP_TX)?;
    must_drop(&mut bed, Hook::UplinkXdp, &client(2), Outcome::DropNoPort)?;
    let again = bed.expect(Hook::UplinkXdp, &client(1), action::XDP_TX)?;
    assert_eq!(again.source, first.source);
    Ok(())
}

#[test]
fn a_node_without_an_address_to_masquerade_with_drops_what_needs_one() -> Result<()> {
    let mut bed = Testbed::new()?;
    bed.set_node(|node| node.masquerade_v4 = Ipv4::default())?;
    let backend = bed.add_backend(REMOTE.v4.into(), false)?;
    bed.add_service(SERVICE.v4.into(), PORT, Protocol::Udp, &[backend])?;
    let request = Frame::new((POD.v4.into(), 1), (SERVICE.v4.into(), PORT), Transport::Udp);
    must_drop(&mut bed, Hook::UplinkXdp, &request, Outcome::DropNoMasquerade)
}

#[test]
fn a_change_of_routes_makes_a_flow_look_up_its_next_hop_anew() -> Result<()> {
    let mut bed = Testbed::new()?;
    let backend = bed.add_backend(REMOTE.v4.into(), false)?;
    bed.add_service(SERVICE.v4.into(), PORT, Protocol::Udp, &[backend])?;
    let request = Frame::new((POD.v4.into(), 1), (SERVICE.v4.into(), PORT), Transport::Udp);
    let before = bed.expect(Hook::UplinkXdp, &request, action::XDP_TX)?;
    bed.ip("neigh replace 192.0.2.2 lladdr 02:00:00:00:00:22 dev uplink")?;
    assert_eq!(bed.expect(Hook::UplinkXdp, &request, action::XDP_TX)?.macs.0, before.macs.0);
    bed.set_node(|node| node.route_generation += 1)?;
    assert_eq!(bed.expect(Hook::UplinkXdp, &request, action::XDP_TX)?.macs.0, [2, 0, 0, 0, 0, 0x22]);
    Ok(())
}

/// Trap 10: source ports are of a range that is neither that of NodePorts nor that of the node's own sockets.
#[test]
fn a_masquerading_flow_stands_apart_from_the_nodes_own_ports() -> Result<()> {
    let mut bed = Testbed::new()?;
    let backend = bed.add_backend(REMOTE.v4.into(), false)?;
    bed.add_service(SERVICE.v4.into(), PORT, Protocol::Tcp, &[backend])?;
    for port in 40_000..40_050 {
        let request = Frame::new((POD.v4.into(), port), (SERVICE.v4.into(), PORT), SYN);
        let sent = bed.expect(Hook::UplinkXdp, &request, action::XDP_TX)?;
        assert_eq!(sent.source.0, NODE.v4);
        assert!(Port::new(sent.source.1) != Port::new(port) && (10_000..30_000).contains(&sent.source.1));
    }
    Ok(())
}
