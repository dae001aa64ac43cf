//! Direct server return: what one node sends on as it came, and what the other makes of it.
#![allow(clippy::expect_used, reason = "packets that a helper builds are part of the test")]

use std::net::IpAddr;

use anyhow::{Result, ensure};
use etherparse::{Icmpv4Type, Icmpv6Type, PacketBuilder, icmpv4};
use proxy_common::{
    addr::Protocol,
    backend::BackendState,
    flow::{Direction, Output, state},
    outcome::{Hook, Outcome},
    tuple::Stage,
};
use tests::{
    fragments::cut,
    frame::{Chunk, ETHERNET, Family, Flags, Frame, Host, MACS, Transport},
    testbed::{
        CLIENT, Kind, NODE, NODE_PORT, OTHER_NODE_MAC, POD, PORT, REMOTE, ROUTER_MAC, SERVICE, TARGET, Testbed,
        UNRESOLVED, UPLINK_MAC, action, told,
    },
};

const TRANSPORTS: [(Transport, Protocol); 4] = [
    (Transport::Tcp(Flags::SYN), Protocol::Tcp),
    (Transport::Udp, Protocol::Udp),
    (Transport::UdpUnchecked, Protocol::Udp),
    (Transport::Sctp(Chunk::INIT), Protocol::Sctp),
];
const SYN: Transport = Transport::Tcp(Flags::SYN);
const ACK: Transport = Transport::Tcp(Flags::ACK);

/// Ways in, with what they say of a packet that leaves at once, and of one that goes up the stack.
const WAYS_IN: [(Hook, i32, i32); 2] =
    [(Hook::UplinkXdp, action::XDP_TX, action::XDP_PASS), (Hook::UplinkIn, action::TC_REDIRECT, action::TC_NEXT)];

/// The node with [`OTHER_NODE_MAC`].
const OTHER_NODE: Host =
    Host { v4: std::net::Ipv4Addr::new(192, 0, 2, 2), v6: std::net::Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 2) };

fn any(family: Family) -> IpAddr {
    if family == Family::V4 { [0; 4].into() } else { [0; 16].into() }
}

/// A NodePort and an external address: what the table says, and what a client does.
fn frontends(family: Family, node: Host) -> [((IpAddr, u16), (IpAddr, u16)); 2] {
    let address = (SERVICE.address(family), PORT);
    [((any(family), NODE_PORT), (node.address(family), NODE_PORT)), (address, address)]
}

fn client(family: Family) -> (IpAddr, u16) {
    (CLIENT.address(family), 50_000)
}

/// The frame as it leaves for a node: with another header of the link, one hop older, and every checksum made anew.
fn sent_on(frame: &Frame, to: [u8; 6]) -> Vec<u8> {
    Frame { macs: (to, UPLINK_MAC), hop_limit: frame.hop_limit - 1, ..frame.clone() }.bytes()
}

/// A node that dispatches a NodePort to the other one. Returns the backend's id.
fn dispatching(family: Family, proto: Protocol) -> Result<(Testbed, u32)> {
    let mut bed = Testbed::new()?;
    let backend = bed.add_backend_of(REMOTE.address(family), OTHER_NODE.address(family))?;
    bed.add_dispatched((any(family), NODE_PORT), proto, &[backend], &[])?;
    Ok((bed, backend))
}

fn to_node_port(family: Family, transport: Transport) -> Frame {
    Frame::new(client(family), (NODE.address(family), NODE_PORT), transport)
}

/// Every protocol and kind of frontend, each with a client port of its own.
fn requests(family: Family, node: Host) -> Vec<(Frame, (IpAddr, u16), Protocol)> {
    let mut requests = Vec::new();
    for (index, (transport, proto)) in (0..).zip(TRANSPORTS) {
        for (place, (frontend, destination)) in (0..).zip(frontends(family, node)) {
            let client = (CLIENT.address(family), 50_000 + 10 * index + place);
            requests.push((Frame::new(client, destination, transport), frontend, proto));
        }
    }
    requests
}

#[test]
fn what_is_for_a_backend_of_a_neighbour_goes_there_as_it_came() -> Result<()> {
    for family in Family::BOTH {
        for (hook, sent_out, _) in WAYS_IN {
            let mut bed = Testbed::new()?;
            bed.watch()?;
            let backend = bed.add_backend_of(REMOTE.address(family), OTHER_NODE.address(family))?;
            let requests = requests(family, NODE);
            for (request, frontend, proto) in &requests {
                bed.add_dispatched(*frontend, *proto, &[backend], &[])?;
                for _ in 0..3 {
                    let ran = bed.run(hook, request)?;
                    ensure!(ran.action == sent_out, "{hook:?} answered {} to {request:?}", ran.action);
                    assert_eq!(ran.bytes, sent_on(request, OTHER_NODE_MAC), "{hook:?} {request:?}");
                }
            }
            let count = requests.len() as u64;
            assert_eq!(bed.counter(hook, Outcome::Opened)?, count);
            assert_eq!(bed.counter(hook, Outcome::Dispatched)?, count);
            assert_eq!(told(&bed.events()?), bed.counters()?);
            let kind = |state| Kind {
                stage: Stage::UplinkIn,
                output: Output::Dispatch,
                direction: Direction::Original,
                state: state::ONE_WAY | state,
                backend,
                addresses: (NODE.address(family), OTHER_NODE.address(family)),
            };
            // One entry for each, and no half of a pair: datagrams are confirmed, and a handshake repeated is not.
            assert_eq!(bed.kinds(family, "EMBRYOS")?, [kind(0); 4]);
            assert_eq!(bed.kinds(family, "FLOWS")?, [kind(state::CONFIRMED); 4]);
        }
    }
    Ok(())
}

#[test]
fn a_connection_is_confirmed_by_the_third_part_of_its_handshake_and_begins_anew_after_its_end() -> Result<()> {
    let family = Family::V4;
    for (hook, sent_out, _) in WAYS_IN {
        let (mut bed, _) = dispatching(family, Protocol::Tcp)?;
        let mut step = |flags: Flags, tiers: (usize, usize), opened: u64| {
            let request = to_node_port(family, Transport::Tcp(flags));
            let ran = bed.run(hook, &request)?;
            assert_eq!((ran.action, ran.bytes), (sent_out, sent_on(&request, OTHER_NODE_MAC)), "{flags:?}");
            let found = (bed.kinds(family, "EMBRYOS")?.len(), bed.kinds(family, "FLOWS")?.len());
            assert_eq!((found, bed.counter(hook, Outcome::Dispatched)?), (tiers, opened), "{hook:?} {flags:?}");
            Ok::<_, anyhow::Error>(())
        };
        step(Flags::SYN, (1, 0), 1)?;
        step(Flags::SYN, (1, 0), 1)?;
        step(Flags::ACK, (0, 1), 1)?;
        step(Flags::FIN, (0, 1), 1)?;
        // A long download goes on after the client has said all it had to say.
        step(Flags::ACK, (0, 1), 1)?;
        step(Flags::SYN, (1, 0), 2)?;
        step(Flags::ACK, (0, 1), 2)?;
        step(Flags::RST, (0, 1), 2)?;
        step(Flags::SYN, (1, 0), 3)?;
    }
    Ok(())
}

#[test]
fn a_half_closed_download_goes_on_after_an_hour_of_silence() -> Result<()> {
    let (mut bed, _) = dispatching(Family::V4, Protocol::Tcp)?;
    for flags in [Flags::SYN, Flags::ACK, Flags::FIN] {
        bed.expect(Hook::UplinkXdp, &to_node_port(Family::V4, Transport::Tcp(flags)), action::XDP_TX)?;
    }
    bed.age_flows(3_600)?;
    let sent = bed.expect(Hook::UplinkXdp, &to_node_port(Family::V4, ACK), action::XDP_TX)?;
    assert_eq!(sent.macs.0, OTHER_NODE_MAC);
    assert_eq!(bed.counter(Hook::UplinkXdp, Outcome::Opened)?, 1);
    Ok(())
}

#[test]
fn the_others_node_decides_about_a_connection_whose_backend_has_gone_and_datagrams_choose_again() -> Result<()> {
    let family = Family::V4;
    for (transport, proto) in [(SYN, Protocol::Tcp), (Transport::Udp, Protocol::Udp)] {
        let (mut bed, backend) = dispatching(family, proto)?;
        bed.expect(Hook::UplinkXdp, &to_node_port(family, transport), action::XDP_TX)?;
        let next = if proto == Protocol::Tcp { ACK } else { transport };
        bed.expect(Hook::UplinkXdp, &to_node_port(family, next), action::XDP_TX)?;

        let elsewhere = bed.add_backend(POD.address(family), true)?;
        bed.set_backend(backend, REMOTE.address(family), false, BackendState::Gone, 1)?;
        bed.add_dispatched((any(family), NODE_PORT), proto, &[elsewhere], &[elsewhere])?;
        bed.age_flows(2)?;
        let request = to_node_port(family, next);
        let ran = bed.run(Hook::UplinkXdp, &request)?;
        if proto == Protocol::Tcp {
            assert_eq!((ran.action, ran.bytes), (action::XDP_TX, sent_on(&request, OTHER_NODE_MAC)));
            assert_eq!(bed.counter(Hook::UplinkXdp, Outcome::ResetGone)?, 0);
        } else {
            assert_eq!(ran.action, action::XDP_PASS);
            assert_eq!(Frame::read(&ran.bytes).destination, (POD.address(family), TARGET));
            assert_eq!(bed.counter(Hook::UplinkXdp, Outcome::Moved)?, 1);
        }
    }
    Ok(())
}

#[test]
fn what_cannot_be_dispatched_is_masqueraded_as_ever() -> Result<()> {
    for (hook, sent_out, _) in WAYS_IN {
        for family in Family::BOTH {
            let unknown = any(family);
            let beyond_the_router = Host { v4: [203, 0, 113, 1].into(), v6: CLIENT.v6 }.address(family);
            let silent = Host { v4: [192, 0, 2, 3].into(), v6: UNRESOLVED.v6 }.address(family);
            let (other, plain) = (OTHER_NODE.address(family), CLIENT.address(family));
            let cases = [
                ("its node is not known", unknown, plain, MACS.1),
                ("its node is behind a router", beyond_the_router, plain, MACS.1),
                ("nobody knows where its node is", silent, plain, MACS.1),
                ("the client is its node", other, other, MACS.1),
                ("the client is behind its node", other, plain, OTHER_NODE_MAC),
            ];
            for (name, node, source, mac) in cases {
                let mut bed = Testbed::new()?;
                let backend = bed.add_backend_of(REMOTE.address(family), node)?;
                bed.add_dispatched((any(family), NODE_PORT), Protocol::Udp, &[backend], &[])?;
                let destination = (NODE.address(family), NODE_PORT);
                let request = Frame::new((source, 50_000), destination, Transport::Udp);
                let request = Frame { macs: (MACS.0, mac), ..request };
                let sent = bed.expect(hook, &request, sent_out)?;
                assert_eq!(sent.source.0, NODE.address(family), "{name}");
                assert_eq!(sent.destination, (REMOTE.address(family), TARGET), "{name}");
                assert_eq!(bed.counter(hook, Outcome::NotDispatched)?, 1, "{name}");
                assert_eq!(bed.counter(hook, Outcome::Dispatched)?, 0, "{name}");
            }
        }
    }
    Ok(())
}

#[test]
fn a_packet_at_the_end_of_its_life_or_sent_back_by_its_node_is_dropped() -> Result<()> {
    let drops = [(Hook::UplinkXdp, action::XDP_DROP), (Hook::UplinkIn, action::TC_DROP)];
    for (hook, dropped) in drops {
        for family in Family::BOTH {
            let (mut bed, _) = dispatching(family, Protocol::Tcp)?;
            bed.run(hook, &to_node_port(family, SYN))?;
            let request = to_node_port(family, ACK);
            let old = Frame { hop_limit: 1, ..request.clone() };
            let returned = Frame { macs: (UPLINK_MAC, OTHER_NODE_MAC), ..request };
            for frame in [old, returned] {
                assert_eq!(bed.run(hook, &frame)?.action, dropped, "{frame:?}");
            }
            assert_eq!(bed.counter(hook, Outcome::DropNotDispatched)?, 2);
        }
    }
    Ok(())
}

#[test]
fn a_connection_follows_its_node_to_another_link_address_and_stays_where_it_was_if_there_is_none() -> Result<()> {
    for (hook, sent_out, _) in WAYS_IN {
        for family in Family::BOTH {
            let (mut bed, _) = dispatching(family, Protocol::Tcp)?;
            let node = OTHER_NODE.address(family);
            bed.expect(hook, &to_node_port(family, SYN), sent_out)?;
            bed.ip(&format!("neigh change {node} lladdr 02:00:00:00:00:77 dev uplink"))?;
            let next = |bed: &mut Testbed, generation| {
                bed.set_node(|node| node.route_generation = generation)?;
                Ok::<_, anyhow::Error>(bed.expect(hook, &to_node_port(family, ACK), sent_out)?.macs.0)
            };
            assert_eq!(next(&mut bed, 1)?, OTHER_NODE_MAC, "nobody has said that anything has changed");
            assert_eq!(next(&mut bed, 2)?, [2, 0, 0, 0, 0, 0x77]);
            bed.ip(&format!("neigh del {node} dev uplink"))?;
            assert_eq!(next(&mut bed, 3)?, [2, 0, 0, 0, 0, 0x77]);
        }
    }
    Ok(())
}

/// Ids of the backends that [`receiving`] adds.
const LOCAL_ID: u32 = 1;
const REMOTE_ID: u32 = 2;

/// A node with a backend, to which another one at [`OTHER_NODE`] dispatches, and a backend elsewhere beside it.
fn receiving(family: Family, proto: Protocol, frontend: (IpAddr, u16), has_local: bool) -> Result<Testbed> {
    let mut bed = Testbed::new()?;
    bed.add_peer(OTHER_NODE_MAC, OTHER_NODE.address(family))?;
    assert_eq!(bed.add_backend(POD.address(family), true)?, LOCAL_ID);
    assert_eq!(bed.add_backend_of(REMOTE.address(family), OTHER_NODE.address(family))?, REMOTE_ID);
    let local: &[u32] = if has_local { &[LOCAL_ID] } else { &[] };
    bed.add_dispatched(frontend, proto, &[REMOTE_ID], local)?;
    Ok(bed)
}

#[test]
fn what_another_node_dispatched_goes_to_a_backend_here_which_answers_as_the_frontend() -> Result<()> {
    for family in Family::BOTH {
        for (hook, _, passed) in WAYS_IN {
            let mut bed = receiving(family, Protocol::Tcp, (any(family), NODE_PORT), true)?;
            for (request, frontend, proto) in requests(family, OTHER_NODE) {
                bed.add_dispatched(frontend, proto, &[REMOTE_ID], &[LOCAL_ID])?;
                let request = Frame { macs: (UPLINK_MAC, OTHER_NODE_MAC), ..request };
                let target = (POD.address(family), TARGET);
                let ran = bed.run(hook, &request)?;
                assert_eq!(ran.action, passed, "{request:?}");
                assert_eq!(ran.bytes, Frame { destination: target, ..request.clone() }.bytes());

                let reply = Frame::new(target, request.source, request.transport);
                let ran = bed.run(Hook::UplinkOut, &reply)?;
                assert_eq!(ran.action, action::TC_NEXT);
                assert_eq!(ran.bytes, Frame { source: request.destination, ..reply }.bytes());
            }
        }
    }
    Ok(())
}

#[test]
fn only_what_another_node_dispatched_is_taken_for_that() -> Result<()> {
    let family = Family::V4;
    for (hook, _, passed) in WAYS_IN {
        let node_port = (OTHER_NODE.address(family), NODE_PORT);
        let mut bed = receiving(family, Protocol::Tcp, (any(family), NODE_PORT), true)?;
        let request = Frame::new(client(family), node_port, SYN);
        let ran = bed.run(hook, &request)?;
        assert_eq!((ran.action, ran.bytes), (passed, request.bytes()), "somebody else's packet to the other node");

        let dispatched = Frame { macs: (UPLINK_MAC, OTHER_NODE_MAC), ..request };
        let port = Frame { destination: (node_port.0, NODE_PORT + 1), ..dispatched.clone() };
        let ran = bed.run(hook, &port)?;
        assert_eq!((ran.action, ran.bytes), (passed, port.bytes()), "a port of nobody");

        let mut plain = Testbed::new()?;
        plain.add_peer(OTHER_NODE_MAC, OTHER_NODE.address(family))?;
        let local = plain.add_backend(POD.address(family), true)?;
        plain.add_service(any(family), NODE_PORT, Protocol::Tcp, &[local])?;
        let ran = plain.run(hook, &dispatched)?;
        assert_eq!((ran.action, ran.bytes), (passed, dispatched.bytes()), "a Service that does not ask for it");
    }
    Ok(())
}

/// The other node's own clients, and those behind it, may have any backend.
#[test]
fn a_node_port_of_this_node_is_not_taken_for_dispatched_whoever_sends() -> Result<()> {
    for (hook, sent_out, _) in WAYS_IN {
        for family in Family::BOTH {
            let mut bed = receiving(family, Protocol::Tcp, (any(family), NODE_PORT), true)?;
            let request = Frame { macs: (UPLINK_MAC, OTHER_NODE_MAC), ..to_node_port(family, SYN) };
            let sent = bed.expect(hook, &request, sent_out)?;
            assert_eq!(sent.source.0, NODE.address(family), "not back to where the client is");
            assert_eq!(sent.destination, (REMOTE.address(family), TARGET));
        }
    }
    Ok(())
}

#[test]
fn what_was_dispatched_to_a_node_without_a_backend_is_masqueraded_and_not_dispatched_again() -> Result<()> {
    for (hook, sent_out, _) in WAYS_IN {
        for family in Family::BOTH {
            for (frontend, destination) in frontends(family, OTHER_NODE) {
                let mut bed = receiving(family, Protocol::Tcp, frontend, false)?;
                // The backend is on a third node, a neighbour.
                bed.ip("neigh add 192.0.2.9 lladdr 02:00:00:00:00:09 dev uplink
                        neigh add 2001:db8:1::9 lladdr 02:00:00:00:00:09 dev uplink")?;
                let third = Host { v4: [192, 0, 2, 9].into(), v6: "2001:db8:1::9".parse()? };
                let backend = bed.add_backend_of(REMOTE.address(family), third.address(family))?;
                bed.add_dispatched(frontend, Protocol::Tcp, &[backend], &[])?;
                let request = Frame::new(client(family), destination, SYN);
                let request = Frame { macs: (UPLINK_MAC, OTHER_NODE_MAC), ..request };
                let sent = bed.expect(hook, &request, sent_out)?;
                assert_eq!((sent.source.0, sent.destination.0), (NODE.address(family), REMOTE.address(family)));
                let reply = Frame::new(sent.destination, sent.source, ACK);
                let seen = bed.expect(hook, &reply, sent_out)?;
                assert_eq!((seen.source, seen.destination), (destination, client(family)));
                assert_eq!(seen.macs.0, ROUTER_MAC);
                assert_eq!(bed.counter(hook, Outcome::Dispatched)?, 0);
            }
        }
    }
    Ok(())
}

/// All of a datagram's fragments, in order.
#[test]
fn fragments_follow_the_first_one_as_they_came() -> Result<()> {
    for (hook, sent_out, _) in WAYS_IN {
        for family in Family::BOTH {
            let (mut bed, _) = dispatching(family, Protocol::Udp)?;
            let whole = Frame { payload: (0..71).collect(), ..to_node_port(family, Transport::Udp) };
            let aged = Frame { macs: (OTHER_NODE_MAC, UPLINK_MAC), hop_limit: 63, ..whole.clone() };
            let pieces = cut(&whole.bytes(), 7_000, 24);
            assert!(pieces.len() > 3);
            for (piece, expected) in pieces.into_iter().zip(cut(&aged.bytes(), 7_000, 24)) {
                let ran = bed.run_bytes(hook, &piece)?;
                assert_eq!((ran.action, ran.bytes), (sent_out, expected));
            }
        }
    }
    Ok(())
}

const ROUTER: Host = Host {
    v4: std::net::Ipv4Addr::new(203, 0, 113, 254),
    v6: std::net::Ipv6Addr::new(0x2001, 0xdb8, 0xfe02, 0, 0, 0, 0, 254),
};

/// What the router says of a packet that is too long for it, with so many hops of its life left.
fn too_big(about: &Frame, macs: ([u8; 6], [u8; 6]), life: u8) -> Vec<u8> {
    let ethernet = PacketBuilder::ethernet2(macs.1, macs.0);
    let (mut bytes, quote) = (Vec::new(), &about.bytes()[ETHERNET..]);
    match about.source.0 {
        IpAddr::V4(to) => {
            let kind = icmpv4::DestUnreachableHeader::FragmentationNeeded { next_hop_mtu: 1_400 };
            let packet = ethernet.ipv4(ROUTER.v4.octets(), to.octets(), life);
            packet.icmpv4(Icmpv4Type::DestinationUnreachable(kind)).write(&mut bytes, quote)
        }
        IpAddr::V6(to) => {
            let packet = ethernet.ipv6(ROUTER.v6.octets(), to.octets(), life);
            packet.icmpv6(Icmpv6Type::PacketTooBig { mtu: 1_400 }).write(&mut bytes, quote)
        }
    }
    .expect("a vector takes every write");
    bytes
}

/// What a router says of a reply, it says to the frontend's address: to a node that has not seen the reply.
#[test]
fn an_error_about_a_reply_goes_to_the_node_that_sent_it_and_there_to_the_pod() -> Result<()> {
    for (hook, sent_out, passed) in WAYS_IN {
        for family in Family::BOTH {
            let request = to_node_port(family, SYN);
            let (frontend, client) = (request.destination, request.source);
            let (mut bed, _) = dispatching(family, Protocol::Tcp)?;
            bed.run(hook, &request)?;
            let reply = Frame { hop_limit: 60, ..Frame::new(frontend, client, ACK) };
            let error = too_big(&reply, MACS, 61);
            let ran = bed.run_bytes(hook, &error)?;
            assert_eq!((ran.action, &ran.bytes), (sent_out, &too_big(&reply, (OTHER_NODE_MAC, UPLINK_MAC), 60)));
            assert_eq!(bed.counter(hook, Outcome::Related)?, 1);

            // The other node, whose neighbour the first one is. Here both have the same address on the link.
            let destination = (OTHER_NODE.address(family), NODE_PORT);
            let mut bed = receiving(family, Protocol::Tcp, (any(family), NODE_PORT), true)?;
            let macs = (UPLINK_MAC, OTHER_NODE_MAC);
            bed.run(hook, &Frame { destination, macs, ..request.clone() })?;
            let error = too_big(&Frame { source: destination, ..reply.clone() }, MACS, 61);
            let ran = bed.run_bytes(hook, &error)?;
            let target = (POD.address(family), TARGET);
            let expected = too_big(&Frame { source: target, ..reply }, MACS, 61);
            assert_eq!((ran.action, ran.bytes), (passed, expected));
        }
    }
    Ok(())
}

#[test]
fn what_came_with_a_tag_is_masqueraded() -> Result<()> {
    for hook in [Hook::UplinkXdp, Hook::UplinkIn] {
        let (mut bed, _) = dispatching(Family::V4, Protocol::Tcp)?;
        let uplink = bed.uplink();
        bed.add_vlan(uplink, 0x8100, 7, uplink)?;
        let mut bytes = to_node_port(Family::V4, SYN).bytes();
        bytes.splice(12..12, [0x81, 0, 0, 7]);
        bed.run_bytes(hook, &bytes)?;
        assert_eq!((bed.counter(hook, Outcome::Dispatched)?, bed.counter(hook, Outcome::NotDispatched)?), (0, 1));
    }
    Ok(())
}
