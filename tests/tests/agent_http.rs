//! What the agent says about its health over HTTP, asked as kubelets and load balancers ask. Needs root.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tests::{
    api::{ApiServer, Fault, On, Resource},
    freeze::freeze,
    http::{Answer, ask, wait_for_answer},
    patience::patience,
    sandbox::{Agent, Sandbox},
};

const HEALTH: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 10256);

fn service(name: &str, cluster_ip: &str) -> Value {
    json!({
        "kind": "Service",
        "metadata": {"namespace": "test", "name": name},
        "spec": {"clusterIP": cluster_ip, "clusterIPs": [cluster_ip], "ports": [{"port": 80}]},
    })
}

fn node() -> Value {
    json!({"kind": "Node", "metadata": {"name": "here"}})
}

/// A server with a Service and the agent's own Node, and an agent that has taken them in.
fn started(sandbox: &Sandbox, arguments: &[&str]) -> Result<(ApiServer, Agent)> {
    let server = sandbox.server()?;
    server.apply(service("web", "10.96.0.1"))?;
    server.apply(node())?;
    let agent = sandbox.agent(&[&["--master", &server.url()][..], arguments].concat())?;
    agent.wait_for("in sync")?;
    Ok((server, agent))
}

/// A configuration with which no update may wait for long.
fn hasty(sandbox: &Sandbox) -> Result<String> {
    let path = sandbox.directory.path().join("hasty.yaml");
    let text = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nmode: nftables\n\
                nftables: {syncPeriod: 50ms}\n";
    fs::write(&path, text)?;
    Ok(path.display().to_string())
}

fn get(sandbox: &Sandbox, path: &str) -> Result<Answer> {
    ask(&sandbox.namespace, HEALTH, "GET", path)
}

fn wait_for_status(sandbox: &Sandbox, path: &str, status: u16) -> Result<Answer> {
    wait_for_answer(&sandbox.namespace, HEALTH, path, |answer| answer.status == status)
}

fn text<'a>(body: &'a Value, pointer: &str) -> &'a str {
    body.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

#[test]
fn a_healthy_agent_says_so_as_kube_proxy_does() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let _running = started(&sandbox, &[])?;
    let answer = wait_for_status(&sandbox, "/healthz", 200)?;
    assert_eq!(answer.headers["content-type"], "application/json");
    assert_eq!(answer.headers["x-content-type-options"], "nosniff");
    let body = answer.json()?;
    assert_eq!((&body["healthy"], &body["nodeEligible"]), (&json!(true), &json!(true)));
    assert_eq!(body["lastUpdated"], body["currentTime"], "that of a healthy agent is always now");
    for family in ["IPv4", "IPv6"] {
        assert_eq!(body["status"][family]["healthy"], json!(true));
        let updated = text(&body, &format!("/status/{family}/lastUpdated"));
        assert!(("2026".."2999").contains(&updated) && updated <= text(&body, "/currentTime"), "{body}");
    }
    let live = get(&sandbox, "/livez")?;
    assert_eq!((live.status, live.json()?.get("nodeEligible")), (200, None));
    assert_eq!(get(&sandbox, "/other")?.status, 404);
    Ok(())
}

#[test]
fn an_agent_that_waits_for_its_lists_lives_but_is_not_ready() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let server = sandbox.server()?;
    server.inject(On::all(Resource::EndpointSlices), Fault::Refuse(403), usize::MAX);
    let hasty = hasty(&sandbox)?;
    let agent = sandbox.agent(&["--master", &server.url(), "--config", &hasty])?;
    agent.wait_for("watching EndpointSlices: ")?;
    wait_for_status(&sandbox, "/readyz", 503)?;
    let answer = get(&sandbox, "/healthz")?;
    assert_eq!(
        (answer.status, &answer.json()?["status"]["IPv4"]["lastUpdated"]),
        (200, &json!("0001-01-01T00:00:00Z"))
    );
    assert_eq!(get(&sandbox, "/livez")?.status, 200);
    server.heal();
    wait_for_status(&sandbox, "/readyz", 200)?;
    Ok(())
}

#[test]
fn an_api_server_that_is_gone_is_no_reason_to_fail() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let (server, agent) = started(&sandbox, &["--config", &hasty(&sandbox)?])?;
    drop(server);
    agent.wait_for("watching Services: ")?;
    for path in ["/healthz", "/livez", "/readyz"] {
        assert_eq!(get(&sandbox, path)?.status, 200, "{path}");
    }
    Ok(())
}

#[test]
fn a_node_that_is_about_to_go_is_not_sent_traffic_but_its_agent_lives() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let (server, _agent) = started(&sandbox, &[])?;
    wait_for_status(&sandbox, "/healthz", 200)?;
    let mut tainted = node();
    tainted["spec"] = json!({"taints": [{"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}]});
    let mut deleted = node();
    deleted["metadata"]["deletionTimestamp"] = json!("2026-11-20T11:40:16Z");
    for (name, object) in [("tainted", tainted), ("being deleted", deleted)] {
        server.apply(object)?;
        let body = wait_for_status(&sandbox, "/healthz", 503).context(name)?.json()?;
        assert_eq!((&body["healthy"], &body["nodeEligible"]), (&json!(true), &json!(false)), "{name}");
        assert_eq!(get(&sandbox, "/livez")?.status, 200, "{name}");
        server.apply(node())?;
        wait_for_status(&sandbox, "/healthz", 200).context(name)?;
    }
    server.delete(Resource::Nodes, "", "here")?;
    wait_for_status(&sandbox, "/healthz", 503)?;
    assert_eq!(get(&sandbox, "/livez")?.status, 200);
    Ok(())
}

#[test]
fn an_update_that_waits_for_too_long_is_a_failure() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let (server, agent) = started(&sandbox, &["--config", &hasty(&sandbox)?])?;
    wait_for_status(&sandbox, "/livez", 200)?;
    let balancer = SocketAddr::from((Ipv4Addr::LOCALHOST, 32_100));
    let mut web = service("balanced", "10.96.0.3");
    web["spec"]["type"] = json!("LoadBalancer");
    web["spec"]["externalTrafficPolicy"] = json!("Local");
    web["spec"]["healthCheckNodePort"] = json!(balancer.port());
    server.apply(web)?;
    server.apply(json!({
        "kind": "EndpointSlice",
        "metadata": {"namespace": "test", "name": "b-1", "labels": {"kubernetes.io/service-name": "balanced"}},
        "addressType": "IPv4",
        "endpoints": [{"addresses": ["10.0.0.1"], "nodeName": "here"}],
        "ports": [{"name": "", "port": 8080, "protocol": "TCP"}],
    }))?;
    wait_for_answer(&sandbox.namespace, balancer, "/", |answer| answer.status == 200)?;
    freeze(sandbox.pins.path(), "SERVICES_V4")?;
    server.apply(service("late", "10.96.0.2"))?;
    agent.wait_for("trying again in")?;
    let body = wait_for_status(&sandbox, "/livez", 503)?.json()?;
    assert_eq!(body["healthy"], json!(false));
    assert!(text(&body, "/lastUpdated") < text(&body, "/currentTime"), "{body}");
    assert_eq!(get(&sandbox, "/healthz")?.status, 503);
    let answer = ask(&sandbox.namespace, balancer, "GET", "/")?;
    assert_eq!((answer.status, &answer.json()?["localEndpoints"]), (503, &json!(1)));
    assert_eq!(answer.json()?["serviceProxyHealthy"], json!(false));
    assert_eq!(get(&sandbox, "/readyz")?.status, 200, "what was written first still stands");
    Ok(())
}

#[test]
fn clients_that_say_nothing_hold_up_neither_others_nor_the_kernel() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let (server, _agent) = started(&sandbox, &[])?;
    wait_for_status(&sandbox, "/healthz", 200)?;
    let silent = || (0..500).map(|_| TcpStream::connect(HEALTH)).collect::<std::io::Result<Vec<_>>>();
    let silent = sandbox.namespace.run(silent)??;
    let began = Instant::now();
    assert_eq!(get(&sandbox, "/healthz")?.status, 200);
    ensure!(began.elapsed() < patience(Duration::from_secs(2)), "it took {:?}", began.elapsed());
    server.apply(service("late", "10.96.0.2"))?;
    sandbox.wait_for_services("the new Service", |services| services.len() == 2)?;
    drop(silent);
    Ok(())
}

#[test]
fn an_address_in_use_is_waited_for() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let occupant = sandbox.namespace.run(|| TcpListener::bind(HEALTH))??;
    let (_server, agent) = started(&sandbox, &[])?;
    agent.wait_for("cannot serve /healthz, /livez and /readyz at 0.0.0.0:10256")?;
    drop(occupant);
    wait_for_status(&sandbox, "/healthz", 200)?;
    Ok(())
}
