//! What is not ours and what is not understood is passed on untouched, and counted for what it is.

use anyhow::Result;
use proxy_common::{
    addr::Protocol,
    outcome::{Hook, Outcome},
};
use tests::{
    frame::{ETHERNET, Family, Flags, Frame, Transport},
    testbed::{CLIENT, NODE, NODE_PORT, POD, PORT, SERVICE, Testbed, action},
};

/// A hook with what it answers to a packet it lets go.
const HOOKS: [(Hook, i32); 3] =
    [(Hook::UplinkXdp, action::XDP_PASS), (Hook::UplinkIn, action::TC_NEXT), (Hook::PodIn, action::TC_NEXT)];

const TRANSPORTS: [Transport; 2] = [Transport::Tcp(Flags::SYN), Transport::Udp];

fn bed(family: Family) -> Result<Testbed> {
    let mut bed = Testbed::new()?;
    let backend = bed.add_backend(POD.address(family), true)?;
    for proto in [Protocol::Tcp, Protocol::Udp] {
        bed.add_service(SERVICE.address(family), PORT, proto, &[backend])?;
    }
    Ok(bed)
}

fn request(family: Family, transport: Transport) -> Frame {
    Frame::new((CLIENT.address(family), 50_000), (SERVICE.address(family), PORT), transport)
}

fn internet(family: Family) -> usize {
    if family == Family::V4 { 20 } else { 40 }
}

/// Runs bytes through a hook: they must come out as they went in, and only `outcome` may have been counted, once.
fn must_pass(
    bed: &mut Testbed,
    hook: Hook,
    passed: i32,
    bytes: &[u8],
    outcome: Option<Outcome>,
    name: &str,
) -> Result<()> {
    let before = bed.counters()?;
    let ran = bed.run_bytes(hook, bytes)?;
    assert_eq!(ran.action, passed, "{hook:?}: {name}");
    assert_eq!(ran.bytes, bytes, "{hook:?}: {name}");
    let mut expected = before;
    if let Some(outcome) = outcome {
        match expected.iter_mut().find(|seen| (seen.0, seen.1) == (hook, outcome)) {
            Some(seen) => seen.2 += 1,
            None => expected.push((hook, outcome, 1)),
        }
        expected.sort();
    }
    let mut after = bed.counters()?;
    after.sort();
    assert_eq!(after, expected, "{hook:?}: {name}");
    Ok(())
}

#[test]
fn a_packet_cut_short_anywhere_in_its_headers_is_passed_on() -> Result<()> {
    for family in Family::BOTH {
        let mut bed = bed(family)?;
        for transport in TRANSPORTS {
            let bytes = request(family, transport).bytes();
            for length in ETHERNET..bytes.len() {
                for (hook, passed) in HOOKS {
                    // The kernel gives no skb without a whole IP header to a test run of a classifier.
                    if hook != Hook::UplinkXdp && length < ETHERNET + internet(family) {
                        continue;
                    }
                    let name = format!("{family:?} {transport:?} cut to {length} bytes");
                    must_pass(&mut bed, hook, passed, &bytes[..length], Some(Outcome::PassMalformed), &name)?;
                }
            }
        }
    }
    Ok(())
}

#[test]
fn lengths_that_lie_are_passed_on() -> Result<()> {
    type Change = fn(&mut Vec<u8>);
    let v4: [(&str, Transport, Change); 8] = [
        ("a total length beyond the frame", Transport::Udp, |b| b[17] += 1),
        ("a total length of the header alone", Transport::Udp, |b| b[16..18].copy_from_slice(&[0, 20])),
        ("a total length shorter than the header", Transport::Udp, |b| b[16..18].copy_from_slice(&[0, 19])),
        ("a header length of four words", Transport::Udp, |b| b[14] = 0x44),
        ("another version", Transport::Udp, |b| b[14] = 0x55),
        ("a UDP length beyond the packet", Transport::Udp, |b| b[14 + 20 + 5] += 1),
        ("a UDP length shorter than its header", Transport::Udp, |b| b[14 + 20 + 5] = 7),
        ("a TCP offset beyond the packet", Transport::Tcp(Flags::SYN), |b| b[14 + 20 + 12] = 0xf0),
    ];
    let v6: [(&str, Transport, Change); 5] = [
        ("a payload length beyond the frame", Transport::Udp, |b| b[19] += 1),
        ("a payload length of nothing", Transport::Udp, |b| b[18..20].copy_from_slice(&[0, 0])),
        ("another version", Transport::Udp, |b| b[14] = 0x40),
        ("a UDP length beyond the packet", Transport::Udp, |b| b[14 + 40 + 5] += 1),
        ("a TCP offset of four words", Transport::Tcp(Flags::SYN), |b| b[14 + 40 + 12] = 0x40),
    ];
    for (family, cases) in [(Family::V4, v4.as_slice()), (Family::V6, v6.as_slice())] {
        let mut bed = bed(family)?;
        for (name, transport, change) in cases {
            let mut bytes = request(family, *transport).bytes();
            change(&mut bytes);
            for (hook, passed) in HOOKS {
                must_pass(&mut bed, hook, passed, &bytes, Some(Outcome::PassMalformed), name)?;
            }
        }
    }
    Ok(())
}

#[test]
fn fragments_without_their_first_tags_and_other_protocols_are_passed_on() -> Result<()> {
    type Change = fn(&mut Vec<u8>);
    let cases: [(&str, Family, Outcome, Change); 5] = [
        ("a later fragment", Family::V4, Outcome::PassFragment, |b| b[21] = 3),
        ("an IPv6 fragment", Family::V6, Outcome::PassFragment, |b| {
            let next = std::mem::replace(&mut b[20], 44);
            b[19] += 8;
            b.splice(54..54, [next, 0, 1, 4, 0, 0, 0, 0]);
        }),
        ("a VLAN tag", Family::V4, Outcome::PassVlan, |b| drop(b.splice(12..12, [0x81, 0, 0, 5]))),
        ("GRE", Family::V4, Outcome::PassProtocol, |b| b[23] = 47),
        ("a protocol nobody has", Family::V6, Outcome::PassProtocol, |b| b[20] = 253),
    ];
    for (name, family, outcome, change) in cases {
        let mut bed = bed(family)?;
        let mut bytes = request(family, Transport::Udp).bytes();
        change(&mut bytes);
        for (hook, passed) in HOOKS {
            must_pass(&mut bed, hook, passed, &bytes, Some(outcome), name)?;
        }
    }
    Ok(())
}

#[test]
fn what_is_not_ours_is_passed_on_uncounted() -> Result<()> {
    for family in Family::BOTH {
        let mut bed = bed(family)?;
        let stranger = Frame::new((SERVICE.address(family), PORT), (CLIENT.address(family), 50_000), Transport::Udp);
        let to_node = Frame::new((CLIENT.address(family), 5), (NODE.address(family), 22), Transport::Tcp(Flags::SYN));
        let unserved = Frame::new((CLIENT.address(family), 5), (NODE.address(family), NODE_PORT), Transport::Udp);
        for (hook, passed) in HOOKS {
            for (name, frame) in [("a stranger", &stranger), ("the node's own", &to_node), ("no NodePort", &unserved)] {
                must_pass(&mut bed, hook, passed, &frame.bytes(), None, name)?;
            }
            let mut arp = stranger.bytes();
            arp[12..14].copy_from_slice(&[0x08, 0x06]);
            must_pass(&mut bed, hook, passed, &arp, None, "ARP")?;
        }
        for hook in [Hook::PodOut, Hook::UplinkOut] {
            let from_backend =
                Frame::new((POD.address(family), 8_080), (CLIENT.address(family), 50_000), Transport::Udp);
            must_pass(&mut bed, hook, action::TC_NEXT, &from_backend.bytes(), None, "a backend's own traffic")?;
        }
    }
    Ok(())
}

#[test]
fn padding_behind_a_packet_is_neither_an_error_nor_touched() -> Result<()> {
    let mut bed = bed(Family::V4)?;
    let mut bytes = request(Family::V4, Transport::Udp).bytes();
    let length = bytes.len();
    bytes.extend([0xa5; 9]);
    let ran = bed.run_bytes(Hook::UplinkXdp, &bytes)?;
    assert_eq!(ran.action, action::XDP_PASS);
    assert_eq!(Frame::read(&ran.bytes[..length]).destination.0, POD.address(Family::V4));
    assert_eq!(ran.bytes[length..], [0xa5; 9]);
    Ok(())
}
