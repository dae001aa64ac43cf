//! Clients of a Service without endpoints are told so at once, whoever completes the checksums of the answer.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use tests::{
    lab::{
        LabOptions, UplinkMode,
        address::Family,
        agent::{AgentOptions, SocketLb},
        cluster::Cluster,
        device::{Offload, set_offload},
        errors::checksum_errors,
        manifest::Service,
    },
    patience::patience,
    traffic::{Ask, Failure, Protocol, Target, place::Place},
};

/// From `connect`, or the datagram, to the error.
const AT_ONCE: Duration = Duration::from_millis(100);

/// Who leaves checksums to the next device: the client, and the device the answer leaves by.
const OFFLOADS: [[bool; 2]; 4] = [[true, true], [true, false], [false, true], [false, false]];

fn cluster(uplinks: [UplinkMode; 2]) -> Result<(Cluster, Service)> {
    let service = Service::new("nobody", 60, &[]);
    // Packets are what this is about: pods' sockets are left alone.
    let options = AgentOptions { socket_lb: SocketLb::Host, ..AgentOptions::default() };
    Ok((
        Cluster::start(LabOptions { uplinks, ..LabOptions::default() }, options, std::slice::from_ref(&service))?,
        service,
    ))
}

/// Connects, and sends a datagram on a connected socket.
fn is_refused_at_once(client: &Place, target: Target) -> Result<()> {
    // The first packet of all may have to wait for a neighbour.
    client.ask_times(Ask::new(target), 1)?;
    let start = Instant::now();
    let answers = client.ask_times(Ask::new(target), 1)?;
    let took = start.elapsed();
    ensure!(matches!(answers[..], [Err(Failure::Refused)]), "{} asks {target}: {answers:?}", client.name());
    ensure!(took <= patience(AT_ONCE), "{} is refused by {target} after {took:?}", client.name());
    Ok(())
}

fn have_no_checksum_errors(cluster: &Cluster) -> Result<()> {
    for place in cluster.lab.places() {
        assert_eq!(checksum_errors(place)?, Vec::<String>::new(), "at {}", place.name());
    }
    Ok(())
}

#[test]
fn pods_are_refused_at_once() -> Result<()> {
    let (cluster, service) = cluster([UplinkMode::Xdp, UplinkMode::Tc])?;
    for node in &cluster.lab.nodes {
        for [by_pod, by_node] in OFFLOADS {
            let pod = node.pods.iter().find(|pod| pod.name().starts_with("client-")).context("a client")?;
            set_offload(pod.namespace(), "eth0", Offload::TransmitChecksum, by_pod)?;
            let device = format!("pod-{}", pod.name());
            set_offload(node.host.namespace(), &device, Offload::TransmitChecksum, by_node)?;
            for family in Family::ALL {
                for protocol in Protocol::ALL {
                    is_refused_at_once(pod, service.cluster(family, protocol))
                        .with_context(|| format!("offload by the pod: {by_pod}, by the node: {by_node}"))?;
                }
            }
        }
    }
    have_no_checksum_errors(&cluster)
}

#[test]
fn clients_outside_are_refused_at_once_by_tc_uplinks() -> Result<()> {
    let (cluster, service) = cluster([UplinkMode::Tc, UplinkMode::Tc])?;
    let client = &cluster.lab.client;
    for [by_client, by_node] in OFFLOADS {
        set_offload(client.namespace(), "eth0", Offload::TransmitChecksum, by_client)?;
        for node in &cluster.lab.nodes {
            set_offload(node.host.namespace(), "uplink", Offload::TransmitChecksum, by_node)?;
            for family in Family::ALL {
                for protocol in Protocol::ALL {
                    is_refused_at_once(client, service.at_node(node.addresses(), family, protocol))
                        .with_context(|| format!("offload by the client: {by_client}, by the node: {by_node}"))?;
                }
            }
        }
    }
    have_no_checksum_errors(&cluster)
}

#[test]
fn clients_outside_are_refused_at_once_by_xdp_uplinks() -> Result<()> {
    let (cluster, service) = cluster([UplinkMode::Xdp, UplinkMode::Xdp])?;
    for node in &cluster.lab.nodes {
        for family in Family::ALL {
            for protocol in Protocol::ALL {
                is_refused_at_once(&cluster.lab.client, service.at_node(node.addresses(), family, protocol))?;
            }
        }
    }
    have_no_checksum_errors(&cluster)
}
