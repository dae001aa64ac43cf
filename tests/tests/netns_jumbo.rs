//! Frames larger than a page, which XDP gets in parts.

use anyhow::{Result, ensure};
use proxy_common::outcome::{Hook, Outcome};
use tests::{
    lab::{
        Lab, LabOptions, UplinkMode,
        address::Family,
        agent::{AgentOptions, SocketLb},
        manifest::{Service, write_nodes},
    },
    traffic::{Ask, Protocol},
};

const MTU: u32 = 9_000;

/// Lets everybody on the wire and in the pods send large frames.
fn enlarge(lab: &Lab) -> Result<()> {
    let wire = lab.gateway.namespace();
    let ports = ["client", "node-a", "node-b"].map(|name| format!("link set port-{name} mtu {MTU}"));
    wire.ip(&format!("{}\nlink set wire mtu {MTU}", ports.join("\n")))?;
    lab.client.namespace().ip(&format!("link set eth0 mtu {MTU}"))?;
    for node in &lab.nodes {
        let pods = node.pods.iter().map(|pod| format!("link set pod-{} mtu {MTU}", pod.name()));
        let lines: Vec<_> = pods.chain([format!("link set uplink mtu {MTU}")]).collect();
        node.host.namespace().ip(&lines.join("\n"))?;
        // The bridge takes over the least of its ports.
        node.pods.iter().try_for_each(|pod| pod.namespace().ip(&format!("link set eth0 mtu {MTU}")))?;
    }
    Ok(())
}

fn has_xdp(lab: &Lab, node: usize) -> Result<bool> {
    let output = lab.nodes[node].host.namespace().command("ip")?.args(["-o", "link", "show", "uplink"]).output()?;
    Ok(String::from_utf8_lossy(&output.stdout).contains(" xdp "))
}

#[test]
fn segments_larger_than_a_page_go_through_xdp() -> Result<()> {
    let source = tempfile::tempdir()?;
    write_nodes(source.path())?;
    let services = [Service::new("at-a", 31, &["a1"]), Service::new("at-b", 32, &["b1"])];
    services.iter().try_for_each(|service| service.write(source.path()))?;
    let lab = Lab::new(LabOptions { uplinks: [UplinkMode::Xdp; 2], ..LabOptions::default() })?;
    enlarge(&lab)?;
    lab.start_agents(source.path(), &AgentOptions { socket_lb: SocketLb::Host, ..AgentOptions::default() })?;
    for (index, node) in lab.nodes.iter().enumerate() {
        ensure!(has_xdp(&lab, index)?, "{} has no XDP: {}", node.plan.name, node.agent()?.log());
        for (service, family) in services.iter().flat_map(|service| Family::ALL.map(|family| (service, family))) {
            let target = service.at_node(node.addresses(), family, Protocol::Tcp);
            let report = lab.client.transfer(Ask::new(target), 8 << 20)?;
            assert_eq!((report.pod.as_str(), report.bytes), (service.pods[0], 8 << 20), "{target}");
        }
        assert!(node.counted(Hook::UplinkXdp, Outcome::Opened)? >= 4, "{}", node.plan.name);
        assert_eq!(node.counted(Hook::UplinkXdp, Outcome::PassMalformed)?, 0, "{}", node.plan.name);
    }
    Ok(())
}
