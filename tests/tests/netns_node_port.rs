//! Node ports, from outside, from nodes and from pods.

use std::net::IpAddr;

use anyhow::Result;
use tests::{
    lab::{
        LabOptions, Node, UplinkMode,
        address::{self, CLIENT, Family},
        agent::AgentOptions,
        cluster::Cluster,
        manifest::Service,
    },
    traffic::{Ask, Protocol},
};

/// One backend each, so that it is known which node it is on.
fn services() -> [Service; 2] {
    [Service::new("at-a", 31, &["a1"]), Service::new("at-b", 32, &["b1"])]
}

fn cluster(uplinks: [UplinkMode; 2]) -> Result<Cluster> {
    Cluster::start(LabOptions { uplinks, ..LabOptions::default() }, AgentOptions::default(), &services())
}

fn is_local(service: &Service, node: &Node) -> bool {
    service.pods.iter().all(|pod| node.pods.iter().any(|place| place.name() == *pod))
}

/// Every entry node, Service, family and protocol.
fn cases(cluster: &Cluster) -> impl Iterator<Item = (&Node, Service, Family, Protocol)> {
    let nodes = cluster.lab.nodes.iter();
    let services = nodes.flat_map(|node| services().map(|service| (node, service)));
    let families = services.flat_map(|(node, service)| Family::ALL.map(|family| (node, service.clone(), family)));
    families.flat_map(|(node, service, family)| Protocol::ALL.map(|protocol| (node, service.clone(), family, protocol)))
}

/// What a backend sees of a client outside: itself when the backend is on the node it came to, else that node.
fn expected_peer(node: &Node, service: &Service, family: Family) -> IpAddr {
    let seen = if is_local(service, node) { address::on_wire(CLIENT) } else { node.addresses() };
    seen.of(family)
}

fn the_client_outside_reaches_node_ports(uplinks: [UplinkMode; 2]) -> Result<()> {
    let cluster = cluster(uplinks)?;
    for (node, service, family, protocol) in cases(&cluster) {
        let target = service.at_node(node.addresses(), family, protocol);
        let case = format!("{target} at {} to {}", node.plan.name, service.name);
        // The first packet may wait for a neighbour; the others take the known way.
        for answer in cluster.lab.client.ask_times(Ask::new(target), 5)? {
            let answer = answer.map_err(|failure| anyhow::anyhow!("{case}: {failure}"))?;
            assert_eq!(answer.pod, service.pods[0], "{case}");
            assert_eq!(answer.from, target.address, "{case}");
            assert_eq!(answer.peer.ip(), expected_peer(node, &service, family), "{case}");
            if protocol == Protocol::Udp {
                let routers = if is_local(&service, node) { 1 } else { 2 };
                assert_eq!(answer.ttl, Some(64 - routers), "{case}");
            }
        }
    }
    Ok(())
}

#[test]
fn node_a_forwards_on_xdp_and_node_b_on_tc() -> Result<()> {
    the_client_outside_reaches_node_ports([UplinkMode::Xdp, UplinkMode::Tc])
}

#[test]
fn node_a_forwards_on_tc_and_node_b_on_xdp() -> Result<()> {
    the_client_outside_reaches_node_ports([UplinkMode::Tc, UplinkMode::Xdp])
}

#[test]
fn both_nodes_forward_on_xdp() -> Result<()> {
    the_client_outside_reaches_node_ports([UplinkMode::Xdp, UplinkMode::Xdp])
}

#[test]
fn an_open_connection_from_outside_keeps_its_backend() -> Result<()> {
    let cluster = cluster([UplinkMode::Xdp, UplinkMode::Tc])?;
    for (node, service, family, _) in cases(&cluster) {
        let target = service.at_node(node.addresses(), family, Protocol::Tcp);
        let connection = cluster.lab.client.open(Ask::new(target))?;
        for _ in 0..20 {
            assert_eq!(connection.ask()?.pod, service.pods[0], "{target}");
        }
        connection.close()?;
    }
    Ok(())
}

#[test]
fn nodes_reach_their_own_and_each_others_node_ports() -> Result<()> {
    let cluster = cluster([UplinkMode::Xdp, UplinkMode::Tc])?;
    for (node, service, family, protocol) in cases(&cluster) {
        for client in &cluster.lab.nodes {
            let target = service.at_node(node.addresses(), family, protocol);
            let answer = client.host.ask(Ask::new(target))?;
            assert_eq!(answer.pod, service.pods[0], "{} asks {target}", client.plan.name);
            assert_eq!(answer.from, target.address, "{} asks {target}", client.plan.name);
        }
    }
    Ok(())
}

#[test]
fn pods_reach_the_node_ports_of_both_nodes() -> Result<()> {
    let cluster = cluster([UplinkMode::Xdp, UplinkMode::Tc])?;
    for (node, service, family, protocol) in cases(&cluster) {
        for client in ["client-a", "client-b"] {
            let target = service.at_node(node.addresses(), family, protocol);
            let answer = cluster.lab.place(client)?.ask(Ask::new(target))?;
            assert_eq!(answer.pod, service.pods[0], "{client} asks {target}");
            assert_eq!(answer.from, target.address, "{client} asks {target}");
        }
    }
    Ok(())
}
