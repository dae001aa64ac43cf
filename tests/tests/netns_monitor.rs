//! `sluice monitor` with real sockets: what happens to them is shown as it happens, with names, and costs nothing when nobody looks.

use std::{
    io::{BufRead as _, BufReader, Read as _},
    net::SocketAddr,
    process::{Child, Stdio},
    sync::mpsc::{self, Receiver},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use proxy_common::service::WhenEmpty;
use serde_json::Value;
use tests::{
    lab::{
        LabOptions, Node,
        address::{self, Family},
        agent::{AgentOptions, SocketLb, sluice_program},
        cluster::Cluster,
        manifest::Service,
    },
    patience::{patience, wait_until},
    traffic::{Ask, Protocol},
};

const SOON: Duration = Duration::from_secs(5);
/// What pods listen on.
const TARGET: u16 = 8080;
/// How long the programs go on after one who was killed.
const DEADLINE: Duration = Duration::from_secs(3);

/// A running `sluice monitor`. Dropping the handle kills it.
struct Monitor {
    child: Child,
    lines: Receiver<String>,
}

impl Monitor {
    /// Starts one on a node, which watches once this returns.
    fn start(node: &Node, arguments: &[&str]) -> Result<Self> {
        let before = node.watched_until()?;
        let mut command = node.host.command(sluice_program()?)?;
        command.arg("monitor").arg("--pin-path").arg(node.pins()).args(arguments);
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let stdout = BufReader::new(child.stdout.take().context("no stdout")?);
        let (sender, lines) = mpsc::channel();
        thread::spawn(move || stdout.lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
        let mut monitor = Self { child, lines };
        let watches = || node.watched_until().is_ok_and(|until| until != before).then_some(());
        if let Err(error) = wait_until("somebody to watch", SOON, watches) {
            bail!("{error}: {}", monitor.complaint()?);
        }
        Ok(monitor)
    }

    /// The next line that has all of these words.
    fn line_with(&self, words: &[&str]) -> Result<String> {
        let (end, mut seen) = (Instant::now() + patience(SOON), Vec::new());
        while let Ok(line) = self.lines.recv_timeout(end.saturating_duration_since(Instant::now())) {
            if words.iter().all(|word| line.contains(word)) {
                return Ok(line);
            }
            seen.push(line);
        }
        bail!("no line with {words:?} in:\n{}", seen.join("\n"))
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(Pid::from_raw(self.child.id().cast_signed()), signal)?)
    }

    /// Its status, once it has ended; and what it has said that nobody has read.
    fn end(&mut self) -> Result<(Option<i32>, Vec<String>)> {
        let status = wait_until("the monitor to end", SOON, || self.child.try_wait().ok().flatten())?;
        Ok((status.code(), self.lines.iter().collect()))
    }

    /// What it says of an error it ends with.
    fn complaint(&mut self) -> Result<String> {
        self.child.kill()?;
        let mut text = String::new();
        self.child.stderr.take().context("no stderr")?.read_to_string(&mut text)?;
        Ok(text)
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A Service that pod a1 serves, and one that nobody does. Pods' sockets are left alone: packets are what is watched.
fn cluster() -> Result<(Cluster, [Service; 2])> {
    let services = [Service::new("web", 10, &["a1"]), Service::new("nobody", 60, &[])];
    let options = AgentOptions { socket_lb: SocketLb::Host, ..AgentOptions::default() };
    Ok((Cluster::start(LabOptions::default(), options, &services)?, services))
}

#[test]
fn what_happens_to_packets_and_sockets_is_shown_with_names() -> Result<()> {
    let (cluster, [web, nobody]) = cluster()?;
    let (node, pod) = (&cluster.lab.nodes[0], cluster.lab.place("client-a")?);
    let monitor = Monitor::start(node, &[])?;
    let shows = |words: &[&str]| -> Result<()> {
        println!("{}", monitor.line_with(words)?);
        Ok(())
    };
    shows(&["TIME", "EVENT", "SERVICE"])?;
    for (family, protocol) in
        Family::ALL.into_iter().flat_map(|family| Protocol::ALL.map(|protocol| (family, protocol)))
    {
        let (web, nobody) = (web.cluster(family, protocol), nobody.cluster(family, protocol));
        let name = protocol.to_string();
        let port = |service: &str| format!("lab/{service}:{}", name.to_lowercase());
        let answer = pod.ask(Ask::new(web))?;
        let backend = SocketAddr::new(address::pod("a1").context("no a1")?.1.of(family), TARGET);
        let way = format!("{} > {} ({backend})", answer.local, web.address);
        shows(&["pod_in", " opened ", &name, &way, &port("web")])?;
        node.host.ask(Ask::new(web))?;
        shows(&["connect", " opened ", &name, &format!("- > {} ({backend})", web.address), &port("web")])?;

        let _ = pod.ask_times(Ask::new(nobody), 1)?;
        shows(&["pod_in", " reject_no_endpoint ", &format!("> {} ", nobody.address), &port("nobody")])?;
        let _ = node.host.ask_times(Ask::new(nobody), 1)?;
        shows(&["connect", " reject_no_endpoint ", &name, &port("nobody")])?;

        node.edit_service(nobody, |service| service.internal_empty = WhenEmpty::Drop)?;
        let _ = pod.ask_times(Ask { timeout: Duration::from_millis(50), ..Ask::new(nobody) }, 1)?;
        shows(&["pod_in", " drop_no_local_endpoint ", &name, &port("nobody")])?;
    }
    Ok(())
}

#[test]
fn a_filter_lets_through_what_is_asked_for_and_the_count_ends_it() -> Result<()> {
    let (cluster, [web, nobody]) = cluster()?;
    let (node, pod) = (&cluster.lab.nodes[0], cluster.lab.place("client-a")?);
    let arguments = ["--event", "reject", "--service", "lab/nobody", "--protocol", "udp", "--count", "1", "-o", "json"];
    let mut monitor = Monitor::start(node, &arguments)?;
    pod.ask(Ask::new(web.cluster(Family::V6, Protocol::Udp)))?;
    let _ = pod.ask_times(Ask::new(nobody.cluster(Family::V4, Protocol::Tcp)), 1)?;
    let meant = nobody.cluster(Family::V6, Protocol::Udp);
    let _ = pod.ask_times(Ask::new(meant), 1)?;
    let (status, lines) = monitor.end()?;
    ensure!(status == Some(0) && lines.len() == 1, "{status:?}: {lines:?}");
    let event: Value = serde_json::from_str(&lines[0])?;
    let shown = ["event", "hook", "protocol", "destination", "device"].map(|field| event[field].as_str());
    let destination = meant.address.to_string();
    assert_eq!(
        shown,
        [Some("reject_no_endpoint"), Some("pod_in"), Some("UDP"), Some(destination.as_str()), Some("pod-client-a")]
    );
    assert_eq!((&event["service"]["name"], &event["backend"]), (&"nobody".into(), &Value::Null));
    Ok(())
}

#[test]
fn who_is_interrupted_ends_well_and_the_programs_stop_at_once() -> Result<()> {
    let (cluster, [web, _]) = cluster()?;
    let node = &cluster.lab.nodes[0];
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let mut monitor = Monitor::start(node, &[])?;
        monitor.signal(signal)?;
        assert_eq!(monitor.end()?.0, Some(0), "{signal}");
        node.host.ask(Ask::new(web.cluster(Family::V4, Protocol::Tcp)))?;
        assert_eq!(node.events()?, [], "{signal}");
    }
    Ok(())
}

#[test]
fn a_time_ends_it() -> Result<()> {
    let (cluster, _) = cluster()?;
    let mut monitor = Monitor::start(&cluster.lab.nodes[0], &["--for", "1"])?;
    assert_eq!(monitor.end()?.0, Some(0));
    Ok(())
}

#[test]
fn a_second_one_is_told_that_there_is_a_first() -> Result<()> {
    let (cluster, _) = cluster()?;
    let node = &cluster.lab.nodes[0];
    let _first = Monitor::start(node, &[])?;
    let mut command = node.host.command(sluice_program()?)?;
    let second = command.arg("monitor").arg("--pin-path").arg(node.pins()).output()?;
    let said = String::from_utf8(second.stderr)?;
    assert_eq!(second.status.code(), Some(1), "{said}");
    assert!(said.starts_with("sluice: another `sluice monitor` watches "), "{said}");
    Ok(())
}

#[test]
fn the_programs_stop_soon_after_one_who_was_killed_and_the_next_one_sees_nothing_of_before() -> Result<()> {
    let (cluster, [web, _]) = cluster()?;
    let node = &cluster.lab.nodes[0];
    let target = web.cluster(Family::V4, Protocol::Tcp);
    let mut monitor = Monitor::start(node, &[])?;
    monitor.signal(Signal::SIGKILL)?;
    monitor.end()?;
    let killed = Instant::now();
    let is_told = || -> Result<bool> {
        node.host.ask(Ask::new(target))?;
        Ok(!node.events()?.is_empty())
    };
    assert!(is_told()?, "they were told to go on");
    wait_until("the programs to stop", DEADLINE + SOON, || is_told().is_ok_and(|is_told| !is_told).then_some(()))?;
    println!("they stopped after {:?}", killed.elapsed());
    ensure!(killed.elapsed() <= DEADLINE + patience(Duration::from_secs(1)), "after {:?}", killed.elapsed());
    let monitor = Monitor::start(node, &[])?;
    node.host.ask(Ask::new(target))?;
    monitor.line_with(&["TIME"])?;
    monitor.line_with(&[" opened "])?;
    Ok(())
}
