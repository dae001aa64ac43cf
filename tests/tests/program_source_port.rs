//! Source ports of masqueraded flows: kept, shared, run out of, and what then becomes of the flows that have one.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use anyhow::Result;
use proxy_common::{
    addr::{Port, Protocol},
    node::{foreign, newcomers},
    outcome::{Hook, Outcome},
};
use tests::{
    frame::{Family, Flags, Frame, Host, Transport},
    testbed::{CLIENT, NODE, NODE_PORT, PORT, REMOTE, SERVICE, TARGET, Testbed, action},
};

/// Another pod of the other node.
const REMOTE2: Host =
    Host { v4: Ipv4Addr::new(10, 244, 2, 6), v6: Ipv6Addr::new(0x2001, 0xdb8, 0x2442, 0, 0, 0, 0, 6) };
/// Another client.
const OTHER: Host =
    Host { v4: Ipv4Addr::new(198, 51, 100, 8), v6: Ipv6Addr::new(0x2001, 0xdb8, 0xfe01, 0, 0, 0, 0, 8) };
/// Further addresses of the node.
const FURTHER: [Host; 2] = [
    Host { v4: Ipv4Addr::new(192, 0, 2, 21), v6: Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 21) },
    Host { v4: Ipv4Addr::new(192, 0, 2, 22), v6: Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 22) },
];

const HOOKS: [(Hook, i32, i32); 2] =
    [(Hook::UplinkXdp, action::XDP_TX, action::XDP_DROP), (Hook::UplinkIn, action::TC_REDIRECT, action::TC_DROP)];

fn any(family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::UNSPECIFIED.into(),
        Family::V6 => Ipv6Addr::UNSPECIFIED.into(),
    }
}

/// A NodePort with a backend on another node, and so many source ports.
fn bed(family: Family, ports: std::ops::RangeInclusive<u16>) -> Result<Testbed> {
    let mut bed = Testbed::new()?;
    bed.set_node(|node| {
        node.source_port_first = Port::new(*ports.start());
        node.source_port_last = Port::new(*ports.end());
    })?;
    let backend = bed.add_backend(REMOTE.address(family), false)?;
    for proto in [Protocol::Tcp, Protocol::Udp] {
        bed.add_service(any(family), NODE_PORT, proto, &[backend])?;
    }
    Ok(bed)
}

fn request(family: Family, port: u16, transport: Transport) -> Frame {
    Frame::new((CLIENT.address(family), port), (NODE.address(family), NODE_PORT), transport)
}

/// The backend answers what it got: the answer must be the frontend's, and go to who asked.
fn must_come_back(bed: &mut Testbed, hook: Hook, sent_out: i32, asked: &Frame, sent: &Frame) -> Result<()> {
    let reply = Frame::new(sent.destination, sent.source, asked.transport);
    let seen = bed.expect(hook, &reply, sent_out)?;
    assert_eq!((seen.source, seen.destination), (asked.destination, asked.source));
    Ok(())
}

/// Trap 9: what finds no port is dropped and counted; what has one keeps it, and its replies.
#[test]
fn flows_beyond_the_last_port_are_counted_drops_and_the_others_go_on() -> Result<()> {
    for family in Family::BOTH {
        for (hook, sent_out, dropped) in HOOKS {
            let mut bed = bed(family, 10_000..=10_015)?;
            let mut flows = Vec::new();
            let mut drops = 0;
            for port in 40_000..40_060 {
                let asked = request(family, port, Transport::Udp);
                let ran = bed.run(hook, &asked)?;
                if ran.action == sent_out {
                    flows.push((asked, Frame::read(&ran.bytes)));
                } else {
                    assert_eq!(ran.action, dropped, "{family:?} {hook:?}");
                    drops += 1;
                }
            }
            assert!((8..=16).contains(&flows.len()), "{} flows over sixteen ports", flows.len());
            assert_eq!(bed.counter(hook, Outcome::DropNoPort)?, drops, "{family:?} {hook:?}");
            let ports: BTreeSet<u16> = flows.iter().map(|(_, sent)| sent.source.1).collect();
            assert_eq!(ports.len(), flows.len(), "no two flows to one backend share a port");
            assert!(ports.iter().all(|port| (10_000..=10_015).contains(port)), "{ports:?}");
            for (asked, sent) in &flows {
                must_come_back(&mut bed, hook, sent_out, asked, sent)?;
                assert_eq!(bed.expect(hook, asked, sent_out)?.source, sent.source, "it keeps its port");
            }
        }
    }
    Ok(())
}

#[test]
fn one_port_serves_flows_to_different_backends() -> Result<()> {
    for family in Family::BOTH {
        let mut bed = bed(family, 10_000..=10_000)?;
        let other = bed.add_backend(REMOTE2.address(family), false)?;
        bed.add_service(SERVICE.address(family), PORT, Protocol::Udp, &[other])?;
        let (hook, sent_out, _) = HOOKS[0];
        let first = request(family, 40_000, Transport::Udp);
        let second = Frame { destination: (SERVICE.address(family), PORT), ..request(family, 40_001, Transport::Udp) };
        let tcp = request(family, 40_002, Transport::Tcp(Flags::SYN));
        let mut sent = Vec::new();
        for asked in [&first, &second, &tcp] {
            sent.push(bed.expect(hook, asked, sent_out)?);
        }
        assert!(sent.iter().all(|sent| sent.source == (NODE.address(family), 10_000)), "{sent:?}");
        assert_eq!(sent[1].destination, (REMOTE2.address(family), TARGET));
        for (asked, sent) in [first, second, tcp].iter().zip(&sent) {
            must_come_back(&mut bed, hook, sent_out, asked, sent)?;
        }
    }
    Ok(())
}

#[test]
fn a_client_port_that_is_taken_gives_way_to_another_of_the_range() -> Result<()> {
    let mut bed = bed(Family::V4, 10_000..=29_999)?;
    let (hook, sent_out, _) = HOOKS[0];
    let first = bed.expect(hook, &request(Family::V4, 12_345, Transport::Udp), sent_out)?;
    assert_eq!(first.source.1, 12_345);
    let mut other = request(Family::V4, 12_345, Transport::Udp);
    other.source.0 = Ipv4Addr::new(198, 51, 100, 8).into();
    let second = bed.expect(hook, &other, sent_out)?;
    assert!(second.source.1 != 12_345 && (10_000..=29_999).contains(&second.source.1), "{second:?}");
    assert_eq!(bed.counter(hook, Outcome::PortChanged)?, 1);
    must_come_back(&mut bed, hook, sent_out, &other, &second)
}

#[test]
fn a_port_by_which_another_proxy_is_answered_gives_way_while_that_is_at_work() -> Result<()> {
    for family in Family::BOTH {
        for (hook, sent_out, _) in HOOKS {
            let mut bed = bed(family, 10_000..=29_999)?;
            let (backend, node) = ((REMOTE.address(family), TARGET), (NODE.address(family), 12_345));
            bed.add_foreign(Protocol::Udp, backend, node, foreign::ANSWERED)?;
            bed.set_node(|node| node.flags |= newcomers::LOOK)?;
            let sent = bed.expect(hook, &request(family, 12_345, Transport::Udp), sent_out)?;
            assert!(sent.source.1 != 12_345 && (10_000..=29_999).contains(&sent.source.1), "{hook:?} {sent:?}");
            assert_eq!(bed.counter(hook, Outcome::PortChanged)?, 1);
            let asked = request(family, 12_346, Transport::Udp);
            assert_eq!(bed.expect(hook, &asked, sent_out)?.source.1, 12_346, "nobody's port is kept");
            must_come_back(&mut bed, hook, sent_out, &request(family, 12_345, Transport::Udp), &sent)?;
            // Of what is left in the map nobody asks any more.
            bed.set_node(|node| node.flags &= !newcomers::ALL)?;
            let mut other = request(family, 12_345, Transport::Udp);
            other.source.0 = OTHER.address(family);
            assert_eq!(bed.expect(hook, &other, sent_out)?.source.1, 12_345);
        }
    }
    Ok(())
}

#[test]
fn when_the_ports_of_one_address_run_out_the_nodes_others_have_their_turn() -> Result<()> {
    for family in Family::BOTH {
        for (hook, sent_out, dropped) in HOOKS {
            let mut bed = bed(family, 10_000..=10_000)?;
            bed.set_node(|node| {
                for (place, host) in node.further_v4.iter_mut().zip(FURTHER) {
                    *place = host.v4.into();
                }
                for (place, host) in node.further_v6.iter_mut().zip(FURTHER) {
                    *place = host.v6.into();
                }
            })?;
            for host in FURTHER {
                bed.add_local_addr(host.address(family))?;
            }
            let asked: Vec<Frame> = (40_000..40_003).map(|port| request(family, port, Transport::Udp)).collect();
            let mut sent = Vec::new();
            for asked in &asked {
                sent.push(bed.expect(hook, asked, sent_out)?);
            }
            assert_eq!(sent[0].source.0, NODE.address(family), "the first one first");
            let sources: BTreeSet<IpAddr> = sent.iter().map(|sent| sent.source.0).collect();
            let expected = [NODE, FURTHER[0], FURTHER[1]].map(|host| host.address(family));
            assert_eq!(sources, expected.into(), "{family:?} {hook:?}");
            let ran = bed.run(hook, &request(family, 40_003, Transport::Udp))?;
            assert_eq!((ran.action, bed.counter(hook, Outcome::DropNoPort)?), (dropped, 1), "{family:?} {hook:?}");
            for (asked, sent) in asked.iter().zip(&sent) {
                must_come_back(&mut bed, hook, sent_out, asked, sent)?;
            }
        }
    }
    Ok(())
}
