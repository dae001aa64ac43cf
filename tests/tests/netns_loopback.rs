//! Node ports at the loopback address: for the node's own sockets, wherever the backend is, and for nobody else. Trap 25.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use proxy_common::outcome::{Hook, Outcome};
use tests::{
    lab::{LabOptions, UplinkMode, address::Family, agent::AgentOptions, cluster::Cluster, manifest::Service},
    patience::patience,
    traffic::{Answer, Ask, Failure, Protocol, Target, place::Place},
};

/// How long one waits who expects nothing.
const MOMENT: Duration = Duration::from_millis(300);

/// Behind each is one pod: on the node, on the other one, the node itself, the other node itself.
fn services() -> [Service; 4] {
    [
        Service::new("pod-here", 31, &["a1"]),
        Service::new("pod-elsewhere", 32, &["b1"]),
        Service::new("host-here", 33, &["node-a"]),
        Service::new("host-elsewhere", 34, &["node-b"]),
    ]
}

fn start(nodeport_addresses: &str) -> Result<Cluster> {
    let more = vec!["--nodeport-addresses".into(), nodeport_addresses.into()];
    let lab = LabOptions { uplinks: [UplinkMode::Xdp, UplinkMode::Tc], ..LabOptions::default() };
    let cluster = Cluster::start(lab, AgentOptions { more, ..AgentOptions::default() }, &services())?;
    for node in &cluster.lab.nodes {
        node.host.serve(&[8080])?;
    }
    Ok(cluster)
}

fn loopback(family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::LOCALHOST.into(),
        Family::V6 => Ipv6Addr::LOCALHOST.into(),
    }
}

/// What Linux takes for it.
fn unspecified(family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::UNSPECIFIED.into(),
        Family::V6 => Ipv6Addr::UNSPECIFIED.into(),
    }
}

/// TCP, UDP of a connected socket, UDP of an unconnected one.
fn asks(address: IpAddr, port: u16) -> [Ask; 3] {
    let [tcp, udp] =
        Protocol::ALL.map(|protocol| Ask::new(Target { address: SocketAddr::new(address, port), protocol }));
    [tcp, udp, udp.unconnected()]
}

fn one(client: &Place, ask: Ask) -> Result<Result<Answer, Failure>> {
    client.ask_times(ask, 1)?.pop().context("no answer to one request")
}

/// Trap 25: host clients, host-network backends.
#[test]
fn the_nodes_own_sockets_reach_every_backend_by_loopback() -> Result<()> {
    let cluster = start("primary")?;
    let host = cluster.lab.place("node-a")?;
    for service in services() {
        for family in Family::ALL {
            for named in [loopback(family), unspecified(family)] {
                for ask in asks(named, service.node_port) {
                    let answer = host.ask(ask).with_context(|| format!("{}: {ask:?}", service.name))?;
                    assert_eq!(answer.pod, service.pods[0], "{ask:?}");
                    let peer = SocketAddr::new(loopback(family), service.node_port);
                    // A client without a connection is told nothing but what it has named itself.
                    assert_eq!(answer.from, peer, "{ask:?}");
                }
            }
        }
    }
    Ok(())
}

/// Packets with such a source do not leave the node: the socket is told so, and not left alone.
#[test]
fn a_socket_that_is_bound_to_loopback_reaches_what_is_on_the_node_and_is_refused_the_rest() -> Result<()> {
    let cluster = start("primary")?;
    let node = &cluster.lab.nodes[0];
    for service in services() {
        let is_here = service.name == "host-here";
        for family in Family::ALL {
            let source = SocketAddr::new(loopback(family), 0);
            for ask in asks(loopback(family), service.node_port) {
                let refused = || {
                    let hooks = [Hook::Connect, Hook::Sendmsg];
                    hooks.into_iter().map(|hook| node.counted(hook, Outcome::DropMartian)).sum::<Result<u64>>()
                };
                let before = refused()?;
                let answer = one(&node.host, ask.from(source))?;
                if is_here {
                    let answer = answer.with_context(|| format!("{ask:?}"))?;
                    assert_eq!((answer.pod.as_str(), answer.peer.ip()), ("node-a", source.ip()), "{ask:?}");
                } else {
                    let unavailable = Failure::System { errno: libc::EADDRNOTAVAIL };
                    assert_eq!(answer.err(), Some(unavailable), "{}: {ask:?}", service.name);
                    assert_eq!(refused()?, before + 1, "{}: {ask:?}", service.name);
                }
            }
        }
    }
    Ok(())
}

/// Trap 25: to a pod, loopback is the pod.
#[test]
fn pods_do_not_reach_the_nodes_loopback_by_their_own() -> Result<()> {
    let cluster = start("all")?;
    for client in ["client-a", "client-b"] {
        let client = cluster.lab.place(client)?;
        let mapped = Ipv4Addr::LOCALHOST.to_ipv6_mapped().into();
        let named = Family::ALL.into_iter().flat_map(|family| [loopback(family), unspecified(family)]).chain([mapped]);
        for named in named {
            for ask in asks(named, services()[0].node_port) {
                let answer = one(client, ask.within(patience(MOMENT)))?;
                let expected = if ask.unconnected { Failure::TimedOut } else { Failure::Refused };
                assert_eq!(answer.err(), Some(expected), "{} asks {named}", client.name());
            }
        }
    }
    Ok(())
}

#[test]
fn loopback_serves_node_ports_where_the_operator_wants_it() -> Result<()> {
    let nodes_alone = start("192.0.2.0/24,2001:db8::/64")?;
    let loopback_alone = start("localhost")?;
    let service = &services()[0];
    for family in Family::ALL {
        let host = nodes_alone.lab.place("node-a")?;
        for named in [loopback(family), unspecified(family)] {
            for ask in &asks(named, service.node_port)[..2] {
                assert_eq!(one(host, *ask)?.err(), Some(Failure::Refused), "{ask:?}");
            }
        }
        let node = &loopback_alone.lab.nodes[0];
        for ask in asks(loopback(family), service.node_port) {
            assert_eq!(node.host.ask(ask)?.pod, "a1", "{ask:?}");
        }
        for ask in &asks(node.addresses().of(family), service.node_port)[..2] {
            assert_eq!(one(&node.host, *ask)?.err(), Some(Failure::Refused), "{ask:?}");
        }
    }
    Ok(())
}

/// Trap 25: CVE-2020-8558 as it was exploited, on nodes that let loopback addresses through (`route_localnet`), as kube-proxy
/// makes them. A neighbour on the wire, or a pod, sends to 127.0.0.1 by the node.
#[test]
fn neighbours_and_pods_do_not_reach_what_listens_on_loopback() -> Result<()> {
    let cluster = start("primary")?;
    let lab = &cluster.lab;
    for (name, client, via, device, hook) in [
        ("node-a", &lab.client, "192.0.2.11", "eth0", Hook::UplinkXdp),
        ("node-b", &lab.client, "192.0.2.12", "eth0", Hook::UplinkIn),
        ("node-a", lab.place("client-a")?, "169.254.1.1", "eth0", Hook::PodIn),
        ("node-b", lab.place("client-b")?, "10.244.2.1", "eth0", Hook::PodIn),
    ] {
        let node = lab.node(name)?;
        let case = format!("{} by {name}", client.name());
        node.host.namespace().sysctl("net/ipv4/conf/all/route_localnet", "1")?;
        client.namespace().sysctl("net/ipv4/conf/all/route_localnet", "1")?;
        // Fails where it has none.
        let _ = client.namespace().ip("addr del 127.0.0.1/8 dev lo");
        client.namespace().ip(&format!("route replace 127.0.0.1/32 via {via} dev {device}"))?;
        for port in [8080, services()[0].node_port] {
            for ask in &asks(Ipv4Addr::LOCALHOST.into(), port)[..2] {
                let before = node.counted(hook, Outcome::DropMartian)?;
                let answer = one(client, ask.within(patience(MOMENT)))?;
                assert_eq!(answer.err(), Some(Failure::TimedOut), "{case}: {ask:?}");
                ensure!(node.counted(hook, Outcome::DropMartian)? > before, "{case}: {ask:?} never came");
            }
        }
    }
    Ok(())
}
