//! The lab itself, without Sluice: who reaches whom. What fails here is wrong with the lab.

use anyhow::Result;
use tests::{
    lab::{
        Lab, LabOptions, UplinkMode,
        address::{self, Family, NODES, of_pod},
    },
    traffic::{Ask, Protocol, Target},
};

#[test]
fn every_pod_is_reached_from_pods_nodes_and_outside() -> Result<()> {
    let lab = Lab::new(LabOptions::default())?;
    lab.client.namespace().ip("route add 10.244.0.0/16 via 192.0.2.11\nroute add fd00:10:244::/48 via 2001:db8::11")?;
    for client in lab.places() {
        for (node, pod, number) in pods() {
            for family in Family::ALL {
                for protocol in Protocol::ALL {
                    let address = (of_pod(node, number).of(family), 8080).into();
                    let answer = client.ask(Ask::new(Target { address, protocol }))?;
                    assert_eq!(answer.pod, pod);
                    assert_eq!(answer.peer, answer.local, "somebody translates between {} and {pod}", client.name());
                }
            }
        }
    }
    Ok(())
}

fn pods() -> impl Iterator<Item = (u8, &'static str, u8)> {
    NODES.iter().flat_map(|node| node.pods.iter().map(|(pod, number)| (node.number, *pod, *number)))
}

#[test]
fn large_transfers_arrive_whole_on_both_kinds_of_wire() -> Result<()> {
    for uplinks in [[UplinkMode::Xdp, UplinkMode::Tc], [UplinkMode::Tc, UplinkMode::Xdp]] {
        let lab = Lab::new(LabOptions { uplinks })?;
        for family in Family::ALL {
            let (_, addresses) = address::pod("b1").unwrap();
            let target = Target::tcp((addresses.of(family), 8080));
            let report = lab.place("a1")?.transfer(Ask::new(target), 8 << 20)?;
            assert_eq!((report.pod.as_str(), report.bytes), ("b1", 8 << 20));
        }
    }
    Ok(())
}
