//! Fragments: the first has the ports, the others follow it, in whatever order they come after it.

use std::net::IpAddr;

use anyhow::{Context as _, Result};
use proxy_common::{
    addr::Protocol,
    outcome::{Hook, Outcome},
    service::Service,
};
use tests::{
    fragments::{cut, fragment, reassemble},
    frame::{Family, Flags, Frame, Host, Transport},
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

/// A packet long enough for four fragments.
fn long(source: (IpAddr, u16), destination: (IpAddr, u16), transport: Transport) -> Frame {
    Frame { payload: (0..71).collect(), ..Frame::new(source, destination, transport) }
}

fn fragments(frame: &Frame, id: u16) -> Vec<Vec<u8>> {
    cut(&frame.bytes(), id, PIECE)
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

/// A Service that is the address's alone, as the agent has it, and a NodePort.
fn served(family: Family, proto: Protocol) -> Result<Testbed> {
    let mut bed = Testbed::new()?;
    let backend = bed.add_backend(POD2.address(family), true)?;
    bed.add_service(SERVICE.address(family), PORT, proto, &[backend])?;
    bed.set_service(SERVICE.address(family), 0, Protocol::Any, Service::default())?;
    bed.add_service(any(family), NODE_PORT, proto, &[backend])?;
    Ok(bed)
}

/// Where fragments come in, from whom, and what they meet when they go on and when they do not.
const WAYS_IN: [(Hook, Host, i32, i32); 3] = [
    (Hook::PodIn, POD, action::TC_NEXT, action::TC_DROP),
    (Hook::UplinkIn, CLIENT, action::TC_NEXT, action::TC_DROP),
    (Hook::UplinkXdp, CLIENT, action::XDP_PASS, action::XDP_DROP),
];

/// Trap 13: without the first fragment nobody knows where the others belong. The kernel puts together what is addressed to
/// the node; an address that is a Service's alone it would send on to nowhere.
#[test]
fn a_fragment_before_the_first_one_is_the_kernels_if_it_is_for_the_node_and_else_dropped() -> Result<()> {
    for family in Family::BOTH {
        for (hook, client, passed, dropped) in WAYS_IN {
            let mut bed = served(family, Protocol::Udp)?;
            let client = (client.address(family), 4_000);
            for (target, action) in
                [((SERVICE.address(family), PORT), dropped), ((NODE.address(family), NODE_PORT), passed)]
            {
                let request = long(client, target, Transport::Udp);
                bed.run_bytes(hook, &fragments(&request, 7_001)[0])?;
                for piece in &fragments(&request, 7_000)[1..] {
                    let ran = bed.run_bytes(hook, piece)?;
                    assert_eq!((ran.action, &ran.bytes), (action, piece), "{hook:?} {family:?} to {target:?}");
                }
            }
            assert_eq!(bed.counter(hook, Outcome::DropFragment)?, 3, "{hook:?} {family:?}");
            assert_eq!(bed.counter(hook, Outcome::PassFragment)?, 3, "{hook:?} {family:?}");
        }
    }
    Ok(())
}

/// Trap 13: a backend's fragment that comes before the first one does not leave the node under the backend's name; a pod puts together
/// by itself what is addressed to it.
#[test]
fn a_replys_fragment_before_the_first_one_does_not_leave_the_node() -> Result<()> {
    for family in Family::BOTH {
        let mut bed = served(family, Protocol::Udp)?;
        let reply = long((POD2.address(family), TARGET), (CLIENT.address(family), 50_000), Transport::Udp);
        for piece in &fragments(&reply, 7_000)[1..] {
            assert_eq!(bed.run_bytes(Hook::UplinkOut, piece)?.action, action::TC_DROP, "{family:?}");
        }
        assert_eq!(bed.counter(Hook::UplinkOut, Outcome::DropFragment)?, 3, "{family:?}");

        let inside = long((POD2.address(family), TARGET), (POD.address(family), 4_000), Transport::Udp);
        let piece = &fragments(&inside, 7_000)[1];
        let ran = bed.run_bytes(Hook::PodOut, piece)?;
        assert_eq!((ran.action, &ran.bytes), (action::TC_NEXT, piece), "{family:?}");
        assert_eq!(bed.counter(Hook::PodOut, Outcome::PassFragment)?, 1, "{family:?}");
    }
    Ok(())
}

/// What a backend sends on its own account is not ours, fragments and all.
#[test]
fn fragments_of_a_flow_nobody_knows_are_passed_on_at_the_way_out() -> Result<()> {
    for family in Family::BOTH {
        let mut bed = served(family, Protocol::Udp)?;
        let own = long((POD2.address(family), 5_000), (CLIENT.address(family), 53), Transport::Udp);
        for piece in &fragments(&own, 7_000) {
            let ran = bed.run_bytes(Hook::UplinkOut, piece)?;
            assert_eq!((ran.action, &ran.bytes), (action::TC_NEXT, piece), "{family:?}");
        }
        assert_eq!(bed.counter(Hook::UplinkOut, Outcome::DropFragment)?, 0, "{family:?}");
    }
    Ok(())
}

/// Fragments of a first one that was refused go no further than it did.
#[test]
fn fragments_of_a_packet_that_was_refused_are_dropped_too() -> Result<()> {
    for family in Family::BOTH {
        for (hook, client, _, dropped) in WAYS_IN {
            let mut bed = served(family, Protocol::Udp)?;
            let nobodys = (SERVICE.address(family), PORT + 1);
            let request = long((client.address(family), 4_000), nobodys, Transport::Udp);
            for piece in fragments(&request, 7_000) {
                assert_eq!(bed.run_bytes(hook, &piece)?.action, dropped, "{hook:?} {family:?}");
            }
            assert_eq!(bed.counter(hook, Outcome::RejectNoPort)?, 1, "{hook:?} {family:?}");
            assert_eq!(bed.counter(hook, Outcome::DropFragment)?, 3, "{hook:?} {family:?}");
        }
    }
    Ok(())
}

/// RFC 1858 and RFC 5722: the first fragment has ports that were looked at, and a second one must not write over them.
#[test]
fn a_fragment_that_would_write_over_the_first_one_is_dropped() -> Result<()> {
    for_each_kind(|family, transport, proto| {
        for (hook, client, passed, dropped) in WAYS_IN {
            let mut bed = served(family, proto)?;
            let request = long((client.address(family), 4_000), (SERVICE.address(family), PORT), transport).bytes();
            // From a pod to a pod, the packet goes on through the kernel; from outside that is so too.
            assert_eq!(bed.run_bytes(hook, &fragment(&request, 7_000, 0, PIECE))?.action, passed, "{hook:?}");
            for (offset, action) in [(8, dropped), (16, dropped), (24, passed), (48, passed)] {
                let ran = bed.run_bytes(hook, &fragment(&request, 7_000, offset, PIECE))?;
                assert_eq!(ran.action, action, "{hook:?} at {offset}");
            }
            assert_eq!(bed.counter(hook, Outcome::DropOverlap)?, 2, "{hook:?}");
        }
        Ok(())
    })
}

/// RFC 1858: a first fragment without TCP's flags would let the second one bring any. It is passed on as not understood, and
/// no other follows it into a flow.
#[test]
fn a_first_fragment_too_short_for_tcp_leads_no_other_into_a_flow() -> Result<()> {
    for family in Family::BOTH {
        for (hook, client, passed, dropped) in WAYS_IN {
            let mut bed = served(family, Protocol::Tcp)?;
            let syn = Transport::Tcp(Flags::SYN);
            let request = long((client.address(family), 4_000), (SERVICE.address(family), PORT), syn);
            bed.run(hook, &request)?;
            let mut options = request.bytes();
            let data_offset = options.len() - request.payload.len() - 8;
            options[data_offset] = 0xf0;
            for (packet, length) in [(request.bytes(), 16), (options, 32)] {
                let first = fragment(&packet, 7_000, 0, length);
                let ran = bed.run_bytes(hook, &first)?;
                assert_eq!((ran.action, &ran.bytes), (passed, &first), "{hook:?} {family:?}");
                let second = fragment(&packet, 7_000, length, PIECE);
                assert_eq!(bed.run_bytes(hook, &second)?.action, dropped, "{hook:?} {family:?}");
            }
            assert_eq!(bed.counter(hook, Outcome::PassMalformed)?, 2, "{hook:?} {family:?}");
            assert_eq!(bed.counter(hook, Outcome::DropFragment)?, 2, "{hook:?} {family:?}");
        }
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
