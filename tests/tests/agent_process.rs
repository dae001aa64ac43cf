//! The agent as a process, with the real kernel: what it writes, what it leaves alone, and what it says. Needs root.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use aya::maps::{HashMap, Map, MapData};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use proxy_common::{
    addr::Ipv4,
    service::{Frontend, Service},
};
use serde_json::{Value, json};
use tempfile::TempDir;
use tests::{
    api::{ApiServer, Fault, On, Resource},
    lab::{agent::sluice_program, cgroup::Cgroup, pins::PinDirectory},
    netns::Namespace,
    patience::{patience, wait_until},
};

const USUAL: Duration = Duration::from_secs(20);

/// A network namespace, a cgroup and a pin path for agents, one after the other.
struct Sandbox {
    namespace: Namespace,
    cgroup: Cgroup,
    pins: PinDirectory,
    directory: TempDir,
}

impl Sandbox {
    fn new() -> Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let namespace = Namespace::new("agent")?;
        Ok(Self {
            namespace,
            cgroup: Cgroup::new(1000 + number)?,
            pins: PinDirectory::new(1000 + number, "agent")?,
            directory: TempDir::new()?,
        })
    }

    fn server(&self) -> Result<ApiServer> {
        self.namespace.run(ApiServer::start)?
    }

    fn agent(&self, source: &[&str]) -> Result<Agent> {
        let log = self.directory.path().join("log");
        let mut command = self.namespace.command(sluice_program()?)?;
        command.args(["run", "-v", "--hostname-override", "here"]).args(source);
        command.arg("--pin-path").arg(self.pins.path()).arg("--cgroup").arg(self.cgroup.path());
        command.env_remove("KUBECONFIG").env_remove("NODE_NAME");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(File::create(&log)?);
        Ok(Agent { child: command.spawn().context("cannot run sluice")?, log })
    }

    /// `SERVICES_V4` as it is now; empty as long as there is no map.
    fn services(&self) -> Result<Vec<(Frontend<Ipv4>, Service)>> {
        let path = self.pins.path().join("maps/SERVICES_V4");
        if !path.exists() {
            return Ok(Vec::new());
        }
        let map: HashMap<_, Frontend<Ipv4>, Service> = Map::HashMap(MapData::from_pin(path)?).try_into()?;
        Ok(map.iter().collect::<Result<_, _>>()?)
    }

    fn wait_for_services(&self, what: &str, condition: impl Fn(&[Service]) -> bool) -> Result<Duration> {
        let began = Instant::now();
        wait_until(what, USUAL, || {
            let services: Vec<Service> = self.services().ok()?.into_iter().map(|(_, service)| service).collect();
            condition(&services).then_some(())
        })?;
        Ok(began.elapsed())
    }
}

/// A running agent; killed when dropped.
struct Agent {
    child: Child,
    log: PathBuf,
}

impl Agent {
    fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    fn wait_for(&self, words: &str) -> Result<()> {
        let waited =
            wait_until(&format!("the agent to say {words:?}"), USUAL, || self.log().contains(words).then_some(()));
        waited.with_context(|| format!("its log:\n{}", self.log()))
    }

    fn terminate(mut self) -> Result<i32> {
        kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGTERM)?;
        let status = wait_until("the agent to end", USUAL, || self.child.try_wait().ok().flatten())?;
        status.code().context("the agent was killed")
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("{}", self.log());
        }
    }
}

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
    assert!(agent.log().contains("kernel follows writes=1 "), "{}", agent.log());
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
    agent.wait_for("watching Services: ")?;
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
fn what_keeps_an_agent_from_starting_is_said_with_advice() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let missing = sandbox.directory.path().join("missing").display().to_string();
    let cases = [
        (vec!["--source", "file:/nonexistent/services"], "/nonexistent/services"),
        (vec!["--kubeconfig", &missing], "correct --kubeconfig"),
        (vec!["--master", "not a url"], "is not a URL"),
        (vec![], "name the API server with --kubeconfig or --master"),
    ];
    for (arguments, advice) in cases {
        let mut agent = sandbox.agent(&arguments)?;
        let status = wait_until("the agent to end", USUAL, || agent.child.try_wait().ok().flatten())?;
        assert_eq!(status.code(), Some(78), "{arguments:?}");
        assert!(agent.log().contains(advice), "{arguments:?}: {}", agent.log());
    }
    assert_eq!(sandbox.services()?, []);
    Ok(())
}
