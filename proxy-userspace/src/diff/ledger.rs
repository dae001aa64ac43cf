//! What the kernel holds and who owns what in it. In: the tables that are wanted and what of them was touched. Out: the
//! plan. The ledger assumes that its plans are carried out; when one was not, a new ledger adopts what is there.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    time::Instant,
};

use proxy_common::{
    addr::{Address, Ipv4, Ipv6, Port, Protocol},
    backend::{Backend, BackendId, BackendState},
    node::ServiceCidrs,
    service::{Frontend, Pick, Range, Service, flag},
};

use super::{
    FamilyState, KernelState, Plan, Step,
    backends::{Backends, Full},
    indexes::Indexes,
    ranges::Ranges,
    serving::ServingBackends,
    sources::{self, ClientRanges},
};
use crate::{
    desired::{DesiredBackend, DesiredService, FamilyTables, FamilyTouched, Tables, Target, Touched},
    model::{ObjectName, ServicePortName},
};

/// How many entries the maps have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// `SERVICES_*`, each.
    pub services: u32,
    /// `BACKENDS_*`, each.
    pub backends: u32,
    /// `SLOTS`.
    pub slots: u32,
    /// `SOURCES_*`, each.
    pub sources: u32,
}

impl Default for Capacity {
    fn default() -> Self {
        Self { services: 131_072, backends: 131_072, slots: 1_048_576, sources: 65_536 }
    }
}

/// What found no room in the kernel's maps. But for a [compromise](Self::is_compromise), it stays as it was and should be
/// tried again.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub enum Overflow {
    /// Every backend id is taken.
    #[error("no room for backend {0}: BACKENDS is full")]
    Backend(String),
    /// No gap in the slots is large enough.
    #[error("no room for the {slots} slots of {service}: SLOTS is full")]
    Slots {
        /// The Service port.
        service: ServicePortName,
        /// How many it needs.
        slots: usize,
    },
    /// No gap is large enough for a hash table, or none that other Services could do without. It works without.
    #[error(
        "no room for the {slots} slots of the hash table of {service}: it has one for each backend until these change \
         next, and clients may change theirs then"
    )]
    Table {
        /// The Service port.
        service: ServicePortName,
        /// How many it needs.
        slots: usize,
    },
    /// Every service index, or every entry of the services map, is taken.
    #[error("no room for {0}: SERVICES is full")]
    Service(ServicePortName),
    /// Every entry for ranges of clients is taken.
    #[error("no room for the source ranges of {0}: SOURCES is full")]
    Sources(ServicePortName),
}

impl Overflow {
    /// The Service that finds no room. A backend may be of several.
    pub fn service(&self) -> Option<&ObjectName> {
        match self {
            Self::Backend(_) => None,
            Self::Slots { service, .. }
            | Self::Table { service, .. }
            | Self::Service(service)
            | Self::Sources(service) => Some(&service.service),
        }
    }

    /// Whether all works, if not as well as it could.
    pub fn is_compromise(&self) -> bool {
        matches!(self, Self::Table { .. })
    }
}

/// The kernel's maps, as far as the agent owns them.
#[derive(Debug)]
pub struct Ledger {
    v4: FamilyLedger<Ipv4>,
    v6: FamilyLedger<Ipv6>,
    ranges: Ranges,
    service_cidrs: ServiceCidrs,
}

impl Ledger {
    /// Takes over what was read back from the kernel.
    pub fn adopt(state: KernelState, capacity: Capacity, now: Instant) -> Self {
        let mut ranges = Ranges::new(capacity.slots);
        for service in state.v4.services.values().chain(state.v6.services.values()) {
            for range in [service.internal, service.external, service.local] {
                ranges.adopt(range, content(&state.slots, range));
            }
        }
        ranges.rest_below((state.slots.len() as u32).min(capacity.slots), now);
        Self {
            v4: FamilyLedger::adopt(state.v4, capacity, now),
            v6: FamilyLedger::adopt(state.v6, capacity, now),
            ranges,
            service_cidrs: state.service_cidrs,
        }
    }

    /// What to write for the part of the tables that was touched.
    pub fn plan(&mut self, want: &Tables, touched: &Touched, now: Instant) -> (Plan, Vec<Overflow>) {
        let mut overflows = Vec::new();
        let v4 = self.v4.plan(&mut self.ranges, &want.v4, &touched.v4, now, &mut overflows);
        let v6 = self.v6.plan(&mut self.ranges, &want.v6, &touched.v6, now, &mut overflows);
        let service_cidrs = want.service_cidrs.filter(|wanted| *wanted != self.service_cidrs);
        self.service_cidrs = service_cidrs.unwrap_or(self.service_cidrs);
        let (serving_v4, serving_v6) = (self.v4.serving.take_changes(), self.v6.serving.take_changes());
        (Plan { v4, v6, service_cidrs, serving_v4, serving_v6 }, overflows)
    }

    /// The endpoints the kernel leads clients of this node to, and whether they run here.
    pub fn endpoints(&self, address: IpAddr, port: u16, protocol: Protocol) -> BTreeMap<SocketAddr, bool> {
        let port = Port::new(port);
        match address {
            IpAddr::V4(v4) => self.v4.endpoints(&self.ranges, Frontend::new(v4.into(), port, protocol)),
            IpAddr::V6(v6) => self.v6.endpoints(&self.ranges, Frontend::new(v6.into(), port, protocol)),
        }
    }

    /// When there is something to write even if nothing is touched until then.
    pub fn next_deadline(&self) -> Option<Instant> {
        [self.v4.backends.next_burial(), self.v6.backends.next_burial()].into_iter().flatten().min()
    }

    /// What to write for the kernel to hold the tables and nothing else.
    pub fn plan_all(&mut self, want: &Tables, now: Instant) -> (Plan, Vec<Overflow>) {
        let touched = Touched { v4: self.v4.everything(&want.v4), v6: self.v6.everything(&want.v6) };
        self.plan(want, &touched, now)
    }
}

fn content(slots: &[BackendId], range: Range) -> &[BackendId] {
    let first = range.first as usize;
    slots.get(first..first.saturating_add(range.count as usize)).unwrap_or_default()
}

#[derive(Debug)]
struct FamilyLedger<A: Ord> {
    services: BTreeMap<Frontend<A>, Service>,
    local_addrs: BTreeMap<A, u32>,
    backends: Backends<A>,
    indexes: Indexes,
    sources: ClientRanges<A>,
    serving: ServingBackends,
    services_capacity: usize,
}

impl<A: Address + std::fmt::Display> FamilyLedger<A> {
    fn adopt(state: FamilyState<A>, capacity: Capacity, now: Instant) -> Self {
        Self {
            indexes: Indexes::adopt(state.services.values(), capacity.services),
            sources: ClientRanges::adopt(state.sources, state.services.values(), capacity.sources),
            serving: ServingBackends::adopt(),
            services: state.services,
            local_addrs: state.local_addrs,
            backends: Backends::adopt(state.backends, capacity.backends, now),
            services_capacity: capacity.services as usize,
        }
    }

    fn endpoints(&self, ranges: &Ranges, frontend: Frontend<A>) -> BTreeMap<SocketAddr, bool>
    where
        IpAddr: From<A>,
    {
        let range = self.services.get(&frontend).map(|service| service.internal).unwrap_or_default();
        let backends = ranges.content(range).iter().filter_map(|id| self.backends.get(*id));
        backends
            .map(|backend| (SocketAddr::new(backend.addr.into(), backend.port.number()), backend.is_local != 0))
            .collect()
    }

    fn everything(&self, want: &FamilyTables<A>) -> FamilyTouched<A> {
        FamilyTouched {
            frontends: self.services.keys().chain(want.services.keys()).copied().collect(),
            targets: self.backends.targets().chain(want.backends.keys().copied()).collect(),
            local_addrs: self.local_addrs.keys().chain(want.local_addrs.keys()).copied().collect(),
        }
    }

    fn plan(
        &mut self,
        ranges: &mut Ranges,
        want: &FamilyTables<A>,
        touched: &FamilyTouched<A>,
        now: Instant,
        overflows: &mut Vec<Overflow>,
    ) -> Vec<Step<A>> {
        let mut steps = Phases::default();
        for target in &touched.targets {
            let desired = want.backends.get(target).copied();
            self.plan_backend(*target, desired, now, &mut steps).unwrap_or_else(|overflow| overflows.push(overflow));
        }
        for (id, backend) in std::iter::from_fn(|| self.backends.bury(now)) {
            steps.put_backend(id, backend);
        }
        self.claim_indexes(want, &touched.frontends);
        let mut unchanged = BTreeSet::new();
        for frontend in &touched.frontends {
            match want.services.get(frontend) {
                Some(desired) => {
                    self.plan_service(ranges, *frontend, desired, now, &mut steps).unwrap_or_else(|overflow| {
                        unchanged.extend(self.ids_behind(ranges, frontend));
                        overflows.push(overflow);
                    });
                }
                None => self.plan_removal(ranges, *frontend, now, &mut steps),
            }
        }
        // After one that finds no room the next plan looks at everything, so that these are all there are.
        self.backends.set_unchanged(unchanged);
        for address in &touched.local_addrs {
            self.plan_local_addr(*address, want.local_addrs.get(address).copied(), &mut steps);
        }
        self.sources.tidy(&mut steps.removed_sources);
        overflows.append(&mut steps.compromises);
        steps.in_order()
    }

    fn plan_backend(
        &mut self,
        target: Target<A>,
        desired: Option<DesiredBackend<A>>,
        now: Instant,
        steps: &mut Phases<A>,
    ) -> Result<(), Overflow> {
        let change = match desired {
            Some(desired) => self
                .backends
                .put(target, desired, now)
                .map_err(|Full| Overflow::Backend(format!("{}:{}", target.addr, target.port)))?,
            None => self.backends.leave(&target, now),
        };
        if let Some((id, backend)) = change {
            steps.put_backend(id, backend);
        }
        Ok(())
    }

    /// The endpoints that a frontend leads to in the kernel.
    fn ids_behind(&self, ranges: &Ranges, frontend: &Frontend<A>) -> Vec<BackendId> {
        let service = self.services.get(frontend).copied().unwrap_or_default();
        [service.internal, service.external, service.local]
            .iter()
            .flat_map(|range| ranges.content(*range))
            .copied()
            .collect()
    }

    /// A Service port that has a frontend in the kernel keeps that frontend's index, also after a restart; so these are
    /// looked at before any number is taken.
    fn claim_indexes(&mut self, want: &FamilyTables<A>, frontends: &BTreeSet<Frontend<A>>) {
        for frontend in frontends {
            if let (Some(desired), Some(service)) = (want.services.get(frontend), self.services.get(frontend)) {
                self.indexes.claim(service.index, &desired.port);
            }
        }
    }

    fn plan_service(
        &mut self,
        ranges: &mut Ranges,
        frontend: Frontend<A>,
        desired: &DesiredService<A>,
        now: Instant,
        steps: &mut Phases<A>,
    ) -> Result<(), Overflow> {
        let old = self.services.get(&frontend).copied();
        // Entries this plan removes are still there when it adds: the kernel has to have room for both.
        if old.is_none() && self.services.len() + steps.removed_services.len() >= self.services_capacity {
            return Err(Overflow::Service(desired.port.as_ref().clone()));
        }
        let index = if frontend.proto == Protocol::Any { 0 } else { self.indexes.of(&desired.port, now)? };
        self.indexes.hold(index);
        let placed = self.put_sources(index, desired, steps);
        let placed = placed.and_then(|()| self.place_all(ranges, desired, now, steps));
        let [internal, external, local] = match placed {
            Ok(placed) => placed,
            Err(overflow) => {
                self.indexes.release(index, now);
                return Err(overflow);
            }
        };
        let service = Service {
            index,
            pick: desired.pick,
            internal_empty: desired.internal_empty,
            external_empty: desired.external_empty,
            flags: desired.flags,
            affinity_seconds: desired.affinity_seconds,
            internal,
            external,
            local,
        };
        if old != Some(service) {
            self.services.insert(frontend, service);
            steps.services.push(Step::PutService(frontend, service));
        }
        self.sources.hold(&service);
        if frontend.proto == Protocol::Udp {
            self.serving.put(index, desired.serving.iter().filter_map(|target| self.backends.id(target)).collect());
        }
        if let Some(old) = old {
            self.let_go(ranges, old, now);
        }
        Ok(())
    }

    fn plan_removal(&mut self, ranges: &mut Ranges, frontend: Frontend<A>, now: Instant, steps: &mut Phases<A>) {
        if let Some(old) = self.services.remove(&frontend) {
            steps.removed_services.push(Step::RemoveService(frontend));
            self.let_go(ranges, old, now);
        }
    }

    fn let_go(&mut self, ranges: &mut Ranges, old: Service, now: Instant) {
        ranges.release(old.internal, now);
        ranges.release(old.external, now);
        ranges.release(old.local, now);
        if self.indexes.release(old.index, now) {
            self.serving.remove(old.index);
        }
        self.sources.release(&old);
    }

    fn put_sources(&mut self, index: u32, desired: &DesiredService<A>, steps: &mut Phases<A>) -> Result<(), Overflow> {
        if desired.flags & flag::SOURCE_RANGES == 0 {
            return Ok(());
        }
        let put = self.sources.put(index, &desired.sources, &mut steps.sources);
        put.map_err(|sources::Full| Overflow::Sources(desired.port.as_ref().clone()))
    }

    fn place_all(
        &self,
        ranges: &mut Ranges,
        desired: &DesiredService<A>,
        now: Instant,
        steps: &mut Phases<A>,
    ) -> Result<[Range; 3], Overflow> {
        let mut placed = [Range::default(); 3];
        for (index, targets) in [&desired.internal, &desired.external, &desired.local].into_iter().enumerate() {
            match self.place(ranges, desired, targets, now, steps) {
                Ok(range) => placed[index] = range,
                Err(overflow) => {
                    placed[..index].iter().for_each(|range| ranges.release(*range, now));
                    return Err(overflow);
                }
            }
        }
        Ok(placed)
    }

    /// The range with these targets. One that found no room among the backends is left out.
    fn place(
        &self,
        ranges: &mut Ranges,
        desired: &DesiredService<A>,
        targets: &[Target<A>],
        now: Instant,
        steps: &mut Phases<A>,
    ) -> Result<Range, Overflow> {
        let mut ids: Vec<BackendId> = targets.iter().filter_map(|target| self.backends.id(target)).collect();
        if matches!(desired.pick, Pick::Hash | Pick::SourceHash) && !ranges.has_room_for_table(&ids, now) {
            steps.compromise(Overflow::Table { service: desired.port.as_ref().clone(), slots: ids.len() });
            ids.sort_unstable();
            ids.dedup();
        }
        let Some((range, is_new)) = ranges.hold(&ids, now) else {
            return Err(Overflow::Slots { service: desired.port.as_ref().clone(), slots: ids.len() });
        };
        if is_new {
            steps.slots.push(Step::PutSlots(range.first, ids));
        }
        Ok(range)
    }

    fn plan_local_addr(&mut self, address: A, bits: Option<u32>, steps: &mut Phases<A>) {
        match bits {
            Some(bits) if self.local_addrs.insert(address, bits) != Some(bits) => {
                steps.local_addrs.push(Step::PutLocalAddr(address, bits));
            }
            None if self.local_addrs.remove(&address).is_some() => {
                steps.local_addrs.push(Step::RemoveLocalAddr(address));
            }
            _ => {}
        }
    }
}

/// The steps of a plan, by what they may only come after.
struct Phases<A> {
    /// New backends, and those that serve again.
    arriving: Vec<Step<A>>,
    slots: Vec<Step<A>>,
    /// Ranges of clients, before the frontends that ask for them.
    sources: Vec<Step<A>>,
    services: Vec<Step<A>>,
    removed_services: Vec<Step<A>>,
    removed_sources: Vec<Step<A>>,
    /// Backends that stop serving: after nothing new leads to them.
    leaving: Vec<Step<A>>,
    local_addrs: Vec<Step<A>>,
    /// What had to be done with less room than wanted.
    compromises: Vec<Overflow>,
}

impl<A> Default for Phases<A> {
    fn default() -> Self {
        Self {
            arriving: Vec::new(),
            slots: Vec::new(),
            sources: Vec::new(),
            services: Vec::new(),
            removed_services: Vec::new(),
            removed_sources: Vec::new(),
            leaving: Vec::new(),
            local_addrs: Vec::new(),
            compromises: Vec::new(),
        }
    }
}

impl<A> Phases<A> {
    /// Two ranges of a Service may find as little room.
    fn compromise(&mut self, overflow: Overflow) {
        if self.compromises.last() != Some(&overflow) {
            self.compromises.push(overflow);
        }
    }

    fn put_backend(&mut self, id: BackendId, backend: Backend<A>) {
        let phase = if backend.state == BackendState::Serving { &mut self.arriving } else { &mut self.leaving };
        phase.push(Step::PutBackend(id, backend));
    }

    fn in_order(self) -> Vec<Step<A>> {
        // The first may be by far the longest: the others are moved behind it.
        let mut steps = self.arriving;
        let added = [self.slots, self.sources, self.services];
        let removed = [self.removed_services, self.removed_sources, self.leaving, self.local_addrs];
        for mut phase in added.into_iter().chain(removed) {
            steps.append(&mut phase);
        }
        steps
    }
}
