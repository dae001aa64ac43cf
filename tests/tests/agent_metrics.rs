//! What the agent counts and tells, asked as Prometheus asks. Needs root.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    slice::from_ref,
};

use anyhow::{Context as _, Result};
use aya::{
    maps::{Array, Map, MapData, PerCpuArray, PerCpuValues},
    util::nr_cpus,
};
use k8s_openapi::jiff::Timestamp;
use proxy_common::{
    outcome::{Hook, Outcome, counter},
    service::Frontend,
    stats::Stats,
};
use serde_json::{Value, json};
use tests::{
    api::{
        ApiServer,
        object::{node, service},
    },
    http::{Answer, ask, wait_for_answer},
    lab::{LabOptions, address::Family, agent::AgentOptions, cluster::Cluster, manifest::Service},
    sandbox::{Agent, Sandbox},
    traffic::{Ask, Protocol},
};

const HEALTH: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 10256);
const METRICS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 10249);

/// A server with a Service and the agent's own Node, and an agent that has taken them in.
fn started(sandbox: &Sandbox, arguments: &[&str]) -> Result<(ApiServer, Agent)> {
    let server = sandbox.server()?;
    server.apply(service("web", "10.96.0.1"))?;
    server.apply(node())?;
    let agent = sandbox.agent(&[&["--master", &server.url()][..], arguments].concat())?;
    agent.wait_for("in sync")?;
    Ok((server, agent))
}

fn metrics(sandbox: &Sandbox, series: &str, is_right: impl Fn(f64) -> bool) -> Result<Answer> {
    let is_right = |answer: &Answer| answer.metric(series).is_some_and(&is_right);
    wait_for_answer(&sandbox.namespace, METRICS, "/metrics", is_right).with_context(|| series.to_owned())
}

fn map(sandbox: &Sandbox, name: &str) -> Result<MapData> {
    Ok(MapData::from_pin(sandbox.pins.path().join("maps").join(name))?)
}

#[test]
fn dashboards_made_for_kube_proxy_find_their_metrics() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let (server, _agent) = started(&sandbox, &[])?;
    let family = "{ip_family=\"IPv4\"}";
    let answer = metrics(&sandbox, &format!("kubeproxy_sync_proxy_rules_duration_seconds_count{family}"), |n| n > 0.0)?;
    assert_eq!(answer.headers["content-type"], "text/plain; version=0.0.4; charset=utf-8");
    let synced = answer.metric(&format!("kubeproxy_sync_proxy_rules_last_timestamp_seconds{family}"));
    assert!(synced.is_some_and(|at| at > 1_700_000_000.0), "{synced:?}");
    assert!(answer.metric(&format!("kubeproxy_sync_full_proxy_rules_duration_seconds_count{family}")) >= Some(1.0));
    assert!(answer.metric("process_resident_memory_bytes") > Some(1e6));
    let total = "kubeproxy_sync_proxy_rules_service_changes_total{ip_family=\"IPv6\"}";
    let before = answer.metric(total).context("no changes")?;
    server.apply(service("late", "10.96.0.2"))?;
    let answer = metrics(&sandbox, total, |changes| changes > before)?;
    assert_eq!(answer.metric("sluice_map_capacity{map=\"SERVICES_V4\"}"), Some(131_072.0));
    assert!(answer.metric("sluice_map_entries{map=\"SERVICES_V4\"}") > Some(0.0));
    assert_eq!(ask(&sandbox.namespace, METRICS, "GET", "/proxyMode")?.body, "sluice");
    let configuration = ask(&sandbox.namespace, METRICS, "GET", "/configz")?.json()?;
    assert_eq!(configuration["sluice"]["hostname"], json!("here"));
    ask(&sandbox.namespace, HEALTH, "GET", "/livez")?;
    metrics(&sandbox, "kubeproxy_proxy_livez_total{code=\"200\"}", |count| count > 0.0)?;
    Ok(())
}

/// Names of metrics as operators know them: those of kube-proxy, of every process, and ours.
const NAMES: [&str; 38] = [
    "kubeproxy_network_programming_duration_seconds_bucket",
    "kubeproxy_sync_proxy_rules_duration_seconds_bucket",
    "kubeproxy_sync_full_proxy_rules_duration_seconds_bucket",
    "kubeproxy_sync_partial_proxy_rules_duration_seconds_bucket",
    "kubeproxy_sync_proxy_rules_last_timestamp_seconds",
    "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds",
    "kubeproxy_sync_proxy_rules_service_changes_pending",
    "kubeproxy_sync_proxy_rules_service_changes_total",
    "kubeproxy_sync_proxy_rules_endpoint_changes_pending",
    "kubeproxy_sync_proxy_rules_endpoint_changes_total",
    "kubeproxy_sync_proxy_rules_no_local_endpoints_total",
    "kubeproxy_conntrack_reconciler_deleted_entries_total",
    "kubeproxy_conntrack_reconciler_sync_duration_seconds_bucket",
    "kubeproxy_proxy_healthz_total",
    "kubeproxy_proxy_livez_total",
    "process_cpu_seconds_total",
    "process_resident_memory_bytes",
    "process_virtual_memory_bytes",
    "process_start_time_seconds",
    "process_open_fds",
    "process_max_fds",
    "sluice_service_packets_total",
    "sluice_service_bytes_total",
    "sluice_service_connections_opened_total",
    "sluice_service_connections_active",
    "sluice_backend_packets_total",
    "sluice_backend_bytes_total",
    "sluice_backend_connections_opened_total",
    "sluice_backend_connections_active",
    "sluice_drops_total",
    "sluice_rejects_total",
    "sluice_resets_total",
    "sluice_refusals_total",
    "sluice_passes_total",
    "sluice_map_entries",
    "sluice_map_capacity",
    "sluice_flow_evictions_total",
    "sluice_api_events_total",
];

/// What has a value in an answer.
fn names(answer: &Answer) -> BTreeSet<&str> {
    let lines = answer.body.lines().filter(|line| !line.starts_with('#'));
    lines.filter_map(|line| line.split(['{', ' ']).next()).collect()
}

#[test]
fn every_metric_is_there_once_there_was_something_to_count() -> Result<()> {
    let backend = Service::new("web", 60, &["a1"]);
    let cluster = Cluster::start(LabOptions::default(), AgentOptions::default(), from_ref(&backend))?;
    let node = cluster.lab.node("node-a")?;
    let host = node.host.namespace();
    for path in ["/healthz", "/livez"] {
        assert_eq!(ask(host, HEALTH, "GET", path)?.status, 200);
    }
    let target = backend.at_node(node.addresses(), Family::V4, Protocol::Tcp);
    cluster.lab.client.ask(Ask::new(target))?;
    let answer =
        wait_for_answer(host, METRICS, "/metrics", |answer| NAMES.iter().all(|name| names(answer).contains(name)));
    let answer = answer.or_else(|_| ask(host, METRICS, "GET", "/metrics"))?;
    let found = names(&answer);
    let missing: Vec<_> = NAMES.into_iter().filter(|name| !found.contains(name)).collect();
    assert!(missing.is_empty(), "missing: {missing:?} in\n{}", answer.body);
    assert!(!found.iter().any(|name| name.starts_with("sluice_watch")), "files are no API server:\n{}", answer.body);
    Ok(())
}

#[test]
fn a_request_that_is_served_shows_in_the_metrics_of_its_service() -> Result<()> {
    let backend = Service::new("web", 61, &["a1"]);
    let cluster = Cluster::start(LabOptions::default(), AgentOptions::default(), from_ref(&backend))?;
    let node = cluster.lab.node("node-a")?;
    for family in Family::ALL {
        let target = backend.at_node(node.addresses(), family, Protocol::Tcp);
        for answer in cluster.lab.client.ask_times(Ask::new(target), 3)? {
            assert_eq!(answer?.pod, "a1");
        }
        let port =
            format!("namespace=\"lab\",service=\"web\",port=\"tcp\",protocol=\"TCP\",ip_family=\"{}\"", family.name());
        let opened = format!("sluice_service_connections_opened_total{{{port}}}");
        let has_all = |answer: &Answer| answer.metric(&opened) >= Some(3.0);
        let answer = wait_for_answer(node.host.namespace(), METRICS, "/metrics", has_all)?;
        for (what, direction, least) in [
            ("packets", "original", 9.0),
            ("packets", "reply", 6.0),
            ("bytes", "original", 360.0),
            ("bytes", "reply", 240.0),
        ] {
            let series = format!("sluice_service_{what}_total{{{port},direction=\"{direction}\"}}");
            assert!(answer.metric(&series) >= Some(least), "{series}: {:?}", answer.metric(&series));
        }
    }
    Ok(())
}

#[test]
fn nothing_is_counted_where_nobody_can_ask() -> Result<()> {
    let backend = Service::new("web", 62, &["a1"]);
    let options = AgentOptions { more: vec!["--metrics-bind-address=".into()], ..AgentOptions::default() };
    let cluster = Cluster::start(LabOptions::default(), options, from_ref(&backend))?;
    let node = cluster.lab.node("node-a")?;
    cluster.lab.client.ask(Ask::new(backend.at_node(node.addresses(), Family::V4, Protocol::Tcp)))?;
    let stats: Array<_, Stats> = Map::Array(MapData::from_pin(node.pins().join("maps/SERVICE_STATS_4"))?).try_into()?;
    assert!(stats.iter().take(64).all(|stats| stats.is_ok_and(|stats| stats == Stats::default())));
    Ok(())
}

/// A slice of `web` with an endpoint of another node, changed by its author at that moment.
fn changed_at(address: &str, at: &str) -> Value {
    json!({
        "kind": "EndpointSlice",
        "metadata": {
            "namespace": "test", "name": "web-1", "labels": {"kubernetes.io/service-name": "web"},
            "annotations": {"endpoints.kubernetes.io/last-change-trigger-time": at},
        },
        "addressType": "IPv4",
        "endpoints": [{"addresses": [address], "nodeName": "there"}],
        "ports": [{"name": "", "port": 8080, "protocol": "TCP"}],
    })
}

#[test]
fn how_late_endpoints_are_and_which_services_lack_local_ones_is_told() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let (server, _agent) = started(&sandbox, &[])?;
    let programmed = "kubeproxy_network_programming_duration_seconds_count{ip_family=\"IPv4\"}";
    let late = "kubeproxy_network_programming_duration_seconds_sum{ip_family=\"IPv4\"}";
    let lonely = "kubeproxy_sync_proxy_rules_no_local_endpoints_total{ip_family=\"IPv4\",traffic_policy=\"internal\"}";
    let pending = "kubeproxy_sync_proxy_rules_endpoint_changes_pending{ip_family=\"IPv4\"}";
    let has = |count: f64| move |found: f64| (found - count).abs() < 0.1;
    // From before the agent began: it could not be quick about that.
    server.apply(changed_at("10.0.0.1", "2026-01-01T00:00:00Z"))?;
    sandbox.wait_for_services("the endpoint", |services| services.iter().any(|service| service.internal.count == 1))?;
    let answer = metrics(&sandbox, pending, has(0.0))?;
    assert_eq!((answer.metric(programmed), answer.metric(lonely)), (Some(0.0), Some(0.0)));
    server.apply(changed_at("10.0.0.2", &Timestamp::now().to_string()))?;
    let answer = metrics(&sandbox, programmed, has(1.0))?;
    assert!(answer.metric(late).is_some_and(|seconds| (0.0..60.0).contains(&seconds)), "{:?}", answer.metric(late));
    let mut local = service("web", "10.96.0.1");
    local["spec"]["internalTrafficPolicy"] = json!("Local");
    server.apply(local)?;
    metrics(&sandbox, lonely, has(1.0))?;
    server.apply(service("web", "10.96.0.1"))?;
    metrics(&sandbox, lonely, has(0.0))?;
    Ok(())
}

#[test]
fn what_the_programs_count_is_told_by_name() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let (server, agent) = started(&sandbox, &["--metrics-per-backend", "true"])?;
    server.apply(json!({
        "kind": "EndpointSlice",
        "metadata": {"namespace": "test", "name": "web-1", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4",
        "endpoints": [{"addresses": ["10.0.0.1"]}],
        "ports": [{"name": "", "port": 8080, "protocol": "TCP"}],
    }))?;
    sandbox.wait_for_services("the endpoint", |services| services.iter().any(|service| service.internal.count == 1))?;
    let is_port = |frontend: &Frontend<_>| frontend.port.number() == 80;
    let found = sandbox.services()?.into_iter().find(|(frontend, _)| is_port(frontend));
    let index = found.context("no Service")?.1.index;
    let counted = Stats { opened: 3, packets: 10, bytes: 1000, reply_packets: 20, reply_bytes: 2000 };
    let mut services: Array<_, Stats> = Map::Array(map(&sandbox, "SERVICE_STATS_4")?).try_into()?;
    services.set(index, counted, 0)?;
    let mut backends: Array<_, Stats> = Map::Array(map(&sandbox, "BACKEND_STATS_4")?).try_into()?;
    backends.set(1, counted, 0)?;
    let mut counters: PerCpuArray<_, u64> = Map::PerCpuArray(map(&sandbox, "COUNTERS")?).try_into()?;
    let each = nr_cpus().map_err(|(_, error)| error)?;
    let place = counter(Hook::UplinkXdp, Outcome::DropNoPort);
    counters.set(place, PerCpuValues::try_from(vec![2; each])?, 0)?;

    let service = "namespace=\"test\",service=\"web\",port=\"\",protocol=\"TCP\",ip_family=\"IPv4\"";
    let opened = format!("sluice_service_connections_opened_total{{{service}}}");
    let answer = metrics(&sandbox, &opened, |opened| (opened - 3.0).abs() < 0.1)?;
    let value = |series: &str| answer.metric(series);
    assert_eq!(value(&format!("sluice_service_packets_total{{{service},direction=\"original\"}}")), Some(10.0));
    assert_eq!(value(&format!("sluice_service_bytes_total{{{service},direction=\"reply\"}}")), Some(2000.0));
    assert_eq!(value("sluice_backend_packets_total{backend=\"10.0.0.1:8080\",direction=\"reply\"}"), Some(20.0));
    assert_eq!(value("sluice_drops_total{reason=\"no_port\",hook=\"uplink_xdp\"}"), Some(f64::from(2 * each as u32)));

    // What was counted before is not counted again by the next agent, as counters of a process that begins anew are not.
    drop(agent);
    let agent = sandbox.agent(&["--master", &server.url(), "--metrics-per-backend", "false"])?;
    agent.wait_for("in sync")?;
    services.set(index, Stats { opened: 4, ..counted }, 0)?;
    let answer = metrics(&sandbox, &opened, |opened| (opened - 1.0).abs() < 0.1)?;
    assert!(!answer.body.contains("sluice_backend_packets_total{"), "they were turned off");
    Ok(())
}
