//! What Kubernetes means: the rules of kube-proxy in plain words, without a look at how the agent goes about it. In: who
//! asks what of which Service, under which settings. Out: which backends may answer and whom they see, or a refusal, or
//! silence.
//!
//! Where it says "ours", we differ from kube-proxy on purpose.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnet::IpNet;
use tests::{
    lab::{
        address::{self, CLIENT, Family, GATEWAY, NodePlan, PodNetwork},
        agent::SocketLb,
    },
    traffic::{Protocol, socket::any_like},
};

use crate::fixture::{Destination, Endpoint, Fixture, IpMode, Policy, RangeScope, State};

/// Who answers what leaks out of the nodes.
pub(crate) const GATEWAY_NAME: &str = "wire";

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Client {
    Pod(&'static str),
    /// A process in the node's own network.
    Node(&'static str),
    /// Beyond the wire, with routes to every address of the Services by this node.
    Outside(&'static str),
}

/// How the agents are set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Settings {
    /// Begins the names of cases, unless it is empty.
    pub(crate) name: &'static str,
    pub(crate) socket_lb: SocketLb,
    pub(crate) masquerade_all: bool,
    pub(crate) masquerade_local_backends: bool,
    /// Node ports are served on every address of the node, not on the primary ones alone.
    pub(crate) every_address: bool,
}

/// A question.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Situation<'a> {
    pub(crate) client: Client,
    pub(crate) destination: Destination,
    pub(crate) service: &'a Fixture,
    pub(crate) family: Family,
    pub(crate) protocol: Protocol,
    pub(crate) settings: Settings,
}

/// What is to come of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Expected {
    /// Each of these answers at some time, nobody else ever, and each sees one of the addresses as the client's.
    Answers(BTreeMap<&'static str, BTreeSet<IpAddr>>),
    /// TCP and UDP alike: connection refused, at once.
    Reject,
    /// Silence; but where the socket itself is translated, it may be told at once that the host is unreachable: ours.
    Drop,
}

/// From where a packet came to the node that translates it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    LocalPod,
    Node,
    Outside,
}

/// The endpoints of a Service as one node may use them (pkg/proxy/topology.go).
struct Lists {
    cluster: Vec<Endpoint>,
    local: Vec<Endpoint>,
    has_any: bool,
}

impl Client {
    /// The place of the lab it is at.
    pub(crate) const fn place(self) -> &'static str {
        match self {
            Self::Pod(name) | Self::Node(name) => name,
            Self::Outside(_) => "client",
        }
    }

    /// What its sockets are bound to: the routes of the client outside hang on it, others leave it to the kernel.
    pub(crate) fn source(self, family: Family) -> IpAddr {
        match self {
            Self::Outside(_) => self.address(family),
            Self::Pod(_) | Self::Node(_) => any_like(self.address(family)),
        }
    }

    /// The address its packets bear, as far as it has a choice of one.
    pub(crate) fn address(self, family: Family) -> IpAddr {
        match self {
            Self::Outside("node-b") => address::on_wire(CLIENT + 1).of(family),
            Self::Outside(_) => address::on_wire(CLIENT).of(family),
            Self::Pod(name) | Self::Node(name) => home(name).1.of(family),
        }
    }
}

impl Situation<'_> {
    pub(crate) fn expected(&self) -> Expected {
        let lists = lists(self.service, self.node().name);
        match self.destination {
            Destination::Unallocated => return Expected::Drop,
            Destination::ClusterIp if self.service.is_absent => return Expected::Drop,
            Destination::UndefinedPort => return Expected::Reject,
            _ => {}
        }
        if self.destination == Destination::Balancer && self.service.ip_mode == IpMode::Proxy {
            // Not an address of the Service's: on its way to whoever has it, which is the gateway.
            let seen = [self.client.address(self.family)].into();
            return Expected::Answers([(GATEWAY_NAME, seen)].into());
        }
        if !self.may_ask() {
            return Expected::Drop;
        }
        let list = if self.uses_local() { &lists.local } else { &lists.cluster };
        match (list.is_empty(), lists.has_any) {
            (false, _) => Expected::Answers(list.iter().map(|backend| (backend.pod, self.seen_by(backend))).collect()),
            (true, false) => Expected::Reject,
            (true, true) => Expected::Drop,
        }
    }

    /// The node whose rules apply: the one addressed, else the one the client's packets come by first.
    fn node(&self) -> &'static NodePlan {
        match (self.destination, self.client) {
            (Destination::NodePort(node), _) | (_, Client::Outside(node)) => home(node).0,
            (_, Client::Pod(name) | Client::Node(name)) => home(name).0,
        }
    }

    fn origin(&self) -> Origin {
        let is_at_home = home(self.client.place_of_entry()).0.name == self.node().name;
        match self.client {
            Client::Pod(_) if is_at_home => Origin::LocalPod,
            Client::Node(_) if is_at_home => Origin::Node,
            // Ours: a pod of another node has come by an uplink, and that is outside.
            _ => Origin::Outside,
        }
    }

    fn uses_local(&self) -> bool {
        if self.destination.is_external() {
            // Clients on the node get the cluster's endpoints, as if their packets had gone out and come back.
            self.service.external == Policy::Local && self.origin() == Origin::Outside
        } else {
            self.service.internal == Policy::Local
        }
    }

    /// `loadBalancerSourceRanges`
    fn may_ask(&self) -> bool {
        let is_restricted = match self.destination {
            Destination::Balancer => true,
            // Ours: by annotation.
            Destination::NodePort(_) | Destination::External => self.service.range_scope == RangeScope::All,
            _ => false,
        };
        let ranges = self.service.source_ranges.iter().filter_map(|range| range.trim().parse::<IpNet>().ok());
        let mut ranges = ranges.filter(|range| Family::of(range.addr()) == self.family).peekable();
        let source = self.client.address(self.family);
        !is_restricted || ranges.peek().is_none() || ranges.any(|range| range.contains(&source))
    }

    /// Whom a backend sees.
    fn seen_by(&self, backend: &Endpoint) -> BTreeSet<IpAddr> {
        let node = self.node();
        let masqueraded = address::on_wire(node.host).of(self.family);
        if self.origin() == Origin::Node {
            // Whichever of its addresses leads to the backend.
            let gateway = (node.pod_network == PodNetwork::Bridged).then(|| address::of_pod(node.number, GATEWAY));
            return gateway.map(|gateway| gateway.of(self.family)).into_iter().chain([masqueraded]).collect();
        }
        let source = if self.is_masqueraded(backend) { masqueraded } else { self.client.address(self.family) };
        [source].into()
    }

    fn is_masqueraded(&self, backend: &Endpoint) -> bool {
        let is_local = home(backend.pod).0.name == self.node().name;
        let is_host_network = address::node(backend.pod).is_some();
        if self.client == Client::Pod(backend.pod) {
            // Ours: a socket that was given its own address as backend talks to itself, and no packet is ever seen.
            return !self.is_socket_translated();
        }
        if is_local && is_host_network {
            return false;
        }
        match self.destination {
            Destination::ClusterIp | Destination::UndefinedPort | Destination::Unallocated => {
                self.origin() == Origin::Outside || self.settings.masquerade_all
            }
            _ if self.service.external == Policy::Local => false,
            // Ours, unless the switch is set: there is no need to for a backend on this node.
            _ => !is_local || self.settings.masquerade_local_backends,
        }
    }

    /// Whether the client's socket is given its backend when it connects.
    pub(crate) fn is_socket_translated(&self) -> bool {
        match self.client {
            Client::Node(_) => self.origin() == Origin::Node,
            Client::Pod(_) => self.is_translated_for_pods(),
            Client::Outside(_) => false,
        }
    }

    /// Pods have that where the node's address never has to take the place of theirs.
    fn is_translated_for_pods(&self) -> bool {
        self.protocol == Protocol::Tcp
            && !self.destination.is_external()
            && self.settings.socket_lb == SocketLb::All
            && !self.settings.masquerade_all
            && !self.service.has_affinity
    }
}

impl Client {
    const fn place_of_entry(self) -> &'static str {
        match self {
            Self::Pod(name) | Self::Node(name) | Self::Outside(name) => name,
        }
    }
}

/// The node of a pod, and its addresses. Names stand in these sources, not in input.
fn home(name: &str) -> (&'static NodePlan, address::Addresses) {
    address::pod(name).expect("the name of a pod or a node of the lab")
}

fn lists(service: &Fixture, node: &str) -> Lists {
    let endpoints = merged(service);
    let with = |state| endpoints.iter().filter(move |endpoint| endpoint.state == state).copied();
    let is_local = |endpoint: &Endpoint| home(endpoint.pod).0.name == node;
    let mut cluster = near(with(State::Ready).collect(), home(node).0);
    if cluster.is_empty() {
        cluster = with(State::Draining).collect();
    }
    let mut local: Vec<_> = with(State::Ready).filter(is_local).collect();
    if local.is_empty() {
        local = with(State::Draining).filter(is_local).collect();
    }
    Lists { cluster, local, has_any: with(State::Ready).chain(with(State::Draining)).next().is_some() }
}

/// One opinion per endpoint: of several slices, one that does not let it terminate is right; ours: one that is ready first.
fn merged(service: &Fixture) -> Vec<Endpoint> {
    let mut merged: Vec<Endpoint> = Vec::new();
    for endpoint in service.endpoints.iter().chain(&service.more_endpoints) {
        match merged.iter_mut().find(|known| known.pod == endpoint.pod) {
            None => merged.push(*endpoint),
            Some(known) if known.state.is_terminating() && !endpoint.state.is_terminating() => *known = *endpoint,
            Some(known) if known.state == State::NotReady && endpoint.state == State::Ready => *known = *endpoint,
            Some(_) => {}
        }
    }
    merged
}

/// Topology: hints count if all ready endpoints have them and one of them is meant for us.
fn near(ready: Vec<Endpoint>, node: &NodePlan) -> Vec<Endpoint> {
    let ways: [fn(&Endpoint) -> &'static [&'static str]; 2] =
        [|endpoint| endpoint.for_nodes, |endpoint| endpoint.for_zones];
    for (hints, us) in ways.into_iter().zip([node.name, node.zone]) {
        let meant: Vec<_> = ready.iter().filter(|endpoint| hints(endpoint).contains(&us)).copied().collect();
        if !meant.is_empty() && ready.iter().all(|endpoint| !hints(endpoint).is_empty()) {
            return meant;
        }
    }
    ready
}
