//! What each verb prints on a fixed state, for people and for programs.

use anyhow::Result;
use aya::{
    maps::{HashMap, Map, MapData, PerCpuArray, PerCpuValues},
    util::nr_cpus,
};
use proxy_common::{
    addr::{Ipv4, Port, Protocol},
    outcome::{self, Hook, Outcome},
    service::{Affinity, Client, Frontend, Service},
};

use crate::node::Node;

/// Holds an answer to what it was, but for numbers that differ from run to run.
fn hold(name: &str, answer: &str) {
    let mut settings = insta::Settings::clone_current();
    settings.set_snapshot_path("../snapshots/command");
    settings.set_prepend_module_to_snapshot(false);
    let filters = [
        (r"/sys/fs/bpf/[^\s\x22/]+", "PINS"),
        (r"/[^\s\x22]+/state\b", "STATE"),
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
    // How many figures it takes differs, too.
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
    let verbs: [(&str, &[&str]); 8] = [
        ("status", &["status"]),
        ("service list", &["service", "list"]),
        ("service get", &["service", "get", "shop/web"]),
        ("backend list", &["backend", "list"]),
        ("flow list", &["flow", "list", "--halves"]),
        ("flow get", &["flow", "get", "10.244.1.9:40000", "10.96.0.10:80/tcp"]),
        ("affinity list", &["affinity", "list", "--all"]),
        ("verify", &["verify"]),
    ];
    for (name, words) in verbs {
        let name = name.replace(' ', "_");
        hold(&name, &node.ask(words)?);
        hold(&format!("{name}_json"), &node.ask(&[words, &["-o", "json"]].concat())?);
    }
    let state = node.state().display().to_string();
    let what = ["cleanup", "--dry-run", "--state-dir", &state];
    hold("cleanup_dry_run", &node.ask(&what)?);
    hold("cleanup_dry_run_json", &node.ask(&[&what[..], &["-o", "json"]].concat())?);
    count(&node)?;
    hold("counters", &node.ask(&["counters"])?);
    hold("counters_json", &node.ask(&["counters", "-o", "json"])?);
    hold("service_get_local", &node.ask(&["service", "get", "edge"])?);
    hold("service_get_empty", &node.ask(&["service", "get", "empty"])?);
    Ok(())
}

#[test]
fn what_differs_is_told_to_people_and_to_programs() -> Result<()> {
    let node = Node::new()?;
    let mut services: HashMap<_, Frontend<Ipv4>, Service> = node.map("SERVICES_V4")?;
    let frontend = |host| Frontend::new(Ipv4 { octets: [10, 96, 0, host] }, Port::new(80), Protocol::Tcp);
    let service = services.get(&frontend(11), 0)?;
    services.remove(&frontend(11))?;
    services.insert(frontend(99), service, 0)?;
    for (name, form) in [("verify_differs", "table"), ("verify_differs_json", "json")] {
        let output = node.run(&["verify", "-o", form])?;
        assert_eq!(output.status.code(), Some(4));
        hold(name, &String::from_utf8(output.stdout)?);
    }
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
    Ok(clients.insert(client, Affinity { backend, backend_generation: 1, slot: 0, last_used: node.now }, 0)?)
}
