//! IPv4 options and IPv6 extension headers stay as they are, and what is behind them is translated like anything else.
//! What lies about its length, or says that the packet is not where it goes yet, is passed on.

use std::net::{Ipv4Addr, Ipv6Addr};

use anyhow::{Context as _, Result};
use proxy_common::{
    addr::Protocol,
    outcome::{Hook, Outcome},
};
use tests::{
    between::{Between, DESTINATION, FRAGMENT, HOP_BY_HOP, ROUTING, padding, sum_up},
    frame::{Family, Flags, Frame, Host, Transport},
    testbed::{
        CLIENT, NODE, NODE_PORT, OTHER_NODE_MAC, POD, POD2, PORT, REMOTE, ROUTER_MAC, SERVICE, TARGET, Testbed,
        UNRESOLVED, action,
    },
};

const TRANSPORTS: [Transport; 3] = [Transport::Tcp(Flags::SYN), Transport::Udp, Transport::UdpUnchecked];

const HOOKS: [(Hook, i32); 3] =
    [(Hook::UplinkXdp, action::XDP_PASS), (Hook::UplinkIn, action::TC_NEXT), (Hook::PodIn, action::TC_NEXT)];

/// For each family a testbed made ready for it, and in it each transport behind each of them, with a port of its own.
fn for_each_kind(
    ready: impl Fn(&mut Testbed, Family, Protocol) -> Result<()>,
    test: impl Fn(&mut Testbed, Family, Transport, &Between, u16) -> Result<()>,
) -> Result<()> {
    for family in Family::BOTH {
        let mut bed = Testbed::new()?;
        ready(&mut bed, family, Protocol::Tcp)?;
        ready(&mut bed, family, Protocol::Udp)?;
        let mut port = 4_000;
        for transport in TRANSPORTS {
            for (name, between) in Between::usual(family) {
                port += 1;
                test(&mut bed, family, transport, &between, port)
                    .with_context(|| format!("{transport:?} behind {name}"))?;
            }
        }
    }
    Ok(())
}

/// A Service with a backend.
fn serve(service: Host, backend: Host, is_local: bool) -> impl Fn(&mut Testbed, Family, Protocol) -> Result<()> {
    move |bed, family, proto| {
        let backend = bed.add_backend(backend.address(family), is_local)?;
        let port = if service == ANY { NODE_PORT } else { PORT };
        bed.add_service(service.address(family), port, proto, &[backend])
    }
}

/// What stands for the node's addresses.
const ANY: Host = Host { v4: Ipv4Addr::UNSPECIFIED, v6: Ipv6Addr::UNSPECIFIED };

/// Runs a frame with something in it. The answer must have the same in it, to the byte, and is read without.
fn expect(bed: &mut Testbed, hook: Hook, frame: &Frame, between: &Between, action: i32) -> Result<Frame> {
    let ran = bed.run_bytes(hook, &between.put_into(&frame.bytes()))?;
    assert_eq!(ran.action, action, "{hook:?}: {frame:?}");
    let read = Frame::read(&ran.bytes);
    assert_eq!(ran.bytes, between.put_into(&read.bytes()), "{hook:?}: {frame:?}");
    Ok(read)
}

#[test]
fn a_pod_reaches_a_service_with_them_and_gets_a_reply_with_them() -> Result<()> {
    for_each_kind(serve(SERVICE, POD2, true), |bed, family, transport, between, port| {
        let pod = (POD.address(family), port);
        let target = (POD2.address(family), TARGET);
        let request = Frame::new(pod, (SERVICE.address(family), PORT), transport);
        let sent = expect(bed, Hook::PodIn, &request, between, action::TC_NEXT)?;
        assert_eq!(sent, Frame { destination: target, ..request.clone() });
        let reply = Frame::new(target, pod, transport);
        let seen = expect(bed, Hook::PodOut, &reply, between, action::TC_NEXT)?;
        assert_eq!(seen, Frame { source: request.destination, ..reply.clone() });
        // The flow is the same without.
        let seen = bed.expect(Hook::PodOut, &reply, action::TC_NEXT)?;
        assert_eq!(seen, Frame { source: request.destination, ..reply });
        Ok(())
    })
}

#[test]
fn an_outside_client_is_sent_on_with_them_in_both_directions() -> Result<()> {
    for (hook, sent_out) in [(Hook::UplinkXdp, action::XDP_TX), (Hook::UplinkIn, action::TC_REDIRECT)] {
        for_each_kind(serve(ANY, REMOTE, false), |bed, family, transport, between, port| {
            let client = (CLIENT.address(family), port);
            let request = Frame::new(client, (NODE.address(family), NODE_PORT), transport);
            let sent = expect(bed, hook, &request, between, sent_out)?;
            let target = (REMOTE.address(family), TARGET);
            assert_eq!((sent.source.0, sent.destination), (NODE.address(family), target));
            assert_eq!((sent.macs.0, sent.hop_limit), (OTHER_NODE_MAC, 63));
            let reply = Frame::new(target, sent.source, transport);
            let seen = expect(bed, hook, &reply, between, sent_out)?;
            assert_eq!((seen.source, seen.destination), (request.destination, client));
            assert_eq!((seen.macs.0, seen.hop_limit), (ROUTER_MAC, 63));
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn what_the_kernel_routes_is_masqueraded_with_them_at_the_way_out() -> Result<()> {
    for_each_kind(serve(ANY, UNRESOLVED, false), |bed, family, transport, between, port| {
        let client = (CLIENT.address(family), port);
        let request = Frame::new(client, (NODE.address(family), NODE_PORT), transport);
        let target = (UNRESOLVED.address(family), TARGET);
        let routed = expect(bed, Hook::UplinkXdp, &request, between, action::XDP_PASS)?;
        assert_eq!((routed.source, routed.destination), (client, target));
        let sent = expect(bed, Hook::UplinkOut, &routed, between, action::TC_NEXT)?;
        assert_eq!((sent.source.0, sent.destination), (NODE.address(family), target));
        Ok(())
    })
}

/// The two fragments of a long packet, each behind what its packet has in front of the fragment header.
fn fragments(frame: &Frame, between: &Between) -> [Vec<u8>; 2] {
    const PIECE: usize = 24;
    let bytes = frame.bytes();
    let head = if frame.source.0.is_ipv4() { 34 } else { 54 };
    let (first, last) = bytes[head..].split_at(PIECE);
    [(first, 0_u16, true), (last, PIECE as u16, false)].map(|(piece, place, more)| {
        let mut bytes = bytes[..head].to_vec();
        if frame.source.0.is_ipv4() {
            bytes[16..18].copy_from_slice(&(20 + piece.len() as u16).to_be_bytes());
            bytes[18..20].copy_from_slice(&[0x12, 0x34]);
            bytes[20..22].copy_from_slice(&((place / 8) | if more { 0x2000 } else { 0 }).to_be_bytes());
            bytes.extend(piece);
            sum_up(&mut bytes);
        } else {
            let next = std::mem::replace(&mut bytes[20], FRAGMENT);
            bytes[18..20].copy_from_slice(&(8 + piece.len() as u16).to_be_bytes());
            bytes.extend([next, 0]);
            bytes.extend((place | u16::from(more)).to_be_bytes());
            bytes.extend([0, 0, 0x12, 0x34]);
            bytes.extend(piece);
        }
        between.put_into(&bytes)
    })
}

#[test]
fn fragments_behind_them_follow_their_first() -> Result<()> {
    for (hook, passed) in HOOKS {
        for_each_kind(serve(SERVICE, POD2, true), |bed, family, transport, between, port| {
            let client = if hook == Hook::PodIn { POD } else { CLIENT };
            let request = Frame::new((client.address(family), port), (SERVICE.address(family), PORT), transport);
            let request = Frame { payload: (0..60).collect(), ..request };
            let wanted = Frame { destination: (POD2.address(family), TARGET), ..request.clone() };
            let pairs = fragments(&request, between).into_iter().zip(fragments(&wanted, between));
            for (index, (given, wanted)) in pairs.enumerate() {
                let ran = bed.run_bytes(hook, &given)?;
                assert_eq!((ran.action, ran.bytes), (passed, wanted), "{hook:?}: fragment {index}");
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// A later fragment ends where its IP header says, behind its fragment header or not.
#[test]
fn a_fragment_that_ends_within_its_own_header_is_passed_on() -> Result<()> {
    for (name, between) in Between::usual(Family::V6) {
        let mut bed = serving(Family::V6)?;
        let frame =
            Frame::new((CLIENT.address(Family::V6), 50_000), (SERVICE.address(Family::V6), PORT), Transport::Udp);
        let [first, mut later] = fragments(&Frame { payload: (0..60).collect(), ..frame }, &between);
        let length = usize::from(u16::from_be_bytes([later[18], later[19]]));
        let behind_header = 60 - 24 + 8;
        for short in [1, 4, 8] {
            let cut = u16::try_from(length - behind_header - short)?;
            later[18..20].copy_from_slice(&cut.to_be_bytes());
            for (hook, passed) in HOOKS {
                let opened = bed.run_bytes(hook, &first)?;
                assert_ne!(opened.bytes, first, "{name}: the flow is there");
                let before = bed.counter(hook, Outcome::PassMalformed)?;
                let ran = bed.run_bytes(hook, &later)?;
                assert_eq!(
                    (ran.action, ran.bytes.as_slice()),
                    (passed, later.as_slice()),
                    "{hook:?}: {name}, {short} short"
                );
                assert_eq!(bed.counter(hook, Outcome::PassMalformed)?, before + 1, "{hook:?}: {name}, {short} short");
            }
        }
    }
    Ok(())
}

/// Runs bytes through every way in: they must come out as they went in, and be counted for what they are.
fn must_pass(bed: &mut Testbed, name: &str, bytes: &[u8], outcome: Outcome) -> Result<()> {
    for (hook, passed) in HOOKS {
        let before = bed.counter(hook, outcome)?;
        let ran = bed.run_bytes(hook, bytes)?;
        assert_eq!((ran.action, ran.bytes.as_slice()), (passed, bytes), "{hook:?}: {name}");
        assert_eq!(bed.counter(hook, outcome)?, before + 1, "{hook:?}: {name}");
        assert_eq!(bed.counter(hook, Outcome::Opened)?, 0, "{hook:?}: {name}");
    }
    Ok(())
}

fn serving(family: Family) -> Result<Testbed> {
    let mut bed = Testbed::new()?;
    for proto in [Protocol::Tcp, Protocol::Udp] {
        serve(SERVICE, POD, true)(&mut bed, family, proto)?;
    }
    Ok(bed)
}

fn request(family: Family, transport: Transport) -> Vec<u8> {
    Frame::new((CLIENT.address(family), 50_000), (SERVICE.address(family), PORT), transport).bytes()
}

#[test]
fn options_that_lie_or_name_a_route_are_passed_on() -> Result<()> {
    let mut bed = serving(Family::V4)?;
    let cases: [(&str, &[u8], Outcome); 8] = [
        ("a loose route", &[131, 7, 4, 192, 0, 2, 77, 0], Outcome::PassOptions),
        ("a strict route behind others", &[1, 148, 4, 0, 0, 137, 3, 4], Outcome::PassOptions),
        ("a route that is over", &[131, 7, 8, 192, 0, 2, 77, 0], Outcome::PassOptions),
        ("an option of no length", &[7, 0, 0, 0], Outcome::PassMalformed),
        ("an option of one byte that has two", &[7, 1, 0, 0], Outcome::PassMalformed),
        ("an option longer than the header", &[7, 5, 4, 0], Outcome::PassMalformed),
        ("an option that begins in the last byte", &[1, 1, 1, 7], Outcome::PassMalformed),
        ("forty bytes and one too many", &[&[1; 37][..], &[7, 4, 4]].concat(), Outcome::PassMalformed),
    ];
    for (name, options, outcome) in cases {
        for transport in [Transport::Tcp(Flags::SYN), Transport::Udp] {
            // What follows the options would make the last of them whole.
            let bytes = Between::Options(options.to_vec()).put_into(&request(Family::V4, transport));
            must_pass(&mut bed, name, &bytes, outcome)?;
        }
    }
    Ok(())
}

#[test]
fn an_ipv4_header_longer_than_its_packet_is_passed_on() -> Result<()> {
    let mut bed = serving(Family::V4)?;
    for (name, total) in [("shorter than the header", 23_u16), ("no room for ports", 27), ("beyond the frame", 5_000)] {
        for transport in [Transport::Tcp(Flags::SYN), Transport::Udp] {
            let mut bytes = Between::Options(vec![1; 4]).put_into(&request(Family::V4, transport));
            bytes[16..18].copy_from_slice(&total.to_be_bytes());
            must_pass(&mut bed, name, &bytes, Outcome::PassMalformed)?;
        }
    }
    Ok(())
}

/// The number of an extension header, and what follows its next header and its length.
type Extension = (u8, Vec<u8>);

#[test]
fn extension_headers_that_lie_or_lead_elsewhere_are_passed_on() -> Result<()> {
    let mut bed = serving(Family::V6)?;
    let usual = |number| (number, padding(6));
    let mut address = vec![2, 1, 0, 0, 0, 0];
    address.extend(CLIENT.v6.octets());
    let cases: [(&str, Vec<Extension>, Outcome); 8] = [
        ("a route with a segment left", vec![(ROUTING, address)], Outcome::PassExtension),
        ("one more than is looked through", vec![usual(DESTINATION); 7], Outcome::PassExtension),
        ("longer than is looked at", vec![(DESTINATION, padding(1_022)); 2], Outcome::PassExtension),
        ("an authentication header", vec![usual(51)], Outcome::PassExtension),
        ("a mobility header behind others", vec![usual(DESTINATION), usual(135)], Outcome::PassExtension),
        ("ESP", vec![usual(DESTINATION), usual(50)], Outcome::PassProtocol),
        ("nothing more", vec![usual(DESTINATION), usual(59)], Outcome::PassProtocol),
        (
            "hop-by-hop options that do not come first",
            vec![usual(DESTINATION), usual(HOP_BY_HOP)],
            Outcome::PassMalformed,
        ),
    ];
    for (name, list, outcome) in cases {
        for transport in [Transport::Tcp(Flags::SYN), Transport::Udp] {
            let bytes = Between::Extensions(list.clone()).put_into(&request(Family::V6, transport));
            must_pass(&mut bed, name, &bytes, outcome)?;
        }
    }
    Ok(())
}

#[test]
fn extension_headers_longer_than_their_packet_are_passed_on() -> Result<()> {
    type Change = fn(&mut Vec<u8>);
    let mut bed = serving(Family::V6)?;
    let cases: [(&str, Change); 6] = [
        ("a header beyond the packet", |bytes| bytes[55] = 200),
        ("a header that ends where the packet does", |bytes| {
            let rest = bytes.len() - 54;
            bytes.truncate(54 + rest / 8 * 8);
            bytes[19] = (rest / 8 * 8) as u8;
            bytes[55] = (rest / 8 - 1) as u8;
        }),
        ("a payload beyond the frame", |bytes| bytes[19] += 1),
        ("a payload shorter than the header", |bytes| bytes[19] = 7),
        ("no length at all", |bytes| bytes[18..20].fill(0)),
        ("a jumbogram that is none", |bytes| {
            bytes[18..20].fill(0);
            let length = (bytes.len() - 54) as u8;
            bytes[56..62].copy_from_slice(&[194, 4, 0, 0, 0, length]);
        }),
    ];
    for (name, change) in cases {
        for transport in [Transport::Tcp(Flags::SYN), Transport::Udp] {
            let mut bytes =
                Between::Extensions(vec![(HOP_BY_HOP, padding(6))]).put_into(&request(Family::V6, transport));
            change(&mut bytes);
            must_pass(&mut bed, name, &bytes, Outcome::PassMalformed)?;
        }
    }
    Ok(())
}

#[test]
fn a_packet_cut_short_anywhere_in_them_is_passed_on() -> Result<()> {
    for family in Family::BOTH {
        let mut bed = serving(family)?;
        for (name, between) in Between::usual(family) {
            let bytes = between.put_into(&request(family, Transport::Tcp(Flags::SYN)));
            for length in 54..bytes.len() {
                for (hook, passed) in HOOKS {
                    let ran = bed.run_bytes(hook, &bytes[..length])?;
                    assert_eq!((ran.action, ran.bytes.as_slice()), (passed, &bytes[..length]), "{name}: {length}");
                }
            }
        }
        for (hook, _) in HOOKS {
            let counted: Vec<_> = bed.counters()?.into_iter().filter(|(counted, ..)| *counted == hook).collect();
            assert!(matches!(counted.as_slice(), [(_, Outcome::PassMalformed, _)]), "{counted:?}");
        }
    }
    Ok(())
}
