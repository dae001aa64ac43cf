//! Ports of the node that are `NodePorts`: no process of the node may take one.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::Result;
use proxy_common::outcome::{Hook, Outcome};
use tests::{
    lab::{LabOptions, address::Family, agent::AgentOptions, cluster::Cluster, manifest::Service},
    traffic::{Failure, Protocol, Target},
};

const IN_USE: Failure = Failure::System { errno: libc::EADDRINUSE };

fn any(family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::UNSPECIFIED.into(),
        Family::V6 => Ipv6Addr::UNSPECIFIED.into(),
    }
}

fn loopback(family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::LOCALHOST.into(),
        Family::V6 => Ipv6Addr::LOCALHOST.into(),
    }
}

fn start(nodeport_addresses: &str) -> Result<(Cluster, Service)> {
    let service = Service::new("echo", 10, &["a1"]);
    let more = vec!["--nodeport-addresses".into(), nodeport_addresses.into()];
    let options = AgentOptions { more, ..AgentOptions::default() };
    Ok((Cluster::start(LabOptions::default(), options, std::slice::from_ref(&service))?, service))
}

fn ways() -> impl Iterator<Item = (Family, Protocol)> {
    Family::ALL.into_iter().flat_map(|family| Protocol::ALL.map(|protocol| (family, protocol)))
}

#[test]
fn a_process_of_the_node_is_refused_a_node_port() -> Result<()> {
    let (cluster, service) = start("primary")?;
    let node = &cluster.lab.nodes[0];
    for (family, protocol) in ways() {
        for address in [any(family), node.addresses().of(family)] {
            let target = |port| Target { address: SocketAddr::new(address, port), protocol };
            let before = node.counted(Hook::PostBind, Outcome::RefuseBind)?;
            assert_eq!(node.host.bind(target(service.node_port))?, Err(IN_USE), "{}", target(service.node_port));
            assert_eq!(node.counted(Hook::PostBind, Outcome::RefuseBind)?, before + 1);
            // A port nobody uses, the kernel's choice, and the same port in a pod.
            assert_eq!(node.host.bind(target(service.node_port + 1))?, Ok(()));
            assert_eq!(node.host.bind(target(0))?, Ok(()));
        }
        let target = Target { address: SocketAddr::new(any(family), service.node_port), protocol };
        assert_eq!(cluster.lab.place("client-a")?.bind(target)?, Ok(()), "a pod binds {target}");
    }
    Ok(())
}

#[test]
fn a_mapped_address_is_the_one_it_stands_for() -> Result<()> {
    let (cluster, service) = start("primary")?;
    let node = &cluster.lab.nodes[0];
    for address in [Ipv4Addr::UNSPECIFIED, node.addresses().v4] {
        for protocol in Protocol::ALL {
            let address = SocketAddr::new(address.to_ipv6_mapped().into(), service.node_port);
            assert_eq!(node.host.bind(Target { address, protocol })?, Err(IN_USE), "{address}");
        }
    }
    Ok(())
}

#[test]
fn addresses_that_serve_no_node_ports_are_free() -> Result<()> {
    let (cluster, service) = start("192.0.2.0/24,2001:db8::/64")?;
    let (local, _) = start("localhost")?;
    for (family, protocol) in ways() {
        let target = |address| Target { address: SocketAddr::new(address, service.node_port), protocol };
        let host = &cluster.lab.nodes[0].host;
        assert_eq!(host.bind(target(loopback(family)))?, Ok(()));
        assert_eq!(host.bind(target(any(family)))?, Err(IN_USE));

        let node = &local.lab.nodes[0];
        assert_eq!(node.host.bind(target(loopback(family)))?, Err(IN_USE));
        assert_eq!(node.host.bind(target(node.addresses().of(family)))?, Ok(()));
    }
    Ok(())
}

#[test]
fn a_socket_that_has_the_port_already_keeps_it() -> Result<()> {
    let service = Service::new("late", 11, &["a1"]);
    let cluster = Cluster::start(LabOptions::default(), AgentOptions::default(), &[])?;
    let node = &cluster.lab.nodes[0];
    node.host.serve(&[service.node_port])?;
    service.write(cluster.source())?;
    let target = service.at_node(node.addresses(), Family::V4, Protocol::Tcp);
    tests::patience::wait_until("the new Service", std::time::Duration::from_secs(5), || {
        let answer = cluster.lab.client.ask(tests::traffic::Ask::new(target));
        answer.is_ok_and(|answer| answer.pod == "a1").then_some(())
    })
}
