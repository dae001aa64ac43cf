//! A socket that was given its backend is one of the backend's connections until it is closed, and no longer.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::IpAddr,
    process::{Child, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use tests::{
    lab::{
        LabOptions, Node,
        address::Family,
        agent::AgentOptions,
        cluster::Cluster,
        manifest::{Service, write_documents},
    },
    patience::{patience, wait_until},
    traffic::{
        Ask, Command, Failure, Protocol, Reply, Target,
        place::{Activity, resident_program},
    },
};

fn start(service: &Service) -> Result<Cluster> {
    Cluster::start(LabOptions::default(), AgentOptions::default(), std::slice::from_ref(service))
}

/// Both families, and the IPv4 address on a socket of IPv6.
fn targets(service: &Service, protocol: Protocol) -> [Target; 3] {
    let [v4, v6] = Family::ALL.map(|family| service.cluster(family, protocol));
    let mut mapped = v4;
    if let IpAddr::V4(address) = v4.address.ip() {
        mapped.address.set_ip(address.to_ipv6_mapped().into());
    }
    [v4, v6, mapped]
}

fn family(target: Target) -> Family {
    Family::of(target.address.ip().to_canonical())
}

fn active(node: &Node, target: Target, pod: &str) -> Result<u32> {
    node.active(family(target), pod)
}

#[test]
fn a_connected_socket_is_a_connection_until_it_is_closed() -> Result<()> {
    let service = Service::new("echo", 10, &["a1"]);
    let cluster = start(&service)?;
    let node = &cluster.lab.nodes[0];
    let ways = [("node-a", Protocol::Tcp), ("node-a", Protocol::Udp), ("client-a", Protocol::Tcp)];
    for (name, protocol) in ways {
        let client = cluster.lab.place(name)?;
        for target in targets(&service, protocol) {
            let before = node.known_sockets()?;
            let open: Vec<_> = (0..3).map(|_| client.open(Ask::new(target))).collect::<Result<_>>()?;
            assert_eq!(open.iter().map(|socket| Ok(socket.ask()?.pod)).collect::<Result<Vec<_>>>()?, ["a1"; 3]);
            for (closed, socket) in (0..).zip(open) {
                assert_eq!(active(node, target, "a1")?, 3 - closed, "{name} to {target}");
                socket.close()?;
            }
            assert_eq!(active(node, target, "a1")?, 0, "{name} to {target}");
            assert_eq!(node.known_sockets()?, before, "nothing is remembered of {name} to {target}");
        }
    }
    Ok(())
}

#[test]
fn an_unconnected_socket_is_no_connection() -> Result<()> {
    let service = Service::new("echo", 10, &["a1"]);
    let cluster = start(&service)?;
    for target in targets(&service, Protocol::Udp) {
        let open = cluster.lab.place("node-a")?.open(Ask::new(target).unconnected())?;
        assert_eq!(open.ask()?.pod, "a1");
        assert_eq!(active(&cluster.lab.nodes[0], target, "a1")?, 0, "{target}");
        open.close()?;
    }
    Ok(())
}

#[test]
fn a_connection_that_never_stood_is_none_once_its_socket_is_closed() -> Result<()> {
    // Nothing listens there.
    let service = Service { target_port: 4, ..Service::new("deaf", 10, &["a1"]) };
    let cluster = start(&service)?;
    let node = &cluster.lab.nodes[0];
    for target in targets(&service, Protocol::Tcp) {
        let answers = node.host.ask_times(Ask::new(target), 1)?;
        assert_eq!(answers, [Err(Failure::Refused)], "{target}");
        assert_eq!(active(node, target, "a1")?, 0, "{target}");
    }
    Ok(())
}

#[test]
fn what_a_killed_process_had_open_is_closed() -> Result<()> {
    let service = Service::new("echo", 10, &["a1"]);
    let cluster = start(&service)?;
    let node = &cluster.lab.nodes[0];
    let target = service.cluster(Family::V4, Protocol::Tcp);
    let program = node.host.command(resident_program()?)?;
    let mut process = Process::start(program)?;
    let opened = process.call(&Command::Open(Ask::new(target)))?;
    ensure!(matches!(opened, Reply::Started(_)), "{opened:?}");
    assert_eq!(node.active(Family::V4, "a1")?, 1);
    drop(process);
    assert_eq!(node.active(Family::V4, "a1")?, 0);
    Ok(())
}

/// A resident of its own, that is killed when it is dropped.
struct Process(Child);

impl Process {
    fn start(mut program: std::process::Command) -> Result<Self> {
        Ok(Self(program.arg("resident").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?))
    }

    fn call(&mut self, command: &Command) -> Result<Reply> {
        let stdin = self.0.stdin.as_mut().context("it has no stdin")?;
        writeln!(stdin, "{}", serde_json::to_string(command)?)?;
        let mut line = String::new();
        BufReader::new(self.0.stdout.as_mut().context("it has no stdout")?).read_line(&mut line)?;
        Ok(serde_json::from_str(&line)?)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Err(error) = self.0.kill().and_then(|()| self.0.wait()) {
            eprintln!("a process stays behind: {error}");
        }
    }
}

/// With two backends, the less loaded of two is the less loaded of all.
#[test]
fn least_connections_follows_what_sockets_have_open() -> Result<()> {
    let service = Service::new("least", 10, &["a1", "b1"]);
    let mut documents = service.documents();
    documents[0]["metadata"]["annotations"] = json!({ "service.sluice.dev/algorithm": "least-connections" });
    let cluster = Cluster::start_with(LabOptions::default(), AgentOptions::default(), |source| {
        write_documents(source, "least.yaml", &documents)
    })?;
    for (name, protocol) in [("node-a", Protocol::Tcp), ("node-a", Protocol::Udp), ("client-a", Protocol::Tcp)] {
        let client = cluster.lab.place(name)?;
        for target in targets(&service, protocol) {
            wait_until("an even spread", Duration::from_secs(5), || {
                let sockets: Vec<_> = (0..8).map_while(|_| client.open(Ask::new(target)).ok()).collect();
                let on_a = sockets.iter().filter(|socket| socket.ask().is_ok_and(|answer| answer.pod == "a1")).count();
                sockets.into_iter().try_for_each(Activity::close).ok()?;
                (on_a == 4).then_some(())
            })?;
            let sockets: Vec<_> = (0..10).map(|_| client.open(Ask::new(target))).collect::<Result<_>>()?;
            let mut by_pod: [Vec<_>; 2] = Default::default();
            for socket in sockets {
                by_pod[usize::from(socket.ask()?.pod == "b1")].push(socket);
            }
            let [on_a, on_b] = by_pod;
            assert_eq!((on_a.len(), on_b.len()), (5, 5), "{name} to {target}");
            on_a.into_iter().try_for_each(Activity::close)?;
            for _ in 0..5 {
                let socket = client.open(Ask::new(target).within(patience(Duration::from_secs(3))))?;
                assert_eq!(socket.ask().context("the next one")?.pod, "a1", "{name} to {target}");
                socket.close()?;
            }
            on_b.into_iter().try_for_each(Activity::close)?;
        }
    }
    Ok(())
}
