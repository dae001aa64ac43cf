//! The agent as a process, with the real kernel: what it writes, what it leaves alone, and what it says. Needs root.

mod bad_node;
mod confined;
mod healing;

use std::{fs, path::Path, time::Duration};

use anyhow::{Context as _, Result, ensure};
use aya::maps::{Array, Map, MapData};
use proxy_common::{
    addr::Ipv4,
    node::{Cidr, ServiceCidrs},
};
use serde_json::{Value, json};
use tempfile::TempDir;
use tests::{
    api::{ApiServer, Fault, On, Resource},
    patience::patience,
    sandbox::Sandbox,
};

fn service(name: &str, cluster_ip: &str) -> Value {
    json!({
        "kind": "Service",
        "metadata": {"namespace": "test", "name": name},
        "spec": {"clusterIP": cluster_ip, "clusterIPs": [cluster_ip], "ports": [{"port": 80}]},
    })
}

fn slice(addresses: &[&str]) -> Value {
    let endpoints: Vec<Value> = addresses.iter().map(|address| json!({"addresses": [address]})).collect();
    json!({
        "kind": "EndpointSlice",
        "metadata": {"namespace": "test", "name": "web-1", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4",
        "endpoints": endpoints,
        "ports": [{"name": "", "port": 8080, "protocol": "TCP"}],
    })
}

/// A server with one Service of two endpoints, and the agent's own Node.
fn filled(sandbox: &Sandbox) -> Result<ApiServer> {
    let server = sandbox.server()?;
    server.apply(service("web", "10.96.0.1"))?;
    server.apply(slice(&["10.0.0.1", "10.0.0.2"]))?;
    server.apply(json!({"kind": "Node", "metadata": {"name": "here"}}))?;
    Ok(server)
}

#[test]
fn nothing_is_written_before_the_first_complete_picture() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let server = filled(&sandbox)?;
    server.inject(On::all(Resource::EndpointSlices), Fault::Refuse(403), usize::MAX);
    // The complaint about this one shows that the Services have arrived.
    let mut broken = service("broken", "10.96.0.2");
    broken["spec"]["externalIPs"] = json!(["nonsense"]);
    server.apply(broken)?;
    let agent = sandbox.agent(&["--master", &server.url()])?;
    agent.wait_for("Service test/broken: spec.externalIPs: \"nonsense\" is not an IP address")?;
    agent.wait_for("watching EndpointSlices: ")?;
    assert_eq!(sandbox.services()?, []);
    server.heal();
    agent.wait_for("in sync")?;
    assert_eq!(sandbox.services()?.len(), 2);
    Ok(())
}

#[test]
fn a_restart_with_equal_input_writes_nothing_and_with_other_input_the_difference() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let server = filled(&sandbox)?;
    let agent = sandbox.agent(&["--master", &server.url()])?;
    agent.wait_for("in sync")?;
    assert!(agent.log().contains("kernel follows"), "the first start writes:\n{}", agent.log());
    let before = sandbox.services()?;
    // SIGKILL: nothing is said goodbye to.
    drop(agent);
    let agent = sandbox.agent(&["--master", &server.url()])?;
    agent.wait_for("in sync")?;
    assert!(!agent.log().contains("kernel follows"), "{}", agent.log());
    assert_eq!(sandbox.services()?, before);
    drop(agent);
    server.apply(service("other", "10.96.0.9"))?;
    let agent = sandbox.agent(&["--master", &server.url()])?;
    agent.wait_for("in sync")?;
    assert!(agent.log().contains("kernel follows writes=2 "), "a port and the address: {}", agent.log());
    Ok(())
}

#[test]
fn a_change_is_in_the_kernel_at_once() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let server = filled(&sandbox)?;
    let agent = sandbox.agent(&["--master", &server.url()])?;
    agent.wait_for("in sync")?;
    let mut times = Vec::new();
    for round in 0..10 {
        let all = ["10.0.0.1", "10.0.0.2", "10.0.0.3"];
        let addresses = &all[..=round % 3];
        server.apply(slice(addresses))?;
        let count = addresses.len() as u32;
        times.push(sandbox.wait_for_services("the new range", |services| services[0].internal.count == count)?);
    }
    times.sort();
    println!("from the API to the kernel: {times:?}");
    ensure!(times[5] < patience(Duration::from_millis(20)), "the median is {:?}", times[5]);
    Ok(())
}

#[test]
fn the_kernel_keeps_what_it_has_while_there_is_no_server_and_after_the_agent_ends() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let server = filled(&sandbox)?;
    let agent = sandbox.agent(&["--master", &server.url()])?;
    agent.wait_for("in sync")?;
    let before = sandbox.services()?;
    assert_eq!(agent.terminate()?, 0);
    let address = server.address();
    drop(server);
    let agent = sandbox.agent(&["--master", &format!("http://{address}")])?;
    agent.wait_for(&address.to_string())?;
    agent.wait_for("watching Services: ")?;
    agent.wait_for("Connection refused (os error 111); what is known is kept, trying again")?;
    assert_eq!(sandbox.services()?, before);
    let server = sandbox.namespace.run(|| ApiServer::start_at(address))??;
    server.apply(service("late", "10.96.0.7"))?;
    server.apply(slice(&[]))?;
    agent.wait_for("in sync")?;
    let frontends: Vec<_> = sandbox.services()?.into_iter().map(|(frontend, _)| frontend.addr.octets).collect();
    assert_eq!(frontends, [[10, 96, 0, 7]]);
    Ok(())
}

fn write(directory: &Path, name: &str, documents: &[Value]) -> Result<()> {
    let texts: Vec<String> = documents.iter().map(ToString::to_string).collect();
    fs::write(directory.join(name), texts.join("\n---\n")).context("cannot write a file of Services")
}

#[test]
fn a_broken_document_is_named_in_the_log_and_the_others_are_served() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let services = TempDir::new()?;
    write(services.path(), "good.yaml", &[service("a", "10.96.0.1"), service("b", "10.96.0.2")])?;
    let agent = sandbox.agent(&["--source", &format!("file:{}", services.path().display())])?;
    agent.wait_for("in sync")?;
    sandbox.wait_for_services("both", |services| services.len() == 2)?;
    let text = format!("{}\n---\nkind: [\n---\n{}", service("c", "10.96.0.3"), service("d", "10.96.0.4"));
    fs::write(services.path().join("mixed.yaml"), text)?;
    agent.wait_for("mixed.yaml: document 2: not YAML")?;
    sandbox.wait_for_services("the good ones", |services| services.len() == 4)?;
    Ok(())
}

#[test]
fn where_cluster_ips_are_taken_from_is_in_the_kernel() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let services = TempDir::new()?;
    let cidr = json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR", "metadata": {"name": "kubernetes"},
        "spec": {"cidrs": ["10.96.0.0/16", "fd00:10:96::/112"]},
    });
    write(services.path(), "good.yaml", &[service("a", "10.96.0.1"), cidr])?;
    let agent = sandbox.agent(&["--source", &format!("file:{}", services.path().display())])?;
    agent.wait_for("in sync")?;
    let map = MapData::from_pin(sandbox.pins.path().join("maps/SERVICE_CIDRS"))?;
    let map: Array<_, ServiceCidrs> = Map::Array(map).try_into()?;
    println!("{}", agent.log());
    assert_eq!(
        map.get(&0, 0)?.v4[0],
        Cidr { addr: Ipv4 { octets: [10, 96, 0, 0] }, mask: Ipv4 { octets: [255, 255, 0, 0] } }
    );
    Ok(())
}
