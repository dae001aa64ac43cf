//! Path MTU discovery through a Service: a link behind the node takes 1,400 bytes, the client's own 1,500.

use std::{
    io,
    net::{IpAddr, UdpSocket},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use tests::{
    lab::{
        LabOptions, UplinkMode,
        address::{self, CLIENT, Family},
        agent::{AgentOptions, SocketLb},
        cluster::Cluster,
        manifest::Service,
    },
    patience::{patience, wait_until},
    traffic::{Ask, Protocol, Target, place::Place, socket::never_fragment},
};

const MTU: usize = 1_400;

/// Where the narrow link is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Narrow {
    /// On the backend's node, between it and its pod.
    AtBackend,
    /// From node-a to node-b.
    BetweenNodes,
    /// From node-a to the client.
    ToClient,
}

/// One backend each, so that it is known which node it is on.
fn services() -> [Service; 2] {
    [Service::new("at-a", 31, &["a1"]), Service::new("at-b", 32, &["b1"])]
}

/// Replies are not hindered: what is narrow is one direction of a link, as a route or a bridge has it.
fn cluster(uplinks: [UplinkMode; 2], narrow: Narrow) -> Result<Cluster> {
    // Packets are what this is about: pods' sockets are left alone.
    let options = AgentOptions { socket_lb: SocketLb::Host, ..AgentOptions::default() };
    let cluster = Cluster::start(LabOptions { uplinks, ..LabOptions::default() }, options, &services())?;
    let [a, b] = &cluster.lab.nodes;
    match narrow {
        Narrow::AtBackend => {
            let (_, a1) = address::pod("a1").context("no pod a1")?;
            b.host.namespace().ip(&format!("link set cni0 mtu {MTU}"))?;
            a.host.namespace().ip(&format!(
                "route change {}/32 dev pod-a1 src {} mtu lock {MTU}
                 route replace {}/128 dev pod-a1 src {} mtu lock {MTU}",
                a1.v4,
                a.addresses().v4,
                a1.v6,
                a.addresses().v6
            ))?;
        }
        Narrow::BetweenNodes => {
            let (pods, via) = (address::of_pod(b.plan.number, 0), b.addresses());
            a.host.namespace().ip(&format!(
                "route change {}/24 via {} mtu lock {MTU}
                 route replace {}/64 via {} mtu lock {MTU}",
                pods.v4, via.v4, pods.v6, via.v6
            ))?;
        }
        Narrow::ToClient => {
            let client = address::on_wire(CLIENT);
            a.host.namespace().ip(&format!(
                "route add {}/32 dev uplink mtu lock {MTU}
                 route add {}/128 dev uplink mtu lock {MTU}",
                client.v4, client.v6
            ))?;
        }
    }
    Ok(cluster)
}

/// What a place's kernel believes of the path to an address.
fn path_mtu(place: &Place, address: IpAddr) -> Result<Option<usize>> {
    let address = address.to_string();
    let output = place.namespace().command("ip")?.args(["route", "get", &address]).output()?;
    let text = String::from_utf8(output.stdout)?;
    let mut words = text.split_whitespace().skip_while(|word| *word != "mtu");
    Ok(words.nth(1).map(str::parse).transpose()?)
}

fn forget_paths(place: &Place) -> Result<()> {
    for family in ["-4", "-6"] {
        let status = place.namespace().command("ip")?.args([family, "route", "flush", "cache"]).status()?;
        ensure!(status.success(), "the paths that {} knows stay", place.name());
    }
    Ok(())
}

/// A transfer both ways is complete, and the client has learnt what the path takes.
fn a_transfer_finds_its_size(place: &Place, target: Target, backend: &str) -> Result<()> {
    forget_paths(place)?;
    ensure!(path_mtu(place, target.address.ip())?.is_none(), "{target}: something is known before");
    let report = place.transfer(Ask::new(target), 1 << 20)?;
    assert_eq!(report.pod, backend, "{target}");
    assert_eq!(path_mtu(place, target.address.ip())?, Some(MTU), "{} to {target}", place.name());
    Ok(())
}

/// A datagram that is too long is lost; the next one of its size is refused; one that fits is answered.
fn a_datagram_finds_its_size(place: &Place, target: Target, backend: &str) -> Result<()> {
    forget_paths(place)?;
    let any = tests::traffic::socket::any_like(target.address.ip());
    let socket = place.namespace().run(|| UdpSocket::bind((any, 0)))??;
    socket.set_read_timeout(Some(patience(Duration::from_secs(3))))?;
    never_fragment(&socket, any.is_ipv6())?;
    socket.connect(target.address)?;
    let headers = if any.is_ipv6() { 48 } else { 28 };
    let request = |length: usize| format!("who {}", "x".repeat(length - headers - 4));
    wait_until(&format!("{target} to be known as narrow"), Duration::from_secs(5), || {
        let refused = socket.send(request(1_500).as_bytes()).err()?;
        (refused.raw_os_error() == Some(libc::EMSGSIZE)).then_some(())
    })?;
    let refused = socket.send(request(MTU + 1).as_bytes()).map_err(|error| error.raw_os_error());
    assert_eq!(refused, Err(Some(libc::EMSGSIZE)), "{target}");
    // The error of the one that was lost may still wait to be told.
    let sent = (0..2).find_map(|_| socket.send(request(MTU).as_bytes()).ok());
    assert_eq!(sent, Some(MTU - headers), "{target}");
    let mut answer = [0; 2_000];
    let length = receive(&socket, &mut answer).with_context(|| format!("{} from {target}", place.name()))?;
    assert!(answer[..length].starts_with(backend.as_bytes()), "{target}");
    Ok(())
}

/// An answer; errors about what was sent before it are passed over.
fn receive(socket: &UdpSocket, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match socket.recv(buffer) {
            Err(error) if error.raw_os_error() == Some(libc::EMSGSIZE) => {}
            other => return other,
        }
    }
}

fn finds_its_size(place: &Place, service: &Service, target: Target) -> Result<()> {
    match target.protocol {
        Protocol::Tcp => a_transfer_finds_its_size(place, target, service.pods[0]),
        Protocol::Udp => a_datagram_finds_its_size(place, target, service.pods[0]),
    }
}

/// From outside by each node's port, to backends on it and elsewhere.
fn outside(uplinks: [UplinkMode; 2]) -> Result<()> {
    let cluster = cluster(uplinks, Narrow::AtBackend)?;
    for node in &cluster.lab.nodes {
        for service in services() {
            for family in Family::ALL {
                for protocol in Protocol::ALL {
                    let target = service.at_node(node.addresses(), family, protocol);
                    finds_its_size(&cluster.lab.client, &service, target)
                        .with_context(|| format!("{protocol} to {} by {}", service.name, node.plan.name))?;
                }
            }
        }
    }
    Ok(())
}

#[test]
fn a_client_outside_learns_of_a_narrow_link_behind_xdp_and_tc() -> Result<()> {
    outside([UplinkMode::Xdp, UplinkMode::Tc])
}

#[test]
fn a_client_outside_learns_of_a_narrow_link_behind_tc_and_xdp() -> Result<()> {
    outside([UplinkMode::Tc, UplinkMode::Xdp])
}

#[test]
fn a_pod_learns_of_a_narrow_link_behind_a_cluster_ip() -> Result<()> {
    let cluster = cluster([UplinkMode::Xdp, UplinkMode::Tc], Narrow::AtBackend)?;
    for (client, service) in ["client-a", "client-b"].into_iter().flat_map(|client| services().map(|s| (client, s))) {
        // Pods of one bridge talk past the node's routing.
        if client == "client-b" && service.name == "at-b" {
            continue;
        }
        for family in Family::ALL {
            for protocol in Protocol::ALL {
                let place = cluster.lab.place(client)?;
                finds_its_size(place, &service, service.cluster(family, protocol))
                    .with_context(|| format!("{protocol} from {client} to {}", service.name))?;
            }
        }
    }
    Ok(())
}

/// The node itself cannot send on what is too long: it tells the client, as a router does, though it forwards without the
/// kernel's routing otherwise.
#[test]
fn a_client_outside_learns_that_the_nodes_own_way_on_is_narrow() -> Result<()> {
    for uplinks in [[UplinkMode::Xdp, UplinkMode::Tc], [UplinkMode::Tc, UplinkMode::Xdp]] {
        let cluster = cluster(uplinks, Narrow::BetweenNodes)?;
        let [a, _] = &cluster.lab.nodes;
        let [_, at_b] = services();
        for family in Family::ALL {
            for protocol in Protocol::ALL {
                finds_its_size(&cluster.lab.client, &at_b, at_b.at_node(a.addresses(), family, protocol))
                    .with_context(|| format!("{protocol} by {uplinks:?}"))?;
            }
        }
    }
    Ok(())
}

/// The same for what a backend answers: it is told of a packet it has sent, to the name it sends to.
#[test]
fn a_backend_learns_that_the_way_to_its_client_is_narrow() -> Result<()> {
    for uplinks in [[UplinkMode::Xdp, UplinkMode::Tc], [UplinkMode::Tc, UplinkMode::Xdp]] {
        let cluster = cluster(uplinks, Narrow::ToClient)?;
        let (node, client) = (cluster.lab.nodes[0].addresses(), address::on_wire(CLIENT));
        for (service, peer) in services().iter().zip([client, node]) {
            for family in Family::ALL {
                let target = service.at_node(node, family, Protocol::Tcp);
                let case = format!("{target} to {} by {uplinks:?}", service.name);
                let report = cluster.lab.client.transfer(Ask::new(target), 1 << 20).context(case.clone())?;
                assert_eq!(report.pod, service.pods[0], "{case}");
                let backend = cluster.lab.place(service.pods[0])?;
                assert_eq!(path_mtu(backend, peer.of(family))?, Some(MTU), "{case}");
            }
        }
    }
    Ok(())
}

/// IPv4 routers cut fragments once more; IPv6 ones tell who sent them, quoting a fragment.
#[test]
fn a_datagram_in_fragments_finds_the_size_of_those() -> Result<()> {
    let cluster = cluster([UplinkMode::Xdp, UplinkMode::Tc], Narrow::AtBackend)?;
    for (node, service) in cluster.lab.nodes.iter().flat_map(|node| services().map(|service| (node, service))) {
        for family in Family::ALL {
            let target = service.at_node(node.addresses(), family, Protocol::Udp).address;
            let any = tests::traffic::socket::any_like(target.ip());
            let socket = cluster.lab.client.namespace().run(|| UdpSocket::bind((any, 0)))??;
            socket.set_read_timeout(Some(Duration::from_millis(200)))?;
            let request = "abcdefgh".repeat(1_000);
            let mut buffer = vec![0; 1 << 16];
            wait_until(&format!("an answer from {target} at {}", service.name), Duration::from_secs(5), || {
                socket.send_to(request.as_bytes(), target).ok()?;
                let length = socket.recv(&mut buffer).ok()?;
                let answer = String::from_utf8_lossy(&buffer[..length]);
                (answer.starts_with(service.pods[0]) && answer.trim_end().ends_with(&request)).then_some(())
            })?;
        }
    }
    Ok(())
}
