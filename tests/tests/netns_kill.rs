//! Killing the agent under load. A file of its own, so that no other test takes the processor from it.

use std::{env, thread, time::Duration};

use anyhow::{Context as _, Result, ensure};
use proxy_common::outcome::{Hook, Outcome};
use tests::{
    lab::{LabOptions, Node, address::Family, agent::AgentOptions, cluster::Cluster, manifest::Service},
    patience::{patience, slowness},
    traffic::{
        Protocol, RatePlan, RateReport, StreamPlan, Target,
        place::{Activity, Place},
    },
};

/// How long traffic runs while the agent is killed and comes back: 30 seconds, or `SLUICE_TEST_SECONDS`.
fn duration() -> Duration {
    let seconds = env::var("SLUICE_TEST_SECONDS").ok().and_then(|seconds| seconds.parse().ok());
    Duration::from_secs(seconds.unwrap_or(30))
}

/// As many per second as this machine manages of what a developer's does: losing what it cannot carry says nothing.
fn per_second(usual: u32) -> u32 {
    (Duration::from_secs(1).div_f64(slowness()).as_millis() as u32 * usual).div_ceil(1_000)
}

fn rate(target: Target, usual: u32) -> RatePlan {
    RatePlan { target, per_second: per_second(usual), timeout: patience(Duration::from_secs(5)) }
}

fn ensure_nothing_was_lost(name: &str, report: &RateReport) -> Result<()> {
    eprintln!("{name}: {report:?}");
    ensure!(report.failures.is_empty(), "{name}: {:?}", report.failures);
    ensure!(report.answered == report.begun, "{name}: {} of {} were answered", report.answered, report.begun);
    ensure!(report.handshake_retransmits == 0, "{name}: a SYN or its answer was lost");
    Ok(())
}

/// The words of `ip` about the XDP program at a node's uplink, its number among them.
fn xdp_program(node: &Node) -> Result<String> {
    let output = node.host.namespace().command("ip")?.args(["link", "show", "dev", "uplink"]).output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let line = text.lines().find(|line| line.contains("prog/xdp")).context("no XDP program at the uplink")?;
    Ok(line.trim().to_owned())
}

/// What the programs of a node have counted: where to look first when something was lost.
fn print_counts(node: &Node) -> Result<()> {
    for (hook, outcome) in Hook::ALL.into_iter().flat_map(|hook| Outcome::ALL.map(|outcome| (hook, outcome))) {
        let count = node.counted(hook, outcome)?;
        if count > 0 {
            eprintln!("{}: {hook:?} {outcome:?} {count}", node.plan.name);
        }
    }
    Ok(())
}

/// What the kernel of a place has counted of TCP: whose resets they were.
fn print_resets(place: &Place) -> Result<()> {
    let mut command = place.namespace().command("cat")?;
    let output = command.args(["/proc/net/snmp", "/proc/net/netstat"]).output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let lines: Vec<_> = text.lines().filter(|line| line.starts_with("Tcp")).collect();
    for (names, numbers) in lines.chunks_exact(2).map(|pair| (pair[0], pair[1])) {
        let counted = names.split(' ').zip(numbers.split(' ')).skip(1).filter(|(_, number)| *number != "0");
        let counted: Vec<_> = counted.map(|(name, number)| format!("{name} {number}")).collect();
        eprintln!("{}: {}", place.name(), counted.join(", "));
    }
    Ok(())
}

/// Kills both agents, waits, starts them again.
fn kill_and_restart(cluster: &Cluster, pause: Duration) -> Result<()> {
    thread::sleep(pause);
    cluster.lab.nodes.iter().for_each(Node::kill_agent);
    thread::sleep(pause);
    cluster.restart_agents()?;
    thread::sleep(pause);
    Ok(())
}

/// Connections from outside by XDP and by TC, and from a node by its sockets; a stream from a pod by its device.
///
/// Trap 19: an agent that ends and starts adopts what is there, and never detaches to attach.
#[test]
fn killing_the_agent_and_starting_it_again_loses_nothing() -> Result<()> {
    let services = [("echo", 10), ("again", 11)].map(|(name, number)| Service::new(name, number, &["a1", "b1", "b2"]));
    let cluster = Cluster::start(LabOptions::default(), AgentOptions::default(), &services)?;
    cluster.lab.without_dropping_queues(|| kill_under_load(&cluster, &services))
}

fn kill_under_load(cluster: &Cluster, services: &[Service; 2]) -> Result<()> {
    let [service, another] = services;
    let [a, b] = [&cluster.lab.nodes[0], &cluster.lab.nodes[1]];
    let before = xdp_program(a)?;
    let rates = [
        // Two, because a client with half its ports in use spends its time on finding others.
        ("by XDP", &cluster.lab.client, service.at_node(a.addresses(), Family::V4, Protocol::Tcp), 500),
        ("by XDP, too", &cluster.lab.client, another.at_node(a.addresses(), Family::V4, Protocol::Tcp), 500),
        ("by TC", &cluster.lab.client, service.at_node(b.addresses(), Family::V6, Protocol::Tcp), 50),
        ("by socket", &a.host, service.cluster(Family::V6, Protocol::Tcp), 50),
    ];
    let stream = StreamPlan {
        target: service.cluster(Family::V4, Protocol::Udp),
        per_second: per_second(10_000),
        linger: patience(Duration::from_secs(2)),
    };
    let stream = cluster.lab.place("client-a")?.stream(stream)?;
    let rates = rates.map(|(name, client, target, usual)| (name, client.rate(rate(target, usual))));
    kill_and_restart(cluster, duration() / 3)?;
    ensure!(xdp_program(a)? != before, "the new agent has not brought its own program");
    let reports = rates.map(|(name, rate)| (name, rate.and_then(Activity::finish_rate)));
    [a, b].into_iter().try_for_each(print_counts)?;
    cluster.lab.places().try_for_each(print_resets)?;
    for (name, report) in reports {
        ensure_nothing_was_lost(name, &report?)?;
    }
    let stream = stream.finish_stream()?;
    eprintln!("stream: {stream:?}");
    ensure!((stream.lost(), stream.duplicated, stream.errors) == (0, 0, 0), "datagrams were lost: {stream:?}");
    let least = u64::from(per_second(10_000)) * duration().as_secs() / 10;
    ensure!(
        stream.sent >= least,
        "this machine sent {} datagrams where {least} are the least that says something",
        stream.sent
    );
    Ok(())
}
