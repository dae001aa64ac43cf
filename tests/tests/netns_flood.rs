//! Floods of forged first packets. A file of its own, so that no other test takes the processor from it.

use std::slice::from_ref;

use anyhow::{Context as _, Result};
use proxy_common::outcome::{Hook, Outcome};
use tests::{
    lab::{LabOptions, Node, address::Family, agent::AgentOptions, cluster::Cluster, manifest::Service},
    traffic::{Ask, Protocol, Target, flood::FloodPlan, place::Activity},
};

/// Connections that are open while the flood comes.
const ESTABLISHED: usize = 1_000;

/// How many packets the flood has: a table of 65,536 that are not confirmed overflows nine times from two entries each, and
/// one of 262,144 confirmed ones would, too.
const PACKETS: u64 = 300_000;

/// How many connections may be lost: one in a thousand.
const LOST: usize = ESTABLISHED / 1_000;

/// The MAC address of a node's uplink.
fn uplink_mac(node: &Node) -> Result<[u8; 6]> {
    let output = node.host.namespace().command("ip")?.args(["-brief", "link", "show", "dev", "uplink"]).output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let octets: Vec<u8> = text
        .split_whitespace()
        .nth(2)
        .context("no MAC")?
        .split(':')
        .map(|octet| u8::from_str_radix(octet, 16))
        .collect::<Result<_, _>>()?;
    octets.try_into().ok().with_context(|| format!("not a MAC: {text}"))
}

fn survives(target: impl Fn(&Service, &Node) -> Target) -> Result<()> {
    // A backend here, whose flows keep the client's address, and one elsewhere, whose flows are masqueraded.
    let service = Service::new("web", 31, &["a1", "b1"]);
    let cluster = Cluster::start(LabOptions::default(), AgentOptions::default(), from_ref(&service))?;
    let [node, _] = &cluster.lab.nodes;
    let open = |_| cluster.lab.client.open(Ask::new(service.at_node(node.addresses(), Family::V4, Protocol::Tcp)));
    let connections: Vec<Activity<'_>> = (0..ESTABLISHED).map(open).collect::<Result<_>>()?;
    let before = connections.iter().map(|connection| Ok(connection.ask()?.pod)).collect::<Result<Vec<_>>>()?;

    let flood = FloodPlan {
        namespace: cluster.lab.client.namespace(),
        device: "eth0",
        dmac: uplink_mac(node)?,
        target: target(&service, node),
        packets: PACKETS,
    };
    let took = flood.send()?;
    let opened = node.counted(Hook::UplinkXdp, Outcome::Opened)?;
    let without_port = node.counted(Hook::UplinkXdp, Outcome::DropNoPort)?;
    eprintln!("{PACKETS} packets in {took:?}: {opened} flows opened, {without_port} without a port");
    assert!(opened > PACKETS / 3, "only {opened} flows: no flood");

    let after = connections.iter().map(Activity::try_ask).collect::<Result<Vec<_>>>()?;
    let lost =
        before.iter().zip(&after).filter(|(pod, answer)| !answer.as_ref().is_ok_and(|answer| answer.pod == **pod));
    let lost = lost.count();
    assert!(lost <= LOST, "{lost} of {ESTABLISHED} connections are lost");
    Ok(())
}

/// Scenario 21.
#[test]
fn a_flood_of_syns_leaves_established_connections_alive() -> Result<()> {
    survives(|service, node| service.at_node(node.addresses(), Family::V4, Protocol::Tcp))
}

#[test]
fn a_flood_of_datagrams_leaves_established_connections_alive() -> Result<()> {
    survives(|service, node| service.at_node(node.addresses(), Family::V4, Protocol::Udp))
}
