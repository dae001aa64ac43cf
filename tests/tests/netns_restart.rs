//! Killing the agent, and taking it away.

use std::{fs, time::Duration};

use anyhow::Result;
use tests::{
    lab::{
        LabOptions, Node,
        address::Family,
        agent::{AgentOptions, clean_up},
        cluster::Cluster,
        device::XdpPass,
        manifest::Service,
    },
    patience::patience,
    traffic::{Ask, Protocol},
};

fn cluster() -> Result<(Cluster, Service)> {
    let service = Service::new("echo", 10, &["a1", "b1", "b2"]);
    let cluster = Cluster::start(LabOptions::default(), AgentOptions::default(), std::slice::from_ref(&service))?;
    Ok((cluster, service))
}

#[test]
fn traffic_goes_on_without_an_agent() -> Result<()> {
    let (cluster, service) = cluster()?;
    let client = cluster.lab.place("client-a")?;
    let target = service.cluster(Family::V4, Protocol::Tcp);
    let open = client.open(Ask::new(target))?;
    let pod = open.ask()?.pod;
    cluster.lab.nodes.iter().for_each(Node::kill_agent);
    assert_eq!(open.ask()?.pod, pod);
    for family in Family::ALL {
        for protocol in Protocol::ALL {
            client.ask(Ask::new(service.cluster(family, protocol)))?;
            for node in &cluster.lab.nodes {
                cluster.lab.client.ask(Ask::new(service.at_node(node.addresses(), family, protocol)))?;
            }
        }
    }
    cluster.restart_agents()?;
    assert_eq!(open.ask()?.pod, pod);
    Ok(())
}

#[test]
fn a_change_made_while_the_agent_was_away_is_found() -> Result<()> {
    let (cluster, service) = cluster()?;
    cluster.lab.nodes.iter().for_each(Node::kill_agent);
    service.with_pods(&["b2"]).write(cluster.source())?;
    cluster.restart_agents()?;
    for answer in cluster.lab.place("client-a")?.ask_times(Ask::new(service.cluster(Family::V6, Protocol::Tcp)), 20)? {
        assert_eq!(answer?.pod, "b2");
    }
    Ok(())
}

#[test]
fn cleanup_removes_what_the_agent_made_and_nothing_else() -> Result<()> {
    let (cluster, service) = cluster()?;
    let [a, b] = [&cluster.lab.nodes[0], &cluster.lab.nodes[1]];
    let _foreign = XdpPass::attach(a.host.namespace(), "pod-client-a")?;
    assert!(has_xdp(a, "uplink")?, "the agent has attached nothing to clean up");
    a.kill_agent();
    let output = clean_up(a)?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));

    let left: Vec<_> = fs::read_dir(a.pins()).map(|entries| entries.flatten().collect()).unwrap_or_default();
    assert!(left.is_empty(), "pins stay: {left:?}");
    assert!(!has_xdp(a, "uplink")?, "the XDP program stays");
    assert!(has_xdp(a, "pod-client-a")?, "somebody else's XDP program is gone");
    let soon = patience(Duration::from_millis(300));
    for client in ["client-a", "node-a"] {
        let target = service.cluster(Family::V4, Protocol::Tcp);
        assert!(cluster.lab.place(client)?.ask(Ask::new(target).within(soon)).is_err(), "{client} is still translated");
    }
    b.agent()?;
    cluster.lab.place("client-b")?.ask(Ask::new(service.cluster(Family::V4, Protocol::Tcp)))?;
    Ok(())
}

fn has_xdp(node: &Node, device: &str) -> Result<bool> {
    let output = node.host.namespace().command("ip")?.args(["link", "show", "dev", device]).output()?;
    Ok(String::from_utf8_lossy(&output.stdout).contains("prog/xdp"))
}
