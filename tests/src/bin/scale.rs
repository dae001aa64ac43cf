//! Measures the agent in a cluster of many Services: how soon all of them are in the kernel, how soon a change is, and what
//! the agent keeps in memory. The API server is the fake one, on this machine; the kernel is real. Exit status 0 means
//! that every goal was met.

use std::{
    fs,
    net::Ipv4Addr,
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use aya::maps::{HashMap, Map, MapData};
use clap::Parser;
use comfy_table::{Table, presets::UTF8_BORDERS_ONLY};
use proxy_common::{
    addr::{Ipv4, Port, Protocol},
    service::{Frontend, Service},
};
use serde_json::{Value, json};
use tests::{
    api::ApiServer,
    patience::wait_until,
    sandbox::{Agent, Sandbox},
};

/// From the moment both lists were received until the kernel holds everything.
const COMPLETE: Duration = Duration::from_secs(2);
/// From a change of one endpoint until it is in the map, at the median.
const CHANGE: Duration = Duration::from_millis(5);
/// Anonymous memory, in KiB.
const MEMORY: u64 = 60 * 1024;

/// For lists of hundreds of megabytes.
const PATIENCE: Duration = Duration::from_mins(5);

/// The agent against many Services.
#[derive(Debug, Parser)]
struct Cli {
    /// How many Services
    #[arg(long, default_value_t = 10_000)]
    services: u32,
    /// How many endpoints each of them has
    #[arg(long, default_value_t = 10)]
    endpoints: u32,
    /// How many changes are measured
    #[arg(long, default_value_t = 300)]
    changes: u32,
    /// How connections are spread
    #[arg(long, default_value = "random")]
    algorithm: String,
}

fn main() -> ExitCode {
    match measure(&Cli::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn measure(cli: &Cli) -> Result<bool> {
    let sandbox = Sandbox::new()?;
    let server = sandbox.server()?;
    populate(&server, cli)?;
    let agent = sandbox.agent(&["--master", &server.url(), "--algorithm", &cli.algorithm])?;
    let peak = wait_until_in_sync(&agent)?;
    check(&sandbox, cli)?;
    let complete = time_to_complete(&agent.log())?;
    let memory = settled_memory(&agent)?;
    let changes = changes(&sandbox, &server, cli)?;
    let after = settled_memory(&agent)?;
    let [median, high, worst] = [50, 99, 100].map(|percent| changes[(changes.len() - 1) * percent / 100]);
    let mut report = Report::new(cli);
    report.row("both lists received → all in the kernel", &format!("{complete:?}"), Some((complete < COMPLETE, "2 s")));
    report.row("change of an endpoint → in the map, median", &format!("{median:?}"), Some((median < CHANGE, "5 ms")));
    report.row("… 99 %", &format!("{high:?}"), None);
    report.row("… worst", &format!("{worst:?}"), None);
    report.row("anonymous memory", &mebibytes(memory), Some((memory < MEMORY, "60 MiB")));
    report.row("… after the changes", &mebibytes(after), Some((after < MEMORY, "60 MiB")));
    report.row("… most, until all was in the kernel", &mebibytes(peak), None);
    Ok(report.print())
}

/// A table of what was measured.
struct Report {
    table: Table,
    is_good: bool,
}

impl Report {
    fn new(cli: &Cli) -> Self {
        let mut table = Table::new();
        let title = format!("{} Services × {} endpoints, {}", cli.services, cli.endpoints, cli.algorithm);
        table.load_style(UTF8_BORDERS_ONLY).set_header([title.as_str(), "found", "goal", ""]);
        Self { table, is_good: true }
    }

    fn row(&mut self, what: &str, found: &str, goal: Option<(bool, &str)>) {
        let (goal, verdict) = match goal {
            Some((true, goal)) => (format!("< {goal}"), "met"),
            Some((false, goal)) => (format!("< {goal}"), "MISSED"),
            None => (String::new(), ""),
        };
        self.is_good &= verdict != "MISSED";
        self.table.add_row([what, found, &goal, verdict]);
    }

    #[expect(clippy::print_stdout, reason = "the table is the program's result")]
    fn print(&self) -> bool {
        println!("{}", self.table);
        self.is_good
    }
}

fn mebibytes(kibibytes: u64) -> String {
    format!("{:.1} MiB", kibibytes as f64 / 1024.0)
}

fn populate(server: &ApiServer, cli: &Cli) -> Result<()> {
    server.apply(json!({
        "kind": "Node",
        "metadata": {"name": "here", "labels": {"topology.kubernetes.io/zone": "a"}},
        "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.1"}]},
    }))?;
    for number in 0..cli.services {
        server.apply(service(number))?;
        server.apply(slice(number, cli.endpoints, 0))?;
    }
    Ok(())
}

fn cluster_ip(number: u32) -> Ipv4Addr {
    Ipv4Addr::from(0x0a60_0001 + number)
}

/// With what a real one bears, most of which the agent has no use for.
fn metadata(number: u32, suffix: &str) -> Value {
    let fields = json!({"f:metadata": {"f:labels": {".": {}, "f:app.kubernetes.io/name": {}}}, "f:spec": {"f:ports": {
        ".": {}, "k:{\"port\":80,\"protocol\":\"TCP\"}": {".": {}, "f:name": {}, "f:port": {}, "f:targetPort": {}}}}});
    json!({
        "namespace": format!("team-{}", number % 100),
        "name": format!("service-{number}{suffix}"),
        "labels": {"app.kubernetes.io/name": format!("service-{number}"), "app.kubernetes.io/managed-by": "Helm"},
        "annotations": {"meta.helm.sh/release-name": format!("release-{number}"),
            "endpoints.kubernetes.io/last-change-trigger-time": "2026-11-20T11:40:16Z"},
        "managedFields": [{"manager": "helm", "operation": "Update", "apiVersion": "v1", "fieldsType": "FieldsV1",
            "time": "2026-11-20T11:40:16Z", "fieldsV1": fields}],
    })
}

/// Every tenth has a NodePort.
fn service(number: u32) -> Value {
    let ip = cluster_ip(number).to_string();
    let mut port = json!({"name": "http", "port": 80, "protocol": "TCP", "targetPort": 8080});
    let mut kind = "ClusterIP";
    if number.is_multiple_of(10) && number / 10 < 2768 {
        kind = "NodePort";
        port["nodePort"] = json!(30_000 + number / 10);
    }
    json!({
        "kind": "Service",
        "metadata": metadata(number, ""),
        "spec": {"type": kind, "clusterIP": ip, "clusterIPs": [ip], "ipFamilies": ["IPv4"], "ports": [port],
            "ipFamilyPolicy": "SingleStack", "selector": {"app.kubernetes.io/name": format!("service-{number}")},
            "sessionAffinity": "None", "internalTrafficPolicy": "Cluster"},
        "status": {"loadBalancer": {}},
    })
}

/// The generation is in the address of the first endpoint.
fn slice(number: u32, endpoints: u32, generation: u32) -> Value {
    let endpoint = |index: u32| {
        let address = match (index, generation) {
            (0, 1..) => Ipv4Addr::from(0x0b00_0001 + number * 16 + generation % 16),
            _ => Ipv4Addr::from(0x0a80_0001 + number * endpoints + index),
        };
        json!({
            "addresses": [address.to_string()],
            "conditions": {"ready": true, "serving": true, "terminating": false},
            "nodeName": format!("node-{}", (number + index) % 100),
            "zone": if index.is_multiple_of(2) { "a" } else { "b" },
            "targetRef": {"kind": "Pod", "namespace": format!("team-{}", number % 100),
                "name": format!("service-{number}-7d9c5b8f6d-{index:05}"),
                "uid": format!("5f0c6d1e-0000-4000-8000-{:012}", number * endpoints + index)},
        })
    };
    let mut metadata = metadata(number, "-x7k2p");
    metadata["labels"]["kubernetes.io/service-name"] = json!(format!("service-{number}"));
    metadata["labels"]["endpointslice.kubernetes.io/managed-by"] = json!("endpointslice-controller.k8s.io");
    metadata["ownerReferences"] = json!([{"apiVersion": "v1", "kind": "Service", "name": format!("service-{number}"),
        "uid": "00000000-0000-4000-8000-000000000000", "controller": true, "blockOwnerDeletion": true}]);
    json!({
        "kind": "EndpointSlice",
        "metadata": metadata,
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
        "endpoints": (0..endpoints).map(endpoint).collect::<Vec<_>>(),
    })
}

/// Returns the most anonymous memory the agent had meanwhile, in KiB.
fn wait_until_in_sync(agent: &Agent) -> Result<u64> {
    let mut peak = 0;
    wait_until("the agent to be in sync", PATIENCE, || {
        peak = anonymous_memory(agent).unwrap_or_default().max(peak);
        agent.log().contains("in sync").then_some(())
    })?;
    Ok(peak)
}

/// The kernel must hold what was asked for, or nothing was measured.
fn check(sandbox: &Sandbox, cli: &Cli) -> Result<()> {
    let services = sandbox.services()?;
    let served = services.iter().filter(|(_, service)| service.internal.count >= cli.endpoints).count();
    let is_node_port = |number: u32| service(number)["spec"]["type"] == "NodePort";
    let expected: usize = (0..cli.services).map(|number| 1 + usize::from(is_node_port(number))).sum();
    ensure!(served == expected, "{served} frontends with endpoints in the kernel instead of {expected}");
    Ok(())
}

/// By the agent's own log: from the later one of the lists to the first complete picture.
fn time_to_complete(log: &str) -> Result<Duration> {
    let moment = |line: &str| line.split_whitespace().next()?.parse::<jiff::Timestamp>().ok();
    let last = |words: &str| log.lines().filter(|line| line.contains(words)).filter_map(moment).max();
    let listed = ["all Services are known", "all EndpointSlices are known"].map(last);
    let received = listed.into_iter().collect::<Option<Vec<_>>>().and_then(|lists| lists.into_iter().max());
    let received = received.context("the agent does not say when it knew the lists")?;
    let complete = last("in sync").context("the agent does not say when it was in sync")?;
    Ok(Duration::try_from(complete.duration_since(received))?)
}

/// Replaces one endpoint after the other, each of another Service, and measures until the kernel has it.
fn changes(sandbox: &Sandbox, server: &ApiServer, cli: &Cli) -> Result<Vec<Duration>> {
    let path = sandbox.pins.path().join("maps/SERVICES_V4");
    let map: HashMap<_, Frontend<Ipv4>, Service> = Map::HashMap(MapData::from_pin(path)?).try_into()?;
    let mut durations = Vec::new();
    for turn in 0..cli.changes {
        // A large prime stride: neighbours in time are not neighbours in any table.
        let number = turn * 7919 % cli.services;
        let frontend = Frontend::new(Ipv4::from(cluster_ip(number)), Port::new(80), Protocol::Tcp);
        let before = map.get(&frontend, 0)?;
        let object = slice(number, cli.endpoints, turn / cli.services + 1);
        let began = Instant::now();
        server.apply(object)?;
        // Ranges are immutable: other content is another range.
        while map.get(&frontend, 0)?.internal == before.internal {
            ensure!(began.elapsed() < PATIENCE, "the change of Service {number} is not in the map");
            thread::sleep(Duration::from_micros(50));
        }
        durations.push(began.elapsed());
    }
    durations.sort_unstable();
    Ok(durations)
}

/// When it does not shrink any more.
fn settled_memory(agent: &Agent) -> Result<u64> {
    let mut least = u64::MAX;
    let end = Instant::now() + Duration::from_secs(3);
    while Instant::now() < end {
        least = anonymous_memory(agent)?.min(least);
        thread::sleep(Duration::from_millis(100));
    }
    Ok(least)
}

fn anonymous_memory(agent: &Agent) -> Result<u64> {
    let path = format!("/proc/{}/status", agent.id());
    let status = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).context("no RssAnon")?;
    Ok(line.trim().trim_end_matches("kB").trim().parse()?)
}
