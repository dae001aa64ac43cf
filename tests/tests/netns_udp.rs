//! UDP flows when endpoints come and go, in the five shapes that black-holed others: always from one and the same socket,
//! because that is what keeps a stale flow alive.

use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};
use tests::{
    lab::{
        Lab, LabOptions,
        address::Family,
        agent::{AgentOptions, SocketLb},
        cluster::Cluster,
        manifest::{Service, write_documents},
    },
    patience::{patience, wait_until},
    traffic::{
        Answer, Ask, Failure, Protocol,
        place::{Activity, Place},
    },
};

/// Until traffic follows a change.
const SOON: Duration = Duration::from_secs(1);

/// How long a datagram may wait for its answer.
const MOMENT: Duration = Duration::from_millis(200);

/// What a socket is told that was connected to a backend which no longer serves.
const ENDED: [Failure; 2] = [Failure::Reset, Failure::System { errno: libc::EDESTADDRREQ }];

/// A client that sends from one socket.
struct Sender<'lab> {
    place: &'lab Place,
    ask: Ask,
    socket: Option<Activity<'lab>>,
    /// It was translated as it connected, so it has to be ended to get elsewhere.
    may_be_ended: bool,
}

impl<'lab> Sender<'lab> {
    fn new(place: &'lab Place, ask: Ask) -> Self {
        Self { place, ask: ask.within(patience(MOMENT)), socket: None, may_be_ended: false }
    }

    fn connected(self) -> Self {
        Self { may_be_ended: true, ..self }
    }

    /// A datagram and its answer. A socket that was ended is replaced, as applications do.
    fn try_ask(&mut self) -> Result<Result<Answer, Failure>> {
        let socket = match self.socket.take() {
            Some(socket) => socket,
            None => match self.place.open(self.ask) {
                Ok(socket) => socket,
                Err(error) => return error.downcast::<Failure>().map(Err),
            },
        };
        let answer = socket.try_ask()?;
        if answer.as_ref().is_err_and(|failure| ENDED.contains(failure)) {
            if !self.may_be_ended {
                bail!("the socket of {self} was ended");
            }
            socket.close()?;
        } else {
            self.socket = Some(socket);
        }
        Ok(answer)
    }

    fn must(&mut self, what: &str, is_so: impl Fn(&Result<Answer, Failure>) -> bool) -> Result<()> {
        let (mut broken, mut last) = (None, None);
        let waited = wait_until(what, SOON, || match self.try_ask() {
            Ok(answer) if is_so(&answer) => Some(()),
            Ok(answer) => {
                last = Some(answer);
                None
            }
            Err(error) => {
                broken = Some(error);
                Some(())
            }
        });
        match broken {
            Some(error) => Err(error),
            None => waited.with_context(|| format!("{self}, and in the end: {last:?}")),
        }
    }

    fn must_reach(&mut self, pod: &str) -> Result<()> {
        self.must(pod, |answer| answer.as_ref().is_ok_and(|answer| answer.pod == pod))
    }

    fn must_fail(&mut self, failure: &Failure) -> Result<()> {
        self.must(&format!("{failure}"), |answer| answer.as_ref() == Err(failure))
    }
}

impl std::fmt::Display for Sender<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let way = if self.ask.unconnected { ", unconnected" } else { "" };
        write!(f, "{} to {}{way}", self.place.name(), self.ask.target)
    }
}

fn start(service: &Service) -> Result<Cluster> {
    let options = AgentOptions { socket_lb: SocketLb::All, ..AgentOptions::default() };
    Cluster::start(LabOptions::default(), options, std::slice::from_ref(service))
}

/// A pod, whose packets are translated, and the node's own sockets, connected and not.
fn inside<'lab>(lab: &'lab Lab, service: &Service) -> Result<Vec<Sender<'lab>>> {
    let (pod, node) = (lab.place("client-a")?, lab.place("node-a")?);
    let asks = Family::ALL.map(|family| Ask::new(service.cluster(family, Protocol::Udp)));
    let senders = asks
        .map(|ask| [Sender::new(pod, ask), Sender::new(node, ask).connected(), Sender::new(node, ask.unconnected())]);
    Ok(senders.into_iter().flatten().collect())
}

/// And the client outside, by XDP and by TC.
fn everywhere<'lab>(lab: &'lab Lab, service: &Service) -> Result<Vec<Sender<'lab>>> {
    let mut senders = inside(lab, service)?;
    for family in Family::ALL {
        for node in &lab.nodes {
            let target = service.at_node(node.addresses(), family, Protocol::Udp);
            senders.push(Sender::new(&lab.client, Ask::new(target)));
        }
    }
    Ok(senders)
}

fn all_reach(senders: &mut [Sender<'_>], pod: &str) -> Result<()> {
    senders.iter_mut().try_for_each(|sender| sender.must_reach(pod))
}

/// Trap 2: with the last endpoint gone, a flow that goes on sending is told so and reaches nobody; with the first one there
/// it is served again, from the same socket.
#[test]
fn from_some_to_none_a_flow_is_refused_and_from_none_to_some_it_is_served() -> Result<()> {
    let service = Service::new("moving", 40, &["a1"]);
    let cluster = start(&service)?;
    let mut senders = everywhere(&cluster.lab, &service)?;
    all_reach(&mut senders, "a1")?;
    service.with_pods(&[]).write(cluster.source())?;
    senders.iter_mut().try_for_each(|sender| sender.must_fail(&Failure::Refused))?;
    service.with_pods(&["b1"]).write(cluster.source())?;
    all_reach(&mut senders, "b1")
}

/// Trap 2: a flow that began when there was nobody to serve it is served once there is.
#[test]
fn a_flow_that_began_with_nobody_to_serve_it_is_served_by_the_first_to_come() -> Result<()> {
    let service = Service::new("moving", 40, &[]);
    let cluster = start(&service)?;
    let mut senders = everywhere(&cluster.lab, &service)?;
    senders.iter_mut().try_for_each(|sender| sender.must_fail(&Failure::Refused))?;
    service.with_pods(&["a2"]).write(cluster.source())?;
    all_reach(&mut senders, "a2")
}

/// Changes every object of a kind in a Service's file.
fn write_changed(cluster: &Cluster, service: &Service, kind: &str, change: impl Fn(&mut Value)) -> Result<()> {
    let mut documents = service.documents();
    documents.iter_mut().filter(|document| document["kind"] == kind).for_each(change);
    write_documents(cluster.source(), &format!("{}.yaml", service.name), &documents)
}

/// Trap 2: the same under internalTrafficPolicy Local, where endpoints elsewhere do not count.
#[test]
fn under_policy_local_a_flow_follows_the_endpoints_of_its_node() -> Result<()> {
    let service = Service::new("moving", 40, &["a1"]);
    let cluster = start(&service)?;
    let serve_by = |pods: &[&'static str]| {
        write_changed(&cluster, &service.with_pods(pods), "Service", |object| {
            object["spec"]["internalTrafficPolicy"] = json!("Local");
        })
    };
    let mut senders = inside(&cluster.lab, &service)?;
    for (pods, local) in [(&["a1", "b1"][..], "a1"), (&["a2", "b1"], "a2"), (&["b1", "b2", "a1"], "a1")] {
        serve_by(pods)?;
        all_reach(&mut senders, local)?;
    }
    serve_by(&["b1"])?;
    for sender in &mut senders {
        let is_pod = sender.place.name() == "client-a";
        // Packets are dropped, as the rule has it; a socket can be told at once.
        sender.must_fail(if is_pod { &Failure::TimedOut } else { &Failure::Unreachable })?;
    }
    serve_by(&["b1", "a2"])?;
    all_reach(&mut senders, "a2")
}

/// Trap 2: an endpoint that stays in its slice but is not ready is left, and found again.
#[test]
fn a_flow_leaves_an_endpoint_that_is_not_ready_and_finds_it_again() -> Result<()> {
    let service = Service::new("moving", 40, &["a1", "b1"]);
    let cluster = start(&service)?;
    let serve_by = |ready: usize| {
        write_changed(&cluster, &service, "EndpointSlice", |slice| {
            for (number, endpoint) in slice["endpoints"].as_array_mut().into_iter().flatten().enumerate() {
                let is_ready = number == ready;
                endpoint["conditions"] = json!({ "ready": is_ready, "serving": is_ready, "terminating": false });
            }
        })
    };
    let mut senders = everywhere(&cluster.lab, &service)?;
    for (ready, pod) in [(0, "a1"), (1, "b1"), (0, "a1")] {
        serve_by(ready)?;
        all_reach(&mut senders, pod)?;
    }
    Ok(())
}

/// Trap 2, and trap 19: flows stay where they are when the agent starts again, and move as ever afterwards.
#[test]
fn a_restart_of_the_agent_moves_no_flow() -> Result<()> {
    let service = Service::new("moving", 40, &["a1", "a2", "b1"]);
    let cluster = start(&service)?;
    let mut senders = everywhere(&cluster.lab, &service)?;
    let before: Result<Vec<_>> = senders.iter_mut().map(|sender| Ok(sender.try_ask()??.pod)).collect();
    let before = before?;
    cluster.restart_agents()?;
    for (sender, pod) in senders.iter_mut().zip(&before) {
        assert_eq!(&sender.try_ask()??.pod, pod, "{sender}");
    }
    service.with_pods(&["b2"]).write(cluster.source())?;
    all_reach(&mut senders, "b2")
}

/// Trap 4: another socket with the source port of a flow whose backend has left gets one that serves.
#[test]
fn a_source_port_that_is_used_again_is_served_by_who_serves_now() -> Result<()> {
    let service = Service::new("moving", 40, &["a1"]);
    let cluster = start(&service)?;
    let client = cluster.lab.place("client-a")?;
    for family in Family::ALL {
        let ask = Ask::new(service.cluster(family, Protocol::Udp)).within(patience(MOMENT));
        let any = match family {
            Family::V4 => std::net::SocketAddr::from(([0, 0, 0, 0], 5_353)),
            Family::V6 => std::net::SocketAddr::from((std::net::Ipv6Addr::UNSPECIFIED, 5_353)),
        };
        for pods in [&["a1"][..], &[], &["b1"], &["a2"]] {
            service.with_pods(pods).write(cluster.source())?;
            wait_until(&format!("{pods:?} to serve"), SOON, || {
                let answer = client.ask_times(ask.from(any), 1).ok()?.pop()?;
                let is_so = match (pods, answer) {
                    ([pod], Ok(answer)) => answer.pod == *pod,
                    ([], Err(failure)) => failure == Failure::Refused,
                    _ => false,
                };
                is_so.then_some(())
            })?;
        }
    }
    Ok(())
}

/// As [`a_flow_leaves_an_endpoint_that_is_not_ready_and_finds_it_again`], where another Service has the endpoint still: flows that are
/// answered, and are confirmed therefore. Connections have no part in it: TCP keeps an endpoint until it has left every slice.
#[test]
fn a_flow_leaves_an_endpoint_that_its_service_has_lost_and_another_has_still() -> Result<()> {
    let (service, other) = (Service::new("moving", 40, &["a1"]), Service::new("other", 41, &["a1"]));
    let cluster = start(&service)?;
    other.write(cluster.source())?;
    let mut senders = everywhere(&cluster.lab, &service)?;
    let mut others = everywhere(&cluster.lab, &other)?;
    all_reach(&mut senders, "a1")?;
    all_reach(&mut others, "a1")?;
    let connections: Vec<_> = ["client-a", "node-a"]
        .into_iter()
        .flat_map(|name| Family::ALL.map(|family| (name, Ask::new(service.cluster(family, Protocol::Tcp)))))
        .map(|(name, ask)| cluster.lab.place(name)?.open(ask))
        .collect::<Result<_>>()?;
    service.with_pods(&["b1"]).write(cluster.source())?;
    all_reach(&mut senders, "b1")?;
    for sender in &mut others {
        assert_eq!(sender.try_ask()??.pod, "a1", "{sender}");
    }
    for connection in &connections {
        assert_eq!(connection.ask()?.pod, "a1");
    }
    service.with_pods(&[]).write(cluster.source())?;
    senders.iter_mut().try_for_each(|sender| sender.must_fail(&Failure::Refused))?;
    service.with_pods(&["a1"]).write(cluster.source())?;
    all_reach(&mut senders, "a1")
}
