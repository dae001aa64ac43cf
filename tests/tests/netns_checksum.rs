//! What is hard about checksums: datagrams without one, segments that are cut up later, transfers that would show a
//! wrong byte.

use anyhow::Result;
use tests::{
    lab::{
        LabOptions, UplinkMode,
        address::Family,
        agent::{AgentOptions, SocketLb},
        cluster::Cluster,
        errors::checksum_errors,
        manifest::Service,
    },
    traffic::{Ask, Protocol, Target, place::Place, server::NO_CHECKSUM_PORT},
};

const UPLINKS: [[UplinkMode; 2]; 2] = [[UplinkMode::Xdp, UplinkMode::Tc], [UplinkMode::Tc, UplinkMode::Xdp]];

/// A Service per backend, so that local and remote ones are both met.
fn services(target_port: u16) -> [Service; 2] {
    [Service::new("at-a", 31, &["a1"]), Service::new("at-b", 32, &["b1"])]
        .map(|service| Service { target_port, ..service })
}

fn cluster(uplinks: [UplinkMode; 2], target_port: u16) -> Result<Cluster> {
    // Packets are what this is about: pods' sockets are left alone.
    let options = AgentOptions { socket_lb: SocketLb::Host, ..AgentOptions::default() };
    Cluster::start(LabOptions { uplinks, ..LabOptions::default() }, options, &services(target_port))
}

/// From pods to cluster addresses, and from outside to node ports.
fn ways(cluster: &Cluster, protocol: Protocol, target_port: u16) -> Vec<(&Place, Target, &'static str)> {
    let mut ways = Vec::new();
    for service in services(target_port) {
        for family in Family::ALL {
            for node in &cluster.lab.nodes {
                let backend = service.pods[0];
                ways.push((&cluster.lab.client, service.at_node(node.addresses(), family, protocol), backend));
                let pods = node.pods.iter().filter(|pod| pod.name().starts_with("client-"));
                ways.extend(pods.map(|pod| (pod, service.cluster(family, protocol), backend)));
            }
        }
    }
    ways
}

#[test]
fn datagrams_without_checksum_go_through_both_ways() -> Result<()> {
    for uplinks in UPLINKS {
        let cluster = cluster(uplinks, NO_CHECKSUM_PORT)?;
        for (client, target, backend) in ways(&cluster, Protocol::Udp, NO_CHECKSUM_PORT) {
            for answer in client.ask_times(Ask::new(target).without_checksum(), 3)? {
                let answer = answer.map_err(|failure| anyhow::anyhow!("{} asks {target}: {failure}", client.name()))?;
                assert_eq!((answer.pod.as_str(), answer.from), (backend, target.address));
            }
        }
    }
    Ok(())
}

#[test]
fn large_transfers_arrive_whole() -> Result<()> {
    for uplinks in UPLINKS {
        let cluster = cluster(uplinks, 8080)?;
        for (client, target, backend) in ways(&cluster, Protocol::Tcp, 8080) {
            let report = client.transfer(Ask::new(target), 8 << 20)?;
            assert_eq!((report.pod.as_str(), report.bytes), (backend, 8 << 20), "{} to {target}", client.name());
        }
    }
    Ok(())
}

#[test]
fn no_device_on_the_way_finds_a_wrong_checksum() -> Result<()> {
    for uplinks in UPLINKS {
        let cluster = cluster(uplinks, 8080)?;
        for protocol in Protocol::ALL {
            for (client, target, _) in ways(&cluster, protocol, 8080) {
                client.ask(Ask::new(target))?;
            }
        }
        for place in cluster.lab.places() {
            assert_eq!(checksum_errors(place)?, Vec::<String>::new(), "at {}", place.name());
        }
    }
    Ok(())
}
