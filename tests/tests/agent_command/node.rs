//! A node whose kernel holds four Services, and the commands that are asked about it.

use std::{fs, path::PathBuf, process::Output};

use anyhow::{Context as _, Result, ensure};
use aya::maps::{HashMap, Map, MapData};
use proxy_common::{
    addr::{Ipv4, Port, Protocol},
    flow::{Direction, Flow, NextHop, Output as Way, Rewrite, state},
    service::{Frontend, Service},
    tuple::{Stage, Tuple},
};
use tests::{
    lab::agent::sluice_program,
    sandbox::{Agent, Sandbox},
    testbed::Testbed,
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

/// A node whose agent has just taken in objects.
pub(super) struct Node {
    pub(super) sandbox: Sandbox,
    pub(super) agent: Agent,
    /// The low 32 bits of jiffies, by which entries are a moment old, and not as old as the machine's last boot.
    pub(super) now: u32,
}

impl Node {
    pub(super) fn new() -> Result<Self> {
        Self::with("shop.yaml", OBJECTS)
    }

    /// One whose objects are those of a file of that name and text.
    pub(super) fn with(file: &str, text: &str) -> Result<Self> {
        let sandbox = Sandbox::new()?;
        sandbox.namespace.ip("link add uplink address 02:00:00:00:00:01 type veth peer name wire
            link set uplink up\nlink set wire up
            address add 192.0.2.1/24 dev uplink
            route add default via 192.0.2.254")?;
        let objects = sandbox.directory.path().join("objects");
        fs::create_dir(&objects)?;
        fs::write(objects.join(file), text)?;
        let source = format!("file:{}", objects.display());
        let state = state(&sandbox).display().to_string();
        let flags = ["--source", &source, "--state-dir", &state, "--uplinks", "uplink", "--flow-table-size", "16384"];
        let agent = sandbox.agent(&flags)?;
        agent.wait_for("in sync")?;
        Ok(Self { sandbox, agent, now: Testbed::new()?.jiffies()? })
    }

    /// Its agent's `--state-dir`.
    pub(super) fn state(&self) -> PathBuf {
        state(&self.sandbox)
    }

    pub(super) fn run(&self, arguments: &[&str]) -> Result<Output> {
        run(&self.sandbox, arguments)
    }

    /// What a verb prints, which must go well.
    pub(super) fn ask(&self, arguments: &[&str]) -> Result<String> {
        let output = self.run(arguments)?;
        let complaint = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{arguments:?}: {}: {complaint}", output.status);
        Ok(String::from_utf8(output.stdout)?)
    }

    pub(super) fn map<K: aya::Pod, V: aya::Pod>(&self, name: &str) -> Result<HashMap<MapData, K, V>> {
        let map = MapData::from_pin(self.sandbox.pins.path().join("maps").join(name))?;
        let is_lru = name.starts_with("FLOWS") || name.starts_with("AFFINITY");
        Ok(if is_lru { Map::LruHashMap(map) } else { Map::HashMap(map) }.try_into()?)
    }

    /// The index of a Service port.
    pub(super) fn index(&self, address: [u8; 4], port: u16, protocol: Protocol) -> Result<u32> {
        let services: HashMap<_, Frontend<Ipv4>, Service> = self.map("SERVICES_V4")?;
        let frontend = Frontend::new(Ipv4 { octets: address }, Port::new(port), protocol);
        Ok(services.get(&frontend, 0)?.index)
    }

    /// The id of a backend, as the command line has it.
    pub(super) fn backend(&self, address: &str) -> Result<u32> {
        let backends: serde_json::Value = serde_json::from_str(&self.ask(&["backend", "list", "-o", "json"])?)?;
        let backends = backends.as_array().context("no list")?;
        let found = backends.iter().find(|backend| backend["address"] == address).context("no such backend")?;
        Ok(found["id"].as_u64().context("no id")? as u32)
    }

    /// Enters both halves of a connection of a pod to the Service `shop/web`.
    pub(super) fn open_flow(&self, client_port: u16) -> Result<()> {
        self.open_flow_to(client_port, [10, 96, 0, 10], [10, 244, 2, 5])
    }

    /// The same to port 80 of any Service, and port 8080 of its endpoint.
    pub(super) fn open_flow_to(&self, client_port: u16, service: [u8; 4], endpoint: [u8; 4]) -> Result<()> {
        let [client, frontend, pod] = [[10, 244, 1, 9], service, endpoint].map(|octets| Ipv4 { octets });
        let (sport, port, target) = (Port::new(client_port), Port::new(80), Port::new(8080));
        let rewrite = |saddr, daddr, sport, dport| Rewrite { saddr, daddr, sport, dport, ..Rewrite::default() };
        let original = Flow {
            rewrite: rewrite(client, pod, sport, target),
            next_hop: NextHop::default(),
            backend: self.backend(&format!("{pod}:8080"))?,
            backend_generation: 1,
            service: self.index(service, 80, Protocol::Tcp)?,
            last_seen: self.now,
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

/// The `--state-dir` of the agent in a sandbox.
pub(super) fn state(sandbox: &Sandbox) -> PathBuf {
    sandbox.directory.path().join("state")
}

pub(super) fn run(sandbox: &Sandbox, arguments: &[&str]) -> Result<Output> {
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
