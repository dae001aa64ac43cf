//! The lab itself, without Sluice: who reaches whom. What fails here is wrong with the lab.

use std::{thread, time::Duration};

use anyhow::{Context as _, Result};
use tests::{
    lab::{
        Lab, LabOptions, UplinkMode,
        address::{self, Family, NODES, of_pod},
    },
    traffic::{Ask, Failure, Protocol, RatePlan, StreamPlan, Target},
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
        let lab = Lab::new(LabOptions { uplinks, ..LabOptions::default() })?;
        for family in Family::ALL {
            let (_, addresses) = address::pod("b1").unwrap();
            let target = Target::tcp((addresses.of(family), 8080));
            let report = lab.place("a1")?.transfer(Ask::new(target), 8 << 20)?;
            assert_eq!((report.pod.as_str(), report.bytes), ("b1", 8 << 20));
        }
    }
    Ok(())
}

fn lab_with_target(pod: &str, port: u16) -> Result<(Lab, std::net::SocketAddr)> {
    let (_, addresses) = address::pod(pod).context("no such pod")?;
    Ok((Lab::new(LabOptions::default())?, (addresses.of(Family::V4), port).into()))
}

#[test]
fn a_stream_and_connections_at_a_rate_lose_nothing_on_a_quiet_way() -> Result<()> {
    let (lab, address) = lab_with_target("b1", 8080)?;
    let (target, linger) = (Target::udp(address), Duration::from_secs(2));
    let stream = lab.place("client-a")?.stream(StreamPlan { target, per_second: 10_000, linger })?;
    let plan = RatePlan { target: Target::tcp(address), per_second: 500, timeout: Duration::from_secs(5) };
    let rate = lab.place("client-b")?.rate(plan)?;
    thread::sleep(Duration::from_secs(1));
    let (rate, stream) = (rate.finish_rate()?, stream.finish_stream()?);
    assert_eq!((stream.lost(), stream.duplicated, stream.errors), (0, 0, 0), "{stream:?}");
    assert!(stream.sent > 5_000, "{stream:?}");
    assert_eq!((rate.answered, rate.failures.len(), rate.handshake_retransmits), (rate.begun, 0, 0), "{rate:?}");
    assert!(rate.begun > 250, "{rate:?}");
    Ok(())
}

#[test]
fn a_gap_on_the_way_is_reported() -> Result<()> {
    let (lab, address) = lab_with_target("b1", 8080)?;
    let (target, linger) = (Target::udp(address), Duration::from_millis(200));
    let stream = lab.place("client-a")?.stream(StreamPlan { target, per_second: 1_000, linger })?;
    let plan = RatePlan { target: Target::tcp(address), per_second: 100, timeout: Duration::from_secs(5) };
    let rate = lab.place("client-b")?.rate(plan)?;
    let node = lab.node("node-b")?.host.namespace();
    thread::sleep(Duration::from_millis(200));
    node.ip("link set pod-b1 down")?;
    thread::sleep(Duration::from_millis(200));
    node.ip("link set pod-b1 up")?;
    thread::sleep(Duration::from_millis(200));
    let (rate, stream) = (rate.finish_rate()?, stream.finish_stream()?);
    assert!(stream.lost() > 0, "{stream:?}");
    assert!(rate.handshake_retransmits + rate.failures.len() as u64 > 0, "{rate:?}");
    Ok(())
}

#[test]
fn failures_are_told_apart() -> Result<()> {
    let (lab, address) = lab_with_target("b1", 1)?;
    let client = lab.place("client-a")?;
    for target in [Target::tcp(address), Target::udp(address)] {
        assert_eq!(client.ask_times(Ask::new(target), 1)?, [Err(Failure::Refused)], "{target}");
    }
    // Behind the gateway there is nothing that answers.
    let nowhere = Ask::new(Target::tcp(([10, 96, 0, 1], 80))).within(Duration::from_millis(100));
    assert_eq!(client.ask_times(nowhere, 1)?, [Err(Failure::TimedOut)]);
    Ok(())
}
