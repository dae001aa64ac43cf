//! Cluster addresses, from pods and from nodes.

use std::{collections::BTreeMap, net::IpAddr};

use anyhow::{Context as _, Result};
use tests::{
    lab::{
        LabOptions,
        address::Family,
        agent::{AgentOptions, SocketLb},
        cluster::Cluster,
        manifest::Service,
    },
    traffic::{Answer, Ask, Protocol, Target, place::Place},
};

const BACKENDS: [&str; 3] = ["a1", "b1", "b2"];

fn cluster(socket_lb: SocketLb) -> Result<(Cluster, Service)> {
    let service = Service::new("echo", 10, &BACKENDS);
    let options = AgentOptions { socket_lb, ..AgentOptions::default() };
    Ok((Cluster::start(LabOptions::default(), options, std::slice::from_ref(&service))?, service))
}

/// Asks until every backend has answered; a third of a chance to miss, a hundred times over, is no chance.
fn answers_of_all(client: &Place, ask: Ask) -> Result<Vec<Answer>> {
    let answers: Result<Vec<_>, _> = client.ask_times(ask, 100)?.into_iter().collect();
    let answers = answers.with_context(|| format!("{} asks {}", client.name(), ask.target))?;
    for backend in BACKENDS {
        let has_answered = answers.iter().any(|answer| answer.pod == backend);
        assert!(has_answered, "{backend} never answers {} at {}", client.name(), ask.target);
    }
    Ok(answers)
}

fn targets(service: &Service) -> impl Iterator<Item = Target> {
    let each = |family| Protocol::ALL.map(|protocol| service.cluster(family, protocol));
    Family::ALL.map(each).into_iter().flatten()
}

fn pods_reach_every_backend_and_keep_their_source(socket_lb: SocketLb) -> Result<()> {
    let (cluster, service) = cluster(socket_lb)?;
    for client in ["client-a", "client-b"] {
        for target in targets(&service) {
            for answer in answers_of_all(cluster.lab.place(client)?, Ask::new(target))? {
                assert_eq!(answer.from, target.address, "{client} sees who is behind the Service");
                assert_eq!(answer.peer, answer.local, "{} does not see who {client} is", answer.pod);
            }
        }
    }
    Ok(())
}

#[test]
fn pods_reach_every_backend_by_their_sockets() -> Result<()> {
    pods_reach_every_backend_and_keep_their_source(SocketLb::All)
}

#[test]
fn pods_reach_every_backend_by_their_devices() -> Result<()> {
    pods_reach_every_backend_and_keep_their_source(SocketLb::Host)
}

#[test]
fn pods_reach_every_backend_without_socket_hooks() -> Result<()> {
    pods_reach_every_backend_and_keep_their_source(SocketLb::Off)
}

#[test]
fn nodes_reach_every_backend() -> Result<()> {
    let (cluster, service) = cluster(SocketLb::Host)?;
    for node in &cluster.lab.nodes {
        for target in targets(&service) {
            for answer in answers_of_all(&node.host, Ask::new(target))? {
                assert_eq!(answer.from, target.address, "{} sees who is behind the Service", node.plan.name);
                assert_eq!(answer.peer, answer.local);
            }
        }
    }
    Ok(())
}

#[test]
fn an_unconnected_udp_socket_hears_from_the_service() -> Result<()> {
    let (cluster, service) = cluster(SocketLb::All)?;
    for client in ["node-a", "node-b", "client-a", "client-b"] {
        for family in Family::ALL {
            let target = service.cluster(family, Protocol::Udp);
            for answer in answers_of_all(cluster.lab.place(client)?, Ask::new(target).unconnected())? {
                assert_eq!(answer.from, target.address, "{client}");
            }
        }
    }
    Ok(())
}

#[test]
fn sockets_of_version_6_reach_services_of_version_4() -> Result<()> {
    let (cluster, service) = cluster(SocketLb::All)?;
    for client in ["node-a", "client-a", "client-b"] {
        for protocol in Protocol::ALL {
            let mut target = service.cluster(Family::V4, protocol);
            if let IpAddr::V4(address) = target.address.ip() {
                target.address.set_ip(address.to_ipv6_mapped().into());
            }
            for ask in [Ask::new(target), Ask::new(target).unconnected()] {
                for answer in answers_of_all(cluster.lab.place(client)?, ask)? {
                    assert_eq!(answer.from, target.address, "{client} sees who is behind the Service");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn backends_in_the_nodes_own_network_are_reached_from_everywhere() -> Result<()> {
    let names = ["node-a", "node-b"];
    let service = Service::new("host", 40, &names);
    let cluster = Cluster::start(LabOptions::default(), AgentOptions::default(), std::slice::from_ref(&service))?;
    for node in &cluster.lab.nodes {
        node.host.serve(&[service.target_port])?;
    }
    let mut ways = Vec::new();
    for target in targets(&service) {
        // A UDP server that listens on every address answers a bridged pod from the bridge's, which is not ours to mend.
        let clients: &[_] = match target.protocol {
            Protocol::Tcp => &["client-a", "client-b", "node-a", "node-b"],
            Protocol::Udp => &["client-a", "node-a", "node-b"],
        };
        ways.extend(clients.iter().map(|client| (*client, target)));
        let family = Family::of(target.address.ip());
        for node in &cluster.lab.nodes {
            ways.push(("client", service.at_node(node.addresses(), family, target.protocol)));
        }
    }
    for (client, target) in ways {
        let answers = cluster.lab.place(client)?.ask_times(Ask::new(target), 60)?;
        let answers: Vec<_> =
            answers.into_iter().collect::<Result<_, _>>().with_context(|| format!("{client} asks {target}"))?;
        for name in names {
            assert!(answers.iter().any(|answer| answer.pod == name), "{name} never answers {client} at {target}");
        }
        assert!(answers.iter().all(|answer| answer.from == target.address), "{client} asks {target}");
    }
    Ok(())
}

#[test]
fn each_router_on_the_way_takes_one_from_the_ttl() -> Result<()> {
    let (cluster, service) = cluster(SocketLb::Host)?;
    for family in Family::ALL {
        let target = service.cluster(family, Protocol::Udp);
        for answer in answers_of_all(cluster.lab.place("client-a")?, Ask::new(target))? {
            let routers = if answer.pod == "a1" { 1 } else { 2 };
            assert_eq!(answer.ttl, Some(64 - routers), "{} over {}", answer.pod, family.name());
        }
    }
    Ok(())
}

/// Even means 100 each; sigma of the binomial distribution is √(300 · ⅓ · ⅔) ≈ 8.2.
#[test]
fn three_hundred_connections_spread_within_five_sigma() -> Result<()> {
    let (cluster, service) = cluster(SocketLb::Host)?;
    for client in ["client-a", "client-b", "node-a"] {
        for target in targets(&service) {
            let mut counts = BTreeMap::new();
            for answer in cluster.lab.place(client)?.ask_times(Ask::new(target), 300)? {
                *counts.entry(answer?.pod).or_insert(0_u32) += 1;
            }
            for backend in BACKENDS {
                let count = counts.get(backend).copied().unwrap_or_default();
                assert!(count.abs_diff(100) <= 40, "{client} to {target}: {counts:?}");
            }
        }
    }
    Ok(())
}
