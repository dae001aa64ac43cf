//! What is longer than the way on takes is left to the kernel, which cuts it or tells its sender.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context as _, Result};
use proxy_common::{
    addr::Protocol,
    outcome::{Hook, Outcome},
};
use tests::{
    fragments::fragment,
    frame::{ETHERNET, Family, Flags, Frame, Transport},
    testbed::{CLIENT, NODE, NODE_PORT, Nature, REMOTE, TARGET, Testbed, action},
};

/// The longest IP packet that the uplink takes in these tests.
const MTU: usize = 1_400;

/// Hooks that send on, with how a packet goes on through the kernel and how it is sent.
const HOOKS: [(Hook, i32, i32); 2] =
    [(Hook::UplinkXdp, action::XDP_PASS, action::XDP_TX), (Hook::UplinkIn, action::TC_NEXT, action::TC_REDIRECT)];

const TRANSPORTS: [(Transport, Protocol); 2] =
    [(Transport::Tcp(Flags::ACK), Protocol::Tcp), (Transport::Udp, Protocol::Udp)];

fn any(family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::UNSPECIFIED.into(),
        Family::V6 => Ipv6Addr::UNSPECIFIED.into(),
    }
}

/// A NodePort whose backend is elsewhere, behind an uplink that takes little.
fn bed(family: Family, proto: Protocol) -> Result<Testbed> {
    let mut bed = Testbed::new()?;
    bed.ip(&format!("link set uplink mtu {MTU}"))?;
    let backend = bed.add_backend(REMOTE.address(family), false)?;
    bed.add_service(any(family), NODE_PORT, proto, &[backend])?;
    Ok(bed)
}

/// A request whose IP packet is that long.
fn request(family: Family, transport: Transport, length: usize) -> Frame {
    let frame = Frame::new((CLIENT.address(family), 50_000), (NODE.address(family), NODE_PORT), transport);
    let headers = frame.bytes().len() - ETHERNET - frame.payload.len();
    Frame { payload: vec![7; length - headers], ..frame }
}

fn for_each_kind(test: impl Fn((Hook, i32, i32), Family, Transport, Protocol) -> Result<()>) -> Result<()> {
    for hook in HOOKS {
        for family in Family::BOTH {
            for (transport, proto) in TRANSPORTS {
                test(hook, family, transport, proto).with_context(|| format!("{hook:?} {family:?} {transport:?}"))?;
            }
        }
    }
    Ok(())
}

#[test]
fn a_packet_longer_than_the_next_hop_takes_is_left_to_the_kernel() -> Result<()> {
    for_each_kind(|(hook, passed, sent), family, transport, proto| {
        let mut bed = bed(family, proto)?;
        let (fits, too_long) = (request(family, transport, MTU), request(family, transport, MTU + 1));
        let backend = (REMOTE.address(family), TARGET);
        // The flow's first packet, and one of a known flow, both ways round.
        for (packet, action) in [(&too_long, passed), (&fits, sent), (&too_long, passed), (&fits, sent)] {
            let frame = bed.expect(hook, packet, action)?;
            assert_eq!(frame.destination, backend);
            let source = if action == sent { NODE } else { CLIENT };
            assert_eq!(frame.source.0, source.address(family));
        }
        // The kernel may have made it fit, by cutting it in two.
        let routed = bed.expect(hook, &too_long, passed)?;
        assert_eq!(bed.expect(Hook::UplinkOut, &routed, action::TC_NEXT)?.source.0, NODE.address(family));
        Ok(())
    })
}

#[test]
fn a_way_that_takes_more_is_noticed_with_the_change_of_routes() -> Result<()> {
    for_each_kind(|(hook, passed, sent), family, transport, proto| {
        let mut bed = bed(family, proto)?;
        let packet = request(family, transport, 1_500);
        bed.expect(hook, &packet, passed)?;
        bed.ip("link set uplink mtu 1500")?;
        bed.expect(hook, &packet, passed)?;
        bed.set_node(|node| node.route_generation += 1)?;
        bed.expect(hook, &packet, sent)?;
        Ok(())
    })
}

#[test]
fn a_generation_of_routes_counts_beyond_sixteen_bits() -> Result<()> {
    let mut bed = bed(Family::V4, Protocol::Udp)?;
    let packet = request(Family::V4, Transport::Udp, MTU);
    for generation in [0xffff, 0x1_0000, 0x1_0001] {
        bed.set_node(|node| node.route_generation = generation)?;
        bed.expect(Hook::UplinkXdp, &packet, action::XDP_TX)?;
    }
    Ok(())
}

/// What will be cut into segments is as long as its segments are.
#[test]
fn segments_are_measured_one_by_one() -> Result<()> {
    for family in Family::BOTH {
        for (transport, proto) in TRANSPORTS {
            let mut bed = bed(family, proto)?;
            let packet = request(family, transport, 2_700);
            let headers = packet.bytes().len() - ETHERNET - packet.payload.len();
            for (segment, action) in [(MTU - headers, action::TC_REDIRECT), (MTU - headers + 1, action::TC_NEXT)] {
                let nature = Nature { segment: u32::try_from(segment)?, ..Nature::default() };
                let ran = bed.run_as(Hook::UplinkIn, &packet.bytes(), nature)?;
                assert_eq!(ran.action, action, "{family:?} {transport:?}: {segment}");
                assert_eq!(Frame::read(&ran.bytes).payload, packet.payload);
            }
        }
    }
    Ok(())
}

/// A later fragment knows the way of the first one, and whether it may go there.
#[test]
fn a_fragment_longer_than_the_next_hop_takes_is_left_to_the_kernel() -> Result<()> {
    for (hook, passed, sent) in HOOKS {
        for family in Family::BOTH {
            let mut bed = bed(family, Protocol::Udp)?;
            let packet = request(family, Transport::Udp, 3_000).bytes();
            assert_eq!(bed.run_bytes(hook, &fragment(&packet, 7, 0, 1_352))?.action, sent, "{hook:?} {family:?}");
            for (length, action) in [(1_352, sent), (1_440, passed)] {
                let ran = bed.run_bytes(hook, &fragment(&packet, 7, 1_352, length))?;
                assert_eq!(ran.action, action, "{hook:?} {family:?}: {length}");
            }
            assert_eq!(bed.counter(hook, Outcome::DropFragment)?, 0);
        }
    }
    Ok(())
}
