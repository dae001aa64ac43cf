//! ICMP errors about translated packets: who sent the packet is told of the packet it sent.
#![allow(clippy::unwrap_used, clippy::panic, reason = "packets that a helper builds or reads are part of the test")]

use anyhow::{Context as _, Result};
use etherparse::{
    Icmpv4Type, Icmpv6Type, IpNumber, NetSlice, PacketBuilder, SlicedPacket, TransportSlice, icmpv4, icmpv6,
};
use proxy_common::{
    addr::Protocol,
    outcome::{Hook, Outcome},
    service::{Service, flag},
};
use std::net::IpAddr;
use tests::{
    fragments::fragment,
    frame::{ETHERNET, Family, Flags, Frame, Host, MACS, Transport},
    testbed::{
        CLIENT, NODE, NODE_PORT, POD, POD2, PORT, REMOTE, ROUTER_MAC, SERVICE, TARGET, Testbed, UNRESOLVED, action,
        told,
    },
};

/// A router nobody has heard of.
const ROUTER: Host = Host {
    v4: std::net::Ipv4Addr::new(203, 0, 113, 9),
    v6: std::net::Ipv6Addr::new(0x2001, 0xdb8, 0xaaaa, 0, 0, 0, 0, 9),
};

const TRANSPORTS: [(Transport, Protocol); 3] = [
    (Transport::Tcp(Flags::SYN), Protocol::Tcp),
    (Transport::Udp, Protocol::Udp),
    (Transport::UdpUnchecked, Protocol::Udp),
];

/// What an error tells.
#[derive(Clone, Copy, Debug)]
enum Error {
    /// Fragmentation needed, or packet too big.
    TooBig,
    /// Time exceeded.
    TimeExceeded,
    /// Port unreachable.
    Port,
    /// A byte of the header that nobody understands.
    Parameter,
}

const ERRORS: [Error; 4] = [Error::TooBig, Error::TimeExceeded, Error::Port, Error::Parameter];

/// An error of `reporter` about a frame, sent to whom the frame names as its source. Quotes `quoted` bytes behind its IP header.
fn error(error: Error, reporter: IpAddr, about: &[u8], quoted: usize) -> Vec<u8> {
    let ethernet = PacketBuilder::ethernet2(MACS.1, MACS.0);
    let mut bytes = Vec::new();
    match (reporter, SlicedPacket::from_ethernet(about).unwrap().net.unwrap()) {
        (IpAddr::V4(reporter), NetSlice::Ipv4(ip)) => {
            use icmpv4::{DestUnreachableHeader as Unreachable, TimeExceededCode};
            let kind = match error {
                Error::TooBig => {
                    Icmpv4Type::DestinationUnreachable(Unreachable::FragmentationNeeded { next_hop_mtu: 1_400 })
                }
                Error::TimeExceeded => Icmpv4Type::TimeExceeded(TimeExceededCode::TtlExceededInTransit),
                Error::Port => Icmpv4Type::DestinationUnreachable(Unreachable::Port),
                Error::Parameter => {
                    Icmpv4Type::ParameterProblem(icmpv4::ParameterProblemHeader::PointerIndicatesError(9))
                }
            };
            let quote = &about[ETHERNET..(ETHERNET + 20 + quoted).min(about.len())];
            let to = ip.header().source();
            ethernet.ipv4(reporter.octets(), to, 61).icmpv4(kind).write(&mut bytes, quote).unwrap();
        }
        (IpAddr::V6(reporter), NetSlice::Ipv6(ip)) => {
            use icmpv6::{DestUnreachableCode, TimeExceededCode};
            let kind = match error {
                Error::TooBig => Icmpv6Type::PacketTooBig { mtu: 1_400 },
                Error::TimeExceeded => Icmpv6Type::TimeExceeded(TimeExceededCode::HopLimitExceeded),
                Error::Port => Icmpv6Type::DestinationUnreachable(DestUnreachableCode::Port),
                Error::Parameter => Icmpv6Type::ParameterProblem(icmpv6::ParameterProblemHeader {
                    code: icmpv6::ParameterProblemCode::UnrecognizedNextHeader,
                    pointer: 6,
                }),
            };
            let quote = &about[ETHERNET..(ETHERNET + 40 + quoted).min(about.len())];
            let to = ip.header().source();
            ethernet.ipv6(reporter.octets(), to, 61).icmpv6(kind).write(&mut bytes, quote).unwrap();
        }
        mixed => panic!("an error of another family: {mixed:?}"),
    }
    bytes
}

/// Source, destination and quote of an error, after every checksum was computed anew.
fn read(bytes: &[u8]) -> Result<(IpAddr, IpAddr, Vec<u8>)> {
    let sliced = SlicedPacket::from_ethernet(bytes)?;
    match (sliced.net.context("no IP")?, sliced.transport.context("no ICMP")?) {
        (NetSlice::Ipv4(ip), TransportSlice::Icmpv4(icmp)) => {
            let header = ip.header();
            assert_eq!(header.header_checksum(), header.to_header().calc_header_checksum(), "IPv4 header");
            assert_eq!(icmp.checksum(), icmp.icmp_type().calc_checksum(icmp.payload()), "ICMP");
            Ok((header.source_addr().into(), header.destination_addr().into(), icmp.payload().to_vec()))
        }
        (NetSlice::Ipv6(ip), TransportSlice::Icmpv6(icmp)) => {
            let header = ip.header();
            assert_eq!(header.next_header(), IpNumber::IPV6_ICMP);
            let computed = icmp.icmp_type().calc_checksum(header.source(), header.destination(), icmp.payload())?;
            assert_eq!(icmp.checksum(), computed, "ICMPv6");
            Ok((header.source_addr().into(), header.destination_addr().into(), icmp.payload().to_vec()))
        }
        other => anyhow::bail!("no error: {other:?}"),
    }
}

/// The IP packet of a frame as it is quoted: the hop limit may be lower by then, and IPv4's checksum follows it.
fn quote(frame: &Frame, hop_limit: u8, quoted: usize) -> Vec<u8> {
    let bytes = Frame { hop_limit, ..frame.clone() }.bytes();
    let header = if frame.source.0.is_ipv4() { 20 } else { 40 };
    bytes[ETHERNET..(ETHERNET + header + quoted).min(bytes.len())].to_vec()
}

/// Eight bytes are all an old router quotes; others quote more than there is.
const QUOTED: [usize; 3] = [8, 20, 2_000];

fn for_each_kind(test: impl Fn(Family, Transport, Protocol) -> Result<()>) -> Result<()> {
    for family in Family::BOTH {
        for (transport, proto) in TRANSPORTS {
            test(family, transport, proto).with_context(|| format!("{family:?} {transport:?}"))?;
        }
    }
    Ok(())
}

/// Every error with every length of quote.
fn for_each_error(test: impl FnMut(&str, Error, usize) -> Result<()>) -> Result<()> {
    let mut test = test;
    for error in ERRORS {
        for quoted in QUOTED {
            let name = format!("{error:?}, {quoted} bytes quoted");
            test(&name, error, quoted).context(name.clone())?;
        }
    }
    Ok(())
}

/// Trap 12: an error about what a pod sent to a Service names the Service.
#[test]
fn a_pod_learns_of_an_error_behind_a_service() -> Result<()> {
    for_each_kind(|family, transport, proto| {
        let mut bed = Testbed::new()?;
        bed.watch()?;
        let backend = bed.add_backend(REMOTE.address(family), false)?;
        bed.add_service(SERVICE.address(family), PORT, proto, &[backend])?;
        let request = Frame::new((POD.address(family), 4_000), (SERVICE.address(family), PORT), transport);
        let sent = bed.run(Hook::PodIn, &request)?;

        for_each_error(|name, kind, quoted| {
            for (reporter, shown) in [(ROUTER, ROUTER), (REMOTE, SERVICE)] {
                let ran = bed.run_bytes(Hook::PodOut, &error(kind, reporter.address(family), &sent.bytes, quoted))?;
                assert_eq!(ran.action, action::TC_NEXT, "{name}");
                let (source, destination, seen) = read(&ran.bytes)?;
                assert_eq!((source, destination), (shown.address(family), POD.address(family)), "{name}");
                assert_eq!(seen, quote(&request, 64, quoted), "{name}");
            }
            Ok(())
        })?;
        assert_eq!(bed.counter(Hook::PodOut, Outcome::Related)?, 24);
        assert_eq!(told(&bed.events()?), bed.counters()?);
        Ok(())
    })
}

/// Trap 12: an error about what was sent on under the node's address goes to the client, in XDP without the kernel.
#[test]
fn an_outside_client_learns_of_an_error_behind_this_node() -> Result<()> {
    let hooks =
        [(Hook::UplinkXdp, action::XDP_PASS, action::XDP_TX), (Hook::UplinkIn, action::TC_NEXT, action::TC_REDIRECT)];
    for (hook, passed, sent_out) in hooks {
        for_each_kind(|family, transport, proto| {
            let mut bed = Testbed::new()?;
            let backend = bed.add_backend(REMOTE.address(family), false)?;
            bed.add_service(any(family), NODE_PORT, proto, &[backend])?;
            let client = (CLIENT.address(family), 50_000);
            let request = Frame::new(client, (NODE.address(family), NODE_PORT), transport);
            let sent = bed.run(hook, &request)?;
            let expect = |bed: &mut Testbed, name: &str, kind, quoted, action| -> Result<Vec<u8>> {
                let ran = bed.run_bytes(hook, &error(kind, ROUTER.address(family), &sent.bytes, quoted))?;
                assert_eq!(ran.action, action, "{name}");
                let (source, destination, seen) = read(&ran.bytes)?;
                assert_eq!((source, destination), (ROUTER.address(family), client.0), "{name}");
                assert_eq!(seen, quote(&request, 63, quoted), "{name}");
                Ok(ran.bytes)
            };
            // No reply has been seen, so the kernel has to find the way.
            for_each_error(|name, kind, quoted| expect(&mut bed, name, kind, quoted, passed).map(drop))?;

            let reply = Frame::read(&sent.bytes);
            bed.run(hook, &Frame::new(reply.destination, reply.source, transport))?;
            for_each_error(|name, kind, quoted| {
                let bytes = expect(&mut bed, name, kind, quoted, sent_out)?;
                assert_eq!(bytes[..6], ROUTER_MAC, "{name}");
                Ok(())
            })
        })?;
    }
    Ok(())
}

/// Trap 12: an error about a reply, as when the client's link is narrow, reaches the backend and speaks of its packet.
#[test]
fn a_backend_learns_of_an_error_on_the_way_to_its_client() -> Result<()> {
    for (hook, passed) in [(Hook::UplinkXdp, action::XDP_PASS), (Hook::UplinkIn, action::TC_NEXT)] {
        for_each_kind(|family, transport, proto| {
            let mut bed = Testbed::new()?;
            let backend = bed.add_backend(POD.address(family), true)?;
            bed.add_service(any(family), NODE_PORT, proto, &[backend])?;
            let client = (CLIENT.address(family), 50_000);
            bed.run(hook, &Frame::new(client, (NODE.address(family), NODE_PORT), transport))?;
            let reply = Frame::new((POD.address(family), TARGET), client, transport);
            let sent = bed.run(Hook::UplinkOut, &reply)?;

            for_each_error(|name, kind, quoted| {
                for reporter in [ROUTER, CLIENT] {
                    let ran = bed.run_bytes(hook, &error(kind, reporter.address(family), &sent.bytes, quoted))?;
                    assert_eq!(ran.action, passed, "{name}");
                    let (source, destination, seen) = read(&ran.bytes)?;
                    assert_eq!((source, destination), (reporter.address(family), POD.address(family)), "{name}");
                    assert_eq!(seen, quote(&reply, 64, quoted), "{name}");
                }
                Ok(())
            })
        })?;
    }
    Ok(())
}

/// Trap 12: this node's own error about a packet on its way to a backend leaves with the name its client knows.
#[test]
fn an_error_of_this_node_about_a_translated_packet_speaks_of_what_the_client_sent() -> Result<()> {
    for_each_kind(|family, transport, proto| {
        let mut bed = Testbed::new()?;
        let backend = bed.add_backend(POD.address(family), true)?;
        bed.add_service(any(family), NODE_PORT, proto, &[backend])?;
        let client = (CLIENT.address(family), 50_000);
        let request = Frame::new(client, (NODE.address(family), NODE_PORT), transport);
        let sent = bed.run(Hook::UplinkXdp, &request)?;

        for_each_error(|name, kind, quoted| {
            for reporter in [NODE, POD] {
                let about = error(kind, reporter.address(family), &sent.bytes, quoted);
                let ran = bed.run_bytes(Hook::UplinkOut, &about)?;
                assert_eq!(ran.action, action::TC_NEXT, "{name}");
                let (source, destination, seen) = read(&ran.bytes)?;
                assert_eq!((source, destination), (NODE.address(family), client.0), "{name}");
                assert_eq!(seen, quote(&request, 64, quoted), "{name}");
            }
            Ok(())
        })
    })
}

/// What the kernel has to route has the backend's name already and still its client's: an error of this node about it, as when
/// the packet is too long for the way on, speaks of what the client sent.
#[test]
fn an_error_about_a_packet_between_its_two_steps_speaks_of_what_the_client_sent() -> Result<()> {
    for_each_kind(|family, transport, proto| {
        let mut bed = Testbed::new()?;
        let backend = bed.add_backend(UNRESOLVED.address(family), false)?;
        bed.add_service(any(family), NODE_PORT, proto, &[backend])?;
        let client = (CLIENT.address(family), 50_000);
        let request = Frame::new(client, (NODE.address(family), NODE_PORT), transport);
        let routed = bed.run(Hook::UplinkXdp, &request)?;
        assert_eq!(Frame::read(&routed.bytes).destination, (UNRESOLVED.address(family), TARGET));

        for_each_error(|name, kind, quoted| {
            let ran = bed.run_bytes(Hook::UplinkOut, &error(kind, NODE.address(family), &routed.bytes, quoted))?;
            assert_eq!(ran.action, action::TC_NEXT, "{name}");
            let (source, destination, seen) = read(&ran.bytes)?;
            assert_eq!((source, destination), (NODE.address(family), client.0), "{name}");
            assert_eq!(seen, quote(&request, 64, quoted), "{name}");
            Ok(())
        })
    })
}

/// The same for a reply that takes the way through the kernel: it has the client's name already and still the backend's.
#[test]
fn an_error_about_a_reply_between_its_two_steps_speaks_of_what_the_backend_sent() -> Result<()> {
    for_each_kind(|family, transport, proto| {
        let mut bed = Testbed::new()?;
        let backend = bed.add_backend(REMOTE.address(family), false)?;
        bed.add_service(any(family), NODE_PORT, proto, &[backend])?;
        let client = (CLIENT.address(family), 50_000);
        // The request took that way, too.
        let request = Frame { hop_limit: 1, ..Frame::new(client, (NODE.address(family), NODE_PORT), transport) };
        let routed = bed.run(Hook::UplinkXdp, &request)?;
        let sent = Frame::read(&bed.run_bytes(Hook::UplinkOut, &routed.bytes)?.bytes);
        let reply = Frame { hop_limit: 1, ..Frame::new(sent.destination, sent.source, transport) };
        let routed = bed.run(Hook::UplinkXdp, &reply)?;
        assert_eq!((routed.action, Frame::read(&routed.bytes).destination), (action::XDP_PASS, client));

        for_each_error(|name, kind, quoted| {
            let ran = bed.run_bytes(Hook::UplinkOut, &error(kind, NODE.address(family), &routed.bytes, quoted))?;
            assert_eq!(ran.action, action::TC_NEXT, "{name}");
            let (source, destination, seen) = read(&ran.bytes)?;
            assert_eq!((source, destination), (NODE.address(family), sent.destination.0), "{name}");
            assert_eq!(seen, quote(&reply, 1, quoted), "{name}");
            Ok(())
        })
    })
}

/// A flow of two pairs: the error about what left under the node's name is turned back at both hooks it passes.
#[test]
fn an_error_about_a_masqueraded_packet_of_a_pod_is_turned_back_twice() -> Result<()> {
    for_each_kind(|family, transport, proto| {
        let mut bed = Testbed::new()?;
        let backend = bed.add_backend(REMOTE.address(family), false)?;
        let range = bed.add_slots(&[backend])?;
        let service =
            Service { index: 1, flags: flag::EXTERNAL, internal: range, external: range, ..Service::default() };
        bed.set_service(any(family), NODE_PORT, proto, service)?;
        let request = Frame::new((POD.address(family), 4_000), (NODE.address(family), NODE_PORT), transport);
        let routed = bed.run(Hook::PodIn, &request)?;
        let sent = bed.run_bytes(Hook::UplinkOut, &routed.bytes)?;
        assert_eq!(Frame::read(&sent.bytes).source.0, NODE.address(family));

        for_each_error(|name, kind, quoted| {
            let about = error(kind, ROUTER.address(family), &sent.bytes, quoted);
            let once = bed.run_bytes(Hook::UplinkXdp, &about)?;
            assert_eq!(once.action, action::XDP_PASS, "{name}");
            let twice = bed.run_bytes(Hook::PodOut, &once.bytes)?;
            let (source, destination, seen) = read(&twice.bytes)?;
            assert_eq!((source, destination), (ROUTER.address(family), POD.address(family)), "{name}");
            assert_eq!(seen, quote(&request, 64, quoted), "{name}");
            Ok(())
        })
    })
}

/// IPv6 routers speak of fragments that are too long, too; the first one has the ports.
#[test]
fn an_error_about_a_first_fragment_is_translated() -> Result<()> {
    for_each_kind(|family, transport, proto| {
        let mut bed = Testbed::new()?;
        let backend = bed.add_backend(REMOTE.address(family), false)?;
        bed.add_service(SERVICE.address(family), PORT, proto, &[backend])?;
        let pod = (POD.address(family), 4_000);
        let request = Frame { payload: vec![7; 71], ..Frame::new(pod, (SERVICE.address(family), PORT), transport) };
        let first = fragment(&request.bytes(), 7_000, 0, 48);
        let sent = bed.run_bytes(Hook::PodIn, &first)?;
        for_each_error(|name, kind, quoted| {
            let ran = bed.run_bytes(Hook::PodOut, &error(kind, ROUTER.address(family), &sent.bytes, quoted + 8))?;
            assert_eq!(ran.action, action::TC_NEXT, "{name}");
            let (_, destination, seen) = read(&ran.bytes)?;
            assert_eq!(destination, pod.0, "{name}");
            assert_eq!(seen, first[ETHERNET..ETHERNET + seen.len()], "{name}");
            Ok(())
        })?;
        assert_eq!(bed.counter(Hook::PodOut, Outcome::Related)?, 12);
        let later = bed.run_bytes(Hook::PodIn, &fragment(&request.bytes(), 7_000, 48, 24))?;
        let about = error(Error::TooBig, ROUTER.address(family), &later.bytes, 20);
        assert_eq!(bed.run_bytes(Hook::PodOut, &about)?.bytes, about, "a later fragment says too little");
        Ok(())
    })
}

#[test]
fn a_pod_that_picked_itself_learns_of_its_own_errors() -> Result<()> {
    for_each_kind(|family, transport, proto| {
        let mut bed = Testbed::new()?;
        let backend = bed.add_backend(POD.address(family), true)?;
        bed.add_service(SERVICE.address(family), PORT, proto, &[backend])?;
        let request = Frame::new((POD.address(family), 4_000), (SERVICE.address(family), PORT), transport);
        let sent = bed.run(Hook::PodIn, &request)?;
        for_each_error(|name, kind, quoted| {
            let ran = bed.run_bytes(Hook::PodIn, &error(kind, POD.address(family), &sent.bytes, quoted))?;
            assert_eq!(ran.action, action::TC_REDIRECT, "{name}");
            let (source, destination, seen) = read(&ran.bytes)?;
            assert_eq!((source, destination), (SERVICE.address(family), POD.address(family)), "{name}");
            assert_eq!(seen, quote(&request, 63, quoted), "{name}");
            Ok(())
        })
    })
}

/// An error that is not about a flow, or not addressed to who sent the packet, or cut short, is nobody's business.
#[test]
fn what_cannot_be_related_is_passed_on_untouched() -> Result<()> {
    type Change = fn(&mut Vec<u8>, usize);
    let cases: [(&str, Change); 7] = [
        ("an echo request", |bytes, at| bytes[at] = if at == 34 { 8 } else { 128 }),
        ("another quoted port", |bytes, at| bytes[at + 8 + (at - ETHERNET)] ^= 1),
        ("another addressee", |bytes, at| bytes[at - 1] ^= 1),
        ("a quoted fragment", |bytes, at| {
            if at == 34 {
                bytes[at + 8 + 7] = 2;
            } else {
                bytes[at + 8 + 6] = 44;
            }
        }),
        ("a quote of another protocol", |bytes, at| bytes[at + 8 + if at == 34 { 9 } else { 6 }] = 132),
        ("a quote of another version", |bytes, at| bytes[at + 8] = 0x55),
        ("a quote cut short", |bytes, at| bytes.truncate(at + 8 + (at - ETHERNET) + 7)),
    ];
    for family in Family::BOTH {
        let mut bed = Testbed::new()?;
        let backend = bed.add_backend(POD2.address(family), true)?;
        bed.add_service(SERVICE.address(family), PORT, Protocol::Udp, &[backend])?;
        let request = Frame::new((POD.address(family), 4_000), (SERVICE.address(family), PORT), Transport::Udp);
        let sent = bed.run(Hook::PodIn, &request)?;
        let message = ETHERNET + if family == Family::V4 { 20 } else { 40 };
        for (name, change) in cases {
            let mut bytes = error(Error::Port, POD2.address(family), &sent.bytes, 8);
            change(&mut bytes, message);
            let ran = bed.run_bytes(Hook::PodOut, &bytes)?;
            assert_eq!((ran.action, &ran.bytes), (action::TC_NEXT, &bytes), "{family:?}: {name}");
        }
        assert_eq!(bed.counter(Hook::PodOut, Outcome::Related)?, 0);
    }
    Ok(())
}

/// The address NodePorts stand for in `SERVICES`.
fn any(family: Family) -> IpAddr {
    match family {
        Family::V4 => std::net::Ipv4Addr::UNSPECIFIED.into(),
        Family::V6 => std::net::Ipv6Addr::UNSPECIFIED.into(),
    }
}
