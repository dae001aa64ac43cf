//! Scenarios of objects that are giant or odd. The agent goes on, in bounded memory, and serves the others meanwhile.
//! Needs root.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tests::{
    api::{
        ApiServer, Resource,
        object::{self, node, slice},
    },
    patience::{patience, wait_until},
    picture::Witness,
    sandbox::{Agent, Sandbox, anonymous_memory},
};

/// Anonymous memory of an agent that was built for debugging, in KiB, after the worst of this.
const MEMORY: u64 = 300 * 1024;

const USUAL: Duration = Duration::from_mins(1);

/// For as many objects as a large cluster has, by programs that were built for debugging.
const MANY: Duration = Duration::from_mins(3);

/// A Service of somebody else, which must not notice anything, and an agent that serves it.
struct Neighbourhood {
    server: ApiServer,
    agent: Agent,
    witness: Option<Witness>,
    sandbox: Sandbox,
    changes: u8,
}

impl Neighbourhood {
    fn new() -> Result<Self> {
        let sandbox = Sandbox::new()?;
        let server = sandbox.server()?;
        server.apply(node())?;
        for (host, name) in [(1, "quiet"), (2, "busy")] {
            server.apply(object::service(name, &format!("10.96.0.{host}")))?;
            server.apply(slice(name, &[&format!("10.0.0.{host}")]))?;
        }
        let agent = sandbox.agent(&["--master", &server.url()])?;
        agent.wait_for("in sync")?;
        let witness = Some(Witness::of(sandbox.pins.path())?);
        Ok(Self { server, agent, witness, sandbox, changes: 0 })
    }

    /// Waits for an endpoint of a Service to be served; the count is of distinct ones.
    fn wait_for(&self, at: &str, endpoints: usize) -> Result<()> {
        wait_until(&format!("{endpoints} endpoints at {at}"), USUAL, || {
            let picture = self.sandbox.picture().ok()?;
            picture.get(at).is_some_and(|answers| answers.internal.len() == endpoints).then_some(())
        })
        .with_context(|| self.tail())
    }

    fn wait_for_frontends(&self, what: &str, count: usize) -> Result<()> {
        wait_until(what, MANY, || self.sandbox.picture().ok().filter(|picture| picture.len() == count))
            .map(drop)
            .with_context(|| self.tail())
    }

    /// A change of another Service is served soon, and the quiet one was not touched.
    fn assert_well(&mut self) -> Result<()> {
        self.changes += 1;
        let address = format!("10.0.1.{}", self.changes);
        let began = Instant::now();
        self.server.apply(slice("busy", &[&address]))?;
        let wanted = format!("{address}:8080");
        wait_until("a change of another Service", USUAL, || {
            let picture = self.sandbox.picture().ok()?;
            picture["10.96.0.2:80/TCP"].internal.contains(&wanted).then_some(())
        })
        .with_context(|| self.tail())?;
        ensure!(
            began.elapsed() < patience(Duration::from_secs(20)),
            "another Service waited for {:?}",
            began.elapsed()
        );
        ensure!(!self.agent.log().contains("panicked"), "{}", self.tail());
        let memory = anonymous_memory(self.agent.id())?;
        ensure!(memory < MEMORY, "{memory} KiB");
        Ok(())
    }

    fn tail(&self) -> String {
        let log = self.agent.log();
        let tail = log.len().saturating_sub(4_000);
        log.char_indices().find(|(at, _)| *at >= tail).map(|(at, _)| log[at..].to_owned()).unwrap_or_default()
    }

    /// The quiet one was the same all the time.
    fn end(mut self) -> Result<()> {
        self.assert_well()?;
        let testimony = self.witness.take().context("a witness")?.testify()?;
        assert_eq!(testimony.seen["10.96.0.1:80/TCP"].len(), 1, "{:?}", testimony.seen["10.96.0.1:80/TCP"]);
        Ok(())
    }
}

/// Ten thousand endpoints in a hundred slices.
#[test]
fn scenario_37_ten_thousand_endpoints_of_one_service() -> Result<()> {
    let mut here = Neighbourhood::new()?;
    for number in 0..100 {
        let addresses: Vec<String> = (0..100).map(|host| format!("10.1.{number}.{host}")).collect();
        let mut part = slice("crowd", &addresses.iter().map(String::as_str).collect::<Vec<_>>());
        part["metadata"]["name"] = json!(format!("crowd-{number}"));
        here.server.apply(part)?;
    }
    here.server.apply(object::service("crowd", "10.96.1.1"))?;
    here.wait_for("10.96.1.1:80/TCP", 10_000)?;
    here.assert_well()?;
    for number in 0..99 {
        here.server.delete(Resource::EndpointSlices, "test", &format!("crowd-{number}"))?;
    }
    here.wait_for("10.96.1.1:80/TCP", 100)?;
    here.end()
}

#[test]
fn scenario_37_a_thousand_ports_of_one_service() -> Result<()> {
    let mut here = Neighbourhood::new()?;
    let ports = |offset: u32| -> Vec<Value> {
        (0..1_000).map(|number| json!({"name": format!("p{number}"), "port": 1_000 + offset + number})).collect()
    };
    let mut service = object::service("many", "10.96.1.2");
    service["spec"]["ports"] = json!(ports(0));
    here.server.apply(service)?;
    let mut endpoints = slice("many", &["10.2.0.1", "10.2.0.2"]);
    endpoints["ports"] = json!(ports(10_000));
    here.server.apply(endpoints)?;
    here.wait_for("10.96.1.2:1000/TCP", 2)?;
    here.wait_for("10.96.1.2:1999/TCP", 2)?;
    here.assert_well()?;
    here.server.delete(Resource::Services, "test", "many")?;
    here.sandbox.wait_for_picture("the end of it", |picture| picture.len() == 2)?;
    here.end()
}

/// A megabyte where an annotation that is read belongs, and ten that nobody reads.
#[test]
fn scenario_37_objects_of_megabytes() -> Result<()> {
    let mut here = Neighbourhood::new()?;
    let mut annotated = object::service("wordy", "10.96.1.3");
    annotated["metadata"]["annotations"] = json!({
        "service.sluice.dev/weights": "nonsense,".repeat(120_000),
        "service.sluice.dev/algorithm": "x".repeat(1 << 20),
        "example.com/essay": "y".repeat(1 << 20),
    });
    here.server.apply(slice("wordy", &["10.3.0.1"]))?;
    here.server.apply(annotated)?;
    here.wait_for("10.96.1.3:80/TCP", 1)?;
    here.assert_well()?;
    assert!(here.agent.log().len() < 100_000, "the log repeats what the object says: {} bytes", here.agent.log().len());

    let mut giant = slice("wordy", &["10.3.0.1", "10.3.0.2"]);
    giant["metadata"]["managedFields"] = json!([{"manager": "z".repeat(10 << 20)}]);
    here.server.apply(giant)?;
    here.wait_for("10.96.1.3:80/TCP", 2)?;
    here.end()
}

/// Names no API server would let in, with what commands a terminal, and everything that is wrong with such an object told.
#[test]
fn scenario_37_names_that_command_a_terminal_are_escaped_in_the_log() -> Result<()> {
    let here = Neighbourhood::new()?;
    let evil = "evil\u{1b}[2J\u{1b}]0;owned\u{7}\r\nINFO in sync\u{9b}31m\u{202e}";
    let mut service = object::service(evil, "10.96.1.4");
    service["metadata"]["annotations"] = json!({"service.sluice.dev/algorithm": evil});
    service["spec"]["externalIPs"] = json!([evil, "127.0.0.1"]);
    service["spec"]["ports"][0]["name"] = json!(evil);
    service["spec"]["ports"][0]["protocol"] = json!("TCP");
    here.server.apply(service)?;
    let mut hostile = slice(evil, &["10.4.0.1", "127.0.0.1"]);
    hostile["endpoints"][0]["addresses"] = json!([evil]);
    hostile["metadata"]["name"] = json!(evil);
    here.server.apply(hostile)?;
    let mut broken = object::service(&format!("{evil}2"), "10.96.1.5");
    broken["spec"]["ports"] = json!(evil);
    here.server.apply(broken)?;
    here.agent.wait_for("cannot be read and is left out")?;
    here.agent.wait_for("evil\\u{1b}[2J")?;
    here.wait_for("10.96.1.4:80/TCP", 0)?;
    let log = here.agent.log();
    let odd = log.chars().find(|c| (c.is_control() && *c != '\n') || *c == '\u{202e}');
    assert_eq!(odd, None, "{}", log.escape_debug());
    assert!(
        !log.lines().any(|line| line.starts_with("INFO in sync")),
        "a line of the log that the agent has not written"
    );
    here.end()
}

/// Fifty thousand, each with an endpoint.
#[test]
fn scenario_37_fifty_thousand_services_created_at_once() -> Result<()> {
    const SERVICES: u16 = 50_000;
    let mut here = Neighbourhood::new()?;
    let cluster_ip = |number: u16| format!("10.97.{}.{}", number >> 8, number & 0xff);
    for number in 0..SERVICES {
        here.server.apply(object::service(&format!("s{number}"), &cluster_ip(number)))?;
        here.server.apply(slice(&format!("s{number}"), &[&format!("10.5.{}.{}", number >> 8, number & 0xff)]))?;
    }
    here.wait_for_frontends("all of them", usize::from(SERVICES) + 2)?;
    here.wait_for(&format!("{}:80/TCP", cluster_ip(SERVICES - 1)), 1)?;
    here.assert_well()?;
    for number in 0..SERVICES {
        here.server.delete(Resource::Services, "test", &format!("s{number}"))?;
    }
    here.wait_for_frontends("the end of them", 2)?;
    here.end()
}
