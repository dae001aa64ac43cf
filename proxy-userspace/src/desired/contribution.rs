//! What one Service contributes to the tables of a family: its frontends with what stands behind them, and its endpoints.

use std::{
    cell::LazyCell,
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    num::{NonZeroU16, NonZeroU32},
    sync::Arc,
};

use proxy_common::{
    addr::{Port, Protocol},
    backend::BackendState,
    service::{Frontend, Pick, WhenEmpty, flag},
};

use super::{
    DesiredBackend, DesiredService, Family, Target, crossing, range,
    rules::Rules,
    sources::{self, Sources},
};
use crate::{
    algorithm::AlgorithmName,
    model::{self, Endpoint, Model, ObjectName, Problem, ServicePort, ServicePortName, SourceScope, TrafficPolicy},
    node_port_mode::NodePortMode,
    topology::{self, Lists, Place},
};

/// Who gets a frontend that several claim: whose family it is, then the oldest, then the one with the smaller uid, on every node
/// the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Claim<'a> {
    /// The backends are of the other family.
    crosses: bool,
    pub(super) created: i64,
    pub(super) uid: &'a str,
    pub(super) service: &'a ObjectName,
}

/// A frontend, and what stands behind it.
type Entry<A> = (Frontend<A>, Arc<DesiredService<A>>);

/// What a Service contributes to the tables of a family.
#[derive(Debug)]
pub(super) struct Contribution<A: Ord> {
    /// None for one that has only endpoints.
    service: Option<Arc<model::Service>>,
    /// In order, each once; a map of so few would be ten times as large.
    frontends: Box<[Entry<A>]>,
    /// In order, each once.
    backends: Box<[(Target<A>, DesiredBackend<A>)]>,
    /// Addresses it may not have.
    pub(super) refused: Vec<Problem>,
    pub(super) no_local: NoLocal,
}

/// Ports whose clients may only be sent to endpoints of this node, and that have none here but some elsewhere.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NoLocal {
    /// By `spec.internalTrafficPolicy`.
    pub internal: usize,
    /// By `spec.externalTrafficPolicy`.
    pub external: usize,
}

impl<A: Ord + Copy> Contribution<A> {
    /// Its frontends, in order.
    pub(super) fn frontends(&self) -> impl Iterator<Item = Frontend<A>> {
        self.frontends.iter().map(|(frontend, _)| *frontend)
    }

    /// Its endpoints, in order.
    pub(super) fn targets(&self) -> impl Iterator<Item = Target<A>> {
        self.backends.iter().map(|(target, _)| *target)
    }

    /// Its claim to a frontend.
    pub(super) fn claim_to(&self, frontend: &Frontend<A>) -> Option<Claim<'_>> {
        let crosses = self.service(frontend).is_some_and(|service| service.flags & flag::CROSS != 0);
        Some(Claim { crosses, ..self.claim()? })
    }

    /// Its claim to frontends of its own family.
    pub(super) fn claim(&self) -> Option<Claim<'_>> {
        let service = self.service.as_ref()?;
        Some(Claim { crosses: false, created: service.created, uid: &service.uid, service: &service.name })
    }

    /// What it has behind a frontend.
    pub(super) fn service(&self, frontend: &Frontend<A>) -> Option<&Arc<DesiredService<A>>> {
        let place = self.frontends.binary_search_by_key(frontend, |(other, _)| *other).ok()?;
        self.frontends.get(place).map(|(_, service)| service)
    }

    /// What it knows of an endpoint.
    pub(super) fn backend(&self, target: &Target<A>) -> Option<DesiredBackend<A>> {
        let place = self.backends.binary_search_by_key(target, |(other, _)| *other).ok()?;
        self.backends.get(place).map(|(_, backend)| *backend)
    }
}

/// What a contribution depends on beside the Service itself.
pub(super) struct World<'a> {
    pub(super) model: &'a Model,
    pub(super) place: &'a Place,
    pub(super) rules: &'a Rules,
    /// The algorithm of Services that name none.
    pub(super) usual: AlgorithmName,
    /// How packets from outside get to other nodes, for Services that do not say it.
    pub(super) mode: NodePortMode,
    /// The node translates between the families.
    pub(super) crosses: bool,
}

impl World<'_> {
    /// Whether an endpoint is one of a Service's backends in the tables of a family: those of IPv6 have all of them, if the
    /// Service is served to both.
    fn has_backend<A: Family>(&self, service: Option<&model::Service>, address: IpAddr) -> bool {
        let home =
            service.filter(|service| self.crosses && service.crosses).and_then(|service| service.cluster_ips.first());
        match home {
            Some(home) => home.is_ipv4() == address.is_ipv4() && A::mixed(address).is_some(),
            None => A::of(address).is_some(),
        }
    }
}

pub(super) fn contribution<A: Family>(name: &ObjectName, world: &World<'_>) -> Option<Contribution<A>> {
    let service = world.model.shared_service(name);
    if !concerns::<A>(name, service.as_deref(), world) {
        return None;
    }
    let backends = backends(name, service.as_deref(), world);
    let (mut refused, mut no_local) = (Vec::new(), NoLocal::default());
    let frontends =
        service.as_ref().map(|service| frontends(service, world, &mut refused, &mut no_local)).unwrap_or_default();
    let is_empty = frontends.is_empty() && backends.is_empty() && refused.is_empty();
    let frontends = frontends.into_iter().collect();
    (!is_empty).then_some(Contribution { service, frontends, backends, refused, no_local })
}

/// Whether there can be anything for a family: most Services are of one.
fn concerns<A: Family>(name: &ObjectName, service: Option<&model::Service>, world: &World<'_>) -> bool {
    let has_address = |service: &model::Service| service.cluster_ips.iter().any(|address| A::of(*address).is_some());
    let mut endpoints = world.model.slices(name).flat_map(|slice| slice.endpoints.iter());
    service.is_some_and(|service| service.crosses || has_address(service))
        || endpoints.any(|endpoint| A::of(endpoint.address).is_some())
}

/// Everything that stands in a slice, also when no port of the Service leads to it: connections that are there keep it
/// until it has left. Where ports disagree about one they share, the better opinion counts: a frontend may lead to it.
fn backends<A: Family>(
    name: &ObjectName,
    service: Option<&model::Service>,
    world: &World<'_>,
) -> Box<[(Target<A>, DesiredBackend<A>)]> {
    let endpoints = model::endpoints_by_port(world.model.slices(name));
    // What is kept of it is of that length: one that shrinks leaves a gap that nothing fits into.
    let mut backends: Vec<(Target<A>, DesiredBackend<A>)> = Vec::with_capacity(endpoints.len());
    for ((address, _), endpoint) in endpoints {
        if !world.has_backend::<A>(service, address.ip()) {
            continue;
        }
        let Some(target) = target(address) else { continue };
        backends.push((target, DesiredBackend::of(endpoint, world.model)));
    }
    backends.sort_by_key(|(target, _)| *target);
    backends.dedup_by(|(target, opinion), (known, best)| {
        let is_same = target == known;
        if is_same {
            *best = best.better(*opinion);
        }
        is_same
    });
    backends.into()
}

fn frontends<A: Family>(
    service: &model::Service,
    world: &World<'_>,
    refused: &mut Vec<Problem>,
    no_local: &mut NoLocal,
) -> BTreeMap<Frontend<A>, Arc<DesiredService<A>>> {
    let mut frontends = crossing::frontends(service, world, refused);
    let Some((home, cluster_ip)) = service.cluster_ips.iter().find_map(|address| Some((*address, A::of(*address)?)))
    else {
        return frontends;
    };
    let is_left = world.rules.on_devices.contains(&home);
    let sources = sources::sources(service, world.place, A::of(IpAddr::from([0; 4])).is_some());
    for port in &service.ports {
        let [inside, outside] = port_services::<A>(service, port, world).map(Arc::new);
        no_local.add(service, port, &inside, &outside);
        let frontend =
            |address: A, number: NonZeroU16| Frontend::new(address, Port::new(number.get()), port.name.protocol);
        if !is_left {
            frontends.entry(frontend(cluster_ip, port.port)).or_insert(inside);
        }
        let restricted = restrict(&outside, sources.as_ref());
        let check = |address| world.rules.check(address, port);
        for address in permitted(&service.balancer_ips, A::of, check, refused) {
            frontends.entry(frontend(address, port.port)).or_insert_with(|| restricted.clone());
            frontends.entry(Frontend::whole(address)).or_insert_with(|| Arc::new(whole(&port.name, flag::EXTERNAL)));
        }
        let outside = if service.source_ranges.scope == SourceScope::All { restricted } else { outside };
        let check = |address| world.rules.check_external_ip(address, port);
        for address in permitted(&service.external_ips, A::of, check, refused) {
            frontends.entry(frontend(address, port.port)).or_insert_with(|| outside.clone());
            frontends.entry(Frontend::whole(address)).or_insert_with(|| Arc::new(whole(&port.name, flag::EXTERNAL)));
        }
        if let Some(number) = port.node_port {
            match world.rules.check_node_port(number.get()) {
                Ok(()) => drop(frontends.entry(frontend(A::ANY, number)).or_insert(outside)),
                Err(problem) => refused.push(problem),
            }
        }
    }
    if let Some(port) = service.ports.first().filter(|_| !is_left) {
        frontends.insert(Frontend::whole(cluster_ip), Arc::new(whole(&port.name, 0)));
    }
    frontends
}

impl NoLocal {
    fn add<A>(
        &mut self,
        service: &model::Service,
        port: &ServicePort,
        inside: &DesiredService<A>,
        outside: &DesiredService<A>,
    ) {
        let is_dropped = |range: &[Target<A>], when_empty| range.is_empty() && when_empty == WhenEmpty::Drop;
        if service.internal_policy == TrafficPolicy::Local && is_dropped(&inside.internal, inside.internal_empty) {
            self.internal += 1;
        }
        let is_local = service.external_policy == TrafficPolicy::Local && service.is_externally_accessible(port);
        if is_local && is_dropped(&outside.external, outside.external_empty) {
            self.external += 1;
        }
    }
}

/// The addresses that are meant and pass. What is wrong with the others is told once.
pub(super) fn permitted<A: Family>(
    addresses: &BTreeSet<IpAddr>,
    meant: impl Fn(IpAddr) -> Option<A>,
    check: impl Fn(IpAddr) -> Result<(), Problem>,
    refused: &mut Vec<Problem>,
) -> Vec<A> {
    let mut passed = Vec::new();
    for address in addresses {
        let Some(of_family) = meant(*address) else { continue };
        match check(*address) {
            Ok(()) => passed.push(of_family),
            Err(problem) if refused.contains(&problem) => {}
            Err(problem) => refused.push(problem),
        }
    }
    passed
}

/// The same for clients of some addresses only.
pub(super) fn restrict<A: Family>(
    service: &Arc<DesiredService<A>>,
    sources: Option<&Sources<A>>,
) -> Arc<DesiredService<A>> {
    let Some(sources) = sources else { return Arc::clone(service) };
    let flags = service.flags | flag::SOURCE_RANGES;
    Arc::new(DesiredService { flags, sources: Arc::clone(sources), ..DesiredService::clone(service) })
}

/// What the ports of an address lead to that its Service does not define. Those of a ClusterIP lead nowhere, and the client is
/// told; those of an external address are nobody's business, but it is known that a Service has it.
pub(super) fn whole<A>(port: &Arc<ServicePortName>, flags: u8) -> DesiredService<A> {
    DesiredService {
        port: Arc::clone(port),
        pick: Pick::default(),
        flags,
        affinity_seconds: 0,
        sources: Arc::default(),
        internal: Arc::default(),
        external: Arc::default(),
        local: Arc::default(),
        serving: Arc::default(),
        internal_empty: WhenEmpty::Reject,
        external_empty: WhenEmpty::Reject,
    }
}

/// What the ClusterIP leads to, and what NodePorts and external addresses lead to. Clients on the node that use the
/// latter get the cluster's endpoints whatever the policy: it is about what arrives from outside.
pub(super) fn port_services<A: Family>(
    service: &model::Service,
    port: &ServicePort,
    world: &World<'_>,
) -> [DesiredService<A>; 2] {
    let is_joined =
        |candidate: &model::SlicePort| candidate.name == port.name.port && candidate.protocol == port.name.protocol;
    let weights = &service.spread.weights;
    let mut endpoints = model::endpoints(world.model.slices(&service.name), is_joined);
    endpoints.retain(|(address, _)| world.has_backend::<A>(Some(service), address.ip()));
    let serving = if port.name.protocol == Protocol::Udp { serving(&endpoints) } else { Arc::default() };
    endpoints.retain(|(_, endpoint)| weights.of(endpoint) > 0);
    let lists = topology::select(&endpoints, world.place);
    let name = &port.name;
    let mode = service.node_port_mode.unwrap_or(world.mode);
    let algorithm = service.spread.algorithm.unwrap_or(world.usual).algorithm();
    let cluster = LazyCell::new(|| range::range(&lists.cluster, &endpoints, weights, algorithm));
    let local = LazyCell::new(|| range::range(&lists.local, &endpoints, weights, algorithm));
    let affinity = service.affinity_seconds.map_or(0, |_| flag::AFFINITY);
    let build = |flags: u8, internal: &Arc<[Target<A>]>, external: &Arc<[Target<A>]>| DesiredService {
        port: Arc::clone(name),
        pick: algorithm.pick(),
        flags: flags | affinity,
        affinity_seconds: service.affinity_seconds.map_or(0, NonZeroU32::get),
        sources: Arc::default(),
        internal: Arc::clone(internal),
        external: Arc::clone(external),
        local: if flags & flag::DISPATCHED != 0 { Arc::clone(&local) } else { Arc::default() },
        serving: Arc::clone(&serving),
        internal_empty: when_empty(&lists),
        external_empty: when_empty(&lists),
    };
    let inside = match service.internal_policy {
        TrafficPolicy::Cluster => build(0, &cluster, &cluster),
        TrafficPolicy::Local => build(0, &local, &local),
    };
    let outside = match service.external_policy {
        TrafficPolicy::Cluster if mode.dispatches(name.protocol) => {
            build(flag::EXTERNAL | flag::DISPATCHED, &cluster, &cluster)
        }
        TrafficPolicy::Cluster => build(flag::EXTERNAL, &cluster, &cluster),
        TrafficPolicy::Local => build(flag::EXTERNAL | flag::SOURCE_KEPT, &cluster, &local),
    };
    [inside, outside]
}

/// The endpoints of a Service port that answer, as kube-proxy keeps their flows (its pkg/proxy/conntrack/cleanup.go).
fn serving<A: Family>(endpoints: &[(SocketAddr, &Endpoint)]) -> Arc<[Target<A>]> {
    endpoints.iter().filter(|(_, endpoint)| is_serving(endpoint)).filter_map(|(address, _)| target(*address)).collect()
}

fn is_serving(endpoint: &Endpoint) -> bool {
    endpoint.is_serving || endpoint.is_ready
}

/// An empty range of a Service that has endpoints elsewhere is a matter of policy: the client is left to time out, so
/// that a load balancer tries another node. Without any endpoint it is told.
fn when_empty(lists: &Lists) -> WhenEmpty {
    if lists.has_any { WhenEmpty::Drop } else { WhenEmpty::Reject }
}

/// An endpoint as it stands in a family's tables.
pub(super) fn target<A: Family>(address: SocketAddr) -> Option<Target<A>> {
    Some(Target { addr: A::mixed(address.ip())?, port: Port::new(address.port()) })
}

impl<A: Family> DesiredBackend<A> {
    fn of(endpoint: &Endpoint, model: &Model) -> Self {
        let state = if is_serving(endpoint) { BackendState::Serving } else { BackendState::NotServing };
        let peer = model.peer(endpoint.node).filter(|_| !endpoint.is_local);
        let node = peer.and_then(|peer| peer.address(endpoint.address.is_ipv4())).and_then(A::of);
        Self { is_local: endpoint.is_local, node: node.unwrap_or(A::ANY), state }
    }

    pub(super) fn better(self, other: Self) -> Self {
        let is_serving = [self.state, other.state].contains(&BackendState::Serving);
        let state = if is_serving { BackendState::Serving } else { BackendState::NotServing };
        // Where they disagree it does not matter whose opinion counts, if it is always the same one's.
        Self { is_local: self.is_local || other.is_local, node: self.node.max(other.node), state }
    }
}
