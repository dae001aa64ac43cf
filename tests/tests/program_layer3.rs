//! Packets that begin with their IP header, as on tunnels: what is translated is the same as behind an Ethernet header.

use std::net::{Ipv4Addr, Ipv6Addr};

use anyhow::{Context as _, Result};
use proxy_common::{
    addr::Protocol,
    outcome::{Hook, Outcome},
};
use tests::{
    between::Between,
    frame::{ETHERNET, Family, Flags, Frame, Host, Transport},
    testbed::{CLIENT, NODE, NODE_PORT, POD, PORT, REMOTE, SERVICE, TARGET, Testbed, action},
};

const TRANSPORTS: [Transport; 3] = [Transport::Tcp(Flags::SYN), Transport::Udp, Transport::UdpUnchecked];

/// What stands for the node's addresses.
const ANY: Host = Host { v4: Ipv4Addr::UNSPECIFIED, v6: Ipv6Addr::UNSPECIFIED };

fn for_each_kind(test: impl Fn(&mut Testbed, Family, Transport, u16) -> Result<()>) -> Result<()> {
    for family in Family::BOTH {
        let mut bed = Testbed::new()?;
        for proto in [Protocol::Tcp, Protocol::Udp] {
            let here = bed.add_backend(POD.address(family), true)?;
            let elsewhere = bed.add_backend(REMOTE.address(family), false)?;
            bed.add_service(SERVICE.address(family), PORT, proto, &[here])?;
            bed.add_service(ANY.address(family), NODE_PORT, proto, &[elsewhere])?;
        }
        for (port, transport) in (4_000..).zip(TRANSPORTS) {
            test(&mut bed, family, transport, port).with_context(|| format!("{family:?} {transport:?}"))?;
        }
    }
    Ok(())
}

/// What is behind the Ethernet header of a frame that etherparse has built.
fn bare(frame: &Frame) -> Vec<u8> {
    frame.bytes().split_off(ETHERNET)
}

/// Reads a packet, with all its checksums, as if it had an Ethernet header.
fn read(like: &Frame, packet: &[u8]) -> Frame {
    Frame::read(&[&like.bytes()[..ETHERNET], packet].concat())
}

#[test]
fn a_packet_to_a_pod_here_is_translated() -> Result<()> {
    for_each_kind(|bed, family, transport, port| {
        let request = Frame::new((CLIENT.address(family), port), (SERVICE.address(family), PORT), transport);
        let wanted = Frame { destination: (POD.address(family), TARGET), ..request.clone() };
        let ran = bed.run_program("uplink_in_l3", &bare(&request))?;
        assert_eq!((ran.action, ran.bytes), (action::TC_NEXT, bare(&wanted)));
        for (name, between) in Between::usual(family) {
            let ran = bed.run_program("uplink_in_l3", &between.put_into(&request.bytes())[ETHERNET..])?;
            assert_eq!(ran.bytes, between.put_into(&wanted.bytes())[ETHERNET..], "{name}");
        }
        Ok(())
    })
}

/// Nobody but the kernel makes the header that the way out has.
#[test]
fn a_packet_to_a_pod_elsewhere_and_its_reply_are_left_to_the_kernel_to_route() -> Result<()> {
    for_each_kind(|bed, family, transport, port| {
        let client = (CLIENT.address(family), port);
        let (frontend, target) = ((NODE.address(family), NODE_PORT), (REMOTE.address(family), TARGET));
        let request = Frame::new(client, frontend, transport);
        let routed = Frame { destination: target, ..request.clone() };
        let ran = bed.run_program("uplink_in_l3", &bare(&request))?;
        assert_eq!((ran.action, ran.bytes), (action::TC_NEXT, bare(&routed)));
        let ran = bed.run_program("uplink_out_l3", &bare(&routed))?;
        let sent = read(&routed, &ran.bytes);
        assert_eq!((ran.action, sent.source.0, sent.destination), (action::TC_NEXT, NODE.address(family), target));

        let reply = Frame::new(target, sent.source, transport);
        let routed = Frame { destination: client, ..reply.clone() };
        let ran = bed.run_program("uplink_in_l3", &bare(&reply))?;
        assert_eq!((ran.action, ran.bytes), (action::TC_NEXT, bare(&routed)));
        let ran = bed.run_program("uplink_out_l3", &bare(&routed))?;
        let seen = read(&routed, &ran.bytes);
        assert_eq!((ran.action, seen.source, seen.destination), (action::TC_NEXT, frontend, client));
        Ok(())
    })
}

#[test]
fn what_lies_about_its_length_or_is_no_ip_is_passed_on() -> Result<()> {
    for_each_kind(|bed, family, transport, port| {
        let request = bare(&Frame::new((CLIENT.address(family), port), (SERVICE.address(family), PORT), transport));
        let mut longer = request.clone();
        longer[if family == Family::V4 { 3 } else { 5 }] += 1;
        let before = bed.counter(Hook::UplinkIn, Outcome::PassMalformed)?;
        let ran = bed.run_program("uplink_in_l3", &longer)?;
        assert_eq!((ran.action, ran.bytes), (action::TC_NEXT, longer));
        assert_eq!(bed.counter(Hook::UplinkIn, Outcome::PassMalformed)?, before + 1);
        let mut other = request;
        other[0] = 0x15;
        let ran = bed.run_program("uplink_in_l3", &other)?;
        assert_eq!((ran.action, ran.bytes), (action::TC_NEXT, other));
        Ok(())
    })
}
