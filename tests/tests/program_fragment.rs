//! Fragments: the first has the ports, the others follow it, in whatever order they come after it.
#![allow(clippy::unwrap_used, clippy::panic, reason = "packets that a helper builds or reads are part of the test")]

use std::net::IpAddr;

use anyhow::{Context as _, Result};
use proxy_common::{
    addr::Protocol,
    outcome::{Hook, Outcome},
};
use tests::{
    frame::{ETHERNET, Family, Flags, Frame, Transport},
    testbed::{
        CLIENT, NODE, NODE_PORT, OTHER_NODE_MAC, POD, POD2, PORT, REMOTE, ROUTER_MAC, SERVICE, TARGET, Testbed,
        UNRESOLVED, action,
    },
};

const TRANSPORTS: [(Transport, Protocol); 3] = [
    (Transport::Tcp(Flags::SYN), Protocol::Tcp),
    (Transport::Udp, Protocol::Udp),
    (Transport::UdpUnchecked, Protocol::Udp),
];

/// Payload of a fragment; a multiple of eight.
const PIECE: usize = 24;

fn internet(frame: &Frame) -> usize {
    if frame.source.0.is_ipv4() { 20 } else { 40 }
}

/// A packet long enough for four fragments.
fn long(source: (IpAddr, u16), destination: (IpAddr, u16), transport: Transport) -> Frame {
    Frame { payload: (0..71).collect(), ..Frame::new(source, destination, transport) }
}

/// Cuts a packet as RFC 791 and RFC 8200 have it.
fn fragments(frame: &Frame, id: u16) -> Vec<Vec<u8>> {
    let bytes = frame.bytes();
    let (head, body) = bytes.split_at(ETHERNET + internet(frame));
    let last = body.chunks(PIECE).count() - 1;
    let cut = |(index, piece): (usize, &[u8])| {
        let (place, more) = ((index * PIECE / 8) as u16, index < last);
        let mut bytes = head.to_vec();
        if frame.source.0.is_ipv4() {
            bytes[16..18].copy_from_slice(&(20 + piece.len() as u16).to_be_bytes());
            bytes[18..20].copy_from_slice(&id.to_be_bytes());
            bytes[20..22].copy_from_slice(&(place | if more { 0x2000 } else { 0 }).to_be_bytes());
            bytes[24..26].fill(0);
            let header = etherparse::Ipv4HeaderSlice::from_slice(&bytes[14..34]).unwrap().to_header();
            bytes[24..26].copy_from_slice(&header.calc_header_checksum().to_be_bytes());
        } else {
            let next = std::mem::replace(&mut bytes[20], 44);
            bytes[18..20].copy_from_slice(&(8 + piece.len() as u16).to_be_bytes());
            bytes.extend([next, 0]);
            bytes.extend((place << 3 | u16::from(more)).to_be_bytes());
            bytes.extend([0, 1]);
            bytes.extend(id.to_be_bytes());
        }
        bytes.extend(piece);
        bytes
    };
    body.chunks(PIECE).enumerate().map(cut).collect()
}

/// Puts fragments that are in order together again and reads the packet, with all its checksums.
fn reassemble(fragments: &[Vec<u8>]) -> Frame {
    let is_v4 = fragments[0][12..14] == [8, 0];
    let (header, extra) = if is_v4 { (20, 0) } else { (40, 8) };
    let mut bytes = fragments[0][..ETHERNET + header].to_vec();
    for fragment in fragments {
        assert_eq!(fragment[26..ETHERNET + header], bytes[26..], "all have the same addresses");
        if is_v4 {
            let slice = etherparse::Ipv4HeaderSlice::from_slice(&fragment[14..34]).unwrap();
            assert_eq!(slice.header_checksum(), slice.to_header().calc_header_checksum(), "checksum of a fragment");
        }
    }
    let body: Vec<u8> = fragments.iter().flat_map(|fragment| fragment[ETHERNET + header + extra..].to_vec()).collect();
    if is_v4 {
        bytes[16..18].copy_from_slice(&(20 + body.len() as u16).to_be_bytes());
        bytes[18..22].fill(0);
        let header = etherparse::Ipv4HeaderSlice::from_slice(&bytes[14..34]).unwrap().to_header();
        bytes[24..26].copy_from_slice(&header.calc_header_checksum().to_be_bytes());
    } else {
        bytes[18..20].copy_from_slice(&(body.len() as u16).to_be_bytes());
        bytes[20] = fragments[0][54];
    }
    bytes.extend(body);
    Frame::read(&bytes)
}

/// Runs all fragments of a packet, the first one first and the others backwards, and reads what came of it.
fn expect(bed: &mut Testbed, hook: Hook, frame: &Frame, action: i32) -> Result<Frame> {
    let pieces = fragments(frame, 7_000);
    assert!(pieces.len() > 3);
    let mut out = vec![Vec::new(); pieces.len()];
    for index in std::iter::once(0).chain((1..pieces.len()).rev()) {
        let ran = bed.run_bytes(hook, &pieces[index])?;
        assert_eq!(ran.action, action, "{hook:?}: fragment {index}");
        out[index] = ran.bytes;
    }
    Ok(reassemble(&out))
}

fn for_each_kind(test: impl Fn(Family, Transport, Protocol) -> Result<()>) -> Result<()> {
    for family in Family::BOTH {
        for (transport, proto) in TRANSPORTS {
            test(family, transport, proto).with_context(|| format!("{family:?} {transport:?}"))?;
        }
    }
    Ok(())
}

fn any(family: Family) -> IpAddr {
    match family {
        Family::V4 => std::net::Ipv4Addr::UNSPECIFIED.into(),
        Family::V6 => std::net::Ipv6Addr::UNSPECIFIED.into(),
    }
}

/// Trap 13: a fragmented request reaches its backend whole, and so does the reply its client.
#[test]
fn fragments_of_a_pod_follow_the_first_one() -> Result<()> {
    for_each_kind(|family, transport, proto| {
        let mut bed = Testbed::new()?;
        let backend = bed.add_backend(POD2.address(family), true)?;
        bed.add_service(SERVICE.address(family), PORT, proto, &[backend])?;
        let pod = (POD.address(family), 4_000);
        let target = (POD2.address(family), TARGET);

        let request = long(pod, (SERVICE.address(family), PORT), transport);
        let sent = expect(&mut bed, Hook::PodIn, &request, action::TC_NEXT)?;
        assert_eq!(sent, Frame { destination: target, ..request.clone() });

        let reply = long(target, pod, transport);
        let seen = expect(&mut bed, Hook::PodOut, &reply, action::TC_NEXT)?;
        assert_eq!(seen, Frame { source: request.destination, ..reply });
        Ok(())
    })
}

/// Trap 13: all fragments of an outside client go to one backend under one masqueraded name, without the kernel.
#[test]
fn fragments_of_an_outside_client_are_sent_on_like_the_first_one() -> Result<()> {
    for (hook, sent_out) in [(Hook::UplinkXdp, action::XDP_TX), (Hook::UplinkIn, action::TC_REDIRECT)] {
        for_each_kind(|family, transport, proto| {
            let mut bed = Testbed::new()?;
            let backend = bed.add_backend(REMOTE.address(family), false)?;
            bed.add_service(any(family), NODE_PORT, proto, &[backend])?;
            let client = (CLIENT.address(family), 50_000);

            let request = long(client, (NODE.address(family), NODE_PORT), transport);
            let sent = expect(&mut bed, hook, &request, sent_out)?;
            let target = (REMOTE.address(family), TARGET);
            assert_eq!((sent.source.0, sent.destination), (NODE.address(family), target));
            assert_eq!((sent.macs.0, sent.hop_limit, &sent.payload), (OTHER_NODE_MAC, 63, &request.payload));

            let reply = long(target, sent.source, transport);
            let seen = expect(&mut bed, hook, &reply, sent_out)?;
            assert_eq!((seen.source, seen.destination), (request.destination, client));
            assert_eq!((seen.macs.0, &seen.payload), (ROUTER_MAC, &reply.payload));
            Ok(())
        })?;
    }
    Ok(())
}

/// Trap 13: what the kernel has to route is translated in two steps, and every fragment takes both.
#[test]
fn fragments_that_go_through_the_kernel_are_masqueraded_at_the_way_out() -> Result<()> {
    for_each_kind(|family, transport, proto| {
        let mut bed = Testbed::new()?;
        let backend = bed.add_backend(UNRESOLVED.address(family), false)?;
        bed.add_service(any(family), NODE_PORT, proto, &[backend])?;
        let client = (CLIENT.address(family), 50_000);
        let request = long(client, (NODE.address(family), NODE_PORT), transport);
        let target = (UNRESOLVED.address(family), TARGET);
        let routed = expect(&mut bed, Hook::UplinkXdp, &request, action::XDP_PASS)?;
        assert_eq!((routed.source, routed.destination), (client, target));
        let sent = expect(&mut bed, Hook::UplinkOut, &routed, action::TC_NEXT)?;
        assert_eq!((sent.source.0, sent.destination), (NODE.address(family), target));
        assert_eq!(sent.payload, request.payload);
        Ok(())
    })
}

/// Trap 13: without the first fragment nobody knows where the others belong.
#[test]
fn a_fragment_before_the_first_one_is_passed_on_and_counted() -> Result<()> {
    for family in Family::BOTH {
        let mut bed = Testbed::new()?;
        let backend = bed.add_backend(POD2.address(family), true)?;
        bed.add_service(SERVICE.address(family), PORT, Protocol::Udp, &[backend])?;
        let request = long((POD.address(family), 4_000), (SERVICE.address(family), PORT), Transport::Udp);
        let pieces = fragments(&request, 7_000);
        let of_another = fragments(&request, 7_001);
        bed.run_bytes(Hook::PodIn, &of_another[0])?;
        for piece in &pieces[1..] {
            let ran = bed.run_bytes(Hook::PodIn, piece)?;
            assert_eq!((ran.action, &ran.bytes), (action::TC_NEXT, piece));
        }
        assert_eq!(bed.counter(Hook::PodIn, Outcome::PassFragment)?, pieces.len() as u64 - 1);
    }
    Ok(())
}

/// A fragment that lies about its length, or has no room for its transport header, is left alone.
#[test]
fn fragments_that_lie_are_passed_on() -> Result<()> {
    type Change = fn(&mut Vec<u8>, Family);
    let cases: [(&str, Change); 3] = [
        ("longer than the frame", |bytes, family| bytes[if family == Family::V4 { 17 } else { 19 }] += 1),
        ("no room for ports", |bytes, family| {
            let (at, length) = if family == Family::V4 { (17, 20 + 7) } else { (19, 8 + 7) };
            bytes[at] = length;
        }),
        ("shorter than its headers", |bytes, family| {
            let (at, length) = if family == Family::V4 { (17, 19) } else { (19, 7) };
            bytes[at] = length;
        }),
    ];
    for family in Family::BOTH {
        for transport in [Transport::Tcp(Flags::SYN), Transport::Udp] {
            let mut bed = Testbed::new()?;
            let backend = bed.add_backend(POD2.address(family), true)?;
            for proto in [Protocol::Tcp, Protocol::Udp] {
                bed.add_service(SERVICE.address(family), PORT, proto, &[backend])?;
            }
            let request = long((CLIENT.address(family), 4_000), (SERVICE.address(family), PORT), transport);
            for (hook, passed) in [(Hook::UplinkXdp, action::XDP_PASS), (Hook::PodIn, action::TC_NEXT)] {
                for (name, change) in cases {
                    let mut bytes = fragments(&request, 7_000).remove(0);
                    change(&mut bytes, family);
                    let ran = bed.run_bytes(hook, &bytes)?;
                    assert_eq!((ran.action, &ran.bytes), (passed, &bytes), "{family:?} {transport:?}: {name}");
                }
                assert_eq!(bed.counter(hook, Outcome::PassMalformed)?, 3, "{family:?} {transport:?}");
            }
        }
    }
    Ok(())
}
