//! Sockets that were translated as they connected, and whose backend goes away: trap 3 of others.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::Duration,
};

use anyhow::Result;
use tests::{
    http,
    lab::{LabOptions, address::Family, agent::AgentOptions, cluster::Cluster, manifest::Service},
    patience::{patience, wait_until},
    traffic::{
        Answer, Ask, Failure, Protocol, Target,
        place::{Activity, Place},
    },
};

const METRICS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 10_249);

/// How long the next request of a client may wait for its answer.
const MOMENT: Duration = Duration::from_millis(200);

/// Until a backend that left every slice counts as gone, and a second more.
const GONE: Duration = Duration::from_secs(8);

fn cluster(pods: &[&'static str]) -> Result<(Cluster, Service)> {
    let service = Service::new("moving", 40, pods);
    let cluster = Cluster::start(LabOptions::default(), AgentOptions::default(), std::slice::from_ref(&service))?;
    Ok((cluster, service))
}

/// An open socket that has had one answer, from that pod.
fn open<'place>(client: &'place Place, ask: Ask, pod: &str) -> Result<Activity<'place>> {
    let open = client.open(ask.within(patience(MOMENT)))?;
    assert_eq!(open.ask()?.pod, pod);
    Ok(open)
}

/// A UDP socket that waits for an answer is told ECONNABORTED, as TCP is; one that sends, that it has no peer any more.
const ENDED: [Failure; 2] = [Failure::Reset, Failure::System { errno: libc::EDESTADDRREQ }];

fn wait_until_ended(open: &Activity<'_>, what: &str, usual: Duration) -> Result<()> {
    wait_until(what, usual, || {
        let answer: Result<Answer, Failure> = open.try_ask().ok()?;
        answer.is_err_and(|failure| ENDED.contains(&failure)).then_some(())
    })
}

fn targets(service: &Service, protocol: Protocol) -> [Target; 3] {
    let [v4, v6] = Family::ALL.map(|family| service.cluster(family, protocol));
    let mut mapped = v4;
    if let IpAddr::V4(address) = v4.address.ip() {
        mapped.address.set_ip(address.to_ipv6_mapped().into());
    }
    [v4, v6, mapped]
}

/// Trap 3: a connection whose backend has left every slice does not hang until its retransmissions end.
#[test]
fn a_connection_to_a_backend_that_has_gone_is_ended_on_the_node_and_in_pods() -> Result<()> {
    let (cluster, service) = cluster(&["a1"])?;
    let bystander = Service::new("staying", 41, &["a2"]);
    bystander.write(cluster.source())?;
    let mut connections = Vec::new();
    for name in ["node-a", "client-a"] {
        let client = cluster.lab.place(name)?;
        for target in targets(&service, Protocol::Tcp) {
            connections.push((name, target, open(client, Ask::new(target), "a1")?));
        }
    }
    let target = bystander.cluster(Family::V4, Protocol::Tcp);
    let host = cluster.lab.place("node-a")?;
    wait_until("the other Service", Duration::from_secs(5), || host.ask(Ask::new(target)).is_ok().then_some(()))?;
    let staying = open(host, Ask::new(target), "a2")?;

    service.with_pods(&["b1"]).write(cluster.source())?;
    for (name, target, connection) in &connections {
        wait_until_ended(connection, &format!("the end of {name}'s connection to {target}"), GONE)?;
        assert_eq!(cluster.lab.place(name)?.ask(Ask::new(*target))?.pod, "b1", "{name} connects again to {target}");
    }
    assert_eq!(staying.ask()?.pod, "a2", "somebody else's connection");
    // Of the node and of the pod one each, and one by the mapped address.
    for (family, sockets) in [("IPv4", 4.0), ("IPv6", 2.0)] {
        let series = format!("kubeproxy_conntrack_reconciler_deleted_entries_total{{ip_family=\"{family}\"}}");
        wait_until(&series, Duration::from_secs(1), || {
            let answer = http::ask(host.namespace(), METRICS, "GET", "/metrics").ok()?;
            (answer.metric(&series) == Some(sockets)).then_some(())
        })?;
    }
    Ok(())
}

/// Trap 3: a connected UDP socket is ended when its backend no longer serves, and the next one gets another.
#[test]
fn a_connected_udp_socket_is_ended_when_its_backend_no_longer_serves() -> Result<()> {
    let (cluster, service) = cluster(&["a1"])?;
    let host = cluster.lab.place("node-a")?;
    for target in targets(&service, Protocol::Udp) {
        service.write(cluster.source())?;
        wait_until("the first backend", Duration::from_secs(5), || answers(host, target, "a1"))?;
        let socket = open(host, Ask::new(target), "a1")?;
        let other = open(host, Ask::new(target), "a1")?;
        service.with_pods(&["b1"]).write(cluster.source())?;
        wait_until_ended(&socket, &format!("the end of the socket to {target}"), Duration::from_secs(1))?;
        wait_until_ended(&other, &format!("the end of the other socket to {target}"), MOMENT)?;
        assert_eq!(host.ask(Ask::new(target))?.pod, "b1");
    }
    Ok(())
}

/// Trap 3: with nothing left, who connects again is refused at once.
#[test]
fn a_connected_udp_socket_whose_service_has_nothing_left_is_ended_and_refused() -> Result<()> {
    let (cluster, service) = cluster(&["a1"])?;
    let host = cluster.lab.place("node-a")?;
    let sockets: Result<Vec<_>> = targets(&service, Protocol::Udp)
        .into_iter()
        .map(|target| Ok((target, open(host, Ask::new(target), "a1")?)))
        .collect();
    let sockets = sockets?;
    service.with_pods(&[]).write(cluster.source())?;
    for (target, socket) in &sockets {
        wait_until_ended(socket, &format!("the end of the socket to {target}"), Duration::from_secs(1))?;
        assert_eq!(host.ask_times(Ask::new(*target), 1)?, [Err(Failure::Refused)], "{target}");
    }
    Ok(())
}

/// Trap 3: an unconnected UDP socket is never ended: it may talk to others, and chooses again with its next datagram.
#[test]
fn an_unconnected_udp_socket_is_left_alone_and_moves() -> Result<()> {
    let (cluster, service) = cluster(&["a1"])?;
    let host = cluster.lab.place("node-a")?;
    let sockets: Result<Vec<_>> = targets(&service, Protocol::Udp)
        .into_iter()
        .map(|target| Ok((target, open(host, Ask::new(target).unconnected(), "a1")?)))
        .collect();
    let sockets = sockets?;
    service.with_pods(&["b1"]).write(cluster.source())?;
    for (target, socket) in &sockets {
        wait_until(&format!("the socket's datagrams to {target} to move"), Duration::from_secs(1), || {
            let answer: Result<Answer, Failure> = socket.try_ask().ok()?;
            assert!(!matches!(&answer, Err(failure) if ENDED.contains(failure)), "the socket was ended");
            answer.is_ok_and(|answer| answer.pod == "b1").then_some(())
        })?;
    }
    Ok(())
}

fn answers(client: &Place, target: Target, pod: &str) -> Option<()> {
    client.ask(Ask::new(target).within(patience(MOMENT))).is_ok_and(|answer| answer.pod == pod).then_some(())
}
