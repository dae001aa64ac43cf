//! Direct server return to nodes behind a router: what is dispatched leaves behind another IP header, and what does not fit
//! there is told to its sender. Outer headers are read with etherparse, inner packets compared byte for byte.
#![allow(clippy::expect_used, reason = "packets that a helper builds are part of the test")]

use std::net::IpAddr;

use anyhow::{Context as _, Result, ensure};
use etherparse::{Icmpv4Type, Icmpv6Type, IpNumber, NetSlice, PacketBuilder, SlicedPacket, icmpv4};
use proxy_common::{
    addr::Protocol,
    flow::{Direction, Output, state},
    node::TUNNELS,
    outcome::{Hook, Outcome},
    tuple::Stage,
};
use tests::{
    fragments::cut,
    frame::{Chunk, ETHERNET, Family, Flags, Frame, Host, MACS, Transport},
    testbed::{CLIENT, Kind, NODE, NODE_PORT, OTHER_NODE_MAC, REMOTE, ROUTER_MAC, Testbed, UPLINK_MAC, action},
};

const TRANSPORTS: [(Transport, Protocol); 3] = [
    (Transport::Tcp(Flags::SYN), Protocol::Tcp),
    (Transport::Udp, Protocol::Udp),
    (Transport::Sctp(Chunk::INIT), Protocol::Sctp),
];

/// Ways in, and what they say of a packet that leaves at once.
const WAYS_IN: [(Hook, i32); 2] = [(Hook::UplinkXdp, action::XDP_TX), (Hook::UplinkIn, action::TC_REDIRECT)];

/// A node behind the router.
const FAR_NODE: Host =
    Host { v4: std::net::Ipv4Addr::new(203, 0, 113, 1), v6: std::net::Ipv6Addr::new(0x2001, 0xdb8, 9, 0, 0, 0, 0, 1) };

fn any(family: Family) -> IpAddr {
    if family == Family::V4 { [0; 4].into() } else { [0; 16].into() }
}

/// Length of an IP header.
fn header(family: Family) -> usize {
    if family == Family::V4 { 20 } else { 40 }
}

/// A node that dispatches a NodePort to the one behind the router, if there are tunnels. Returns the backend's id.
fn bed(family: Family, proto: Protocol, flags: u32) -> Result<(Testbed, u32)> {
    let mut bed = Testbed::new()?;
    bed.set_node(|node| node.flags = flags)?;
    let backend = bed.add_backend_of(REMOTE.address(family), FAR_NODE.address(family))?;
    bed.add_dispatched((any(family), NODE_PORT), proto, &[backend], &[])?;
    Ok((bed, backend))
}

fn request(family: Family, transport: Transport) -> Frame {
    Frame::new((CLIENT.address(family), 50_000), (NODE.address(family), NODE_PORT), transport)
}

/// A request whose IP packet is that long.
fn long_request(family: Family, transport: Transport, length: usize) -> Frame {
    let frame = request(family, transport);
    let headers = frame.bytes().len() - ETHERNET - frame.payload.len();
    Frame { payload: vec![7; length - headers], ..frame }
}

/// The IP packet of a frame, one hop older, with every checksum made anew.
fn older(frame: &Frame) -> Vec<u8> {
    Frame { hop_limit: frame.hop_limit - 1, ..frame.clone() }.bytes().split_off(ETHERNET)
}

/// Takes the outer header off a frame, which must be right and lead from this node to the other one by the router.
fn unwrap(family: Family, frame: &[u8]) -> Result<Vec<u8>> {
    let outer = ETHERNET + header(family);
    ensure!(frame[..12] == [ROUTER_MAC, UPLINK_MAC].concat(), "not to the router: {frame:x?}");
    let sliced = SlicedPacket::from_ethernet(frame)?;
    match sliced.net.context("no IP header")? {
        NetSlice::Ipv4(ip) => {
            let header = ip.header();
            ensure!(header.header_checksum() == header.to_header().calc_header_checksum(), "the header's checksum");
            let addresses = (IpAddr::from(header.source_addr()), IpAddr::from(header.destination_addr()));
            assert_eq!(addresses, (NODE.address(family), FAR_NODE.address(family)));
            assert_eq!((header.protocol(), header.ttl()), (IpNumber::IPV4, 63));
            assert!(!header.dont_fragment() && !header.more_fragments(), "routers may cut it");
            assert_eq!(usize::from(header.total_len()), frame.len() - ETHERNET);
        }
        NetSlice::Ipv6(ip) => {
            let header = ip.header();
            let addresses = (IpAddr::from(header.source_addr()), IpAddr::from(header.destination_addr()));
            assert_eq!(addresses, (NODE.address(family), FAR_NODE.address(family)));
            assert_eq!((header.next_header(), header.hop_limit()), (IpNumber::IPV6, 63));
            assert_eq!(usize::from(header.payload_length()), frame.len() - outer);
        }
        NetSlice::Arp(_) => anyhow::bail!("ARP"),
    }
    Ok(frame[outer..].to_vec())
}

#[test]
fn what_is_for_a_backend_behind_a_router_goes_to_its_node_behind_another_header() -> Result<()> {
    for family in Family::BOTH {
        for (transport, proto) in TRANSPORTS {
            for (hook, sent) in WAYS_IN {
                let (mut bed, backend) = bed(family, proto, TUNNELS)?;
                let request = request(family, transport);
                for _ in 0..3 {
                    let ran = bed.run(hook, &request)?;
                    assert_eq!(ran.action, sent, "{hook:?} {request:?}");
                    assert_eq!(unwrap(family, &ran.bytes)?, older(&request), "{hook:?} {request:?}");
                }
                assert_eq!(bed.counter(hook, Outcome::Opened)?, 1);
                assert_eq!(bed.counter(hook, Outcome::Dispatched)?, 1);
                let tier = if proto == Protocol::Udp { "FLOWS" } else { "EMBRYOS" };
                let confirmed = if proto == Protocol::Udp { state::CONFIRMED } else { 0 };
                let kind = Kind {
                    stage: Stage::UplinkIn,
                    output: Output::Tunnel,
                    direction: Direction::Original,
                    state: state::ONE_WAY | confirmed,
                    backend,
                    addresses: (NODE.address(family), FAR_NODE.address(family)),
                };
                assert_eq!(bed.kinds(family, tier)?, [kind]);
            }
        }
    }
    Ok(())
}

/// What routers look at says of both headers the same.
#[test]
fn the_outer_header_has_the_inner_ones_traffic_class() -> Result<()> {
    const CLASS: u8 = 0xb9;
    for (hook, sent) in WAYS_IN {
        let (mut bed4, _) = bed(Family::V4, Protocol::Udp, TUNNELS)?;
        let mut bytes = request(Family::V4, Transport::Udp).bytes();
        bytes[ETHERNET + 1] = CLASS;
        let sum = etherparse::Ipv4HeaderSlice::from_slice(&bytes[ETHERNET..])?.to_header().calc_header_checksum();
        bytes[ETHERNET + 10..ETHERNET + 12].copy_from_slice(&sum.to_be_bytes());
        let ran = bed4.run_bytes(hook, &bytes)?;
        assert_eq!((ran.action, ran.bytes[ETHERNET + 1]), (sent, CLASS));
        unwrap(Family::V4, &ran.bytes)?;

        let (mut bed6, _) = bed(Family::V6, Protocol::Udp, TUNNELS)?;
        let mut bytes = request(Family::V6, Transport::Udp).bytes();
        bytes[ETHERNET] = 0x60 | CLASS >> 4;
        bytes[ETHERNET + 1] = CLASS << 4;
        let ran = bed6.run_bytes(hook, &bytes)?;
        assert_eq!((ran.action, &ran.bytes[ETHERNET..ETHERNET + 2]), (sent, &[0x60 | CLASS >> 4, CLASS << 4][..]));
        unwrap(Family::V6, &ran.bytes)?;
    }
    Ok(())
}

#[test]
fn without_tunnels_it_is_masqueraded() -> Result<()> {
    for family in Family::BOTH {
        for (hook, sent) in WAYS_IN {
            let (mut bed, _) = bed(family, Protocol::Udp, 0)?;
            let frame = bed.expect(hook, &request(family, Transport::Udp), sent)?;
            assert_eq!(frame.source.0, NODE.address(family));
            assert_eq!(bed.counter(hook, Outcome::NotDispatched)?, 1);
        }
    }
    Ok(())
}

/// A client behind the node of its backend comes by the same router as everybody.
#[test]
fn a_client_behind_the_router_is_no_client_of_the_other_node() -> Result<()> {
    for (hook, sent) in WAYS_IN {
        let (mut bed, _) = bed(Family::V4, Protocol::Udp, TUNNELS)?;
        let request = Frame { macs: (MACS.0, ROUTER_MAC), ..request(Family::V4, Transport::Udp) };
        for _ in 0..2 {
            let ran = bed.run(hook, &request)?;
            assert_eq!((ran.action, unwrap(Family::V4, &ran.bytes)?), (sent, older(&request)));
        }
    }
    Ok(())
}

#[test]
fn a_connection_follows_its_node_onto_the_link_and_back_behind_the_router() -> Result<()> {
    for family in Family::BOTH {
        for (hook, sent) in WAYS_IN {
            let (mut bed, _) = bed(family, Protocol::Tcp, TUNNELS)?;
            let request = |flags| request(family, Transport::Tcp(flags));
            let node = FAR_NODE.address(family);
            let prefix = if family == Family::V4 { 32 } else { 128 };
            assert_eq!(unwrap(family, &bed.run(hook, &request(Flags::SYN))?.bytes)?, older(&request(Flags::SYN)));
            bed.ip(&format!(
                "route add {node}/{prefix} dev uplink
                 neigh add {node} lladdr 02:00:00:00:00:02 dev uplink"
            ))?;
            bed.set_node(|node| node.route_generation = 2)?;
            let ack = request(Flags::ACK);
            let ran = bed.run(hook, &ack)?;
            let direct = Frame { macs: (OTHER_NODE_MAC, UPLINK_MAC), hop_limit: ack.hop_limit - 1, ..ack.clone() };
            assert_eq!((ran.action, ran.bytes), (sent, direct.bytes()));
            bed.ip(&format!("route del {node}/{prefix} dev uplink"))?;
            bed.set_node(|node| node.route_generation = 3)?;
            let ran = bed.run(hook, &ack)?;
            assert_eq!((ran.action, unwrap(family, &ran.bytes)?), (sent, older(&ack)));
        }
    }
    Ok(())
}

#[test]
fn fragments_go_behind_headers_of_their_own() -> Result<()> {
    for family in Family::BOTH {
        for (hook, sent) in WAYS_IN {
            let (mut bed, _) = bed(family, Protocol::Udp, TUNNELS)?;
            let request = Frame { payload: vec![7; 1_200], ..request(family, Transport::Udp) };
            let pieces = cut(&request.bytes(), 7, 600);
            let expected = cut(&Frame { hop_limit: request.hop_limit - 1, ..request.clone() }.bytes(), 7, 600);
            for (piece, expected) in pieces.iter().zip(expected) {
                let ran = bed.run_bytes(hook, piece)?;
                assert_eq!(ran.action, sent);
                assert_eq!(unwrap(family, &ran.bytes)?, expected[ETHERNET..]);
            }
        }
    }
    Ok(())
}

/// What this node says of a packet: that so much fits.
fn too_big(about: &[u8], of: &Frame, mtu: u16) -> Vec<u8> {
    let ethernet = PacketBuilder::ethernet2(of.macs.0, of.macs.1);
    let mut bytes = Vec::new();
    match (of.destination.0, of.source.0) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let kind = icmpv4::DestUnreachableHeader::FragmentationNeeded { next_hop_mtu: mtu };
            let packet = ethernet.ipv4(from.octets(), to.octets(), 64);
            packet.icmpv4(Icmpv4Type::DestinationUnreachable(kind)).write(&mut bytes, about)
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let packet = ethernet.ipv6(from.octets(), to.octets(), 64);
            packet.icmpv6(Icmpv6Type::PacketTooBig { mtu: mtu.into() }).write(&mut bytes, about)
        }
        mixed => unreachable!("{mixed:?}"),
    }
    .expect("a vector takes every write");
    bytes
}

#[test]
fn what_is_too_long_behind_a_header_is_told_to_its_sender() -> Result<()> {
    const MTU: usize = 1_500;
    for family in Family::BOTH {
        for (transport, proto) in [(Transport::Tcp(Flags::ACK), Protocol::Tcp), (Transport::Udp, Protocol::Udp)] {
            for (hook, sent) in WAYS_IN {
                let (mut bed, _) = bed(family, proto, TUNNELS)?;
                let fits = MTU - header(family);
                let request = long_request(family, transport, fits);
                assert_eq!(unwrap(family, &bed.run(hook, &request)?.bytes)?, older(&request));
                assert_eq!(bed.counter(hook, Outcome::DropTooLong)?, 0);

                let request = long_request(family, transport, fits + 1);
                let ran = bed.run(hook, &request)?;
                assert_eq!((ran.action, bed.counter(hook, Outcome::DropTooLong)?), (sent, 1), "{hook:?}");
                // An skb's may be a checksum that is still to be made: what stands in the quote is then not what was sent.
                let quoted = header(family) + 20;
                let mut quote = request.bytes()[ETHERNET..ETHERNET + quoted].to_vec();
                if hook == Hook::UplinkIn {
                    let field = if proto == Protocol::Tcp { 16 } else { 6 } + header(family);
                    let at = ran.bytes.len() - quoted + field;
                    quote[field..field + 2].copy_from_slice(&ran.bytes[at..at + 2]);
                }
                let mut expected = too_big(&quote, &request, u16::try_from(fits)?);
                let id = ETHERNET + 4;
                if family == Family::V4 {
                    expected[id..id + 8].copy_from_slice(&ran.bytes[id..id + 8]);
                    let header = etherparse::Ipv4HeaderSlice::from_slice(&ran.bytes[ETHERNET..])?;
                    assert_eq!(header.header_checksum(), header.to_header().calc_header_checksum());
                }
                assert_eq!(ran.bytes, expected, "{hook:?} {family:?} {proto:?}");
            }
        }
    }
    Ok(())
}

/// SCTP does not learn of it from us, and is dropped as it would be on the way.
#[test]
fn what_is_too_long_and_gets_no_answer_is_dropped_and_counted() -> Result<()> {
    for (hook, dropped) in [(Hook::UplinkXdp, action::XDP_DROP), (Hook::UplinkIn, action::TC_DROP)] {
        let (mut bed, _) = bed(Family::V4, Protocol::Sctp, TUNNELS)?;
        bed.run(hook, &request(Family::V4, Transport::Sctp(Chunk::INIT)))?;
        let ran = bed.run(hook, &long_request(Family::V4, Transport::Sctp(Chunk::COOKIE_ECHO), 1_484))?;
        assert_eq!((ran.action, bed.counter(hook, Outcome::DropTooLong)?), (dropped, 1));
    }
    Ok(())
}
