//! Which sockets are translated when they connect, and what they are told when they cannot be.

use std::time::Duration;

use anyhow::Result;
use proxy_common::{
    node::masquerade,
    outcome::{Hook, Outcome},
    service::{Pick, flag},
};
use tests::{
    lab::{LabOptions, address::Family, agent::AgentOptions, cluster::Cluster, manifest::Service},
    patience::patience,
    traffic::{Ask, Protocol, place::Place},
};

fn cluster() -> Result<(Cluster, Service)> {
    let service = Service::new("echo", 10, &["a1"]);
    let cluster = Cluster::start(LabOptions::default(), AgentOptions::default(), std::slice::from_ref(&service))?;
    Ok((cluster, service))
}

/// Whether a request is translated as the socket connects. What becomes of it then is not the question here.
fn is_translated_at_connect(cluster: &Cluster, client: &Place, ask: Ask) -> Result<bool> {
    let opened = || cluster.lab.nodes[0].counted(Hook::Connect, Outcome::Opened);
    let before = opened()?;
    client.ask_times(ask.within(patience(Duration::from_millis(200))), 1)?;
    Ok(opened()? > before)
}

#[test]
fn a_pod_connects_by_its_packets_where_the_rule_needs_to_know_them() -> Result<()> {
    let (cluster, service) = cluster()?;
    let node = &cluster.lab.nodes[0];
    let (pod, host) = (cluster.lab.place("client-a")?, cluster.lab.place("node-a")?);
    let rules = [
        ("an external address", flag::EXTERNAL, Pick::Random),
        ("affinity", flag::AFFINITY, Pick::Random),
        ("source ranges", flag::SOURCE_RANGES, Pick::Random),
        ("a hash of the client", 0, Pick::SourceHash),
    ];
    for family in Family::ALL {
        let target = service.cluster(family, Protocol::Tcp);
        assert!(is_translated_at_connect(&cluster, pod, Ask::new(target))?, "a plain Service at {target}");
        for (name, flags, pick) in rules {
            node.edit_service(target, |entry| (entry.flags, entry.pick) = (flags, pick))?;
            assert!(!is_translated_at_connect(&cluster, pod, Ask::new(target))?, "{name} at {target}");
            if name != "source ranges" {
                assert!(is_translated_at_connect(&cluster, host, Ask::new(target))?, "{name} at {target}");
            }
        }
    }
    Ok(())
}

#[test]
fn a_pod_connects_by_its_packets_where_everybody_is_masqueraded() -> Result<()> {
    let (cluster, service) = cluster()?;
    let (pod, host) = (cluster.lab.place("client-a")?, cluster.lab.place("node-a")?);
    cluster.lab.nodes[0].edit_node(|node| node.flags |= masquerade::ALL)?;
    for family in Family::ALL {
        let ask = Ask::new(service.cluster(family, Protocol::Tcp));
        assert!(!is_translated_at_connect(&cluster, pod, ask)?);
        assert!(is_translated_at_connect(&cluster, host, ask)?);
    }
    Ok(())
}
