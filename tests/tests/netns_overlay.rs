//! Backends behind an overlay: pods of the other node are reached through a VXLAN device.

use std::net::IpAddr;

use anyhow::{Context as _, Result};
use tests::{
    lab::{
        Between, LabOptions, Node, UplinkMode,
        address::{self, CLIENT, Family, TUNNEL},
        agent::AgentOptions,
        cluster::Cluster,
        manifest::Service,
    },
    traffic::{Ask, Protocol, Target},
};

/// One backend each, so that it is known which node it is on.
fn cluster(uplinks: [UplinkMode; 2]) -> Result<(Cluster, [Service; 2])> {
    let services = [Service::new("at-a", 31, &["a1"]), Service::new("at-b", 32, &["b1"])];
    let options = LabOptions { uplinks, between: Between::Overlay };
    Ok((Cluster::start(options, AgentOptions::default(), &services)?, services))
}

/// The node's address in the tunnel: whatever bears it comes back through the tunnel.
fn tunnel(node: &Node, family: Family) -> IpAddr {
    address::of_pod(node.plan.number, TUNNEL).of(family)
}

fn is_local(service: &Service, node: &Node) -> bool {
    service.pods.iter().all(|pod| node.pods.iter().any(|place| place.name() == *pod))
}

#[test]
fn who_is_masqueraded_bears_the_nodes_address_in_the_tunnel() -> Result<()> {
    for uplinks in [[UplinkMode::Xdp, UplinkMode::Tc], [UplinkMode::Tc, UplinkMode::Xdp]] {
        let (cluster, services) = cluster(uplinks)?;
        for node in &cluster.lab.nodes {
            for service in &services {
                for (family, protocol) in Family::ALL.into_iter().flat_map(|f| Protocol::ALL.map(|p| (f, p))) {
                    outside(&cluster, node, service, service.at_node(node.addresses(), family, protocol))?;
                    inside(node, service, service.at_node(node.addresses(), family, protocol))?;
                }
            }
        }
    }
    Ok(())
}

fn outside(cluster: &Cluster, node: &Node, service: &Service, target: Target) -> Result<()> {
    let family = Family::of(target.address.ip());
    let seen = if is_local(service, node) { address::on_wire(CLIENT).of(family) } else { tunnel(node, family) };
    let case = format!("{target} at {} to {}", node.plan.name, service.name);
    for answer in cluster.lab.client.ask_times(Ask::new(target), 5)? {
        let answer = answer.map_err(|failure| anyhow::anyhow!("{case}: {failure}"))?;
        assert_eq!((answer.pod.as_str(), answer.from), (service.pods[0], target.address), "{case}");
        assert_eq!(answer.peer.ip(), seen, "{case}");
    }
    Ok(())
}

/// From the pod that is nobody's backend.
fn inside(node: &Node, service: &Service, node_port: Target) -> Result<()> {
    let family = Family::of(node_port.address.ip());
    let [.., client] = node.pods.as_slice() else { anyhow::bail!("no pods") };
    let (_, own) = address::pod(client.name()).context("no such pod")?;
    let cluster_ip = service.cluster(family, node_port.protocol);
    let seen = if is_local(service, node) { own.of(family) } else { tunnel(node, family) };
    for (target, seen) in [(cluster_ip, own.of(family)), (node_port, seen)] {
        let case = format!("{target} from {} to {}", client.name(), service.name);
        for answer in client.ask_times(Ask::new(target), 3)? {
            let answer = answer.map_err(|failure| anyhow::anyhow!("{case}: {failure}"))?;
            assert_eq!((answer.pod.as_str(), answer.peer.ip()), (service.pods[0], seen), "{case}");
        }
    }
    Ok(())
}
#[test]
fn a_large_transfer_through_the_tunnel_arrives_whole() -> Result<()> {
    let (cluster, [_, at_b]) = cluster([UplinkMode::Xdp, UplinkMode::Tc])?;
    let [a, _] = &cluster.lab.nodes;
    for family in Family::ALL {
        let target = at_b.at_node(a.addresses(), family, Protocol::Tcp);
        let report = cluster.lab.client.transfer(Ask::new(target), 4 << 20)?;
        assert_eq!((report.pod.as_str(), report.bytes), ("b1", 4 << 20), "{target}");
    }
    Ok(())
}
