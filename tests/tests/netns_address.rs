//! Addresses of a node that come and go.

use std::{net::SocketAddr, time::Duration};

use anyhow::Result;
use tests::{
    lab::{LabOptions, UplinkMode, address::Addresses, agent::AgentOptions, cluster::Cluster, manifest::Service},
    patience::wait_until,
    traffic::{Ask, Protocol, Target},
};

/// As keepalived and kube-vip add them: on the wire, and no node's own.
const FLOATING: Addresses = Addresses {
    v4: std::net::Ipv4Addr::new(192, 0, 2, 77),
    v6: std::net::Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x77),
};

/// Trap 24: an address that is added later serves NodePorts within a second, and one that is gone no longer does.
#[test]
fn node_ports_follow_the_nodes_addresses() -> Result<()> {
    let service = Service::new("moving", 33, &["a1"]);
    for uplink in [UplinkMode::Xdp, UplinkMode::Tc] {
        let options = AgentOptions { more: vec!["--nodeport-addresses=all".into()], ..AgentOptions::default() };
        let cluster = Cluster::start(
            LabOptions { uplinks: [uplink; 2], ..LabOptions::default() },
            options,
            std::slice::from_ref(&service),
        )?;
        let node = cluster.lab.node("node-a")?.host.namespace();
        let change = |what: &str| {
            node.ip(&format!("addr {what} {}/32 dev uplink", FLOATING.v4))?;
            // As keepalived does it: no source of connections, and so deprecated.
            let lifetime = if what == "add" { "preferred_lft 0" } else { "" };
            node.ip(&format!("addr {what} {}/128 dev uplink nodad {lifetime}", FLOATING.v6))
        };
        let targets = [FLOATING.v4.into(), FLOATING.v6.into()].into_iter().flat_map(|address| {
            let address = SocketAddr::new(address, service.node_port);
            Protocol::ALL.map(|protocol| Target { address, protocol })
        });
        let targets: Vec<_> = targets.collect();
        let asked = |target: Target| {
            let ask = Ask::new(target).within(Duration::from_millis(150));
            Ok::<_, anyhow::Error>(cluster.lab.client.ask_times(ask, 1)?.remove(0))
        };
        for round in 0..2 {
            change("add")?;
            for target in &targets {
                let answer =
                    wait_until("an answer at the new address", Duration::from_secs(1), || asked(*target).ok()?.ok())?;
                assert_eq!((answer.pod.as_str(), answer.from), ("a1", target.address), "round {round}");
            }
            change("del")?;
            for target in &targets {
                wait_until("silence at the old address", Duration::from_secs(3), || asked(*target).ok()?.err())?;
            }
        }
    }
    Ok(())
}
