//! Packet in → verdict, packet out: every way a Service's traffic takes, on the real verifier and real maps.

use anyhow::{Result, ensure};
use proxy_common::{
    addr::Protocol,
    outcome::{Hook, Outcome},
};
use tests::{
    frame::{Chunk, Family, Flags, Frame, MACS, Transport},
    testbed::{
        CLIENT, NODE, NODE_PORT, OTHER_NODE_MAC, OTHER_SERVICE, POD, POD2, PORT, REMOTE, ROUTER_MAC, SERVICE,
        SOURCE_PORTS, TARGET, Testbed, UNRESOLVED, action,
    },
};

/// What every way is tried with.
const TRANSPORTS: [(Transport, Protocol); 4] = [
    (Transport::Tcp(Flags::SYN), Protocol::Tcp),
    (Transport::Udp, Protocol::Udp),
    (Transport::UdpUnchecked, Protocol::Udp),
    (Transport::Sctp(Chunk::INIT), Protocol::Sctp),
];

fn for_each_kind(test: impl Fn(Family, Transport, Protocol) -> Result<()>) -> Result<()> {
    for family in Family::BOTH {
        for (transport, proto) in TRANSPORTS {
            test(family, transport, proto).map_err(|e| e.context(format!("{family:?} {transport:?}")))?;
        }
    }
    Ok(())
}

/// Trap 14: a datagram without a checksum is among them, and gets none.
#[test]
fn a_pod_reaches_a_service_and_the_reply_keeps_the_frontend_address() -> Result<()> {
    for_each_kind(|family, transport, proto| {
        let mut bed = Testbed::new()?;
        let backend = bed.add_backend(POD2.address(family), true)?;
        bed.add_service(SERVICE.address(family), PORT, proto, &[backend])?;

        let pod = (POD.address(family), 4_000);
        let request = Frame::new(pod, (SERVICE.address(family), PORT), transport);
        let sent = bed.expect(Hook::PodIn, &request, action::TC_NEXT)?;
        let target = (POD2.address(family), TARGET);
        assert_eq!(sent, Frame { destination: target, ..request.clone() });

        let reply = Frame::new(target, pod, transport);
        let seen = bed.expect(Hook::PodOut, &reply, action::TC_NEXT)?;
        assert_eq!(seen, Frame { source: request.destination, ..reply });
        assert_eq!(bed.counter(Hook::PodIn, Outcome::Opened)?, 1);
        Ok(())
    })
}

/// Trap 14: a datagram without a checksum is among them, and gets none.
#[test]
fn an_outside_client_reaches_a_backend_of_this_node_with_its_own_address() -> Result<()> {
    for (hook, passed) in [(Hook::UplinkXdp, action::XDP_PASS), (Hook::UplinkIn, action::TC_NEXT)] {
        for_each_kind(|family, transport, proto| {
            let mut bed = Testbed::new()?;
            let backend = bed.add_backend(POD.address(family), true)?;
            bed.add_service(any(family), NODE_PORT, proto, &[backend])?;

            let client = (CLIENT.address(family), 50_000);
            let request = Frame::new(client, (NODE.address(family), NODE_PORT), transport);
            let sent = bed.expect(hook, &request, passed)?;
            let target = (POD.address(family), TARGET);
            assert_eq!(sent, Frame { destination: target, ..request.clone() });

            let reply = Frame::new(target, client, transport);
            let seen = bed.expect(Hook::UplinkOut, &reply, action::TC_NEXT)?;
            assert_eq!(seen, Frame { source: request.destination, ..reply });
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn an_outside_client_reaches_a_backend_of_another_node_and_is_answered_by_this_one() -> Result<()> {
    for (hook, sent_out) in [(Hook::UplinkXdp, action::XDP_TX), (Hook::UplinkIn, action::TC_REDIRECT)] {
        for_each_kind(|family, transport, proto| {
            let mut bed = Testbed::new()?;
            let backend = bed.add_backend(REMOTE.address(family), false)?;
            bed.add_service(any(family), NODE_PORT, proto, &[backend])?;

            let client = (CLIENT.address(family), 50_000);
            let request = Frame::new(client, (NODE.address(family), NODE_PORT), transport);
            let sent = bed.expect(hook, &request, sent_out)?;
            let (masquerade, port) = sent.source;
            assert_eq!(masquerade, NODE.address(family));
            ensure!((SOURCE_PORTS.0..=SOURCE_PORTS.1).contains(&port), "source port {port}");
            let target = (REMOTE.address(family), TARGET);
            assert_eq!(sent.destination, target);
            assert_eq!(sent.macs.0, OTHER_NODE_MAC);
            assert_eq!((sent.hop_limit, sent.transport, &sent.payload), (63, transport, &request.payload));

            let reply = Frame::new(target, sent.source, transport);
            let seen = bed.expect(hook, &reply, sent_out)?;
            assert_eq!((seen.source, seen.destination), (request.destination, client));
            assert_eq!((seen.macs.0, seen.hop_limit), (ROUTER_MAC, 63));

            // The second packet finds the flow and keeps its port.
            let again = bed.expect(hook, &request, sent_out)?;
            assert_eq!(again.source, sent.source);
            Ok(())
        })?;
    }
    Ok(())
}

/// Trap 25: a backend in the node's own network.
#[test]
fn a_backend_at_an_address_of_this_node_is_of_this_node_whatever_its_slice_says() -> Result<()> {
    for_each_kind(|family, transport, proto| {
        let mut bed = Testbed::new()?;
        let backend = bed.add_backend(NODE.address(family), false)?;
        bed.add_service(any(family), NODE_PORT, proto, &[backend])?;

        let client = (CLIENT.address(family), 50_000);
        let request = Frame::new(client, (NODE.address(family), NODE_PORT), transport);
        let sent = bed.expect(Hook::UplinkXdp, &request, action::XDP_PASS)?;
        let target = (NODE.address(family), TARGET);
        assert_eq!(sent, Frame { destination: target, ..request.clone() });

        let reply = Frame::new(target, client, transport);
        let seen = bed.expect(Hook::UplinkOut, &reply, action::TC_NEXT)?;
        assert_eq!(seen, Frame { source: request.destination, ..reply });
        Ok(())
    })
}

#[test]
fn a_client_port_that_may_be_kept_is_kept() -> Result<()> {
    let mut bed = Testbed::new()?;
    let backend = bed.add_backend(REMOTE.v4.into(), false)?;
    bed.add_service(any(Family::V4), NODE_PORT, Protocol::Tcp, &[backend])?;
    let request = Frame::new((CLIENT.v4.into(), 12_345), (NODE.v4.into(), NODE_PORT), Transport::Tcp(Flags::SYN));
    let sent = bed.expect(Hook::UplinkXdp, &request, action::XDP_TX)?;
    assert_eq!(sent.source.1, 12_345);
    Ok(())
}

#[test]
fn what_the_fib_cannot_send_yet_goes_through_the_kernel_and_is_masqueraded_at_the_way_out() -> Result<()> {
    for (hook, passed) in [(Hook::UplinkXdp, action::XDP_PASS), (Hook::UplinkIn, action::TC_NEXT)] {
        for_each_kind(|family, transport, proto| {
            let mut bed = Testbed::new()?;
            let backend = bed.add_backend(UNRESOLVED.address(family), false)?;
            bed.add_service(any(family), NODE_PORT, proto, &[backend])?;

            let client = (CLIENT.address(family), 12_345);
            let request = Frame::new(client, (NODE.address(family), NODE_PORT), transport);
            let up = bed.expect(hook, &request, passed)?;
            let target = (UNRESOLVED.address(family), TARGET);
            assert_eq!(up, Frame { destination: target, ..request.clone() });

            let out = bed.expect(Hook::UplinkOut, &up, action::TC_NEXT)?;
            assert_eq!(out, Frame { source: (NODE.address(family), 12_345), ..up });
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn a_packet_whose_life_ends_here_is_left_to_the_kernel() -> Result<()> {
    let mut bed = Testbed::new()?;
    let backend = bed.add_backend(REMOTE.v4.into(), false)?;
    bed.add_service(any(Family::V4), NODE_PORT, Protocol::Udp, &[backend])?;
    let mut request = Frame::new((CLIENT.v4.into(), 12_345), (NODE.v4.into(), NODE_PORT), Transport::Udp);
    request.hop_limit = 1;
    let up = bed.expect(Hook::UplinkXdp, &request, action::XDP_PASS)?;
    assert_eq!((up.hop_limit, up.source), (1, request.source));
    Ok(())
}

/// Trap 15: it would answer itself directly otherwise, under a name it never asked.
#[test]
fn a_pod_that_picks_itself_is_answered_by_itself_under_the_frontend_address() -> Result<()> {
    for_each_kind(|family, transport, proto| {
        let mut bed = Testbed::new()?;
        let backend = bed.add_backend(POD.address(family), true)?;
        bed.add_service(SERVICE.address(family), PORT, proto, &[backend])?;

        let pod = (POD.address(family), 4_000);
        let request = Frame::new(pod, (SERVICE.address(family), PORT), transport);
        let sent = bed.expect(Hook::PodIn, &request, action::TC_REDIRECT)?;
        assert_eq!(sent.source.0, NODE.address(family));
        assert_eq!(sent.destination, (POD.address(family), TARGET));
        assert_eq!(sent.macs, (MACS.1, MACS.0), "back to where it came from");

        let reply = Frame::new(sent.destination, sent.source, transport);
        let seen = bed.expect(Hook::PodIn, &reply, action::TC_REDIRECT)?;
        assert_eq!((seen.source, seen.destination), (request.destination, pod));
        Ok(())
    })
}

/// Found by fuzzing: a hop limit of 0 became one of 255, and the IPv4 checksum wrong.
#[test]
fn a_life_that_is_over_does_not_begin_anew_where_a_pod_picks_itself() -> Result<()> {
    for_each_kind(|family, transport, proto| {
        let mut bed = Testbed::new()?;
        let backend = bed.add_backend(POD.address(family), true)?;
        bed.add_service(SERVICE.address(family), PORT, proto, &[backend])?;
        let request = Frame::new((POD.address(family), 4_000), (SERVICE.address(family), PORT), transport);
        for (hop_limit, expected) in [(2, 1), (1, 0), (0, 0)] {
            let request = Frame { hop_limit, ..request.clone() };
            assert_eq!(bed.expect(Hook::PodIn, &request, action::TC_REDIRECT)?.hop_limit, expected);
        }
        Ok(())
    })
}

/// Trap 8: two frontends, one backend and one client port: the replies keep their frontends.
#[test]
fn two_services_one_backend_and_one_client_port_stay_apart() -> Result<()> {
    for_each_kind(|family, transport, proto| {
        let mut bed = Testbed::new()?;
        let backend = bed.add_backend(POD2.address(family), true)?;
        bed.add_service(SERVICE.address(family), PORT, proto, &[backend])?;
        bed.add_service(OTHER_SERVICE.address(family), PORT, proto, &[backend])?;

        let pod = (POD.address(family), 4_000);
        let first = Frame::new(pod, (SERVICE.address(family), PORT), transport);
        let second = Frame::new(pod, (OTHER_SERVICE.address(family), PORT), transport);
        let first_sent = bed.expect(Hook::PodIn, &first, action::TC_NEXT)?;
        let second_sent = bed.expect(Hook::PodIn, &second, action::TC_NEXT)?;
        assert_ne!(first_sent.source, second_sent.source);
        assert_eq!(bed.counter(Hook::PodIn, Outcome::PortChanged)?, 1);

        for (request, sent) in [(&first, &first_sent), (&second, &second_sent)] {
            let reply = Frame::new(sent.destination, sent.source, transport);
            let seen = bed.expect(Hook::PodOut, &reply, action::TC_NEXT)?;
            assert_eq!((seen.source, seen.destination), (request.destination, pod));
        }
        Ok(())
    })
}

#[test]
fn a_node_port_is_served_on_the_nodes_addresses_and_in_its_range_only() -> Result<()> {
    let mut bed = Testbed::new()?;
    let backend = bed.add_backend(POD.v4.into(), true)?;
    bed.add_service(any(Family::V4), NODE_PORT, Protocol::Tcp, &[backend])?;
    bed.add_service(any(Family::V4), 22, Protocol::Tcp, &[backend])?;
    let cases = [
        ("another address", (OTHER_SERVICE.v4.into(), NODE_PORT)),
        ("a port outside the range", (NODE.v4.into(), 22)),
        ("a port nobody has", (NODE.v4.into(), NODE_PORT + 1)),
    ];
    for (name, destination) in cases {
        let request = Frame::new((CLIENT.v4.into(), 50_000), destination, Transport::Tcp(Flags::SYN));
        let ran = bed.run(Hook::UplinkXdp, &request)?;
        assert_eq!((ran.action, ran.bytes), (action::XDP_PASS, request.bytes()), "{name}");
    }
    Ok(())
}

#[test]
fn three_hundred_flows_spread_within_five_sigma_of_even() -> Result<()> {
    let mut bed = Testbed::new()?;
    let hosts = [POD.v4, POD2.v4, REMOTE.v4];
    let backends = hosts.iter().map(|host| bed.add_backend((*host).into(), true)).collect::<Result<Vec<_>>>()?;
    bed.add_service(SERVICE.v4.into(), PORT, Protocol::Tcp, &backends)?;
    let mut counts = [0_f64; 3];
    for port in 0..300 {
        let client = (std::net::Ipv4Addr::new(10, 244, 1, 99).into(), 20_000 + port);
        let request = Frame::new(client, (SERVICE.v4.into(), PORT), Transport::Tcp(Flags::SYN));
        let sent = bed.expect(Hook::PodIn, &request, action::TC_NEXT)?;
        let chosen = hosts.iter().position(|host| sent.destination.0 == *host).expect("one of the three");
        counts[chosen] += 1.0;
    }
    let sigma = (300.0 * (1.0 / 3.0) * (2.0 / 3.0_f64)).sqrt();
    for count in counts {
        assert!((count - 100.0).abs() < 5.0 * sigma, "{counts:?}");
    }
    Ok(())
}

fn any(family: Family) -> std::net::IpAddr {
    match family {
        Family::V4 => std::net::Ipv4Addr::UNSPECIFIED.into(),
        Family::V6 => std::net::Ipv6Addr::UNSPECIFIED.into(),
    }
}
