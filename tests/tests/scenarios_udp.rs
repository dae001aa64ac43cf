//! Scenario 27: stale UDP, in the five shapes that black-holed others, of clients who only send. Nothing that comes back tells them, or
//! the programs, that a flow leads nowhere; backends listen and do not answer. Always from one and the same socket, unless it is ended.

use std::{
    collections::BTreeMap,
    net::UdpSocket,
    slice::from_ref,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use proxy_common::outcome::{Hook, Outcome};
use serde_json::{Value, json};
use tests::{
    lab::{
        Lab, LabOptions, Node,
        address::{Family, pod},
        agent::{AgentOptions, SocketLb},
        cluster::Cluster,
        manifest::{Service, write_documents},
    },
    patience::{patience, wait_until},
    traffic::{
        Protocol, Target,
        bare::{Call, Kind},
        place::{Activity, Place},
    },
};

/// Until traffic follows a change.
const SOON: Duration = Duration::from_secs(1);

/// Between two datagrams of a client.
const PAUSE: Duration = Duration::from_millis(2);

/// What backends listen on.
const SINK: u16 = 9_999;

const PODS: [&str; 4] = ["a1", "a2", "b1", "b2"];

/// What a connected socket is told when its backend no longer serves, or that nobody does.
const ENDED: [i32; 2] = [libc::ECONNABORTED, libc::EDESTADDRREQ];

/// The pods' sockets, which hear and say nothing.
struct Sinks(BTreeMap<&'static str, Vec<UdpSocket>>);

impl Sinks {
    fn of(lab: &Lab) -> Result<Self> {
        let sink = |name: &'static str| {
            let (_, addresses) = pod(name).context("a pod of the lab")?;
            let sockets = Family::ALL.map(|family| -> Result<UdpSocket> {
                let address = (addresses.of(family), SINK);
                let socket = lab.place(name)?.namespace().run(|| UdpSocket::bind(address))??;
                socket.set_nonblocking(true)?;
                Ok(socket)
            });
            Ok((name, sockets.into_iter().collect::<Result<_>>()?))
        };
        Ok(Self(PODS.into_iter().map(sink).collect::<Result<_>>()?))
    }

    /// Who has heard how much since the last time.
    fn heard(&self) -> BTreeMap<&'static str, usize> {
        let counts = self.0.iter().map(|(pod, sockets)| {
            let datagrams = sockets.iter().flat_map(|socket| std::iter::from_fn(|| socket.recv(&mut [0; 64]).ok()));
            (*pod, datagrams.count())
        });
        counts.filter(|(_, count)| *count > 0).collect()
    }
}

/// A client that only sends.
struct Sender<'lab> {
    place: &'lab Place,
    target: Target,
    is_connected: bool,
    socket: Option<Activity<'lab>>,
}

impl<'lab> Sender<'lab> {
    fn new(place: &'lab Place, target: Target, is_connected: bool) -> Self {
        Self { place, target, is_connected, socket: None }
    }

    /// One datagram; the error is its number. A socket that was ended is replaced, as applications do.
    fn send(&mut self) -> Result<Result<(), i32>> {
        if self.socket.is_none() {
            let socket = self.place.make(Kind::new(self.target.address.is_ipv6(), Protocol::Udp))?;
            if self.is_connected
                && let Err(error) = socket.call(Call::Connect(self.target.address))?
            {
                return Ok(Err(error));
            }
            self.socket = Some(socket);
        }
        let socket = self.socket.as_ref().context("a socket")?;
        let call = if self.is_connected { Call::Send } else { Call::SendTo(self.target.address) };
        let sent = socket.call(call)?.map(drop);
        if sent.is_err_and(|error| ENDED.contains(&error)) {
            self.socket = None;
        }
        Ok(sent)
    }

    /// Its datagrams come to that pod soon, and from then on to nobody else; how long it took.
    fn must_move_to(&mut self, sinks: &Sinks, pod: &str) -> Result<Duration> {
        let began = Instant::now();
        while !sinks.heard().contains_key(pod) {
            ensure!(began.elapsed() < patience(SOON), "{self}: nothing comes to {pod} after {:?}", began.elapsed());
            let _ = self.send()?;
            thread::sleep(PAUSE);
        }
        let took = began.elapsed();
        for _ in 0..5 {
            ensure!(self.send()? == Ok(()), "{self}, to {pod}");
        }
        let mut heard = BTreeMap::new();
        wait_until("five datagrams", SOON, || {
            for (pod, count) in sinks.heard() {
                *heard.entry(pod).or_insert(0) += count;
            }
            (heard.values().sum::<usize>() >= 5).then_some(())
        })?;
        ensure!(heard.keys().eq([&pod]), "{self}: {heard:?} instead of {pod} alone");
        Ok(took)
    }

    /// Its datagrams come to nobody soon; who is connected is told so.
    fn must_end(&mut self, sinks: &Sinks) -> Result<()> {
        let began = Instant::now();
        let mut is_told = !self.is_connected;
        loop {
            let sent = self.send()?;
            is_told |= sent.is_err();
            thread::sleep(PAUSE);
            let heard = sinks.heard();
            if is_told && heard.is_empty() {
                break;
            }
            ensure!(began.elapsed() < patience(SOON), "{self}: {heard:?}, the last word is {sent:?}");
        }
        for _ in 0..5 {
            let _ = self.send()?;
            thread::sleep(PAUSE);
        }
        let heard = sinks.heard();
        if heard.is_empty() { Ok(()) } else { bail!("{self}: {heard:?} when nobody should") }
    }
}

impl std::fmt::Display for Sender<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let way = if self.is_connected { "" } else { ", unconnected" };
        write!(f, "{} to {}{way}", self.place.name(), self.target)
    }
}

fn start(services: &[Service]) -> Result<(Cluster, Sinks)> {
    let options = AgentOptions { socket_lb: SocketLb::All, ..AgentOptions::default() };
    let cluster = Cluster::start(LabOptions::default(), options, services)?;
    let sinks = Sinks::of(&cluster.lab)?;
    Ok((cluster, sinks))
}

fn service(pods: &[&'static str]) -> Service {
    Service { target_port: SINK, ..Service::new("log", 40, pods) }
}

/// A pod, whose packets are translated, and the node's own sockets, connected and not.
fn inside(lab: &Lab) -> Result<Vec<Sender<'_>>> {
    inside_of(lab, &service(&[]))
}

fn inside_of<'lab>(lab: &'lab Lab, service: &Service) -> Result<Vec<Sender<'lab>>> {
    let (pod, node) = (lab.place("client-a")?, lab.place("node-a")?);
    let targets = Family::ALL.map(|family| service.cluster(family, Protocol::Udp));
    let each =
        |target| [Sender::new(pod, target, true), Sender::new(node, target, true), Sender::new(node, target, false)];
    Ok(targets.into_iter().flat_map(each).collect())
}

/// And the client outside, by XDP and by TC.
fn everywhere(lab: &Lab) -> Result<Vec<Sender<'_>>> {
    everywhere_of(lab, &service(&[]))
}

fn everywhere_of<'lab>(lab: &'lab Lab, service: &Service) -> Result<Vec<Sender<'lab>>> {
    let mut senders = inside_of(lab, service)?;
    for node in &lab.nodes {
        for family in Family::ALL {
            let target = service.at_node(node.addresses(), family, Protocol::Udp);
            senders.push(Sender::new(&lab.client, target, true));
        }
    }
    Ok(senders)
}

fn all_move_to(senders: &mut [Sender<'_>], sinks: &Sinks, pod: &str) -> Result<()> {
    let took: Vec<_> = senders.iter_mut().map(|sender| sender.must_move_to(sinks, pod)).collect::<Result<_>>()?;
    eprintln!("to {pod}: after {:?} at most", took.into_iter().max().unwrap_or_default());
    Ok(())
}

/// Nobody is ended, not even for a moment, nor sends to anybody else.
fn all_stay_at(senders: &mut [Sender<'_>], sinks: &Sinks, pod: &str) -> Result<()> {
    let _ = sinks.heard();
    for sender in senders {
        ensure!(sender.send()? == Ok(()), "{sender}, to {pod}");
        let heard = wait_until("a datagram", SOON, || Some(sinks.heard()).filter(|heard| !heard.is_empty()))?;
        ensure!(heard.keys().eq([&pod]), "{sender}: {heard:?} instead of {pod} alone");
    }
    Ok(())
}

fn all_end(senders: &mut [Sender<'_>], sinks: &Sinks) -> Result<()> {
    senders.iter_mut().try_for_each(|sender| sender.must_end(sinks))
}

/// The first and the second shape, and whoever began when there was nobody.
#[test]
fn scenario_27_from_some_to_none_and_from_none_to_one_a_client_who_only_sends_is_followed() -> Result<()> {
    let (cluster, sinks) = start(from_ref(&service(&[])))?;
    let mut senders = everywhere(&cluster.lab)?;
    all_end(&mut senders, &sinks)?;
    for pod in ["a1", "b1"] {
        service(&[pod]).write(cluster.source())?;
        all_move_to(&mut senders, &sinks, pod)?;
        service(&[]).write(cluster.source())?;
        all_end(&mut senders, &sinks)?;
    }
    Ok(())
}

fn write_changed(cluster: &Cluster, service: &Service, kind: &str, change: impl Fn(&mut Value)) -> Result<()> {
    let mut documents = service.documents();
    documents.iter_mut().filter(|document| document["kind"] == kind).for_each(change);
    write_documents(cluster.source(), &format!("{}.yaml", service.name), &documents)
}

/// The third shape: endpoints elsewhere do not count.
#[test]
fn scenario_27_under_policy_local_a_client_who_only_sends_follows_the_endpoints_of_its_node() -> Result<()> {
    let (cluster, sinks) = start(from_ref(&service(&["a1"])))?;
    let serve_by = |pods: &[&'static str]| {
        write_changed(&cluster, &service(pods), "Service", |object| {
            object["spec"]["internalTrafficPolicy"] = json!("Local");
        })
    };
    let mut senders = inside(&cluster.lab)?;
    for (pods, local) in [(&["a1", "b1"][..], "a1"), (&["a2", "b1"], "a2"), (&["b1", "b2", "a1"], "a1")] {
        serve_by(pods)?;
        all_move_to(&mut senders, &sinks, local)?;
    }
    Ok(())
}

/// The fourth shape: an endpoint stays in its slice, and is not ready.
#[test]
fn scenario_27_a_client_who_only_sends_leaves_an_endpoint_that_is_not_ready_and_finds_it_again() -> Result<()> {
    let (cluster, sinks) = start(from_ref(&service(&["a1", "b1"])))?;
    let mut senders = everywhere(&cluster.lab)?;
    for (ready, pod) in [(0, "a1"), (1, "b1"), (0, "a1")] {
        write_changed(&cluster, &service(&["a1", "b1"]), "EndpointSlice", |slice| {
            for (number, endpoint) in slice["endpoints"].as_array_mut().into_iter().flatten().enumerate() {
                let is_ready = number == ready;
                endpoint["conditions"] = json!({ "ready": is_ready, "serving": is_ready, "terminating": false });
            }
        })?;
        all_move_to(&mut senders, &sinks, pod)?;
    }
    Ok(())
}

/// The fifth shape: what an agent does when it starts takes no flow from its backend, and no entry out of the table.
#[test]
fn scenario_27_a_restart_keeps_the_flows_of_clients_who_only_send_and_they_move_as_ever_afterwards() -> Result<()> {
    let (cluster, sinks) = start(from_ref(&service(&PODS)))?;
    let mut senders = everywhere(&cluster.lab)?;
    let one = |sender: &mut Sender<'_>| -> Result<&'static str> {
        ensure!(sender.send()? == Ok(()), "{sender}");
        wait_until("a datagram", SOON, || sinks.heard().into_keys().next())
    };
    let before: Vec<_> = senders.iter_mut().map(one).collect::<Result<_>>()?;
    let opened = || -> Result<u64> {
        let hooks = [Hook::UplinkXdp, Hook::UplinkIn, Hook::PodIn];
        let counts = cluster.lab.nodes.iter().flat_map(|node| hooks.map(|hook| node.counted(hook, Outcome::Opened)));
        counts.sum()
    };
    let known = opened()?;
    cluster.restart_agents()?;
    for (sender, pod) in senders.iter_mut().zip(&before) {
        // Who names the Service with each datagram has no flow.
        let heard = one(sender)?;
        ensure!(heard == *pod || !sender.is_connected, "{sender} has left {pod} for {heard}");
    }
    assert_eq!(opened()?, known, "no flow began anew");
    service(&["b2"]).write(cluster.source())?;
    all_move_to(&mut senders, &sinks, "b2")
}

/// A sixth shape: the endpoint serves on, for another Service. Each Service's clients go by what is said of their own.
#[test]
fn scenario_27_a_client_who_only_sends_leaves_an_endpoint_that_another_service_has_still() -> Result<()> {
    let other = Service { target_port: SINK, ..Service::new("other", 41, &["a1"]) };
    let (cluster, sinks) = start(&[service(&["a1"]), other.clone()])?;
    let (mut own, mut others) = (everywhere(&cluster.lab)?, everywhere_of(&cluster.lab, &other)?);
    all_move_to(&mut own, &sinks, "a1")?;
    all_move_to(&mut others, &sinks, "a1")?;
    let is_unready = |of: &'static str| {
        write_changed(&cluster, &service(&["a1", "b1"]), "EndpointSlice", move |slice| {
            let endpoints = slice["endpoints"].as_array_mut().into_iter().flatten();
            for endpoint in endpoints.filter(|endpoint| endpoint["targetRef"]["name"] == of) {
                endpoint["conditions"] = json!({ "ready": false, "serving": false, "terminating": false });
            }
        })
    };
    // A selector that is another's.
    service(&["b1"]).write(cluster.source())?;
    all_move_to(&mut own, &sinks, "b1")?;
    all_stay_at(&mut others, &sinks, "a1")?;
    // And back, by one who is not ready.
    is_unready("b1")?;
    all_move_to(&mut own, &sinks, "a1")?;
    is_unready("a1")?;
    all_move_to(&mut own, &sinks, "b1")?;
    all_stay_at(&mut others, &sinks, "a1")?;
    // One who drains is kept, as long as that is said of it.
    service(&["a2"]).terminating(&["b1"]).write(cluster.source())?;
    wait_until("a2 to have newcomers", SOON, || {
        let mut newcomer = Sender::new(own[0].place, own[0].target, true);
        newcomer.send().ok()?.ok()?;
        thread::sleep(PAUSE);
        sinks.heard().contains_key("a2").then_some(())
    })?;
    all_stay_at(&mut own, &sinks, "b1")?;
    // While no agent is there, nobody sees who is lost.
    cluster.lab.nodes.iter().for_each(Node::kill_agent);
    Service { pods: vec!["b1"], ..other.clone() }.write(cluster.source())?;
    service(&["a2"]).write(cluster.source())?;
    cluster.restart_agents()?;
    all_move_to(&mut own, &sinks, "a2")?;
    all_move_to(&mut others, &sinks, "b1")
}
