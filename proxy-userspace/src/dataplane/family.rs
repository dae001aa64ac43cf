//! The maps of one address family, and how a plan's steps are written to them.

use std::{collections::BTreeSet, fmt::Debug};

use aya::{
    Ebpf, Pod,
    maps::{MapData, lpm_trie::Key},
};
use proxy_common::{
    addr::Address,
    backend::{Backend, BackendId, BackendState},
    filter::{Filter, Hashed},
    flow::{Direction, Flow},
    names::ServiceName,
    service::{Frontend, Service, Source},
    tuple::{Stage, Tuple},
};

use super::{address_filter::AddressFilter, error::Error, error::OpenError, table::Table};
use crate::{
    desired::Prefix,
    diff::{FamilyState, Step},
};

/// Steps carried out at once, at most.
const RUN: usize = 4_096;

/// Entries of `BACKENDS_*` that nobody has written, one after the other: behind them are no others.
const UNUSED: usize = 4_096;

/// The maps of one family that the agent reads or writes.
pub(super) struct FamilyMaps<A> {
    services: Table<Frontend<A>, Service>,
    backends: Table<BackendId, Backend<A>>,
    local_addrs: Table<A, u32>,
    peer_addrs: Table<A, u32>,
    sources: Table<Key<Source<A>>, u32>,
    names: Table<u32, ServiceName>,
    flows: [Table<Tuple<A>, Flow<A>>; 2],
}

/// The names of one family's maps.
pub(super) struct Names {
    pub(super) services: &'static str,
    pub(super) backends: &'static str,
    pub(super) local_addrs: &'static str,
    peer_addrs: &'static str,
    sources: &'static str,
    pub(super) called: &'static str,
    /// `FLOWS_*` and `EMBRYOS_*`.
    pub(super) flows: [&'static str; 2],
}

/// IPv4.
pub(super) const V4: Names = Names {
    services: "SERVICES_V4",
    backends: "BACKENDS_V4",
    local_addrs: "LOCAL_ADDRS_V4",
    peer_addrs: "PEER_ADDRS_V4",
    sources: "SOURCES_V4",
    called: "NAMES_V4",
    flows: ["FLOWS_V4", "EMBRYOS_V4"],
};

/// IPv6.
pub(super) const V6: Names = Names {
    services: "SERVICES_V6",
    backends: "BACKENDS_V6",
    local_addrs: "LOCAL_ADDRS_V6",
    peer_addrs: "PEER_ADDRS_V6",
    sources: "SOURCES_V6",
    called: "NAMES_V6",
    flows: ["FLOWS_V6", "EMBRYOS_V6"],
};

/// Where maps are found by name.
pub(super) trait Maps {
    /// The map of a name, typed.
    fn table<K: Pod, V: Pod>(&self, name: &'static str) -> Result<Table<K, V>, OpenError>;
}

impl Maps for Ebpf {
    fn table<K: Pod, V: Pod>(&self, name: &'static str) -> Result<Table<K, V>, OpenError> {
        table(self, name)
    }
}

impl<A> Table<BackendId, Backend<A>>
where
    Backend<A>: Pod + Default + PartialEq,
{
    /// `BACKENDS_*` as far as ids were ever given out: the smallest one that is free comes next, so that behind a long run of
    /// entries nobody has written there are no others.
    pub(super) fn assigned(&self) -> Result<Vec<Backend<A>>, Error> {
        let (mut entries, mut unused) = (Vec::new(), 0);
        self.visit(|_, backend| {
            unused = if backend == Backend::default() { unused + 1 } else { 0 };
            entries.push(backend);
            unused < UNUSED
        })?;
        entries.truncate(entries.len() - unused);
        entries.shrink_to_fit();
        Ok(entries)
    }
}

/// The map of a name in the loaded object, typed.
pub(super) fn table<K: Pod, V: Pod>(object: &Ebpf, name: &'static str) -> Result<Table<K, V>, OpenError> {
    let map = object.map(name).and_then(data).ok_or(OpenError::Missing { what: "map", name })?;
    Ok(Table::new(name, map)?)
}

fn data(map: &aya::maps::Map) -> Option<&MapData> {
    use aya::maps::Map::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray};
    match map {
        Array(data) | HashMap(data) | LpmTrie(data) | LruHashMap(data) | PerCpuArray(data) => Some(data),
        _ => None,
    }
}

impl<A> FamilyMaps<A>
where
    A: Address + Hashed + Pod + Debug,
    Frontend<A>: Pod,
    Source<A>: Pod,
    Backend<A>: Pod + PartialEq + Default,
    Tuple<A>: Pod,
    Flow<A>: Pod,
{
    /// The maps, wherever they are.
    pub(super) fn new(object: &impl Maps, names: &Names) -> Result<Self, OpenError> {
        let [flows, embryos] = names.flows;
        Ok(Self {
            services: object.table(names.services)?,
            backends: object.table(names.backends)?,
            local_addrs: object.table(names.local_addrs)?,
            peer_addrs: object.table(names.peer_addrs)?,
            sources: object.table(names.sources)?,
            names: object.table(names.called)?,
            flows: [object.table(flows)?, object.table(embryos)?],
        })
    }

    /// What the maps hold, whoever has written it.
    pub(super) fn read(&self) -> Result<FamilyState<A>, Error> {
        let mut backends = self.backends.values(self.backends.capacity() as usize)?;
        let end = backends.iter().rposition(|backend| *backend != Backend::default()).map_or(0, |last| last + 1);
        backends.truncate(end);
        backends.shrink_to_fit();
        self.with(backends)
    }

    /// The same, if it was agents.
    pub(super) fn read_assigned(&self) -> Result<FamilyState<A>, Error> {
        self.with(self.backends.assigned()?)
    }

    fn with(&self, backends: Vec<Backend<A>>) -> Result<FamilyState<A>, Error> {
        Ok(FamilyState {
            services: self.services.entries()?.into_iter().collect(),
            backends,
            local_addrs: self.local_addrs.entries()?.into_iter().collect(),
            sources: self.sources.entries()?.into_iter().map(|(key, _)| client_range(&key)).collect(),
        })
    }

    /// Carries out steps in order, runs of like steps at once, but for the longest: they would be in memory twice.
    pub(super) fn apply(&self, slots: &Table<u32, BackendId>, steps: &[Step<A>]) -> Result<(), Error> {
        let runs = steps.chunk_by(|a, b| std::mem::discriminant(a) == std::mem::discriminant(b));
        runs.flat_map(|run| run.chunks(RUN)).try_for_each(|run| match run.first() {
            Some(Step::PutBackend(..)) => put(&self.backends, run.iter().filter_map(backend)),
            Some(Step::PutSlots(..)) => put(slots, run.iter().flat_map(slot_entries)),
            Some(Step::PutLocalAddr(..)) => put(&self.local_addrs, run.iter().filter_map(local_addr)),
            Some(Step::PutService(..)) => put(&self.services, run.iter().filter_map(service)),
            Some(Step::RemoveLocalAddr(_)) => {
                self.local_addrs.remove_all(&run.iter().filter_map(removed_local_addr).collect::<Vec<_>>())
            }
            Some(Step::PutSource(..)) => put(&self.sources, run.iter().filter_map(source)),
            Some(Step::RemoveSource(..)) => {
                self.sources.remove_all(&run.iter().filter_map(removed_source).collect::<Vec<_>>())
            }
            Some(Step::RemoveService(_)) => {
                self.services.remove_all(&run.iter().filter_map(removed_service).collect::<Vec<_>>())
            }
            None => Ok(()),
        })
    }

    /// Says what Service ports are called.
    pub(super) fn put_names(&self, names: &[(u32, ServiceName)]) -> Result<(), Error> {
        names.chunks(RUN).try_for_each(|run| put(&self.names, run.iter().copied()))
    }

    /// Makes the addresses of other nodes these.
    pub(super) fn put_peers(&self, wanted: &BTreeSet<A>) -> Result<(), Error> {
        let found: BTreeSet<A> = self.peer_addrs.entries()?.into_iter().map(|(address, _)| address).collect();
        self.peer_addrs.remove_all(&found.difference(wanted).copied().collect::<Vec<_>>())?;
        put(&self.peer_addrs, wanted.difference(&found).map(|address| (*address, 1)))
    }

    /// Adds the addresses of everything the flow tables still translate: what a packet is addressed to on its way in,
    /// and the backend. The second step of a flow has the backend of the first.
    pub(super) fn add_flows(&self, inbound: &mut Filter, outbound: &mut Filter) -> Result<(), Error> {
        // Embryos first: a flow that moves on meanwhile is seen twice rather than not at all.
        for table in self.flows.iter().rev() {
            table.visit(|key, flow| {
                if matches!(key.stage, Stage::FromPod | Stage::UplinkIn | Stage::Cross) {
                    inbound.add(&key.daddr);
                }
                match flow.direction {
                    // What is dispatched has its backend elsewhere, and no reply that comes this way.
                    Direction::Original if flow.is_one_way() => {}
                    Direction::Original => outbound.add(&flow.rewrite.daddr),
                    Direction::Reply => outbound.add(&key.saddr),
                    Direction::Transit => {}
                }
                true
            })?;
        }
        Ok(())
    }
}

/// Adds the addresses of what a plan will write.
pub(super) fn add_steps<A: Address + Hashed>(
    steps: &[Step<A>],
    inbound: &mut AddressFilter,
    outbound: &mut AddressFilter,
) {
    for step in steps {
        match step {
            Step::PutService(frontend, _) if frontend.addr != A::ANY => inbound.add(&frontend.addr),
            Step::PutLocalAddr(address, _) => inbound.add(address),
            Step::PutBackend(_, backend) if backend.state != BackendState::Free => outbound.add(&backend.addr),
            _ => {}
        }
    }
}

/// Adds the addresses of what the maps hold.
pub(super) fn add_state<A: Address + Hashed>(state: &FamilyState<A>, inbound: &mut Filter, outbound: &mut Filter) {
    let frontends = state.services.keys().map(|frontend| &frontend.addr).filter(|address| **address != A::ANY);
    frontends.chain(state.local_addrs.keys()).for_each(|address| inbound.add(address));
    let backends = state.backends.iter().filter(|backend| backend.state != BackendState::Free);
    backends.for_each(|backend| outbound.add(&backend.addr));
}

fn put<K: Pod, V: Pod>(table: &Table<K, V>, entries: impl Iterator<Item = (K, V)>) -> Result<(), Error> {
    let (keys, values): (Vec<K>, Vec<V>) = entries.unzip();
    table.put_all(&keys, &values)
}

fn backend<A: Copy>(step: &Step<A>) -> Option<(BackendId, Backend<A>)> {
    if let Step::PutBackend(id, backend) = step { Some((*id, *backend)) } else { None }
}

fn slot_entries<A>(step: &Step<A>) -> impl Iterator<Item = (u32, BackendId)> {
    let (first, slots) =
        if let Step::PutSlots(first, slots) = step { (*first, slots.as_slice()) } else { (0, &[][..]) };
    (first..).zip(slots.iter().copied())
}

fn local_addr<A: Copy>(step: &Step<A>) -> Option<(A, u32)> {
    if let Step::PutLocalAddr(address, bits) = step { Some((*address, *bits)) } else { None }
}

fn removed_local_addr<A: Copy>(step: &Step<A>) -> Option<A> {
    if let Step::RemoveLocalAddr(address) = step { Some(*address) } else { None }
}

fn service<A: Copy>(step: &Step<A>) -> Option<(Frontend<A>, Service)> {
    if let Step::PutService(frontend, service) = step { Some((*frontend, *service)) } else { None }
}

fn removed_service<A: Copy>(step: &Step<A>) -> Option<Frontend<A>> {
    if let Step::RemoveService(frontend) = step { Some(*frontend) } else { None }
}

fn source<A: Copy>(step: &Step<A>) -> Option<(Key<Source<A>>, u32)>
where
    Source<A>: Pod,
{
    if let Step::PutSource(service, prefix) = step { Some((key(*service, prefix), 1)) } else { None }
}

fn removed_source<A: Copy>(step: &Step<A>) -> Option<Key<Source<A>>>
where
    Source<A>: Pod,
{
    if let Step::RemoveSource(service, prefix) = step { Some(key(*service, prefix)) } else { None }
}

/// The index always counts, and then the prefix's bits.
fn key<A: Copy>(service: u32, prefix: &Prefix<A>) -> Key<Source<A>>
where
    Source<A>: Pod,
{
    Key::new(Source::<A>::BITS + u32::from(prefix.bits), Source { service, pad: 0, addr: prefix.addr })
}

fn client_range<A: Copy>(key: &Key<Source<A>>) -> (u32, Prefix<A>)
where
    Source<A>: Pod,
{
    let bits = key.prefix_len().saturating_sub(Source::<A>::BITS);
    let source = key.data();
    (source.service, Prefix { addr: source.addr, bits: u8::try_from(bits).unwrap_or(u8::MAX) })
}
