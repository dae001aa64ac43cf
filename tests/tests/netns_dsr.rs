//! Direct server return, end to end: two nodes on one wire, a client beside them, and pods that see the client itself.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use tests::{
    lab::{
        LabOptions, Node, UplinkMode,
        address::{self, CLIENT, Family},
        agent::AgentOptions,
        cluster::Cluster,
        manifest::{Service, write_documents},
    },
    patience::wait_until,
    traffic::{Answer, Ask, Protocol, Target},
};

/// Until the nodes know where the other one is.
const SOON: Duration = Duration::from_secs(20);
const UPLINKS: [[UplinkMode; 2]; 2] = [[UplinkMode::Xdp, UplinkMode::Tc], [UplinkMode::Tc, UplinkMode::Xdp]];

/// The only backend is on node-b.
fn at_b() -> Service {
    Service::new("at-b", 32, &["b1"])
}

fn options(mode: &str) -> AgentOptions {
    AgentOptions { more: vec![format!("--nodeport-mode={mode}")], ..AgentOptions::default() }
}

fn cluster(uplinks: [UplinkMode; 2], mode: &str) -> Result<Cluster> {
    Cluster::start(LabOptions { uplinks, ..LabOptions::default() }, options(mode), &[at_b()])
}

/// Whether the pod saw the client and not the node.
fn is_direct(answer: &Answer, target: Target) -> bool {
    answer.peer.ip() == address::on_wire(CLIENT).of(Family::of(target.address.ip()))
}

/// Waits until new connections to a target are dispatched, which they are when both nodes know where the other one is.
fn wait_until_direct(cluster: &Cluster, target: Target) -> Result<()> {
    let asked = || cluster.lab.client.ask(Ask::new(target)).ok().filter(|answer| is_direct(answer, target)).map(drop);
    wait_until(&format!("the pod to see the client of {target}"), SOON, asked)
}

/// Bytes that a node's uplink has received.
fn received(node: &Node) -> Result<u64> {
    let output = node.host.namespace().command("ip")?.args(["-j", "-s", "link", "show", "dev", "uplink"]).output()?;
    let links: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    links[0]["stats64"]["rx"]["bytes"].as_u64().context("ip tells no bytes")
}

#[test]
fn a_pod_of_the_other_node_sees_the_client_and_answers_it_past_the_node_it_asked() -> Result<()> {
    const BYTES: u64 = 8 << 20;
    for uplinks in UPLINKS {
        let cluster = cluster(uplinks, "dsr")?;
        let [a, _] = &cluster.lab.nodes;
        for family in Family::ALL {
            for protocol in Protocol::ALL {
                let target = at_b().at_node(a.addresses(), family, protocol);
                wait_until_direct(&cluster, target)?;
                for answer in cluster.lab.client.ask_times(Ask::new(target), 10)? {
                    let answer = answer?;
                    assert_eq!((answer.pod.as_str(), answer.from), ("b1", target.address), "{target}");
                    assert!(is_direct(&answer, target), "{target}: {answer:?}");
                    if protocol == Protocol::Udp {
                        assert_eq!(answer.ttl, Some(62), "{target}: past both nodes");
                    }
                }
            }
            let target = at_b().at_node(a.addresses(), family, Protocol::Tcp);
            let before = received(a)?;
            let report = cluster.lab.client.transfer(Ask::new(target), BYTES)?;
            let passed = received(a)? - before;
            assert_eq!((report.pod.as_str(), report.bytes), ("b1", BYTES), "{target}");
            ensure!(passed > BYTES && passed < BYTES * 3 / 2, "{passed} of {BYTES} bytes each way came to node-a");
        }
    }
    Ok(())
}

#[test]
fn an_open_connection_goes_on_when_the_agents_are_killed_and_started_again() -> Result<()> {
    let cluster = cluster([UplinkMode::Xdp, UplinkMode::Tc], "dsr")?;
    for family in Family::ALL {
        let target = at_b().at_node(cluster.lab.nodes[0].addresses(), family, Protocol::Tcp);
        wait_until_direct(&cluster, target)?;
        let open = cluster.lab.client.open(Ask::new(target))?;
        open.ask()?;
        cluster.lab.nodes.iter().for_each(Node::kill_agent);
        assert!(is_direct(&open.ask()?, target));
        let answer = cluster.lab.client.ask(Ask::new(target))?;
        assert!(is_direct(&answer, target), "a new one, without an agent: {answer:?}");
        cluster.restart_agents()?;
        assert!(is_direct(&open.ask()?, target));
        wait_until_direct(&cluster, target)?;
        open.close()?;
    }
    Ok(())
}

#[test]
fn a_hybrid_dispatches_connections_and_masquerades_datagrams() -> Result<()> {
    let cluster = cluster([UplinkMode::Xdp, UplinkMode::Tc], "hybrid")?;
    for family in Family::ALL {
        let node = cluster.lab.nodes[0].addresses();
        wait_until_direct(&cluster, at_b().at_node(node, family, Protocol::Tcp))?;
        let answer = cluster.lab.client.ask(Ask::new(at_b().at_node(node, family, Protocol::Udp)))?;
        assert_eq!(answer.peer.ip(), node.of(family));
    }
    Ok(())
}

/// A Service's own word, on nodes that know of no other nodes until then, and an external address of it.
#[test]
fn a_service_decides_for_itself_at_any_time() -> Result<()> {
    let cluster = cluster([UplinkMode::Xdp, UplinkMode::Tc], "snat")?;
    let node = cluster.lab.nodes[0].addresses();
    let external = address::external(32);
    let namespace = cluster.lab.client.namespace();
    namespace.ip(&format!("route add {} via {}\nroute add {} via {}", external.v4, node.v4, external.v6, node.v6))?;
    for family in Family::ALL {
        let target = at_b().at_node(node, family, Protocol::Tcp);
        assert_eq!(cluster.lab.client.ask(Ask::new(target))?.peer.ip(), node.of(family), "{target}");
    }
    let mut documents = at_b().documents();
    documents[0]["metadata"]["annotations"] = json!({"service.sluice.dev/nodeport-mode": "dsr"});
    documents[0]["spec"]["externalIPs"] = json!([external.v4, external.v6]);
    write_documents(cluster.source(), "at-b.yaml", &documents)?;
    for family in Family::ALL {
        for protocol in Protocol::ALL {
            wait_until_direct(&cluster, at_b().at_node(node, family, protocol))?;
            let at = Target { address: (external.of(family), at_b().port).into(), protocol };
            wait_until_direct(&cluster, at)?;
            assert_eq!(cluster.lab.client.ask(Ask::new(at))?.from, at.address);
        }
    }
    Ok(())
}
