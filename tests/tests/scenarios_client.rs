//! Scenarios 29 and 30: clients of every kind. One client's port used towards two addresses with one backend; pods that ask
//! themselves, nodes that ask their own ports, and Services that have nobody to answer.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    slice,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use proxy_common::outcome::{Hook, Outcome};
use serde_json::json;
use tests::{
    http,
    lab::{
        LabOptions,
        address::{CLIENT, Family, of_balancer, on_wire, pod},
        agent::{AgentOptions, SocketLb},
        changed::{balance, write_changed},
        cluster::Cluster,
        manifest::Service,
    },
    patience::patience,
    traffic::{
        Ask, Failure, Inquiry, Protocol, Target,
        bare::{Call, Heard, Kind},
        place::{Activity, Place},
    },
};

/// Ports of clients that may not stand for a node's, each used by one pair.
const FIRST_PORT: u16 = 45_000;

fn own_address(place: &Place, family: Family) -> IpAddr {
    pod(place.name()).map_or_else(|| on_wire(CLIENT), |(_, addresses)| addresses).of(family)
}

/// Sockets of one port, connected to one target each.
fn pair(place: &Place, port: u16, targets: [Target; 2]) -> Result<[Activity<'_>; 2]> {
    let family = Family::of(targets[0].address.ip());
    let connect = |target: Target| {
        let kind = Kind { shares_port: true, ..Kind::new(family == Family::V6, target.protocol) };
        let socket = place.make(kind)?;
        let own = SocketAddr::new(own_address(place, family), port);
        for call in [Call::Bind(own), Call::Connect(target.address)] {
            let heard = socket.call(call)?;
            ensure!(heard == Ok(Heard::Done), "{call:?} of {}: {heard:?}", place.name());
        }
        Ok(socket)
    };
    Ok([connect(targets[0])?, connect(targets[1])?])
}

/// Both ask before either hears, again and again: each has its own answers, and no others.
fn both_work(sockets: &[Activity<'_>; 2], backend: &str) -> Result<()> {
    for _ in 0..3 {
        for socket in sockets {
            ensure!(socket.call(Call::Send)? == Ok(Heard::Done));
        }
        for (number, socket) in sockets.iter().enumerate() {
            let heard = socket.call(Call::Receive)?;
            let is_right = matches!(&heard, Ok(Heard::Answer(pod, _)) if pod == backend);
            ensure!(is_right, "socket {number} heard {heard:?} instead of {backend}");
        }
    }
    Ok(())
}

#[test]
fn scenario_29_one_port_of_a_client_reaches_one_backend_by_two_addresses_at_once() -> Result<()> {
    let services = [
        [Service::new("here", 31, &["a1"]), Service::new("here-too", 32, &["a1"])],
        [Service::new("there", 33, &["b1"]), Service::new("there-too", 34, &["b1"])],
    ];
    // Packets are what this is about: pods' sockets are left alone.
    let options = AgentOptions { socket_lb: SocketLb::Host, ..AgentOptions::default() };
    let cluster = Cluster::start(LabOptions::default(), options, services.as_flattened())?;
    let [a, b] = &cluster.lab.nodes;
    let mut ports = FIRST_PORT..;
    for family in Family::ALL {
        for protocol in Protocol::ALL {
            for [one, other] in &services {
                let at =
                    |service: &Service, node: &tests::lab::Node| service.at_node(node.addresses(), family, protocol);
                let by_vips = [one.cluster(family, protocol), other.cluster(family, protocol)];
                let ways = [
                    ("client", [at(one, a), at(other, a)]),
                    ("client", [at(one, b), at(other, b)]),
                    ("client", [at(one, a), at(one, b)]),
                    ("client-a", by_vips),
                    ("client-b", by_vips),
                    ("client-a", [at(one, a), at(one, b)]),
                    ("client-a", [one.cluster(family, protocol), at(other, a)]),
                ];
                for (client, targets) in ways {
                    let case = format!("{client} to {} and {}", targets[0], targets[1]);
                    let place = cluster.lab.place(client)?;
                    let port = ports.next().context("no port is left")?;
                    let sockets = pair(place, port, targets).with_context(|| case.clone())?;
                    both_work(&sockets, one.pods[0]).with_context(|| case.clone())?;
                    sockets.into_iter().try_for_each(Activity::close)?;
                }
            }
        }
    }
    let changed: u64 = [(a, Hook::UplinkXdp), (b, Hook::UplinkIn), (a, Hook::PodIn), (b, Hook::PodIn)]
        .iter()
        .map(|(node, hook)| node.counted(*hook, Outcome::PortChanged))
        .sum::<Result<u64>>()?;
    eprintln!("{changed} flows had to have another port");
    ensure!(changed >= 16, "only {changed} flows had to have another port: nothing was at stake");
    Ok(())
}

/// The node's own sockets are translated before the kernel looks whether the connection is there already: the second one is
/// refused at once, and takes no answer from the first.
#[test]
fn scenario_29_a_socket_that_would_be_another_ones_double_is_refused_and_the_first_goes_on() -> Result<()> {
    let services = [Service::new("here", 31, &["a1"]), Service::new("here-too", 32, &["a1"])];
    let cluster = Cluster::start(LabOptions::default(), AgentOptions::default(), &services)?;
    for (client, family) in [("node-a", Family::V4), ("client-a", Family::V6)] {
        let place = cluster.lab.place(client)?;
        let own = SocketAddr::new(own_address(place, family), FIRST_PORT);
        let kind = Kind { shares_port: true, ..Kind::new(family == Family::V6, Protocol::Tcp) };
        let [first, second] = [place.make(kind)?, place.make(kind)?];
        let target = |service: &Service| Call::Connect(service.cluster(family, Protocol::Tcp).address);
        for (socket, call) in [(&first, Call::Bind(own)), (&first, target(&services[0])), (&second, Call::Bind(own))] {
            assert_eq!(socket.call(call)?, Ok(Heard::Done), "{client}: {call:?}");
        }
        assert_eq!(second.call(target(&services[1]))?, Err(libc::EADDRNOTAVAIL), "{client}");
        assert_eq!(first.call(Call::Send)?, Ok(Heard::Done));
        assert_eq!(first.call(Call::Receive)?, Ok(Heard::Answer("a1".into(), None)), "{client}");
        // One that leaves its port to the kernel gets one that is free.
        assert_eq!(place.ask(Ask::new(services[1].cluster(family, Protocol::Tcp)))?.pod, "a1", "{client}");
    }
    Ok(())
}

/// From `connect`, or the datagram, to the error.
const AT_ONCE: Duration = Duration::from_millis(100);

/// How long one waits who expects nothing.
const MOMENT: Duration = Duration::from_millis(500);

const HEALTH_CHECK: u16 = 32_100;

fn must_reach(place: &Place, target: Target, pods: &[&str]) -> Result<()> {
    for answer in place.ask_times(Ask::new(target), 4)? {
        let answer = answer.with_context(|| format!("{} to {target}", place.name()))?;
        ensure!(pods.contains(&answer.pod.as_str()), "{} to {target}: {answer:?}", place.name());
        ensure!(answer.from == target.address, "{} to {target}: {answer:?}", place.name());
    }
    Ok(())
}

fn must_be_refused_at_once(place: &Place, target: Target) -> Result<()> {
    // The first packet of all may have to wait for a neighbour.
    place.ask_times(Ask::new(target), 1)?;
    let found = place.inquire(vec![Inquiry { ask: Ask::new(target), times: 1 }])?.remove(0);
    let is_so = matches!(&found.failure, Some((Failure::Refused, took)) if *took <= patience(AT_ONCE));
    ensure!(is_so, "{} to {target}: {found:?}", place.name());
    Ok(())
}

fn must_hear_nothing(place: &Place, target: Target) -> Result<()> {
    let answers = place.ask_times(Ask::new(target).within(patience(MOMENT)), 1)?;
    ensure!(answers == [Err(Failure::TimedOut)], "{} to {target}: {answers:?}", place.name());
    Ok(())
}

fn loopback(family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::LOCALHOST.into(),
        Family::V6 => Ipv6Addr::LOCALHOST.into(),
    }
}

/// Every family and protocol.
fn transports() -> impl Iterator<Item = (Family, Protocol)> {
    Family::ALL.into_iter().flat_map(|family| Protocol::ALL.map(|protocol| (family, protocol)))
}

#[test]
fn scenario_30_pods_reach_themselves_and_nodes_their_own_ports_by_every_address() -> Result<()> {
    let mirrors = [Service::new("mirror-a", 21, &["a2"]), Service::new("mirror-b", 22, &["b2"])];
    let web = Service::new("web", 31, &["a1", "b1"]);
    // By their devices; by their sockets it is another test's.
    let options = AgentOptions { socket_lb: SocketLb::Host, ..AgentOptions::default() };
    let cluster = Cluster::start(LabOptions::default(), options, &[&mirrors[..], slice::from_ref(&web)].concat())?;
    for (family, protocol) in transports() {
        for (mirror, node) in mirrors.iter().zip(&cluster.lab.nodes) {
            let place = cluster.lab.place(mirror.pods[0])?;
            for target in [mirror.cluster(family, protocol), mirror.at_node(node.addresses(), family, protocol)] {
                must_reach(place, target, &mirror.pods)?;
            }
        }
        for node in &cluster.lab.nodes {
            for other in &cluster.lab.nodes {
                must_reach(&node.host, web.at_node(other.addresses(), family, protocol), &web.pods)?;
            }
            let target = Target { address: SocketAddr::new(loopback(family), web.node_port), protocol };
            must_reach(&node.host, target, &web.pods)?;
        }
    }
    Ok(())
}

#[test]
fn scenario_30_without_endpoints_clients_are_refused_at_once_and_policy_local_is_silent_to_the_outside_alone()
-> Result<()> {
    let nobody = Service::new("nobody", 41, &[]);
    let away = Service::new("away", 42, &["b1"]);
    let cluster = Cluster::start_with(LabOptions::default(), AgentOptions::default(), |source| {
        nobody.write(source)?;
        write_changed(source, &away, |object| {
            balance(object, 42);
            object["spec"]["externalTrafficPolicy"] = json!("Local");
            object["spec"]["healthCheckNodePort"] = json!(HEALTH_CHECK);
        })
    })?;
    let [a, b] = &cluster.lab.nodes;
    let (client, pod) = (&cluster.lab.client, cluster.lab.place("client-a")?);
    let vips = of_balancer(42);
    client.namespace().ip(&format!(
        "route add {}/32 via {}\nroute add {}/128 via {}",
        vips.v4,
        a.addresses().v4,
        vips.v6,
        a.addresses().v6
    ))?;
    for (family, protocol) in transports() {
        for node in [a, b] {
            must_be_refused_at_once(client, nobody.at_node(node.addresses(), family, protocol))?;
        }
        for place in [pod, cluster.lab.place("client-b")?, &a.host, &b.host] {
            must_be_refused_at_once(place, nobody.cluster(family, protocol))?;
            must_be_refused_at_once(place, nobody.at_node(a.addresses(), family, protocol))?;
        }
        must_be_refused_at_once(&a.host, Target { address: (loopback(family), nobody.node_port).into(), protocol })?;

        let vip = Target { address: (vips.of(family), away.port).into(), protocol };
        for place in [pod, &a.host] {
            must_reach(place, vip, &["b1"]).context("who is inside is not outside")?;
        }
        let before = a.counted(Hook::UplinkXdp, Outcome::DropNoLocalEndpoint)?;
        must_hear_nothing(client, vip)?;
        must_hear_nothing(client, away.at_node(a.addresses(), family, protocol))?;
        ensure!(a.counted(Hook::UplinkXdp, Outcome::DropNoLocalEndpoint)? >= before + 2, "{family:?} {protocol}");
        let answer = client.ask(Ask::new(away.at_node(b.addresses(), family, protocol)))?;
        assert_eq!((answer.pod.as_str(), answer.peer.ip()), ("b1", on_wire(CLIENT).of(family)));
    }
    for family in Family::ALL {
        for (node, status) in [(a, 503), (b, 200)] {
            let place = SocketAddr::new(node.addresses().of(family), HEALTH_CHECK);
            http::wait_for_answer(client.namespace(), place, "/", |answer| answer.status == status)?;
        }
    }
    Ok(())
}
