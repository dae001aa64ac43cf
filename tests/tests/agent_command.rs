//! The command line on a fixed state: what each verb prints for people and for programs, and what its exit status is. Needs root.

use std::{
    fs,
    path::Path,
    process::Output,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use aya::{
    maps::{Array, HashMap, Map, MapData, PerCpuArray, PerCpuValues},
    util::nr_cpus,
};
use nix::sys::{
    resource::{UsageWho, getrusage},
    time::TimeValLike as _,
};
use proxy_common::{
    addr::{Ipv4, Port, Protocol},
    backend::{Backend, BackendState},
    flow::{Direction, Flow, NextHop, Output as Way, Rewrite, state},
    names::{ServiceName, Text},
    outcome::{self, Hook, Outcome},
    service::{Affinity, Client, Frontend, Range, Service},
    stats::Stats,
    tuple::{Stage, Tuple},
};
use proxy_userspace::{
    dataplane::{Dataplane, Options},
    diff::{Plan, Step},
};
use tests::{
    lab::agent::sluice_program,
    patience::patience,
    sandbox::{Agent, Sandbox},
};

/// Four Services: one with everything, one that sticks, one that nobody serves, one whose policy is Local.
const OBJECTS: &str = r#"
apiVersion: v1
kind: Service
metadata: {namespace: shop, name: web}
spec:
  type: NodePort
  clusterIPs: [10.96.0.10, "2001:db8:96::a"]
  ports:
    - {name: http, port: 80, nodePort: 30080}
    - {name: dns, port: 53, protocol: UDP, nodePort: 30053}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {namespace: shop, name: web-4, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
endpoints:
  - {addresses: [10.244.1.5], nodeName: here}
  - {addresses: [10.244.2.5], nodeName: there}
  - {addresses: [10.244.2.6], nodeName: there, conditions: {ready: false}}
ports: [{name: http, port: 8080}, {name: dns, port: 5353, protocol: UDP}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {namespace: shop, name: web-6, labels: {kubernetes.io/service-name: web}}
addressType: IPv6
endpoints: [{addresses: ["2001:db8:244:1::5"], nodeName: here}]
ports: [{name: http, port: 8080}, {name: dns, port: 5353, protocol: UDP}]
---
apiVersion: v1
kind: Service
metadata: {namespace: shop, name: cart}
spec:
  clusterIP: 10.96.0.11
  sessionAffinity: ClientIP
  sessionAffinityConfig: {clientIP: {timeoutSeconds: 600}}
  ports: [{port: 80}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {namespace: shop, name: cart-1, labels: {kubernetes.io/service-name: cart}}
addressType: IPv4
endpoints: [{addresses: [10.244.1.7], nodeName: here}]
ports: [{name: "", port: 8080}]
---
apiVersion: v1
kind: Service
metadata: {namespace: shop, name: empty}
spec:
  clusterIP: 10.96.0.12
  ports: [{port: 80}]
---
apiVersion: v1
kind: Service
metadata: {namespace: shop, name: edge}
spec:
  type: LoadBalancer
  clusterIP: 10.96.0.13
  externalTrafficPolicy: Local
  loadBalancerSourceRanges: [198.51.100.0/24]
  ports: [{port: 443, nodePort: 30443}]
status: {loadBalancer: {ingress: [{ip: 203.0.113.1}]}}
"#;

/// A node whose agent has just taken in the objects.
struct Node {
    sandbox: Sandbox,
    agent: Agent,
}

impl Node {
    fn new() -> Result<Self> {
        let sandbox = Sandbox::new()?;
        sandbox.namespace.ip("link add uplink address 02:00:00:00:00:01 type veth peer name wire
            link set uplink up\nlink set wire up
            address add 192.0.2.1/24 dev uplink
            route add default via 192.0.2.254")?;
        let objects = sandbox.directory.path().join("objects");
        fs::create_dir(&objects)?;
        fs::write(objects.join("shop.yaml"), OBJECTS)?;
        let source = format!("file:{}", objects.display());
        let agent = sandbox.agent(&["--source", &source, "--uplinks", "uplink", "--flow-table-size", "16384"])?;
        agent.wait_for("in sync")?;
        Ok(Self { sandbox, agent })
    }

    fn run(&self, arguments: &[&str]) -> Result<Output> {
        run(&self.sandbox, arguments)
    }

    /// What a verb prints, which must go well.
    fn ask(&self, arguments: &[&str]) -> Result<String> {
        let output = self.run(arguments)?;
        let complaint = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{arguments:?}: {}: {complaint}", output.status);
        Ok(String::from_utf8(output.stdout)?)
    }

    fn map<K: aya::Pod, V: aya::Pod>(&self, name: &str) -> Result<HashMap<MapData, K, V>> {
        let map = MapData::from_pin(self.sandbox.pins.path().join("maps").join(name))?;
        let is_lru = name.starts_with("FLOWS") || name.starts_with("AFFINITY");
        Ok(if is_lru { Map::LruHashMap(map) } else { Map::HashMap(map) }.try_into()?)
    }

    /// The index of a Service port.
    fn index(&self, address: [u8; 4], port: u16, protocol: Protocol) -> Result<u32> {
        let services: HashMap<_, Frontend<Ipv4>, Service> = self.map("SERVICES_V4")?;
        let frontend = Frontend::new(Ipv4 { octets: address }, Port::new(port), protocol);
        Ok(services.get(&frontend, 0)?.index)
    }

    /// The id of a backend, as the command line has it.
    fn backend(&self, address: &str) -> Result<u32> {
        let backends: serde_json::Value = serde_json::from_str(&self.ask(&["backend", "list", "-o", "json"])?)?;
        let backends = backends.as_array().context("no list")?;
        let found = backends.iter().find(|backend| backend["address"] == address).context("no such backend")?;
        Ok(found["id"].as_u64().context("no id")? as u32)
    }

    /// Enters both halves of a connection of a pod to the Service `shop/web`.
    fn open_flow(&self, client_port: u16) -> Result<()> {
        let (client, frontend, pod) = ([10, 244, 1, 9], [10, 96, 0, 10], [10, 244, 2, 5]);
        let [client, frontend, pod] = [client, frontend, pod].map(|octets| Ipv4 { octets });
        let (sport, port, target) = (Port::new(client_port), Port::new(80), Port::new(8080));
        let rewrite = |saddr, daddr, sport, dport| Rewrite { saddr, daddr, sport, dport, ..Rewrite::default() };
        let original = Flow {
            rewrite: rewrite(client, pod, sport, target),
            next_hop: NextHop::default(),
            backend: self.backend("10.244.2.5:8080")?,
            backend_generation: 1,
            service: self.index([10, 96, 0, 10], 80, Protocol::Tcp)?,
            last_seen: 0,
            output: Way::Stack,
            twin_output: Way::Stack,
            twin_stage: Stage::ToPod,
            direction: Direction::Original,
            state: state::REPLIED | state::CONFIRMED,
            eager: 0,
            packets: 0,
            bytes: 0,
        };
        let reply = Flow {
            rewrite: rewrite(frontend, client, port, sport),
            direction: Direction::Reply,
            twin_stage: Stage::FromPod,
            ..original
        };
        let mut flows: HashMap<_, Tuple<Ipv4>, Flow<Ipv4>> = self.map("FLOWS_V4")?;
        flows.insert(Tuple::new(client, frontend, sport, port, Protocol::Tcp, Stage::FromPod), original, 0)?;
        flows.insert(Tuple::new(pod, client, target, sport, Protocol::Tcp, Stage::ToPod), reply, 0)?;
        Ok(())
    }
}

fn run(sandbox: &Sandbox, arguments: &[&str]) -> Result<Output> {
    let mut command = sandbox.namespace.command(sluice_program()?)?;
    command.args(arguments).env("NO_COLOR", "1");
    if !arguments.iter().any(|word| ["completions", "man"].contains(word)) {
        // Before what follows `--`.
        let mut words: Vec<&str> = arguments.to_vec();
        let at = words.iter().position(|word| *word == "--").unwrap_or(words.len());
        let pins = sandbox.pins.path().display().to_string();
        words.splice(at..at, ["--pin-path", pins.as_str()]);
        command = sandbox.namespace.command(sluice_program()?)?;
        command.args(words);
    }
    Ok(command.output()?)
}

/// Holds an answer to what it was, but for numbers that differ from run to run.
fn hold(name: &str, answer: &str) {
    let mut settings = insta::Settings::clone_current();
    settings.set_snapshot_path("snapshots/command");
    settings.set_prepend_module_to_snapshot(false);
    let filters = [
        (r"/sys/fs/bpf/[^\s\x22]+", "PINS"),
        (r"pid \d+", "pid N"),
        (r"\d+[smhd] ago", "N ago"),
        (r"never|N ago", "N ago"),
        (
            r#""(pid|started_seconds_ago|alive_seconds_ago|heard_seconds_ago|synced_seconds_ago|program_id|link_id|idle_seconds|route_generation)": \d+"#,
            "\"$1\": N",
        ),
    ];
    for (pattern, replacement) in filters {
        settings.add_filter(pattern, replacement);
    }
    // Since the node was booted: how many figures that takes differs, too.
    if name.starts_with("flow") || name.starts_with("affinity") {
        settings.add_filter(r" +\d+[smhd](?: +(10m))?\n", "   N   $1\n");
    }
    settings.bind(|| insta::assert_snapshot!(name, answer));
}

#[test]
fn each_verb_prints_what_it_did_for_people_and_for_programs() -> Result<()> {
    let node = Node::new()?;
    node.open_flow(40_000)?;
    let clients = node.map::<Client<Ipv4>, Affinity>("AFFINITY_V4")?;
    stick(clients, &node)?;
    let verbs: [(&str, &[&str]); 6] = [
        ("status", &["status"]),
        ("service list", &["service", "list"]),
        ("service get", &["service", "get", "shop/web"]),
        ("backend list", &["backend", "list"]),
        ("flow list", &["flow", "list", "--halves"]),
        ("affinity list", &["affinity", "list", "--all"]),
    ];
    for (name, words) in verbs {
        let name = name.replace(' ', "_");
        hold(&name, &node.ask(words)?);
        hold(&format!("{name}_json"), &node.ask(&[words, &["-o", "json"]].concat())?);
    }
    count(&node)?;
    hold("counters", &node.ask(&["counters"])?);
    hold("counters_json", &node.ask(&["counters", "-o", "json"])?);
    hold("service_get_local", &node.ask(&["service", "get", "edge"])?);
    hold("service_get_empty", &node.ask(&["service", "get", "empty"])?);
    Ok(())
}

/// Three packets of a pod to a Service that nobody serves.
fn count(node: &Node) -> Result<()> {
    let map = MapData::from_pin(node.sandbox.pins.path().join("maps/COUNTERS"))?;
    let mut counters: PerCpuArray<_, u64> = Map::PerCpuArray(map).try_into()?;
    let index = outcome::counter(Hook::PodIn, Outcome::RejectNoEndpoint);
    let mut values = vec![0; nr_cpus().map_err(|(_, error)| error)?];
    values[0] = 3;
    Ok(counters.set(index, PerCpuValues::try_from(values)?, 0)?)
}

/// A client that stays with the backend of `shop/cart`.
fn stick(mut clients: HashMap<MapData, Client<Ipv4>, Affinity>, node: &Node) -> Result<()> {
    let service = node.index([10, 96, 0, 11], 80, Protocol::Tcp)?;
    let client = Client { addr: Ipv4 { octets: [10, 244, 1, 9] }, service, pad: 0 };
    let backend = node.backend("10.244.1.7:8080")?;
    Ok(clients.insert(client, Affinity { backend, backend_generation: 1, slot: 0, last_used: 0 }, 0)?)
}

#[test]
fn json_and_yaml_say_the_same() -> Result<()> {
    let node = Node::new()?;
    for words in [&["service", "list"][..], &["backend", "list"], &["affinity", "list"], &["flow", "list"]] {
        let json: serde_json::Value = serde_json::from_str(&node.ask(&[words, &["-o", "json"]].concat())?)?;
        let yaml = node.ask(&[words, &["-o", "yaml"]].concat())?;
        let yaml: serde_json::Value = serde_saphyr::from_str(&yaml).with_context(|| yaml.clone())?;
        assert_eq!(json, yaml, "{words:?}");
    }
    Ok(())
}

#[test]
fn the_agent_may_be_gone() -> Result<()> {
    let Node { sandbox, agent } = Node::new()?;
    drop(agent);
    let output = run(&sandbox, &["status"])?;
    let status = String::from_utf8(output.stdout)?;
    assert!(output.status.success() && status.contains("not running: traffic goes on"), "{status}");
    let output = run(&sandbox, &["service", "list", "-n", "shop"])?;
    assert!(String::from_utf8(output.stdout)?.contains("shop/web:http"));
    Ok(())
}

#[test]
fn what_cannot_be_told_is_an_exit_status_and_a_sentence() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let complaint = |output: &Output| String::from_utf8_lossy(&output.stderr).into_owned();
    let output = run(&sandbox, &["service", "list"])?;
    assert_eq!(output.status.code(), Some(78), "{}", complaint(&output));
    assert!(complaint(&output).contains("nothing of Sluice is pinned under"), "{}", complaint(&output));
    let node = Node::new()?;
    let output = node.run(&["service", "get", "shop/none"])?;
    assert_eq!(output.status.code(), Some(3), "{}", complaint(&output));
    assert!(complaint(&output).contains("no Service shop/none"), "{}", complaint(&output));
    let output = node.run(&["flow", "flush"])?;
    assert_eq!(output.status.code(), Some(2), "{}", complaint(&output));
    Ok(())
}

#[test]
fn flows_are_found_by_what_is_known_of_them_and_forgotten_in_pairs() -> Result<()> {
    let node = Node::new()?;
    node.open_flow(40_000)?;
    node.open_flow(40_001)?;
    let count = |words: &[&str]| -> Result<usize> {
        let answer = node.ask(&[&["flow", "list", "-o", "json"], words].concat())?;
        Ok(serde_json::from_str::<Vec<serde_json::Value>>(&answer)?.len())
    };
    let cases: [(&[&str], usize); 9] = [
        (&[], 2),
        (&["--halves"], 4),
        (&["--service", "shop/web"], 2),
        (&["--service", "shop/cart"], 0),
        (&["--address", "10.244.2.0/24"], 2),
        (&["--address", "10.244.3.1"], 0),
        (&["--port", "40001"], 1),
        (&["--protocol", "udp"], 0),
        (&["--stale"], 0),
    ];
    for (words, expected) in cases {
        assert_eq!(count(words)?, expected, "{words:?}");
    }
    assert_eq!(node.ask(&["flow", "flush", "--port", "40001"])?.trim(), "2 entries are out");
    assert_eq!(count(&["--halves"])?, 2);
    assert_eq!(node.ask(&["flow", "flush", "--all"])?.trim(), "2 entries are out");
    assert_eq!(count(&["--halves"])?, 0);
    Ok(())
}

#[test]
fn verify_agrees_with_the_agent_and_names_what_somebody_has_changed() -> Result<()> {
    let node = Node::new()?;
    assert!(node.ask(&["verify"])?.starts_with("The kernel holds what it should: "));
    let mut services: HashMap<_, Frontend<Ipv4>, Service> = node.map("SERVICES_V4")?;
    let frontend = Frontend::new(Ipv4 { octets: [10, 96, 0, 11] }, Port::new(80), Protocol::Tcp);
    let service = services.get(&frontend, 0)?;
    services.remove(&frontend)?;
    let stray = Frontend::new(Ipv4 { octets: [10, 96, 0, 99] }, Port::new(80), Protocol::Tcp);
    services.insert(stray, service, 0)?;
    let output = node.run(&["verify"])?;
    let told = String::from_utf8(output.stdout)?;
    assert_eq!(output.status.code(), Some(1), "{told}");
    for expected in [
        "SERVICES_V4   10.96.0.11 port 80/TCP of shop/cart/TCP   is missing",
        "SERVICES_V4   10.96.0.99 port 80/TCP",
        "INBOUND       10.96.0.99",
    ] {
        assert!(told.contains(expected), "{expected:?} in\n{told}");
    }
    services.insert(frontend, service, 0)?;
    services.remove(&stray)?;
    assert!(node.ask(&["verify"])?.starts_with("The kernel holds what it should: "));
    Ok(())
}

#[test]
fn check_finds_nothing_missing_where_an_agent_runs() -> Result<()> {
    let node = Node::new()?;
    let answer = node.ask(&["check", "--uplinks", "uplink", "-o", "json"])?;
    let findings: Vec<serde_json::Value> = serde_json::from_str(&answer)?;
    let verdict = |subject: &str| findings.iter().find(|finding| finding["subject"] == subject).map(|f| &f["verdict"]);
    for subject in ["programs", "uplinks", "BPF file system", "cgroup v2", "capability BPF"] {
        assert_eq!(verdict(subject), Some(&"good".into()), "{subject}: {answer}");
    }
    Ok(())
}

#[test]
fn a_bug_report_is_an_archive_of_what_the_kernel_holds() -> Result<()> {
    let node = Node::new()?;
    let archive = node.sandbox.directory.path().join("report.tar.gz");
    let path = archive.display().to_string();
    node.ask(&["bugreport", "--to", &path])?;
    let listed = std::process::Command::new("tar").args(["-tzf", &path]).output()?;
    let listed = String::from_utf8(listed.stdout)?;
    for name in ["status.json", "services.json", "flows.json", "check.json", "agent.txt", "links.txt"] {
        assert!(listed.contains(&format!("sluice-bugreport/{name}")), "{name} in\n{listed}");
    }
    // What is there is not written over.
    assert_eq!(node.run(&["bugreport", "--to", &path])?.status.code(), Some(1));
    Ok(())
}

#[test]
fn shells_and_manuals_know_every_verb() -> Result<()> {
    let sandbox = Sandbox::new()?;
    for shell in ["bash", "zsh", "fish"] {
        let script = String::from_utf8(run(&sandbox, &["completions", shell])?.stdout)?;
        assert!(script.contains("bugreport"), "{shell}: {script}");
    }
    let directory = sandbox.directory.path();
    let output = run(&sandbox, &["man", &directory.display().to_string()])?;
    assert!(output.status.success(), "{output:?}");
    for page in ["sluice.1", "sluice-service-list.1"] {
        assert!(Path::new(directory).join(page).exists(), "{page}");
    }
    Ok(())
}

#[test]
fn top_tells_rates_of_what_was_counted_meanwhile() -> Result<()> {
    let node = Node::new()?;
    let index = node.index([10, 96, 0, 10], 80, Protocol::Tcp)?;
    let map = MapData::from_pin(node.sandbox.pins.path().join("maps/SERVICE_STATS_4"))?;
    let mut counts: Array<_, Stats> = Map::Array(map).try_into()?;
    let done = AtomicBool::new(false);
    let answer = thread::scope(|scope| {
        let counting = scope.spawn(|| -> Result<()> {
            for packets in (0..).step_by(100) {
                counts.set(index, Stats { packets, ..Stats::default() }, 0)?;
                if done.load(Ordering::Relaxed) {
                    break;
                }
                thread::yield_now();
            }
            Ok(())
        });
        let answer = node.ask(&["top", "--once", "-o", "json"]);
        done.store(true, Ordering::Relaxed);
        counting.join().map_err(|_panic| anyhow::anyhow!("counting has panicked"))??;
        answer
    })?;
    let rates: serde_json::Value = serde_json::from_str(&answer)?;
    let busiest = &rates["services"][0];
    assert_eq!(busiest["name"], "shop/web:http/TCP", "{answer}");
    assert!(busiest["packets"].as_f64().is_some_and(|rate| rate > 0.0), "{answer}");
    Ok(())
}

/// So many Services of three endpoints each, without an agent.
fn fill(sandbox: &Sandbox, count: u32) -> Result<()> {
    let mut options = Options::new(sandbox.pins.path());
    options.cgroup = Some(sandbox.cgroup.path().to_owned());
    let mut plan = Plan::default();
    let mut names = Vec::new();
    for number in 1..=count {
        let [_, b, c, d] = number.to_be_bytes();
        let backend = |last: u8| Backend {
            addr: Ipv4 { octets: [20 + last, b, c, d] },
            port: Port::new(8080),
            state: BackendState::Serving,
            generation: 1,
            ..Backend::default()
        };
        let first = number * 3;
        plan.v4.extend((0..3).map(|last| Step::PutBackend(first + u32::from(last), backend(last))));
        plan.v4.push(Step::PutSlots(first, (first..first + 3).collect()));
        let range = Range { first, count: 3 };
        let service = Service { index: number, internal: range, external: range, ..Service::default() };
        let frontend = Frontend::new(Ipv4 { octets: [10, b, c, d] }, Port::new(80), Protocol::Tcp);
        plan.v4.push(Step::PutService(frontend, service));
        let name = Text::new(&format!("service-{number}"));
        names.push((number, ServiceName { namespace: Text::new("many"), name, port: Text::EMPTY }));
    }
    sandbox.namespace.run(|| -> Result<()> {
        let mut dataplane = Dataplane::open(&options)?;
        dataplane.put_names(&names, &[])?;
        Ok(dataplane.apply(&plan)?)
    })?
}

/// Milliseconds. What is built without optimisation takes several times as long as what is shipped.
const LIMIT: u64 = if cfg!(debug_assertions) { 1_000 } else { 200 };

/// Of those that have ended.
fn processor_time_of_children() -> Result<Duration> {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    let time = usage.user_time() + usage.system_time();
    Ok(Duration::from_micros(time.num_microseconds().try_into()?))
}

#[test]
fn each_verb_answers_within_200_ms_with_10_000_services() -> Result<()> {
    let sandbox = Sandbox::new()?;
    fill(&sandbox, 10_000)?;
    let verbs: [&[&str]; 7] = [
        &["status"],
        &["counters"],
        &["service", "list"],
        &["service", "get", "many/service-7"],
        &["backend", "list"],
        &["flow", "list"],
        &["affinity", "list"],
    ];
    for words in verbs {
        // What others do on this machine meanwhile is not the verb's: what it had of a processor, in the best of five.
        let time = |_| -> Result<Duration> {
            let before = processor_time_of_children()?;
            let output = run(&sandbox, words)?;
            ensure!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
            Ok(processor_time_of_children()?.saturating_sub(before))
        };
        let times = (0..5).map(time).collect::<Result<Vec<_>>>()?;
        let best = times.into_iter().min().unwrap_or_default();
        println!("{words:?}: {best:?}");
        ensure!(best < patience(Duration::from_millis(LIMIT)), "{words:?} takes {best:?}");
    }
    Ok(())
}
