//! Whose source address is replaced where the kernel routes in between: a conversation is followed through every hook it
//! passes, there and back.

use anyhow::Result;
use proxy_common::{
    addr::Protocol,
    backend::BackendState,
    node::masquerade,
    outcome::{Hook, Outcome},
    service::{Service, flag},
};
use tests::{
    frame::{Chunk, Family, Flags, Frame, Host, Transport},
    testbed::{CLIENT, NODE, NODE_PORT, POD, POD2, PORT, REMOTE, SERVICE, SOURCE_PORTS, TARGET, Testbed, action},
};

/// A place on the way: a hook, and what it answers when the packet goes on.
type Step = (Hook, i32);

const POD_IN: Step = (Hook::PodIn, action::TC_NEXT);
const POD_OUT: Step = (Hook::PodOut, action::TC_NEXT);
const UPLINK_OUT: Step = (Hook::UplinkOut, action::TC_NEXT);
const UPLINK_IN: Step = (Hook::UplinkIn, action::TC_NEXT);
const UPLINK_XDP: Step = (Hook::UplinkXdp, action::XDP_PASS);

/// Which rule sends a conversation which way.
struct Case {
    name: &'static str,
    client: Host,
    /// The NodePort, or else the ClusterIP.
    by_node_port: bool,
    backend: Host,
    node_flags: u32,
    /// Where the client's packets come in, leave for the backend, where the backend's come in, and leave for the client.
    steps: [Step; 4],
}

const CASES: [Case; 8] = [
    Case {
        name: "a pod to a NodePort, the backend elsewhere",
        client: POD,
        by_node_port: true,
        backend: REMOTE,
        node_flags: 0,
        steps: [POD_IN, UPLINK_OUT, UPLINK_XDP, POD_OUT],
    },
    Case {
        name: "the same without XDP",
        client: POD,
        by_node_port: true,
        backend: REMOTE,
        node_flags: 0,
        steps: [POD_IN, UPLINK_OUT, UPLINK_IN, POD_OUT],
    },
    Case {
        name: "a pod to a NodePort, the backend here, as kube-proxy",
        client: POD,
        by_node_port: true,
        backend: POD2,
        node_flags: masquerade::LOCAL_BACKENDS,
        steps: [POD_IN, POD_OUT, POD_IN, POD_OUT],
    },
    Case {
        name: "outside to a NodePort, the backend here, as kube-proxy",
        client: CLIENT,
        by_node_port: true,
        backend: POD2,
        node_flags: masquerade::LOCAL_BACKENDS,
        steps: [UPLINK_XDP, POD_OUT, POD_IN, UPLINK_OUT],
    },
    Case {
        name: "outside to a ClusterIP, the backend here",
        client: CLIENT,
        by_node_port: false,
        backend: POD2,
        node_flags: 0,
        steps: [UPLINK_XDP, POD_OUT, POD_IN, UPLINK_OUT],
    },
    Case {
        name: "the same without XDP",
        client: CLIENT,
        by_node_port: false,
        backend: POD2,
        node_flags: 0,
        steps: [UPLINK_IN, POD_OUT, POD_IN, UPLINK_OUT],
    },
    Case {
        name: "a pod to a ClusterIP, the backend elsewhere, all masqueraded",
        client: POD,
        by_node_port: false,
        backend: REMOTE,
        node_flags: masquerade::ALL,
        steps: [POD_IN, UPLINK_OUT, UPLINK_XDP, POD_OUT],
    },
    Case {
        name: "a pod to a ClusterIP, the backend here, all masqueraded",
        client: POD,
        by_node_port: false,
        backend: POD2,
        node_flags: masquerade::ALL,
        steps: [POD_IN, POD_OUT, POD_IN, POD_OUT],
    },
];

/// A client and a Service, and the way between them.
struct Conversation {
    bed: Testbed,
    family: Family,
    case: &'static Case,
    client: (std::net::IpAddr, u16),
    frontend: (std::net::IpAddr, u16),
}

impl Conversation {
    fn new(case: &'static Case, family: Family, proto: Protocol) -> Result<Self> {
        let mut bed = Testbed::new()?;
        bed.set_node(|node| node.flags = case.node_flags)?;
        let backend = bed.add_backend(case.backend.address(family), case.backend == POD2)?;
        let range = bed.add_slots(&[backend])?;
        let service = Service { index: 1, internal: range, external: range, ..Service::default() };
        let frontend = if case.by_node_port {
            bed.set_service(any(family), NODE_PORT, proto, Service { flags: flag::EXTERNAL, ..service })?;
            (NODE.address(family), NODE_PORT)
        } else {
            bed.set_service(SERVICE.address(family), PORT, proto, service)?;
            (SERVICE.address(family), PORT)
        };
        Ok(Self { bed, family, case, client: (case.client.address(family), 4_000), frontend })
    }

    /// The client speaks; returns what the backend gets.
    fn ask(&mut self, transport: Transport) -> Result<Frame> {
        let [enter, leave, ..] = self.case.steps;
        let request = Frame::new(self.client, self.frontend, transport);
        let routed = self.bed.expect(enter.0, &request, enter.1)?;
        assert_eq!(routed.source.0, self.client.0, "{}: the kernel must not see its own address", self.case.name);
        let sent = self.bed.expect(leave.0, &routed, leave.1)?;
        assert_eq!(sent.source.0, NODE.address(self.family), "{}", self.case.name);
        assert!((SOURCE_PORTS.0..=SOURCE_PORTS.1).contains(&sent.source.1), "{}", self.case.name);
        assert_eq!(sent, Frame { source: sent.source, destination: routed.destination, ..request });
        Ok(sent)
    }

    /// The backend answers what it got; the client must see the frontend.
    fn answer(&mut self, to: &Frame, transport: Transport) -> Result<()> {
        let [_, _, enter, leave] = self.case.steps;
        let reply = Frame::new(to.destination, to.source, transport);
        let routed = self.bed.expect(enter.0, &reply, enter.1)?;
        let seen = self.bed.expect(leave.0, &routed, leave.1)?;
        assert_eq!(seen, Frame { source: self.frontend, destination: self.client, ..reply }, "{}", self.case.name);
        Ok(())
    }
}

fn any(family: Family) -> std::net::IpAddr {
    match family {
        Family::V4 => std::net::Ipv4Addr::UNSPECIFIED.into(),
        Family::V6 => std::net::Ipv6Addr::UNSPECIFIED.into(),
    }
}

#[test]
fn what_the_kernel_routes_bears_the_nodes_address_at_its_backend_and_the_frontends_at_its_client() -> Result<()> {
    for case in &CASES {
        for family in Family::BOTH {
            for (transport, proto) in [
                (Transport::Tcp(Flags::SYN), Protocol::Tcp),
                (Transport::Udp, Protocol::Udp),
                (Transport::UdpUnchecked, Protocol::Udp),
                (Transport::Sctp(Chunk::INIT), Protocol::Sctp),
            ] {
                let mut conversation = Conversation::new(case, family, proto)?;
                let sent = conversation.ask(transport)?;
                assert_eq!(sent.destination, (case.backend.address(family), TARGET), "{}", case.name);
                conversation.answer(&sent, transport)?;
                assert_eq!(conversation.ask(transport)?.source, sent.source, "{}: it keeps its port", case.name);
                assert_eq!(conversation.bed.counter(case.steps[0].0, Outcome::Opened)?, 1, "{}", case.name);
            }
        }
    }
    Ok(())
}

#[test]
fn a_masqueraded_connection_is_confirmed_closed_and_opened_anew_as_a_whole() -> Result<()> {
    let tcp = Transport::Tcp;
    for case in &CASES {
        let mut conversation = Conversation::new(case, Family::V4, Protocol::Tcp)?;
        let sent = conversation.ask(tcp(Flags::SYN))?;
        conversation.answer(&sent, tcp(Flags::SYN_ACK))?;
        conversation.ask(tcp(Flags::ACK))?;
        assert_eq!(conversation.bed.flows("FLOWS_V4")?.len(), 4, "{}", case.name);
        assert_eq!(conversation.bed.active(1)?, 1, "{}: counted once", case.name);
        conversation.ask(tcp(Flags::FIN))?;
        conversation.answer(&sent, tcp(Flags::FIN))?;
        conversation.ask(tcp(Flags::ACK))?;
        assert_eq!(conversation.bed.active(1)?, 0, "{}", case.name);

        let again = conversation.ask(tcp(Flags::SYN))?;
        conversation.answer(&again, tcp(Flags::SYN_ACK))?;
        conversation.ask(tcp(Flags::ACK))?;
        assert_eq!(conversation.bed.active(1)?, 1, "{}", case.name);
        assert_eq!(conversation.bed.counter(case.steps[0].0, Outcome::Opened)?, 2, "{}", case.name);
    }
    Ok(())
}

#[test]
fn a_masqueraded_datagram_follows_to_another_backend() -> Result<()> {
    let mut conversation = Conversation::new(&CASES[0], Family::V4, Protocol::Udp)?;
    let sent = conversation.ask(Transport::Udp)?;
    conversation.answer(&sent, Transport::Udp)?;
    let bed = &mut conversation.bed;
    bed.set_backend(1, REMOTE.v4.into(), false, BackendState::NotServing, 1)?;
    let other = std::net::Ipv4Addr::new(10, 244, 2, 6);
    let backend = bed.add_backend(other.into(), false)?;
    let range = bed.add_slots(&[backend])?;
    let service = Service { index: 1, flags: flag::EXTERNAL, internal: range, external: range, ..Service::default() };
    bed.set_service(any(Family::V4), NODE_PORT, Protocol::Udp, service)?;
    let sent = conversation.ask(Transport::Udp)?;
    assert_eq!(sent.destination.0, other);
    conversation.answer(&sent, Transport::Udp)
}

#[test]
fn an_original_half_that_was_evicted_finds_the_second_pair_alive() -> Result<()> {
    let mut conversation = Conversation::new(&CASES[0], Family::V4, Protocol::Tcp)?;
    let sent = conversation.ask(Transport::Tcp(Flags::SYN))?;
    conversation.answer(&sent, Transport::Tcp(Flags::SYN_ACK))?;
    conversation.ask(Transport::Tcp(Flags::ACK))?;
    let frontend = proxy_common::addr::Ipv4::from(NODE.v4);
    conversation
        .bed
        .change_flows("FLOWS_V4", |key, flow| (key.daddr != frontend || key.saddr != POD.v4.into()).then_some(flow))?;
    assert_eq!(conversation.bed.flows("FLOWS_V4")?.len(), 3);
    assert_eq!(conversation.ask(Transport::Tcp(Flags::ACK))?.source, sent.source);
    conversation.answer(&sent, Transport::Tcp(Flags::ACK))
}

#[test]
fn a_backend_that_is_the_node_sees_the_client() -> Result<()> {
    for family in Family::BOTH {
        for (hook, passed, client) in [(Hook::PodIn, action::TC_NEXT, POD), (Hook::UplinkXdp, action::XDP_PASS, CLIENT)]
        {
            let mut bed = Testbed::new()?;
            bed.set_node(|node| node.flags = masquerade::ALL | masquerade::LOCAL_BACKENDS)?;
            let backend = bed.add_backend(NODE.address(family), true)?;
            bed.add_service(SERVICE.address(family), PORT, Protocol::Udp, &[backend])?;
            let client = (client.address(family), 4_000);
            let request = Frame::new(client, (SERVICE.address(family), PORT), Transport::Udp);
            let sent = bed.expect(hook, &request, passed)?;
            assert_eq!((sent.source, sent.destination), (client, (NODE.address(family), TARGET)));
        }
    }
    Ok(())
}

#[test]
fn a_masqueraded_flow_for_which_no_source_port_is_left_is_dropped_whole() -> Result<()> {
    let mut conversation = Conversation::new(&CASES[0], Family::V4, Protocol::Udp)?;
    conversation.bed.set_node(|node| node.source_port_last = node.source_port_first)?;
    conversation.ask(Transport::Udp)?;
    let request = Frame::new((POD2.v4.into(), 4_000), conversation.frontend, Transport::Udp);
    assert_eq!(conversation.bed.run(Hook::PodIn, &request)?.action, action::TC_DROP);
    assert_eq!(conversation.bed.counter(Hook::PodIn, Outcome::DropNoPort)?, 1);
    assert_eq!(conversation.bed.flows("EMBRYOS_V4")?.len(), 4, "nothing of the second flow is left");
    Ok(())
}
