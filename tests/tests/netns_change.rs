//! What happens to traffic when objects change.

use std::{
    fs,
    time::{Duration, Instant},
};

use anyhow::Result;
use tests::{
    lab::{
        LabOptions,
        address::Family,
        agent::{AgentOptions, SocketLb},
        cluster::Cluster,
        manifest::Service,
    },
    patience::{patience, wait_until},
    traffic::{Ask, Protocol, Target, place::Place},
};

/// From the moment the file is in place to the first connection that follows.
const SOON: Duration = Duration::from_millis(100);

fn start(socket_lb: SocketLb, services: &[Service]) -> Result<Cluster> {
    Cluster::start(LabOptions::default(), AgentOptions { socket_lb, ..AgentOptions::default() }, services)
}

/// A pod, a node and the client outside, with what each of them calls the Service.
fn clients<'lab>(cluster: &'lab Cluster, service: &Service, protocol: Protocol) -> Result<Vec<(&'lab Place, Target)>> {
    let mut clients = Vec::new();
    for family in Family::ALL {
        for client in ["client-a", "client-b", "node-a"] {
            clients.push((cluster.lab.place(client)?, service.cluster(family, protocol)));
        }
        for node in &cluster.lab.nodes {
            clients.push((&cluster.lab.client, service.at_node(node.addresses(), family, protocol)));
        }
    }
    Ok(clients)
}

fn open_connections_stay_and_new_ones_follow(socket_lb: SocketLb) -> Result<()> {
    let service = Service::new("moving", 40, &["a1"]);
    let cluster = start(socket_lb, std::slice::from_ref(&service))?;
    let clients = clients(&cluster, &service, Protocol::Tcp)?;
    let open: Result<Vec<_>> = clients.iter().map(|(client, target)| client.open(Ask::new(*target))).collect();
    let open = open?;
    for connection in &open {
        assert_eq!(connection.ask()?.pod, "a1");
    }
    // The endpoint stays in its slice, terminating: it takes no new connections and keeps the ones it has.
    let moved = service.with_pods(&["b1"]).terminating(&["a1"]);
    moved.write(cluster.source())?;
    let written = Instant::now();
    let (client, target) = clients[0];
    wait_until("a new connection to follow", Duration::from_secs(5), || {
        client.ask(Ask::new(target)).is_ok_and(|answer| answer.pod == "b1").then_some(())
    })?;
    assert!(written.elapsed() <= patience(SOON), "new connections followed after {:?}", written.elapsed());
    for (client, target) in &clients {
        wait_until("the other node's agent", SOON, || {
            client.ask(Ask::new(*target)).is_ok_and(|answer| answer.pod == "b1").then_some(())
        })?;
        for answer in client.ask_times(Ask::new(*target), 10)? {
            assert_eq!(answer?.pod, "b1", "{} asks {target}", client.name());
        }
    }
    for connection in &open {
        assert_eq!(connection.ask()?.pod, "a1", "an open connection has moved");
    }
    Ok(())
}

#[test]
fn open_connections_stay_and_new_ones_follow_by_device() -> Result<()> {
    open_connections_stay_and_new_ones_follow(SocketLb::Host)
}

#[test]
fn open_connections_stay_and_new_ones_follow_by_socket() -> Result<()> {
    open_connections_stay_and_new_ones_follow(SocketLb::All)
}

#[test]
fn a_udp_client_follows_within_a_tenth_of_a_second() -> Result<()> {
    let service = Service::new("moving", 40, &["a1"]);
    let cluster = start(SocketLb::Host, std::slice::from_ref(&service))?;
    for (client, target) in clients(&cluster, &service, Protocol::Udp)? {
        assert_eq!(client.ask(Ask::new(target))?.pod, "a1");
    }
    service.with_pods(&["b1"]).write(cluster.source())?;
    for (client, target) in clients(&cluster, &service, Protocol::Udp)? {
        wait_until("new datagrams to follow", SOON, || {
            client.ask(Ask::new(target)).is_ok_and(|answer| answer.pod == "b1").then_some(())
        })?;
    }
    Ok(())
}

#[test]
fn a_service_appears_and_disappears_with_its_file() -> Result<()> {
    let cluster = start(SocketLb::All, &[Service::new("first", 40, &["a1"])])?;
    let late = Service::new("late", 41, &["b2"]);
    let target = late.cluster(Family::V6, Protocol::Tcp);
    let client = cluster.lab.place("client-a")?;
    let ask = Ask::new(target).within(patience(Duration::from_millis(300)));
    assert!(client.ask(ask).is_err(), "reached before it exists");
    late.write(cluster.source())?;
    wait_until("the new Service", Duration::from_secs(5), || client.ask(ask).is_ok().then_some(()))?;
    fs::remove_file(cluster.source().join("late.yaml"))?;
    wait_until("the end of the Service", Duration::from_secs(5), || client.ask(ask).is_err().then_some(()))
}

#[test]
fn a_broken_document_is_named_and_the_others_are_served() -> Result<()> {
    let services = [Service::new("good", 40, &["a1"]), Service::new("other", 41, &["b1"])];
    let cluster = start(SocketLb::All, &services[..1])?;
    let broken =
        "apiVersion: v1\nkind: Service\nmetadata: {name: broken, namespace: lab}\nspec:\n  ports: [{port: oops}]\n";
    fs::write(cluster.source().join("broken.yaml"), broken)?;
    fs::write(cluster.source().join("worse.yaml"), "kind: [Service\n  ]: {\n")?;
    services[1].write(cluster.source())?;
    let client = cluster.lab.place("client-b")?;
    for service in &services {
        wait_until("the good Services", Duration::from_secs(5), || {
            client.ask(Ask::new(service.cluster(Family::V4, Protocol::Tcp))).is_ok().then_some(())
        })?;
    }
    for node in &cluster.lab.nodes {
        for file in ["broken.yaml", "worse.yaml"] {
            node.agent()?.wait_for_line(file, Duration::from_secs(5))?;
        }
    }
    Ok(())
}
