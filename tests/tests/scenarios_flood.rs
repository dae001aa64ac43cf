//! Scenario 21: floods of forged first packets. A file of its own, so that no other test takes the processor from it.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use proxy_common::outcome::{Hook, Outcome};
use tests::{
    http,
    lab::{LabOptions, Node, address::Family, agent::AgentOptions, cluster::Cluster, manifest::Service},
    patience::{patience, wait_until},
    traffic::{
        Ask, Protocol,
        flood::FloodPlan,
        place::{Activity, Place},
        wire::mac,
    },
};

/// Connections that are open while the flood comes.
const ESTABLISHED: usize = 1_000;

/// How many of them may be lost: one in a thousand.
const LOST: usize = ESTABLISHED / 1_000;

/// The smallest table there is: of flows that are not confirmed as many entries as of those that are.
const FLOWS: u64 = 16_384;
const ENTRIES: u64 = 2 * FLOWS;

/// How many packets the flood has. From two entries each both tiers would overflow five times.
const PACKETS: u64 = 5 * FLOWS;

const METRICS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 10_249);

fn evicted(node: &Node, map: &str) -> Result<f64> {
    let answer = http::ask(node.host.namespace(), METRICS, "GET", "/metrics")?;
    let evicted = answer.metric(&format!("sluice_flow_evictions_total{{map=\"{map}\"}}"));
    evicted.with_context(|| format!("nothing is said of {map}"))
}

/// Every connection asks once more, again and again until the flood is over; how many are lost.
fn ask_during<T: Send>(
    connections: &[(String, Activity<'_>)],
    flood: impl FnOnce() -> Result<T> + Send,
) -> Result<(usize, T)> {
    thread::scope(|scope| {
        let flood = scope.spawn(flood);
        loop {
            let is_over = flood.is_finished();
            let lost = lost(connections)?;
            if is_over {
                let flood = flood.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                return Ok((lost, flood?));
            }
            ensure!(lost <= LOST, "{lost} of {ESTABLISHED} connections are lost while the flood comes");
        }
    })
}

/// Connections that are not answered by the pod they are with.
fn lost(connections: &[(String, Activity<'_>)]) -> Result<usize> {
    let mut lost = 0;
    for (pod, connection) in connections {
        lost += usize::from(!connection.try_ask()?.is_ok_and(|answer| answer.pod == *pod));
    }
    Ok(lost)
}

fn open(client: &Place, ask: Ask) -> Result<(String, Activity<'_>)> {
    let connection = client.open(ask)?;
    Ok((connection.ask()?.pod, connection))
}

/// A flood that comes by XDP over IPv4, and another one by TC over IPv6.
fn survives(protocol: Protocol) -> Result<()> {
    // A backend here, whose flows keep the client's address, and one elsewhere, whose flows are masqueraded.
    let service = Service::new("web", 31, &["a1", "b1"]);
    // A datagram that is answered is no first packet any more: nobody listens.
    let silent = Service { target_port: 9, ..Service::new("silent", 32, &["a1", "b1"]) };
    let victim = if protocol == Protocol::Tcp { &service } else { &silent };
    let more = vec!["--flow-table-size".into(), FLOWS.to_string()];
    let options = AgentOptions { more, ..AgentOptions::default() };
    let cluster = Cluster::start(LabOptions::default(), options, &[service.clone(), silent.clone()])?;
    let client = &cluster.lab.client;
    let ways = [(Family::V4, Hook::UplinkXdp, "V4"), (Family::V6, Hook::UplinkIn, "V6")];
    for (node, (family, hook, map)) in cluster.lab.nodes.iter().zip(ways) {
        let tcp = Ask::new(service.at_node(node.addresses(), family, Protocol::Tcp));
        let connections: Vec<_> = (0..ESTABLISHED).map(|_| open(client, tcp)).collect::<Result<_>>()?;
        let before = node.counted(hook, Outcome::Opened)?;
        let flood = FloodPlan {
            namespace: client.namespace(),
            device: "eth0",
            dmac: mac(node.host.namespace(), "uplink")?,
            target: victim.at_node(node.addresses(), family, protocol),
            payload: &[],
            packets: PACKETS,
        };
        let (lost, took) = ask_during(&connections, || flood.send())?;
        assert!(lost <= LOST, "{lost} of {ESTABLISHED} connections are lost");

        let opened = node.counted(hook, Outcome::Opened)? - before;
        let without_port = node.counted(hook, Outcome::DropNoPort)?;
        eprintln!(
            "{hook:?}: {protocol}: {PACKETS} packets in {took:?}: {opened} flows opened, {without_port} without a port"
        );
        assert!(opened > PACKETS / 3, "only {opened} flows: no flood");
        assert!(opened + without_port <= PACKETS, "{opened} opened, {without_port} dropped, of {PACKETS}");
        // What has entered, two entries for each, and found no room.
        let expected = f64::from(u32::try_from(2 * opened - ENTRIES)?);
        wait_until("the evictions to be told", Duration::from_secs(2), || {
            (evicted(node, &format!("EMBRYOS_{map}")).ok()? >= expected).then_some(())
        })?;
        assert!(evicted(node, &format!("FLOWS_{map}"))? < 1.0, "a connection gave way");
        for _ in 0..20 {
            client.ask(tcp.within(patience(Duration::from_secs(10)))).context("a new connection after the flood")?;
        }
    }
    Ok(())
}

#[test]
fn scenario_21_a_flood_of_syns_leaves_established_connections_alive() -> Result<()> {
    survives(Protocol::Tcp)
}

#[test]
fn scenario_21_a_flood_of_datagrams_leaves_established_connections_alive() -> Result<()> {
    survives(Protocol::Udp)
}
