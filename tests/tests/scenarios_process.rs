//! Scenarios of the agent's process: killed again and again, followed by another one, ended for want of memory. What is in the kernel
//! goes on, and traffic does not notice. Needs root.

use std::{
    collections::BTreeMap,
    env, fs, thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use nix::{
    sys::{signal::Signal, wait::WaitStatus},
    unistd::Pid,
};
use proxy_common::outcome::{Hook, Outcome};
use proxy_userspace::dataplane::pinned_links;
use serde_json::{Value, json};
use tests::{
    lab::{
        LabOptions, Node,
        agent::AgentOptions,
        cluster::Cluster,
        load,
        manifest::{Service, write_documents},
        memory::MemoryCgroup,
        succession::{Successor, ended, terminate},
    },
    patience::{patience, wait_until},
    scenario::note,
    traffic::{RateReport, StreamReport},
};

const USUAL: Duration = Duration::from_secs(20);

/// As many per second as the variable says: the scenarios' own figures are for machines that do nothing else.
fn per_second(variable: &str, usual: u32) -> u32 {
    env::var(variable).ok().and_then(|number| number.parse().ok()).unwrap_or(usual)
}

fn each_second(count: u64, elapsed: Duration) -> u64 {
    count * 1_000 / (elapsed.as_millis() as u64).max(1)
}

/// Ids of a node's links and of the programs they hold, by program and target.
fn links(node: &Node) -> Result<BTreeMap<String, (u32, u32)>> {
    let links = pinned_links(node.pins())?;
    Ok(links
        .into_iter()
        .map(|link| (format!("{}-{}", link.program, link.target), (link.link, link.program_id)))
        .collect())
}

/// Ids of the links alone.
fn link_ids(node: &Node) -> Result<BTreeMap<String, u32>> {
    Ok(links(node)?.into_iter().map(|(name, (link, _))| (name, link)).collect())
}

fn opened(node: &Node) -> Result<u64> {
    [Hook::UplinkXdp, Hook::UplinkIn, Hook::Connect].into_iter().map(|hook| node.counted(hook, Outcome::Opened)).sum()
}

fn assert_all_answered(name: &str, report: &RateReport) {
    let RateReport { begun, elapsed, slowest, .. } = report;
    note(
        11,
        &format!("{begun} connections {name}, {} per second, the slowest {slowest:?}", each_second(*begun, *elapsed)),
    );
    assert!(report.failures.is_empty(), "{name}: {:?}", report.failures);
    assert_eq!(report.answered, report.begun, "{name}");
    assert!(report.pods.keys().all(|pod| ["a1", "b1", "b2"].contains(&pod.as_str())), "{name}: {:?}", report.pods);
}

/// Moments at which agents are killed: from their first system calls to long after they are in sync.
fn moment(round: u32) -> Duration {
    patience(Duration::from_millis(u64::from(round * 37 % 250)))
}

#[test]
fn scenario_11_a_hundred_kills_under_new_connections_fail_none_and_leave_every_link() -> Result<()> {
    const KILLS: u32 = 100;
    let service = Service::new("echo", 10, &["a1", "b1", "b2"]);
    let cluster = Cluster::start(LabOptions::default(), AgentOptions::default(), std::slice::from_ref(&service))?;
    let nodes = &cluster.lab.nodes;
    let before = [links(&nodes[0])?, links(&nodes[1])?];
    let counted = [opened(&nodes[0])?, opened(&nodes[1])?];
    let began = Instant::now();
    let rates = load::rates(&cluster, &service, per_second("SLUICE_TEST_RATE", 400))?;
    for round in 0..KILLS {
        let node = &nodes[round as usize % 2];
        if round % 25 == 24 {
            node.agent()?.wait_until_in_sync()?;
        } else {
            thread::sleep(moment(round));
        }
        // SIGKILL to the one before.
        node.launch_agent(cluster.source(), &cluster.options)?;
    }
    for node in nodes {
        node.agent()?.wait_until_in_sync()?;
    }
    println!("{KILLS} kills in {:?}", began.elapsed());
    let mut connections = Vec::new();
    for (name, rate) in rates {
        let report = rate.finish_rate()?;
        assert_all_answered(name, &report);
        assert_eq!(report.handshake_retransmits, 0, "{name}: a SYN or its answer was lost");
        connections.push(report.begun);
    }
    for (node, before) in nodes.iter().zip(before) {
        let now = links(node)?;
        for (name, (link, program)) in &before {
            let (same_link, other_program) = now.get(name).with_context(|| format!("no link {name}"))?;
            assert_eq!(link, same_link, "{}: {name} was made anew", node.plan.name);
            assert_ne!(program, other_program, "{}: {name} is still that of the first agent", node.plan.name);
        }
        assert_eq!(now.len(), before.len(), "{}: {now:?}", node.plan.name);
    }
    // The counters add up: each connection was given a backend once.
    let counted = [opened(&nodes[0])? - counted[0], opened(&nodes[1])? - counted[1]];
    assert_eq!(counted, [connections[0] + connections[2], connections[1]], "opened at node-a and at node-b");
    Ok(())
}

/// More endpoints than the limit of [`starve`] has room for.
fn giant() -> Vec<Value> {
    let slices = (0..40).map(|number| {
        let endpoints: Vec<_> =
            (0..200).map(|host| json!({"addresses": [format!("10.200.{number}.{host}")], "conditions": {"ready": true}})).collect();
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {
                "namespace": "lab", "name": format!("giant-{number}"), "labels": {"kubernetes.io/service-name": "giant"},
            },
            "endpoints": endpoints, "ports": [{"name": "tcp", "protocol": "TCP", "port": 8080}],
        })
    });
    slices.collect()
}

/// Has the kernel kill a node's agent for want of memory, and starts another. Where it cannot be made to, the agent is killed as it
/// would be.
fn starve(cluster: &Cluster, node: &Node) -> Result<()> {
    let process = node.agent()?.id();
    match MemoryCgroup::new(node.plan.number.into()) {
        Ok(cgroup) => {
            cgroup.take(process)?;
            cgroup.limit(4 << 20)?;
            write_documents(cluster.source(), "giant.yaml", &giant())?;
            let status = ended(process)?;
            let killed = WaitStatus::Signaled(Pid::from_raw(process.cast_signed()), Signal::SIGKILL, false);
            ensure!(status == killed, "not killed: {status:?}");
            ensure!(cgroup.killed()? == 1, "the kernel has not counted it");
        }
        Err(error) => {
            note(12, &format!("the kernel kills nobody for want of memory here, so that SIGKILL stood in: {error:#}"));
            node.kill_agent();
        }
    }
    let giant = cluster.source().join("giant.yaml");
    if giant.exists() {
        fs::remove_file(giant)?;
    }
    node.start_agent(cluster.source(), &cluster.options)
}

/// One agent is ended well, and the next one is started.
fn replace(cluster: &Cluster, node: &Node) -> Result<()> {
    terminate(node.agent()?.id())?;
    node.start_agent(cluster.source(), &cluster.options)
}

/// The next one is there before the first is told to end, as in an update with a surge.
fn overlap(cluster: &Cluster, node: &Node) -> Result<()> {
    let before = links(node)?;
    let successor = Successor::start(node)?;
    terminate(node.agent()?.id())?;
    let is_taken_over = || {
        let now = links(node).ok()?;
        now.iter().all(|(name, link)| before.get(name).is_some_and(|(_, program)| *program != link.1)).then_some(())
    };
    wait_until("the second agent to take over", USUAL, is_taken_over)?;
    drop(successor);
    node.start_agent(cluster.source(), &cluster.options)
}

/// One agent is followed by another.
type Change = fn(&Cluster, &Node) -> Result<()>;

fn assert_no_gap(name: &str, report: &StreamReport, elapsed: Duration) {
    let StreamReport { sent, answered, .. } = report;
    note(12, &format!("{sent} datagrams {name}, {} per second, {answered} answered", each_second(*sent, elapsed)));
    assert_eq!((report.lost(), report.duplicated, report.errors), (0, 0, 0), "{name}: {:?}", report.gaps);
    assert_eq!(report.pods.len(), 1, "{name}: a flow stays with its backend: {:?}", report.pods);
}

#[test]
fn scenario_12_agents_that_follow_each_other_however_they_end_lose_no_datagram() -> Result<()> {
    let service = Service::new("echo", 10, &["a1", "b1", "b2"]);
    let cluster = Cluster::start(LabOptions::default(), AgentOptions::default(), std::slice::from_ref(&service))?;
    let nodes = &cluster.lab.nodes;
    let before = [link_ids(&nodes[0])?, link_ids(&nodes[1])?];
    let began = Instant::now();
    let streams = load::streams(&cluster, &service, per_second("SLUICE_TEST_PPS", 9_000) / 3)?;
    let [a, b] = nodes;
    let changes: [(_, Change, &Node); 5] = [
        ("SIGTERM", replace, a),
        ("SIGTERM", replace, b),
        ("an update with a surge", overlap, a),
        ("an update with a surge", overlap, b),
        ("no memory", starve, a),
    ];
    for (name, change, node) in changes {
        let began = Instant::now();
        change(&cluster, node).with_context(|| format!("{name} at {}", node.plan.name))?;
        println!("{name} at {}: {:?}", node.plan.name, began.elapsed());
    }
    let elapsed = began.elapsed();
    for (name, stream) in streams {
        assert_no_gap(name, &stream.finish_stream()?, elapsed);
    }
    for (node, before) in nodes.iter().zip(before) {
        assert_eq!(link_ids(node)?, before, "{}", node.plan.name);
    }
    Ok(())
}
