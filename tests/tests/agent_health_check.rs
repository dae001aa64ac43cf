//! What load balancers hear when they ask nodes about Services (`spec.healthCheckNodePort`), and that it is true. Needs
//! root.

use std::{
    net::{SocketAddr, TcpListener, TcpStream},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tests::{
    api::{
        ApiServer, Resource,
        object::{self, node, slice},
    },
    http::{Answer, ask, wait_for_answer},
    lab::{
        LabOptions,
        address::Family,
        agent::AgentOptions,
        cluster::Cluster,
        manifest::{Service, write_documents},
    },
    patience::{patience, wait_until},
    sandbox::{Agent, Sandbox},
    traffic::{Ask, Protocol},
};

const PORT: u16 = 32_100;
const USUAL: Duration = Duration::from_secs(10);

/// A Service of a load balancer that wants to know which nodes have endpoints.
fn service(name: &str, port: u16) -> Value {
    let mut object = object::service(name, "10.96.0.1");
    object["spec"]["type"] = json!("LoadBalancer");
    object["spec"]["externalTrafficPolicy"] = json!("Local");
    object["spec"]["healthCheckNodePort"] = json!(port);
    object
}

/// The slice of `web` with endpoints on the agent's node.
fn local(addresses: &[&str]) -> Value {
    let mut object = slice("web", addresses);
    for endpoint in object["endpoints"].as_array_mut().into_iter().flatten() {
        endpoint["nodeName"] = json!(object::NODE);
    }
    object
}

/// An agent whose node serves NodePorts at its loopback device and at an uplink's addresses.
fn started(sandbox: &Sandbox) -> Result<(ApiServer, Agent)> {
    sandbox.namespace.ip("link add uplink type veth peer name wire\nlink set uplink up\nlink set wire up")?;
    let server = sandbox.server()?;
    server.apply(node())?;
    server.apply(service("web", PORT))?;
    server.apply(local(&["10.0.0.1", "10.0.0.2"]))?;
    let addresses = ["--nodeport-addresses", "127.0.0.0/8,198.51.100.0/24"];
    let agent = sandbox.agent(&[&["--master", &server.url()][..], &addresses].concat())?;
    agent.wait_for("in sync")?;
    Ok((server, agent))
}

fn at(address: &str, port: u16) -> Result<SocketAddr> {
    Ok(SocketAddr::new(address.parse()?, port))
}

fn loopback() -> Result<SocketAddr> {
    at("127.0.0.1", PORT)
}

fn wait_for_status(sandbox: &Sandbox, place: SocketAddr, status: u16) -> Result<Answer> {
    wait_for_answer(&sandbox.namespace, place, "/", |answer| answer.status == status)
}

/// Waits until nobody listens there.
fn wait_for_refusal(sandbox: &Sandbox, place: SocketAddr) -> Result<()> {
    let is_refused = || sandbox.namespace.run(|| TcpStream::connect(place).is_err()).ok().filter(|refused| *refused);
    wait_until(&format!("nobody to listen at {place}"), USUAL, is_refused).map(drop)
}

#[test]
fn any_request_is_answered_with_the_number_of_ready_endpoints_on_the_node() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let (server, _agent) = started(&sandbox)?;
    wait_for_status(&sandbox, loopback()?, 200)?;
    for (method, path) in [("GET", "/"), ("GET", "/healthz?verbose"), ("POST", "/any/thing"), ("DELETE", "/")] {
        let answer = ask(&sandbox.namespace, loopback()?, method, path)?;
        assert_eq!(answer.status, 200, "{method} {path}");
        assert_eq!(answer.headers["content-type"], "application/json");
        assert_eq!(answer.headers["x-content-type-options"], "nosniff");
        assert_eq!(answer.headers["x-load-balancing-endpoint-weight"], "2");
        let body = r#"{"service":{"namespace":"test","name":"web"},"localEndpoints":2,"serviceProxyHealthy":true}"#;
        assert_eq!(answer.body, body, "{method} {path}");
    }
    server.apply(slice("web", &["10.0.0.1"]))?;
    let answer = wait_for_status(&sandbox, loopback()?, 503)?;
    assert_eq!(answer.headers["x-load-balancing-endpoint-weight"], "0");
    assert_eq!(answer.json()?["localEndpoints"], json!(0), "the other node's does not count");
    server.apply(local(&["10.0.0.1"]))?;
    let answer = wait_for_status(&sandbox, loopback()?, 200)?;
    assert_eq!(answer.headers["x-load-balancing-endpoint-weight"], "1");
    Ok(())
}

#[test]
fn it_is_answered_where_node_ports_are_for_as_long_as_the_service_is_there() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let (server, _agent) = started(&sandbox)?;
    let (uplink, other) = (at("198.51.100.9", PORT)?, at("203.0.113.9", PORT)?);
    wait_for_status(&sandbox, loopback()?, 200)?;
    sandbox.namespace.ip("address add 203.0.113.9/24 dev uplink\naddress add 198.51.100.9/24 dev uplink")?;
    wait_for_status(&sandbox, uplink, 200)?;
    wait_for_refusal(&sandbox, other).context("no NodePorts are served there")?;
    sandbox.namespace.ip("address del 198.51.100.9/24 dev uplink")?;
    sandbox.namespace.ip("address add 198.51.100.10/24 dev uplink")?;
    let moved = at("198.51.100.10", PORT)?;
    wait_for_status(&sandbox, moved, 200)?;
    server.apply(service("web", PORT + 1))?;
    wait_for_status(&sandbox, at("198.51.100.10", PORT + 1)?, 200)?;
    wait_for_refusal(&sandbox, moved)?;
    server.delete(Resource::Services, "test", "web")?;
    wait_for_refusal(&sandbox, at("198.51.100.10", PORT + 1)?)?;
    wait_for_refusal(&sandbox, at("127.0.0.1", PORT + 1)?)?;
    Ok(())
}

#[test]
fn a_port_in_use_is_told_by_an_event_and_the_service_answers_for_itself_elsewhere() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let occupant = sandbox.namespace.run(|| TcpListener::bind(("127.0.0.1", PORT)))??;
    sandbox.namespace.ip("address add 127.0.0.2/8 dev lo")?;
    let (server, agent) = started(&sandbox)?;
    agent.wait_for("Service test/web: health checks at 127.0.0.1:32100 cannot be answered: Address already in use")?;
    let about = |event: &Value| event["reason"] == "FailedToStartServiceHealthcheck";
    let event = wait_until("the Event", USUAL, || server.events().into_iter().find(about))?;
    assert_eq!((&event["regarding"]["name"], &event["action"]), (&json!("web"), &json!("Listen")));
    wait_for_status(&sandbox, at("127.0.0.2", PORT)?, 200)?;
    drop(occupant);
    // Any change is an occasion to try again.
    server.apply(local(&["10.0.0.1"]))?;
    wait_for_status(&sandbox, loopback()?, 200)?;
    Ok(())
}

#[test]
fn balancers_that_say_nothing_hold_up_neither_others_nor_the_kernel() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let (server, _agent) = started(&sandbox)?;
    let place = loopback()?;
    wait_for_status(&sandbox, place, 200)?;
    let silent = || (0..500).map(|_| TcpStream::connect(place)).collect::<std::io::Result<Vec<_>>>();
    let silent = sandbox.namespace.run(silent)??;
    let began = Instant::now();
    assert_eq!(ask(&sandbox.namespace, place, "GET", "/")?.status, 200);
    ensure!(began.elapsed() < patience(Duration::from_secs(2)), "it took {:?}", began.elapsed());
    server.apply(object::service("late", "10.96.0.2"))?;
    sandbox.wait_for_services("the new Service", |services| services.len() == 2)?;
    drop(silent);
    Ok(())
}

/// The lab's Service, for a load balancer.
fn write_balanced(cluster: &Cluster, service: &Service) -> Result<()> {
    let mut documents = service.documents();
    let spec = &mut documents[0]["spec"];
    spec["type"] = json!("LoadBalancer");
    spec["externalTrafficPolicy"] = json!("Local");
    spec["healthCheckNodePort"] = json!(PORT);
    write_documents(cluster.source(), &format!("{}.yaml", service.name), &documents)
}

/// Trap 17: when the last endpoint of a node shuts down, load balancers are told at once, and what they send until they
/// have understood is still answered by it.
#[test]
fn a_node_whose_last_endpoint_drains_says_no_and_goes_on_answering() -> Result<()> {
    let service = Service::new("draining", 50, &["a1", "b1"]);
    let cluster = Cluster::start(LabOptions::default(), AgentOptions::default(), &[])?;
    write_balanced(&cluster, &service)?;
    let (client, node) = (&cluster.lab.client, cluster.lab.node("node-a")?);
    for family in Family::ALL {
        let balancer = SocketAddr::new(node.addresses().of(family), PORT);
        wait_for_answer(client.namespace(), balancer, "/", |answer| answer.status == 200)?;
    }
    write_balanced(&cluster, &service.with_pods(&["b1"]).terminating(&["a1"]))?;
    for family in Family::ALL {
        let balancer = SocketAddr::new(node.addresses().of(family), PORT);
        let answer = wait_for_answer(client.namespace(), balancer, "/", |answer| answer.status == 503)?;
        assert_eq!(answer.json()?["localEndpoints"], json!(0));
        for protocol in Protocol::ALL {
            let answers = client.ask_times(Ask::new(service.at_node(node.addresses(), family, protocol)), 5)?;
            for answer in answers {
                assert_eq!(answer?.pod, "a1", "{family:?} {protocol}: it is still told apart from a node without any");
            }
        }
        let other = SocketAddr::new(cluster.lab.node("node-b")?.addresses().of(family), PORT);
        assert_eq!(ask(client.namespace(), other, "GET", "/")?.status, 200);
    }
    Ok(())
}
