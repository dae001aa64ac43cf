//! A little of everything that the netns suite shows, with agents that the manifest starts and that ask an API server. All of it is
//! `cargo xtask test netns --installed`. Needs root.

use std::time::Duration;

use anyhow::Result;
use tests::{
    lab::{
        Between, LabOptions, Node,
        address::{self, CLIENT, Family, TUNNEL},
        agent::{AgentOptions, SocketLb},
        cluster::Cluster,
        installed::install_all,
        manifest::Service,
    },
    patience::wait_until,
    traffic::{Ask, Protocol},
};

fn cluster(lab: LabOptions, options: AgentOptions) -> Result<(Cluster, [Service; 2])> {
    install_all();
    let services = [Service::new("at-a", 31, &["a1"]), Service::new("at-b", 32, &["b1"])];
    Ok((Cluster::start(lab, options, &services)?, services))
}

fn ways() -> impl Iterator<Item = (Family, Protocol)> {
    Family::ALL.into_iter().flat_map(|family| Protocol::ALL.map(|protocol| (family, protocol)))
}

#[test]
fn cluster_ips_are_served_to_pods_by_their_devices() -> Result<()> {
    let options = AgentOptions { socket_lb: SocketLb::Host, ..AgentOptions::default() };
    let (cluster, services) = cluster(LabOptions::default(), options)?;
    for (family, protocol) in ways() {
        for service in &services {
            let answer = cluster.lab.place("client-a")?.ask(Ask::new(service.cluster(family, protocol)))?;
            assert_eq!(answer.pod, service.pods[0]);
        }
    }
    Ok(())
}

#[test]
fn cluster_ips_are_served_to_sockets_of_nodes_and_pods() -> Result<()> {
    let (cluster, services) = cluster(LabOptions::default(), AgentOptions::default())?;
    for (family, protocol) in ways() {
        for (service, place) in services.iter().flat_map(|service| [(service, "node-a"), (service, "client-b")]) {
            let answer = cluster.lab.place(place)?.ask(Ask::new(service.cluster(family, protocol)))?;
            assert_eq!(answer.pod, service.pods[0], "from {place}");
        }
    }
    Ok(())
}

#[test]
fn node_ports_are_served_to_a_client_outside_by_xdp_and_by_tc() -> Result<()> {
    let (cluster, services) = cluster(LabOptions::default(), AgentOptions::default())?;
    for (family, protocol) in ways() {
        for (service, node) in services.iter().flat_map(|service| cluster.lab.nodes.each_ref().map(|n| (service, n))) {
            let target = service.at_node(node.addresses(), family, protocol);
            let answer = cluster.lab.client.ask(Ask::new(target))?;
            assert_eq!((answer.pod.as_str(), answer.from), (service.pods[0], target.address));
        }
    }
    Ok(())
}

#[test]
fn connections_outlive_agents_and_the_next_ones_know_what_has_changed() -> Result<()> {
    let (cluster, [service, _]) = cluster(LabOptions::default(), AgentOptions::default())?;
    let target = service.at_node(cluster.lab.nodes[1].addresses(), Family::V4, Protocol::Tcp);
    let open = cluster.lab.client.open(Ask::new(target))?;
    assert_eq!(open.ask()?.pod, "a1");
    cluster.lab.nodes.iter().for_each(Node::kill_agent);
    assert_eq!(open.ask()?.pod, "a1");
    assert_eq!(cluster.lab.client.ask(Ask::new(target))?.pod, "a1");
    service.with_pods(&["a1", "b2"]).terminating(&["a1"]).write(cluster.source())?;
    cluster.restart_agents()?;
    assert_eq!(open.ask()?.pod, "a1");
    let client = cluster.lab.place("client-b")?;
    service.with_pods(&["b2"]).write(cluster.source())?;
    let asked = || client.ask(Ask::new(service.cluster(Family::V6, Protocol::Udp))).ok();
    let moved = || asked().filter(|answer| answer.pod == "b2").map(drop);
    wait_until("a change that is made under the agents' eyes", Duration::from_secs(20), moved)
}

#[test]
fn direct_server_return_shows_pods_the_client_itself() -> Result<()> {
    let more = vec!["--nodeport-mode=dsr".to_owned()];
    let (cluster, [_, at_b]) = cluster(LabOptions::default(), AgentOptions { more, ..AgentOptions::default() })?;
    for (family, protocol) in ways() {
        let target = at_b.at_node(cluster.lab.nodes[0].addresses(), family, protocol);
        let seen = address::on_wire(CLIENT).of(family);
        let asked = || cluster.lab.client.ask(Ask::new(target)).ok();
        let is_direct = || asked().filter(|answer| answer.peer.ip() == seen).map(drop);
        wait_until(&format!("the pod to see the client of {target}"), Duration::from_secs(20), is_direct)?;
    }
    Ok(())
}

#[test]
fn pods_behind_an_overlay_are_reached_through_it() -> Result<()> {
    let lab = LabOptions { between: Between::Overlay, ..LabOptions::default() };
    let (cluster, [_, at_b]) = cluster(lab, AgentOptions::default())?;
    let [a, _] = &cluster.lab.nodes;
    for (family, protocol) in ways() {
        let answer = cluster.lab.client.ask(Ask::new(at_b.at_node(a.addresses(), family, protocol)))?;
        assert_eq!(answer.pod, "b1");
        assert_eq!(answer.peer.ip(), address::of_pod(a.plan.number, TUNNEL).of(family));
    }
    Ok(())
}
