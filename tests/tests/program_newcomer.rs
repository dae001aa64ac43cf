//! Packets that no flow knows, while another proxy is at work on the node or another version takes over.

use std::net::IpAddr;

use anyhow::Result;
use proxy_common::{
    addr::Protocol,
    flow::Tier,
    node::newcomers::{HOLD, LEAVE, LOOK},
    outcome::{Hook, Outcome},
    service::{Service, flag},
};
use tests::{
    frame::{Flags, Frame, Host, Transport},
    testbed::{CLIENT, NODE, NODE_PORT, POD, POD2, PORT, SERVICE, Testbed, action},
};

const SYN: Transport = Transport::Tcp(Flags::SYN);
const ACK: Transport = Transport::Tcp(Flags::ACK);
const UDP: Transport = Transport::Udp;

/// Addresses of one family.
type Of = fn(Host) -> IpAddr;
const FAMILIES: [Of; 2] = [|host| host.v4.into(), |host| host.v6.into()];

/// A Service with a pod of this node behind it, at its own address and at a NodePort.
fn bed(of: Of) -> Result<Testbed> {
    let mut bed = Testbed::new()?;
    let backend = bed.add_backend(of(POD2), true)?;
    for proto in [Protocol::Tcp, Protocol::Udp] {
        bed.add_service(of(SERVICE), PORT, proto, &[backend])?;
        let range = bed.add_slots(&[backend])?;
        let any: IpAddr = if of(NODE).is_ipv4() { [0; 4].into() } else { [0; 16].into() };
        let service =
            Service { index: 2, flags: flag::EXTERNAL, internal: range, external: range, ..Service::default() };
        bed.set_service(any, NODE_PORT, proto, service)?;
    }
    Ok(bed)
}

/// What is held is so for ten seconds.
fn set(bed: &mut Testbed, flags: u32) -> Result<()> {
    let length = 10 * bed.jiffies_per_second();
    hold(bed, flags, length)
}

/// What is held is so for some jiffies from now on; 2^32 less those that have passed for what was to be let go.
fn hold(bed: &mut Testbed, flags: u32, jiffies: u32) -> Result<()> {
    let until = bed.jiffies()?.wrapping_add(jiffies);
    bed.set_node(|node| (node.flags, node.held_until) = (flags, until))
}

fn from_pod(of: Of, port: u16, transport: Transport) -> Frame {
    Frame::new((of(POD), port), (of(SERVICE), PORT), transport)
}

fn from_outside(of: Of, port: u16, transport: Transport) -> Frame {
    Frame::new((of(CLIENT), port), (of(NODE), NODE_PORT), transport)
}

/// Whether a packet is translated, and not passed on as it is.
fn is_translated(bed: &mut Testbed, of: Of, hook: Hook, frame: &Frame) -> Result<bool> {
    let pass = if hook == Hook::UplinkXdp { action::XDP_PASS } else { action::TC_NEXT };
    let after = bed.expect(hook, frame, pass)?;
    assert_eq!(after.source, frame.source);
    let is_translated = after.destination.0 == of(POD2);
    assert_eq!(is_translated, after.destination != frame.destination);
    Ok(is_translated)
}

#[test]
fn what_was_left_to_another_proxy_stays_with_it_and_what_is_new_does_not() -> Result<()> {
    for of in FAMILIES {
        let mut bed = bed(of)?;
        let frames = |port| {
            let (tcp, udp) = (from_pod(of, port, ACK), from_pod(of, port, UDP));
            let outside = from_outside(of, port, UDP);
            [(Hook::PodIn, tcp), (Hook::PodIn, udp), (Hook::UplinkXdp, outside.clone()), (Hook::UplinkIn, outside)]
        };
        set(&mut bed, LEAVE | LOOK)?;
        for (hook, frame) in frames(4_000) {
            assert!(!is_translated(&mut bed, of, hook, &frame)?, "{hook:?} {frame:?}");
        }
        set(&mut bed, LOOK)?;
        for (hook, frame) in frames(4_000) {
            assert!(!is_translated(&mut bed, of, hook, &frame)?, "{hook:?} {frame:?}");
        }
        for (hook, frame) in frames(4_001) {
            assert!(is_translated(&mut bed, of, hook, &frame)?, "{hook:?} {frame:?}");
        }
        assert_eq!(bed.counter(Hook::PodIn, Outcome::PassForeign)?, 4);
        assert_eq!(bed.counter(Hook::UplinkXdp, Outcome::PassForeign)?, 2);
        // Nobody is at work beside us any more.
        set(&mut bed, 0)?;
        assert!(is_translated(&mut bed, of, Hook::PodIn, &from_pod(of, 4_000, UDP))?);
    }
    Ok(())
}

#[test]
fn a_known_flow_goes_on_while_new_ones_are_left_to_another_proxy_or_held() -> Result<()> {
    for (of, flags) in FAMILIES.into_iter().flat_map(|of| [(of, LEAVE), (of, HOLD)]) {
        let mut bed = bed(of)?;
        let known = from_pod(of, 4_000, UDP);
        assert!(is_translated(&mut bed, of, Hook::PodIn, &known)?);
        set(&mut bed, flags)?;
        assert!(is_translated(&mut bed, of, Hook::PodIn, &known)?);
        let reply = Frame::new((of(POD2), 8_080), (of(POD), 4_000), UDP);
        assert_eq!(bed.expect(Hook::PodOut, &reply, action::TC_NEXT)?.source, (of(SERVICE), PORT));
        let entered = bed.turnover(Tier::Embryos)?.entered;
        let new = from_pod(of, 4_001, UDP);
        if flags == LEAVE {
            assert!(!is_translated(&mut bed, of, Hook::PodIn, &new)?);
        } else {
            assert_eq!(bed.run(Hook::PodIn, &new)?.action, action::TC_DROP);
            assert_eq!(bed.counter(Hook::PodIn, Outcome::DropHeld)?, 1);
        }
        assert_eq!(bed.turnover(Tier::Embryos)?.entered, entered, "no flow was opened");
    }
    Ok(())
}

/// Who was to let them go has been killed: a moment ago, an hour ago, and so long ago that a sign would take it for the future.
#[test]
fn flows_that_nobody_lets_go_are_opened_when_their_time_is_over() -> Result<()> {
    for (of, long) in FAMILIES.into_iter().flat_map(|of| [1, 1_000_000, (1 << 31) + 1_000].map(|long| (of, long))) {
        let mut bed = bed(of)?;
        let new = from_pod(of, 4_000, SYN);
        set(&mut bed, HOLD)?;
        assert_eq!(bed.run(Hook::PodIn, &new)?.action, action::TC_DROP);
        hold(&mut bed, HOLD, 0_u32.wrapping_sub(long))?;
        assert!(is_translated(&mut bed, of, Hook::PodIn, &new)?, "{long} jiffies ago");
    }
    Ok(())
}

#[test]
fn what_no_service_has_is_refused_to_nobody_else() -> Result<()> {
    for of in FAMILIES {
        let mut bed = bed(of)?;
        bed.add_service(of(SERVICE), 0, Protocol::Any, &[])?;
        let undefined = Frame::new((of(POD), 4_000), (of(SERVICE), PORT + 1), SYN);
        assert_eq!(bed.run(Hook::PodIn, &undefined)?.action, action::TC_REDIRECT, "answered with a RST");
        set(&mut bed, LEAVE)?;
        assert!(!is_translated(&mut bed, of, Hook::PodIn, &undefined)?);
        assert_eq!(bed.counter(Hook::PodIn, Outcome::RejectNoPort)?, 1);
        assert_eq!(bed.foreign(of(POD).is_ipv4())?, 0, "nobody is going to ask");
        set(&mut bed, LEAVE | LOOK)?;
        assert!(!is_translated(&mut bed, of, Hook::PodIn, &undefined)?);
        // What goes to nobody's Service is noted nowhere.
        let elsewhere = Frame::new((of(POD), 4_000), (of(CLIENT), 443), SYN);
        assert!(!is_translated(&mut bed, of, Hook::PodIn, &elsewhere)?);
        assert_eq!(bed.foreign(of(POD).is_ipv4())?, 1);
    }
    Ok(())
}
