//! Frames that a switch floods to everybody, because it has not learnt yet where the host is that they are for.

use std::time::Duration;

use anyhow::Result;
use proxy_common::outcome::{Hook, Outcome};
use tests::{
    lab::{LabOptions, UplinkMode, address::Family, agent::AgentOptions, cluster::Cluster, manifest::Service},
    traffic::{Ask, Failure, Protocol},
};

#[test]
fn a_node_that_a_frame_is_not_for_does_not_answer() -> Result<()> {
    let service = Service::new("at-b", 32, &["b1"]);
    for (uplink, hook) in [(UplinkMode::Xdp, Hook::UplinkXdp), (UplinkMode::Tc, Hook::UplinkIn)] {
        let options = LabOptions { uplinks: [uplink; 2], ..LabOptions::default() };
        let cluster = Cluster::start(options, AgentOptions::default(), std::slice::from_ref(&service))?;
        let node = cluster.lab.node("node-a")?;
        let client = cluster.lab.client.namespace();
        for family in Family::ALL {
            let address = node.addresses().of(family);
            client.ip(&format!("neigh replace {address} lladdr 02:00:00:00:99:99 dev eth0"))?;
            for protocol in Protocol::ALL {
                let target = service.at_node(node.addresses(), family, protocol);
                let before = node.counted(hook, Outcome::PassOtherHost)?;
                let ask = Ask::new(target).within(Duration::from_millis(300));
                let answer = cluster.lab.client.ask_times(ask, 1)?.remove(0);
                assert!(matches!(answer, Err(Failure::TimedOut)), "{target}: {answer:?}");
                assert!(node.counted(hook, Outcome::PassOtherHost)? > before, "{target}: the frame came to the node");
            }
            client.ip(&format!("neigh del {address} dev eth0"))?;
            for protocol in Protocol::ALL {
                let answer = cluster.lab.client.ask(Ask::new(service.at_node(node.addresses(), family, protocol)))?;
                assert_eq!(answer.pod, "b1");
            }
        }
    }
    Ok(())
}
