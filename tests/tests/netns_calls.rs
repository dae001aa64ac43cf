//! Sockets of the node whose system calls come in an order that no ordinary client has: whatever it is, a socket talks to the
//! Service that it named last, and is told of that one.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use anyhow::{Context as _, Result};
use proxy_common::outcome::{Hook, Outcome};
use tests::{
    lab::{LabOptions, address::Family, agent::AgentOptions, cluster::Cluster, manifest::Service},
    patience::wait_until,
    traffic::{
        Ask, Protocol,
        bare::{Call, Heard, Kind},
        place::{Activity, Place},
    },
};

const A: u8 = 10;
const B: u8 = 11;

fn cluster(services: &[Service]) -> Result<Cluster> {
    Cluster::start(LabOptions::default(), AgentOptions::default(), services)
}

/// Two Services with a backend each.
fn two() -> Result<(Cluster, [Service; 2])> {
    let services = [Service::new("first", A, &["a1"]), Service::new("second", B, &["b1"])];
    Ok((cluster(&services)?, services))
}

/// How a socket may come to a Service.
#[derive(Clone, Copy, Debug)]
enum Dress {
    V4,
    V6,
    /// An IPv4 address on a socket of IPv6.
    Mapped,
}

impl Dress {
    const ALL: [Self; 3] = [Self::V4, Self::V6, Self::Mapped];

    fn family(self) -> Family {
        if matches!(self, Self::V6) { Family::V6 } else { Family::V4 }
    }

    fn kind(self, protocol: Protocol) -> Kind {
        Kind::new(!matches!(self, Self::V4), protocol)
    }

    fn clothe(self, mut address: SocketAddr) -> SocketAddr {
        if let (Self::Mapped, IpAddr::V4(v4)) = (self, address.ip()) {
            address.set_ip(v4.to_ipv6_mapped().into());
        }
        address
    }

    fn of(self, service: &Service, protocol: Protocol) -> SocketAddr {
        self.clothe(service.cluster(self.family(), protocol).address)
    }
}

fn host(cluster: &Cluster) -> &Place {
    &cluster.lab.nodes[0].host
}

fn must(socket: &Activity<'_>, call: Call) -> Result<Heard> {
    socket.call(call)?.map_err(|errno| anyhow::anyhow!("error number {errno}")).with_context(|| format!("{call:?}"))
}

/// Makes a call that returns nothing.
fn make(socket: &Activity<'_>, call: Call) -> Result<()> {
    assert_eq!(must(socket, call)?, Heard::Done, "{call:?}");
    Ok(())
}

fn hears(socket: &Activity<'_>, pod: &str, from: Option<SocketAddr>) -> Result<()> {
    let heard = must(socket, Call::Receive).with_context(|| format!("from {pod} as {from:?}"))?;
    assert_eq!(heard, Heard::Answer(pod.to_owned(), from));
    Ok(())
}

fn names(socket: &Activity<'_>, peer: SocketAddr) -> Result<()> {
    assert_eq!(must(socket, Call::PeerName)?, Heard::Address(peer));
    Ok(())
}

/// How many connections the two backends of [`two`] have.
fn active(cluster: &Cluster, dress: Dress) -> Result<[u32; 2]> {
    let node = &cluster.lab.nodes[0];
    Ok([node.active(dress.family(), "a1")?, node.active(dress.family(), "b1")?])
}

#[test]
fn a_udp_socket_that_connects_twice_is_the_second_services() -> Result<()> {
    let (cluster, [first, second]) = two()?;
    for dress in Dress::ALL {
        let [a, b] = [&first, &second].map(|service| dress.of(service, Protocol::Udp));
        let socket = host(&cluster).make(dress.kind(Protocol::Udp))?;
        for (service, pod, expected) in [(a, "a1", [1, 0]), (b, "b1", [0, 1]), (a, "a1", [1, 0])] {
            make(&socket, Call::Connect(service))?;
            names(&socket, service)?;
            make(&socket, Call::Send)?;
            hears(&socket, pod, Some(service))?;
            assert_eq!(active(&cluster, dress)?, expected, "{dress:?} to {service}");
        }
        socket.close()?;
        assert_eq!(active(&cluster, dress)?, [0, 0], "{dress:?}");
    }
    Ok(())
}

#[test]
fn a_udp_socket_that_leaves_a_service_for_somebody_else_is_no_longer_its() -> Result<()> {
    let (cluster, [first, second]) = two()?;
    for dress in Dress::ALL {
        let [a, b] = [&first, &second].map(|service| dress.of(service, Protocol::Udp));
        let socket = host(&cluster).make(dress.kind(Protocol::Udp))?;
        make(&socket, Call::Connect(a))?;
        // The backend itself, which the Service's name must not be given to.
        let pod = tests::lab::address::pod("a1").context("no pod a1")?.1.of(dress.family());
        let pod = dress.clothe(SocketAddr::new(pod, first.target_port));
        make(&socket, Call::Connect(pod))?;
        names(&socket, pod)?;
        make(&socket, Call::Send)?;
        hears(&socket, "a1", Some(pod))?;
        assert_eq!(active(&cluster, dress)?, [0, 0], "{dress:?}");

        make(&socket, Call::Connect(a))?;
        make(&socket, Call::Disconnect)?;
        assert_eq!(socket.call(Call::PeerName)?, Err(libc::ENOTCONN));
        // Linux lets a socket of IPv6 that was connected hear from that one address only, also when it no longer is.
        let targets: &[_] = if matches!(dress, Dress::V6) { &[(a, "a1")] } else { &[(a, "a1"), (b, "b1")] };
        for (service, pod) in targets {
            make(&socket, Call::SendTo(*service))?;
            hears(&socket, pod, Some(*service))?;
        }
        socket.close()?;
    }
    Ok(())
}

#[test]
fn a_udp_socket_that_may_not_connect_again_stays_where_it_is() -> Result<()> {
    let first = Service::new("first", A, &["a1"]);
    let nobody = Service::new("nobody", B, &[]);
    let cluster = cluster(&[first.clone(), nobody.clone()])?;
    for dress in Dress::ALL {
        let [a, b] = [&first, &nobody].map(|service| dress.of(service, Protocol::Udp));
        let socket = host(&cluster).make(dress.kind(Protocol::Udp))?;
        make(&socket, Call::Connect(a))?;
        assert_eq!(socket.call(Call::Connect(b))?, Err(libc::ECONNREFUSED));
        names(&socket, a)?;
        make(&socket, Call::Send)?;
        hears(&socket, "a1", Some(a))?;
        assert_eq!(cluster.lab.nodes[0].active(dress.family(), "a1")?, 1);
        socket.close()?;
    }
    Ok(())
}

/// Another backend's answer would not reach a socket that is connected to one.
#[test]
fn a_connected_udp_socket_that_names_its_peer_again_is_answered() -> Result<()> {
    let service = Service::new("echo", A, &["a1", "a2", "b1", "b2"]);
    let other = Service::new("other", B, &["b1"]);
    let cluster = cluster(&[service.clone(), other])?;
    for dress in Dress::ALL {
        let target = dress.of(&service, Protocol::Udp);
        for _ in 0..4 {
            let socket = host(&cluster).make(dress.kind(Protocol::Udp))?;
            make(&socket, Call::Connect(target))?;
            for call in [Call::SendTo(target), Call::Send, Call::SendTo(target)] {
                make(&socket, call)?;
                let Heard::Answer(_, from) = must(&socket, Call::Receive)? else { anyhow::bail!("no answer") };
                assert_eq!(from, Some(target), "{dress:?}");
            }
            socket.close()?;
        }
    }
    Ok(())
}

#[test]
fn a_socket_of_version_6_alone_is_told_what_the_kernel_says_of_mapped_addresses() -> Result<()> {
    let (cluster, [first, _]) = two()?;
    for protocol in Protocol::ALL {
        let socket = host(&cluster).make(Kind { only_v6: true, ..Kind::new(true, protocol) })?;
        assert_eq!(socket.call(Call::Connect(Dress::Mapped.of(&first, protocol)))?, Err(libc::ENETUNREACH));
        let target = Dress::V6.of(&first, protocol);
        make(&socket, Call::Connect(target))?;
        names(&socket, target)?;
        make(&socket, Call::Send)?;
        hears(&socket, "a1", (protocol == Protocol::Udp).then_some(target))?;
        assert_eq!(active(&cluster, Dress::V4)?, [0, 0], "the attempt is none");
        socket.close()?;
    }
    Ok(())
}

#[test]
fn a_request_with_the_syn_reaches_the_service() -> Result<()> {
    let (cluster, [first, _]) = two()?;
    host(&cluster).namespace().sysctl("net/ipv4/tcp_fastopen", "1")?;
    for dress in Dress::ALL {
        let target = dress.of(&first, Protocol::Tcp);
        for _ in 0..2 {
            let socket = host(&cluster).make(dress.kind(Protocol::Tcp))?;
            make(&socket, Call::SendFast(target))?;
            hears(&socket, "a1", None)?;
            names(&socket, target)?;
            assert_eq!(active(&cluster, dress)?, [1, 0], "{dress:?}");
            socket.close()?;
            assert_eq!(active(&cluster, dress)?, [0, 0], "{dress:?}");
        }
    }
    Ok(())
}

#[test]
fn a_connect_that_does_not_wait_is_one_connection() -> Result<()> {
    let (cluster, [first, _]) = two()?;
    let node = &cluster.lab.nodes[0];
    for dress in Dress::ALL {
        let target = dress.of(&first, Protocol::Tcp);
        let before = node.counted(Hook::Connect, Outcome::Opened)?;
        let socket = host(&cluster).make(dress.kind(Protocol::Tcp))?;
        assert_eq!(socket.call(Call::Begin(target))?, Err(libc::EINPROGRESS));
        wait_until("the connection", Duration::from_secs(3), || {
            let again = socket.call(Call::Begin(target)).ok()?;
            [Ok(Heard::Done), Err(libc::EISCONN)].contains(&again).then_some(())
        })?;
        names(&socket, target)?;
        make(&socket, Call::Send)?;
        hears(&socket, "a1", None)?;
        assert_eq!(node.counted(Hook::Connect, Outcome::Opened)?, before + 1, "{dress:?}");
        assert_eq!(active(&cluster, dress)?, [1, 0], "{dress:?}");
        socket.close()?;
    }
    Ok(())
}

#[test]
fn sockets_that_share_a_port_talk_to_their_services() -> Result<()> {
    let (cluster, [first, second]) = two()?;
    for dress in Dress::ALL {
        let [a, b] = [&first, &second].map(|service| dress.of(service, Protocol::Udp));
        let kind = Kind { shares_port: true, ..dress.kind(Protocol::Udp) };
        let any = SocketAddr::new(tests::traffic::socket::any_like(a.ip()), 5_300);
        let sockets = [host(&cluster).make(kind)?, host(&cluster).make(kind)?];
        for (socket, target) in sockets.iter().zip([a, b]) {
            make(socket, Call::Bind(any))?;
            make(socket, Call::Connect(target))?;
        }
        for (socket, target, pod) in [(&sockets[1], b, "b1"), (&sockets[0], a, "a1")] {
            make(socket, Call::Send)?;
            hears(socket, pod, Some(target))?;
        }
        let taken = host(&cluster).make(kind)?;
        let node_port = SocketAddr::new(any.ip(), first.node_port);
        assert_eq!(taken.call(Call::Bind(node_port))?, Err(libc::EADDRINUSE), "{dress:?}");
        for socket in sockets {
            socket.close()?;
        }
    }
    Ok(())
}

#[test]
fn the_peer_has_the_services_name_after_the_backend_was_moved() -> Result<()> {
    let (cluster, [first, _]) = two()?;
    for dress in Dress::ALL {
        first.write(cluster.source())?;
        let [tcp, udp] = Protocol::ALL.map(|protocol| dress.of(&first, protocol));
        let target = first.cluster(dress.family(), Protocol::Tcp);
        wait_for(&cluster, Ask::new(target), "a1")?;
        let staying = host(&cluster).make(dress.kind(Protocol::Tcp))?;
        make(&staying, Call::Connect(tcp))?;
        let moving = host(&cluster).make(dress.kind(Protocol::Udp))?;
        make(&moving, Call::SendTo(udp))?;
        hears(&moving, "a1", Some(udp))?;

        first.with_pods(&["b1"]).terminating(&["a1"]).write(cluster.source())?;
        wait_for(&cluster, Ask::new(target), "b1")?;
        names(&staying, tcp)?;
        make(&staying, Call::Send)?;
        hears(&staying, "a1", None)?;

        first.with_pods(&["b1"]).write(cluster.source())?;
        wait_until("the datagrams to move", Duration::from_secs(3), || {
            make(&moving, Call::SendTo(udp)).ok()?;
            let heard = must(&moving, Call::Receive).ok()?;
            assert!(matches!(heard, Heard::Answer(_, from) if from == Some(udp)), "{heard:?}");
            matches!(heard, Heard::Answer(pod, _) if pod == "b1").then_some(())
        })?;
    }
    Ok(())
}

fn wait_for(cluster: &Cluster, ask: Ask, pod: &str) -> Result<()> {
    wait_until(&format!("an answer of {pod}"), Duration::from_secs(5), || {
        host(cluster).ask(ask).is_ok_and(|answer| answer.pod == pod).then_some(())
    })
}
