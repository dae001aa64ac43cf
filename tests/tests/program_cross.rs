//! Between the families: a client of one gets to backends of the other, and hears from them, as if they were of its own.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use anyhow::{Result, ensure};
use proxy_common::{
    addr::Protocol,
    backend::BackendState,
    outcome::{Hook, Outcome},
    service::{Service, flag},
};
use tests::{
    fragments::cut,
    frame::{Chunk, ETHERNET, Family, Flags, Frame, Host, Transport},
    patience::wait_until,
    testbed::{
        CLIENT, CROSS_PORTS, NODE, NODE_PORT, OTHER_NODE_MAC, POD, PORT, REMOTE, ROUTER_MAC, SERVICE, TARGET, Testbed,
        UNRESOLVED, UPLINK_MAC, action, told,
    },
};

const UPLINK: Hook = Hook::CrossUplinkIn;

/// An address of a load balancer.
const BALANCER: Host =
    Host { v4: Ipv4Addr::new(203, 0, 113, 10), v6: Ipv6Addr::new(0x2001, 0xdb8, 0xb, 0, 0, 0, 0, 0x10) };

fn other(family: Family) -> Family {
    match family {
        Family::V4 => Family::V6,
        Family::V6 => Family::V4,
    }
}

/// As an address stands in the tables.
fn mixed(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().into(),
        IpAddr::V6(v6) => v6.into(),
    }
}

/// A Service that clients of one family use, whose backend is of the other.
struct Crossing {
    bed: Testbed,
    family: Family,
    client: (IpAddr, u16),
    frontend: (IpAddr, u16),
    backend: (IpAddr, u16),
    id: u32,
}

impl Crossing {
    /// By a NodePort, to a pod of another node.
    fn new(family: Family, proto: Protocol) -> Result<Self> {
        Self::by(family, proto, (NODE.address(family), NODE_PORT), &[REMOTE])
    }

    fn by(family: Family, proto: Protocol, frontend: (IpAddr, u16), backends: &[Host]) -> Result<Self> {
        let mut bed = Testbed::new()?;
        bed.add_local_addr(mixed(NODE.v4.into()))?;
        let backend = |host: &Host| host.address(other(family));
        let ids: Vec<u32> =
            backends.iter().map(|host| bed.add_backend(mixed(backend(host)), *host == POD)).collect::<Result<_>>()?;
        let range = bed.add_slots(&ids)?;
        let flags = flag::EXTERNAL | flag::CROSS;
        let service = Service { index: 1, flags, internal: range, external: range, ..Service::default() };
        let key = if frontend.1 == NODE_PORT { any(family) } else { frontend.0 };
        bed.set_service(mixed(key), frontend.1, proto, service)?;
        Ok(Self {
            family,
            client: (CLIENT.address(family), 4_000),
            frontend,
            backend: (backends.first().map_or(any(family), backend), TARGET),
            id: ids.first().copied().unwrap_or(0),
            bed,
        })
    }

    /// What is sent from here to the backend for a packet of the client, whose source port is given by us.
    fn ask(&mut self, transport: Transport) -> Result<Frame> {
        self.ask_with(&Frame::new(self.client, self.frontend, transport))
    }

    fn ask_with(&mut self, request: &Frame) -> Result<Frame> {
        let sent = self.bed.expect(UPLINK, request, action::TC_REDIRECT)?;
        let expected = Frame {
            macs: (OTHER_NODE_MAC, UPLINK_MAC),
            source: (NODE.address(other(self.family)), sent.source.1),
            destination: self.backend,
            hop_limit: request.hop_limit - 1,
            ..request.clone()
        };
        assert_eq!(sent, expected);
        ensure!((CROSS_PORTS.0..=CROSS_PORTS.1).contains(&sent.source.1), "source port {}", sent.source.1);
        Ok(sent)
    }

    /// What the client gets for a packet of the backend to whom it heard from.
    fn answer(&mut self, to: (IpAddr, u16), transport: Transport) -> Result<()> {
        let reply = Frame::new(self.backend, to, transport);
        let sent = self.bed.expect(UPLINK, &reply, action::TC_REDIRECT)?;
        let expected = Frame {
            macs: (ROUTER_MAC, UPLINK_MAC),
            source: self.frontend,
            destination: self.client,
            hop_limit: reply.hop_limit - 1,
            ..reply
        };
        assert_eq!(sent, expected);
        Ok(())
    }
}

fn any(family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::UNSPECIFIED.into(),
        Family::V6 => Ipv6Addr::UNSPECIFIED.into(),
    }
}

#[test]
fn a_tcp_connection_crosses_the_families_and_its_replies_come_from_the_frontend() -> Result<()> {
    for family in Family::BOTH {
        let mut crossing = Crossing::new(family, Protocol::Tcp)?;
        crossing.bed.watch()?;
        let opened = crossing.ask(Transport::Tcp(Flags::SYN))?;
        let first = crossing.bed.events()?[0];
        assert_eq!(IpAddr::from(first.daddr.octets), mixed(crossing.frontend.0), "{family:?}");
        assert_eq!((first.outcome, first.family, first.backend), (Outcome::Opened as u8, 6, crossing.id));
        crossing.answer(opened.source, Transport::Tcp(Flags::SYN_ACK))?;
        for flags in [Flags::ACK, Flags::FIN] {
            assert_eq!(crossing.ask(Transport::Tcp(flags))?.source, opened.source, "{family:?}");
            crossing.answer(opened.source, Transport::Tcp(flags))?;
        }
        assert_eq!(crossing.bed.counter(UPLINK, Outcome::Opened)?, 1);
        assert_eq!(crossing.bed.counter(UPLINK, Outcome::Confirmed)?, 1);
        assert_eq!(told(&crossing.bed.events()?), [(UPLINK, Outcome::Confirmed, 1)]);
        assert_eq!(crossing.bed.flows_v6("FLOWS_V6")?.len(), 2, "{family:?}");
        assert!(crossing.bed.flows("FLOWS_V4")?.is_empty() && crossing.bed.flows("EMBRYOS_V4")?.is_empty());
    }
    Ok(())
}

#[test]
fn udp_crosses_the_families() -> Result<()> {
    for family in Family::BOTH {
        let balancer = (BALANCER.address(family), PORT);
        let mut crossing = Crossing::by(family, Protocol::Udp, balancer, &[REMOTE])?;
        for _ in 0..2 {
            let sent = crossing.ask(Transport::Udp)?;
            crossing.answer(sent.source, Transport::Udp)?;
        }
    }
    Ok(())
}

/// RFC 7915 §4.5: over IPv6 there must be one, and its sum needs bytes that are not at hand.
#[test]
fn a_datagram_without_a_checksum_does_not_become_one_of_ipv6() -> Result<()> {
    let mut crossing = Crossing::new(Family::V4, Protocol::Udp)?;
    let request = Frame::new(crossing.client, crossing.frontend, Transport::UdpUnchecked);
    assert_eq!(crossing.bed.run(UPLINK, &request)?.action, action::TC_DROP);
    assert_eq!(crossing.bed.counter(UPLINK, Outcome::DropNotCrossed)?, 1);
    crossing.ask(Transport::Udp)?;
    Ok(())
}

/// Who sets 0 in IPv6 breaks its rules; towards IPv4 it means that there is none.
#[test]
fn what_has_no_checksum_in_ipv6_has_none_in_ipv4() -> Result<()> {
    let mut crossing = Crossing::new(Family::V6, Protocol::Udp)?;
    crossing.ask(Transport::UdpUnchecked)?;
    Ok(())
}

/// The traffic class is carried over; a flow label is not, and IPv4 must not be cut on the way.
#[test]
fn the_other_header_is_as_rfc_7915_has_it() -> Result<()> {
    let mut crossing = Crossing::new(Family::V6, Protocol::Tcp)?;
    let mut request = Frame::new(crossing.client, crossing.frontend, Transport::Tcp(Flags::SYN)).bytes();
    request[ETHERNET..ETHERNET + 4].copy_from_slice(&(0x6000_0000_u32 | 0xb9 << 20 | 0x12345).to_be_bytes());
    let sent = crossing.bed.run_bytes(UPLINK, &request)?;
    let header = &sent.bytes[ETHERNET..ETHERNET + 20];
    let length = u16::from_be_bytes([header[2], header[3]]);
    assert_eq!((header[0], header[1], &header[4..8]), (0x45, 0xb9, &[0, 0, 0x40, 0][..]));
    assert_eq!(usize::from(length), sent.bytes.len() - ETHERNET);
    Frame::read(&sent.bytes);

    let mut crossing = Crossing::new(Family::V4, Protocol::Tcp)?;
    let mut request = Frame::new(crossing.client, crossing.frontend, Transport::Tcp(Flags::SYN)).bytes();
    let tos = 0xb8_u8;
    request[ETHERNET + 1] = tos;
    let sent = crossing.bed.run_bytes(UPLINK, &request)?;
    assert_eq!(sent.bytes[ETHERNET..ETHERNET + 4], (0x6000_0000_u32 | u32::from(tos) << 20).to_be_bytes());
    Frame::read(&sent.bytes);
    Ok(())
}

#[test]
fn replies_of_a_pod_of_this_node_cross_where_they_come_in() -> Result<()> {
    for family in Family::BOTH {
        let mut crossing = Crossing::by(family, Protocol::Tcp, (NODE.address(family), NODE_PORT), &[POD])?;
        crossing.bed.ip("link add pod type veth peer name inside
             link set pod address 02:00:00:00:00:05 up
             link set inside up
             route add 10.244.1.5/32 dev pod
             route add 2001:db8:2441::5/128 dev pod
             neigh add 10.244.1.5 lladdr 02:00:00:00:00:06 dev pod
             neigh add 2001:db8:2441::5 lladdr 02:00:00:00:00:06 dev pod")?;
        let request = Frame::new(crossing.client, crossing.frontend, Transport::Tcp(Flags::SYN));
        let sent = crossing.bed.expect(UPLINK, &request, action::TC_REDIRECT)?;
        assert_eq!((sent.destination, sent.macs.0), (crossing.backend, [2, 0, 0, 0, 0, 6]));
        let reply = Frame::new(crossing.backend, sent.source, Transport::Tcp(Flags::SYN_ACK));
        let answered = crossing.bed.expect(Hook::CrossPodIn, &reply, action::TC_REDIRECT)?;
        assert_eq!((answered.source, answered.destination), (crossing.frontend, crossing.client));
    }
    Ok(())
}

/// The kernel asks for it, and makes the header of the link itself.
#[test]
fn a_neighbour_that_is_not_known_is_left_to_the_kernel() -> Result<()> {
    for family in Family::BOTH {
        let frontend = (NODE.address(family), NODE_PORT);
        let mut crossing = Crossing::by(family, Protocol::Tcp, frontend, &[UNRESOLVED])?;
        let request = Frame::new(crossing.client, frontend, Transport::Tcp(Flags::SYN));
        let sent = crossing.bed.expect(UPLINK, &request, action::TC_REDIRECT)?;
        assert_eq!((sent.destination, sent.macs), (crossing.backend, request.macs), "{family:?}");
    }
    Ok(())
}

#[test]
fn whoever_has_no_backend_is_told_in_his_own_family() -> Result<()> {
    for family in Family::BOTH {
        let mut crossing = Crossing::by(family, Protocol::Tcp, (NODE.address(family), NODE_PORT), &[])?;
        let request = Frame::new(crossing.client, crossing.frontend, Transport::Tcp(Flags::SYN));
        let answer = crossing.bed.expect(UPLINK, &request, action::TC_REDIRECT)?;
        assert_eq!((answer.source, answer.destination), (crossing.frontend, crossing.client));
        assert_eq!(crossing.bed.counter(UPLINK, Outcome::RejectNoEndpoint)?, 1);
    }
    Ok(())
}

/// A flow whose backend has gone for good is reset, and one whose backend serves no longer keeps it.
#[test]
fn a_connection_ends_with_its_backend() -> Result<()> {
    for family in Family::BOTH {
        let mut crossing = Crossing::new(family, Protocol::Tcp)?;
        let opened = crossing.ask(Transport::Tcp(Flags::SYN))?;
        crossing.answer(opened.source, Transport::Tcp(Flags::SYN_ACK))?;
        crossing.ask(Transport::Tcp(Flags::ACK))?;
        let (id, address) = (crossing.id, mixed(crossing.backend.0));
        crossing.bed.set_backend(id, address, false, BackendState::NotServing, 1)?;
        assert_eq!(crossing.ask(Transport::Tcp(Flags::ACK))?.source, opened.source);
        crossing.bed.set_backend(id, address, false, BackendState::Gone, 1)?;
        // It is looked for once in a flow's second, which lasts one jiffy here.
        crossing.bed.set_node(|node| node.jiffies_per_second = 1)?;
        let before = crossing.bed.jiffies()?;
        let bed = &mut crossing.bed;
        wait_until("the next jiffy", Duration::from_secs(1), || {
            bed.jiffies().is_ok_and(|now| now != before).then_some(())
        })?;
        let request = Frame::new(crossing.client, crossing.frontend, Transport::Tcp(Flags::ACK));
        let reset = crossing.bed.expect(UPLINK, &request, action::TC_REDIRECT)?;
        assert_eq!((reset.source, reset.destination), (crossing.frontend, crossing.client));
        assert_eq!(crossing.bed.counter(UPLINK, Outcome::ResetGone)?, 1);
    }
    Ok(())
}

/// A Service of one family, and one that does not ask.
#[test]
fn packets_of_others_go_on_untouched() -> Result<()> {
    for family in Family::BOTH {
        let mut crossing = Crossing::new(family, Protocol::Tcp)?;
        let backend = crossing.bed.add_backend(REMOTE.address(family), false)?;
        crossing.bed.add_service(SERVICE.address(family), PORT, Protocol::Tcp, &[backend])?;
        let others = [(SERVICE.address(family), PORT), (NODE.address(family), 22), (REMOTE.address(family), NODE_PORT)];
        for destination in others {
            for hook in [UPLINK, Hook::CrossPodIn] {
                let frame = Frame::new(crossing.client, destination, Transport::Tcp(Flags::SYN));
                let ran = crossing.bed.run(hook, &frame)?;
                assert_eq!((ran.action, ran.bytes), (action::TC_NEXT, frame.bytes()), "{destination:?}");
            }
        }
        assert_eq!(crossing.bed.counters()?, vec![]);
    }
    Ok(())
}

/// They stand behind, and get nothing that is not left to them.
#[test]
fn the_other_programs_leave_them_what_is_theirs() -> Result<()> {
    for family in Family::BOTH {
        let mut crossing = Crossing::new(family, Protocol::Tcp)?;
        let request = Frame::new(crossing.client, crossing.frontend, Transport::Tcp(Flags::SYN));
        let opened = crossing.ask(Transport::Tcp(Flags::SYN))?;
        let reply = Frame::new(crossing.backend, opened.source, Transport::Tcp(Flags::SYN_ACK));
        let hooks = [
            (Hook::UplinkXdp, action::XDP_PASS),
            (Hook::UplinkIn, action::TC_NEXT),
            (Hook::PodIn, action::TC_NEXT),
            (Hook::UplinkOut, action::TC_NEXT),
            (Hook::PodOut, action::TC_NEXT),
        ];
        for (hook, action) in hooks {
            for frame in [&request, &reply, &opened] {
                let ran = crossing.bed.run(hook, frame)?;
                assert_eq!((ran.action, ran.bytes), (action, frame.bytes()), "{hook:?}");
            }
        }
    }
    Ok(())
}

#[test]
fn what_does_not_cross_is_passed_on_and_counted() -> Result<()> {
    for family in Family::BOTH {
        let mut crossing = Crossing::new(family, Protocol::Udp)?;
        let whole = Frame { payload: vec![7; 71], ..Frame::new(crossing.client, crossing.frontend, Transport::Udp) };
        let whole = whole.bytes();
        for piece in cut(&whole, 7, 24) {
            let ran = crossing.bed.run_bytes(UPLINK, &piece)?;
            assert_eq!((ran.action, ran.bytes), (action::TC_NEXT, piece));
        }
        assert!(crossing.bed.counter(UPLINK, Outcome::PassFragment)? > 1);
        let sctp = Frame::new(crossing.client, crossing.frontend, Transport::Sctp(Chunk::INIT));
        assert_eq!(crossing.bed.run(UPLINK, &sctp)?.action, action::TC_NEXT);
        assert_eq!(crossing.bed.counter(UPLINK, Outcome::PassProtocol)?, 1);
    }
    let mut crossing = Crossing::new(Family::V4, Protocol::Udp)?;
    let plain = Frame::new(crossing.client, crossing.frontend, Transport::Udp).bytes();
    let mut with_options = [&plain[..ETHERNET + 20], &[1, 1, 1, 0], &plain[ETHERNET + 20..]].concat();
    with_options[ETHERNET] = 0x46;
    let ran = crossing.bed.run_bytes(UPLINK, &with_options)?;
    assert_eq!((ran.action, ran.bytes), (action::TC_NEXT, with_options));
    assert_eq!(crossing.bed.counter(UPLINK, Outcome::PassOptions)?, 1);
    Ok(())
}

/// Nobody may come from the wire in IPv6's tables as an IPv4 host.
#[test]
fn a_mapped_address_on_the_wire_is_nobodys() -> Result<()> {
    let mut crossing = Crossing::new(Family::V4, Protocol::Tcp)?;
    let sent = crossing.ask(Transport::Tcp(Flags::SYN))?;
    let reached = Frame::new((CLIENT.v6.into(), 4_000), (mixed(NODE.v4.into()), NODE_PORT), Transport::Tcp(Flags::SYN));
    let posing = Frame { source: (mixed(CLIENT.v4.into()), 4_000), ..reached.clone() };
    for frame in [reached, posing] {
        assert_eq!(crossing.bed.run(UPLINK, &frame)?.action, action::TC_NEXT);
    }
    assert_eq!(crossing.ask(Transport::Tcp(Flags::ACK))?.source, sent.source);
    Ok(())
}
