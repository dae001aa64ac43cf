//! Reads what the programs count and how full their maps are, through descriptors of its own: it may be asked from any
//! thread, and the loop that writes the maps does not wait for it.

use std::{collections::HashMap, fmt::Debug, net::SocketAddr, path::Path};

use aya::{
    Pod,
    maps::{Map, MapData, PerCpuArray, lpm_trie::Key},
};
use proxy_common::{
    addr::{Address, Ipv4, Ipv6},
    backend::{Backend, BackendState},
    flow::{Direction, Flow, TIERS, Tier, Turnover},
    names::{Agent, ServiceName},
    node::{Node, foreign},
    outcome::{Hook, Outcome, counter},
    service::{Affinity, Client, Frontend, Pick, Service, Source},
    socket::{SocketPeer, SocketTarget, SocketWay},
    stats::Stats,
    tuple::Tuple,
};

use super::{
    error::Error,
    flow_table::{self, goes_on, silence},
    load::maps_directory,
    table::Table,
};

/// Reads the maps of both families.
pub struct Observer {
    counters: PerCpuArray<MapData, u64>,
    turnover: PerCpuArray<MapData, Turnover>,
    expired: Table<u32, u64>,
    slots: Table<u32, u32>,
    node: Table<u32, Node>,
    agent: Table<u32, Agent>,
    v4: FamilyObserver<Ipv4>,
    v6: FamilyObserver<Ipv6>,
}

impl Debug for Observer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Observer").finish_non_exhaustive()
    }
}

/// Reads the maps of one family.
pub struct FamilyObserver<A> {
    pub(super) services: Table<Frontend<A>, Service>,
    pub(super) backends: Table<u32, Backend<A>>,
    pub(super) local_addrs: Table<A, u32>,
    pub(super) sources: Table<Key<Source<A>>, u32>,
    pub(super) affinity: Table<Client<A>, Affinity>,
    pub(super) names: Table<u32, ServiceName>,
    pub(super) flows: [Table<Tuple<A>, Flow<A>>; 2],
    sockets: Table<SocketPeer<A>, SocketTarget<A>>,
    pub(super) service_stats: Table<u32, Stats>,
    pub(super) backend_stats: Table<u32, Stats>,
    active: Table<u32, u32>,
    foreign: Table<Tuple<A>, u32>,
}

/// How full a map is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fill {
    /// Its name.
    pub map: &'static str,
    /// Entries in use.
    pub entries: usize,
    /// Entries that fit.
    pub capacity: u32,
}

/// Connections that go on, by Service port and by backend.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Active {
    /// By [`Service::index`].
    pub services: HashMap<u32, u32>,
    /// By backend id.
    pub backends: HashMap<u32, u32>,
}

/// What one look at the maps of a family has shown.
#[derive(Clone, Debug, Default)]
pub struct Survey {
    /// How full the tiers of the flow table are, in the order of [`Tier`].
    pub flow_table: [Fill; 2],
    /// How full the others are.
    pub fills: Vec<Fill>,
    /// Connections that go on.
    pub active: Active,
    /// Connections of another proxy.
    pub foreign_connections: usize,
}

/// A backend that is in use, or was until lately.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KnownBackend {
    /// Its id.
    pub id: u32,
    /// Where it is.
    pub address: SocketAddr,
    /// How often the id was given to another one.
    pub generation: u32,
    /// It is in a slice.
    pub is_present: bool,
}

/// Opens a pinned map.
pub(super) fn open<K: Pod, V: Pod>(directory: &Path, name: &'static str) -> Result<Table<K, V>, Error> {
    Table::new(name, &pinned(directory, name)?)
}

pub(super) fn pinned(directory: &Path, name: &'static str) -> Result<MapData, Error> {
    let error = |source| Error::Map { operation: "open", map: name, source: std::io::Error::other(source) };
    MapData::from_pin(directory.join(name)).map_err(error)
}

fn per_cpu<V: Pod>(directory: &Path, name: &'static str) -> Result<PerCpuArray<MapData, V>, Error> {
    let shape = |_| Error::MapShape { map: name };
    Map::PerCpuArray(pinned(directory, name)?).try_into().map_err(shape)
}

impl Observer {
    /// Opens the maps pinned under a path.
    pub fn open(pin_path: &Path) -> Result<Self, Error> {
        let directory = maps_directory(pin_path);
        Ok(Self {
            counters: per_cpu(&directory, "COUNTERS")?,
            turnover: per_cpu(&directory, "TURNOVER")?,
            expired: open(&directory, "EXPIRED")?,
            slots: open(&directory, "SLOTS")?,
            node: open(&directory, "NODE")?,
            agent: open(&directory, "AGENT")?,
            v4: FamilyObserver::open(&directory, &V4)?,
            v6: FamilyObserver::open(&directory, &V6)?,
        })
    }

    /// What was counted, over all CPUs.
    pub fn counters(&self) -> Vec<(Hook, Outcome, u64)> {
        let read = |hook, outcome| {
            let values = self.counters.get(&counter(hook, outcome), 0).ok()?;
            Some((hook, outcome, values.iter().sum()))
        };
        Hook::ALL.into_iter().flat_map(|hook| Outcome::ALL.map(|outcome| read(hook, outcome))).flatten().collect()
    }

    /// Entries that each map of the flow table would have, by [`Turnover::index`], if the kernel had evicted none: those that
    /// have entered, and that neither the programs nor [`Self::expire`] have taken out.
    pub fn unevicted(&self) -> Result<[u64; TIERS as usize], Error> {
        let expired = self.expired.values(TIERS as usize)?;
        let mut unevicted = [0; TIERS as usize];
        for ((index, count), expired) in (0..).zip(&mut unevicted).zip(expired) {
            let unknown =
                |source| Error::Map { operation: "read", map: "TURNOVER", source: std::io::Error::other(source) };
            let turnover = self.turnover.get(&index, 0).map_err(unknown)?;
            let entered: u64 = turnover.iter().map(|cpu| cpu.entered).sum();
            let left: u64 = turnover.iter().map(|cpu| cpu.left).sum();
            *count = entered.saturating_sub(left + expired);
        }
        Ok(unevicted)
    }

    /// Takes entries of the flow table out, of IPv4 and of IPv6; returns how many there were.
    pub fn remove_flows(&self, v4: &[(Tier, Tuple<Ipv4>)], v6: &[(Tier, Tuple<Ipv6>)]) -> Result<u64, Error> {
        Ok(self.remove(&self.v4.flows, v4, false)? + self.remove(&self.v6.flows, v6, true)?)
    }

    fn remove<A>(
        &self,
        tables: &[Table<Tuple<A>, Flow<A>>; 2],
        keys: &[(Tier, Tuple<A>)],
        is_v6: bool,
    ) -> Result<u64, Error>
    where
        Tuple<A>: Pod,
        Flow<A>: Pod,
    {
        let mut sum = 0;
        for (tier, table) in [Tier::Embryos, Tier::Flows].into_iter().zip(tables) {
            let mut removed = 0;
            for (_, key) in keys.iter().filter(|(of, _)| *of == tier) {
                if table.read(key).is_ok() {
                    table.remove(key)?;
                    removed += 1;
                }
            }
            self.note_expired(Turnover::index(tier, is_v6), removed)?;
            sum += removed;
        }
        Ok(sum)
    }

    fn note_expired(&self, index: u32, count: u64) -> Result<(), Error> {
        flow_table::note_expired(&self.expired, index, count)
    }

    /// Takes flows out that are over, of maps that are nearly full; returns how many entries.
    pub fn expire(&self) -> Result<u64, Error> {
        let [embryos_v4, flows_v4] = &self.v4.flows;
        let [embryos_v6, flows_v6] = &self.v6.flows;
        let removed = [
            (Turnover::index(Tier::Embryos, false), flow_table::expire(embryos_v4)?),
            (Turnover::index(Tier::Flows, false), flow_table::expire(flows_v4)?),
            (Turnover::index(Tier::Embryos, true), flow_table::expire(embryos_v6)?),
            (Turnover::index(Tier::Flows, true), flow_table::expire(flows_v6)?),
        ];
        removed.into_iter().try_for_each(|(index, count)| self.note_expired(index, count))?;
        Ok(removed.iter().map(|(_, count)| count).sum())
    }

    /// How full the array of slots is.
    pub fn slots(&self) -> Result<Fill, Error> {
        let slots = self.slot_values()?;
        let entries = slots.iter().filter(|backend| **backend != 0).count();
        Ok(Fill { map: "SLOTS", entries, capacity: self.slots.capacity() })
    }

    /// `SLOTS`, as far as a Service leads there.
    pub fn slot_values(&self) -> Result<Vec<u32>, Error> {
        let mut end = 0;
        let mut reach = |service: &Service| {
            let ends = [service.internal, service.external, service.local];
            end = ends.into_iter().map(|range| range.first.saturating_add(range.count)).fold(end, u32::max);
        };
        fill(&self.v4.services, |_, service| reach(service))?;
        fill(&self.v6.services, |_, service| reach(service))?;
        self.slots.values(end as usize)
    }

    /// What the programs know of the node.
    pub fn node(&self) -> Result<Node, Error> {
        self.node.read(&0)
    }

    /// What the agent says of itself.
    pub fn agent(&self) -> Result<Agent, Error> {
        self.agent.read(&0)
    }

    /// The maps of IPv4.
    pub fn v4(&self) -> &FamilyObserver<Ipv4> {
        &self.v4
    }

    /// The maps of IPv6.
    pub fn v6(&self) -> &FamilyObserver<Ipv6> {
        &self.v6
    }
}

/// The names of one family's maps.
struct Names {
    services: &'static str,
    backends: &'static str,
    local_addrs: &'static str,
    sources: &'static str,
    called: &'static str,
    affinity: &'static str,
    flows: [&'static str; 2],
    sockets: &'static str,
    stats: [&'static str; 2],
    active: &'static str,
    foreign: &'static str,
}

const V4: Names = Names {
    services: "SERVICES_V4",
    backends: "BACKENDS_V4",
    local_addrs: "LOCAL_ADDRS_V4",
    sources: "SOURCES_V4",
    called: "NAMES_V4",
    affinity: "AFFINITY_V4",
    flows: ["EMBRYOS_V4", "FLOWS_V4"],
    sockets: "SOCKETS_V4",
    stats: ["SERVICE_STATS_4", "BACKEND_STATS_4"],
    active: "ACTIVE_V4",
    foreign: "FOREIGN_V4",
};

const V6: Names = Names {
    services: "SERVICES_V6",
    backends: "BACKENDS_V6",
    local_addrs: "LOCAL_ADDRS_V6",
    sources: "SOURCES_V6",
    called: "NAMES_V6",
    affinity: "AFFINITY_V6",
    flows: ["EMBRYOS_V6", "FLOWS_V6"],
    sockets: "SOCKETS_V6",
    stats: ["SERVICE_STATS_6", "BACKEND_STATS_6"],
    active: "ACTIVE_V6",
    foreign: "FOREIGN_V6",
};

impl<A> FamilyObserver<A>
where
    A: Address + Pod + Into<std::net::IpAddr>,
    Frontend<A>: Pod,
    Backend<A>: Pod + Default + PartialEq,
    Source<A>: Pod,
    Client<A>: Pod,
    Tuple<A>: Pod,
    Flow<A>: Pod,
    SocketPeer<A>: Pod,
    SocketTarget<A>: Pod,
{
    fn open(directory: &Path, names: &Names) -> Result<Self, Error> {
        let [embryos, flows] = names.flows;
        let [service_stats, backend_stats] = names.stats;
        Ok(Self {
            services: open(directory, names.services)?,
            backends: open(directory, names.backends)?,
            local_addrs: open(directory, names.local_addrs)?,
            sources: open(directory, names.sources)?,
            names: open(directory, names.called)?,
            affinity: open(directory, names.affinity)?,
            // Embryos first: a flow that moves on meanwhile is seen twice rather than not at all.
            flows: [open(directory, embryos)?, open(directory, flows)?],
            sockets: open(directory, names.sockets)?,
            service_stats: open(directory, service_stats)?,
            backend_stats: open(directory, backend_stats)?,
            active: open(directory, names.active)?,
            foreign: open(directory, names.foreign)?,
        })
    }

    /// Looks at every entry of every map. Takes a tenth of a second when all are full.
    pub fn survey(&self) -> Result<Survey, Error> {
        let (mut active, mut foreign_connections) = (Active::default(), 0);
        let [embryos, flows] = &self.flows;
        let flow_table = [
            fill(embryos, |key, flow| active.add_flow(key, flow))?,
            fill(flows, |key, flow| active.add_flow(key, flow))?,
        ];
        let fills = vec![
            fill(&self.sockets, |peer, target| active.add_socket(peer, target))?,
            fill(&self.services, |_, _| ())?,
            fill(&self.local_addrs, |_, _| ())?,
            fill(&self.sources, |_, _| ())?,
            fill(&self.affinity, |_, _| ())?,
            fill(&self.foreign, |_, what| foreign_connections += usize::from(*what == foreign::SENT))?,
            Fill { map: self.backends.name(), entries: self.backends()?.len(), capacity: self.backends.capacity() },
        ];
        Ok(Survey { flow_table, fills, active, foreign_connections })
    }

    /// Connections that go on.
    pub fn active(&self) -> Result<Active, Error> {
        let mut active = Active::default();
        for table in &self.flows {
            fill(table, |key, flow| active.add_flow(key, flow))?;
        }
        fill(&self.sockets, |peer, target| active.add_socket(peer, target))?;
        Ok(active)
    }

    /// Whether a Service goes by how many connections its backends have.
    pub fn needs_active(&self) -> Result<bool, Error> {
        let mut needs = false;
        self.services.visit(|_, service| {
            needs = service.pick == Pick::LeastConnections;
            !needs
        })?;
        Ok(needs)
    }

    /// Tells the programs how many connections each backend has.
    pub fn put_active(&self, active: &Active) -> Result<(), Error> {
        let found = self.active.values(self.backends_end()?)?;
        let wanted = |id: u32| active.backends.get(&id).copied().unwrap_or(0);
        let differing = (0_u32..).zip(found).filter(|(id, count)| wanted(*id) != *count);
        let (ids, counts): (Vec<u32>, Vec<u32>) = differing.map(|(id, _)| (id, wanted(id))).unzip();
        self.active.put_all(&ids, &counts)
    }

    /// Counts of a Service port.
    pub fn service_stats(&self, index: u32) -> Result<Stats, Error> {
        self.service_stats.read(&index)
    }

    /// Counts of a backend.
    pub fn backend_stats(&self, id: u32) -> Result<Stats, Error> {
        self.backend_stats.read(&id)
    }

    /// Counts of every Service port below an index.
    pub fn all_service_stats(&self, end: u32) -> Result<Vec<Stats>, Error> {
        self.service_stats.values(end as usize)
    }

    /// Counts of every backend below an id.
    pub fn all_backend_stats(&self, end: u32) -> Result<Vec<Stats>, Error> {
        self.backend_stats.values(end as usize)
    }

    /// The indexes of Service ports that have a frontend.
    pub fn indexes(&self) -> Result<Vec<u32>, Error> {
        let mut indexes = Vec::new();
        self.services.visit(|_, service| {
            indexes.push(service.index);
            true
        })?;
        indexes.sort_unstable();
        indexes.dedup();
        Ok(indexes)
    }

    /// Every backend that has an id.
    pub fn backends(&self) -> Result<Vec<KnownBackend>, Error> {
        let used = (0_u32..).zip(self.backends.assigned()?).filter(|(_, backend)| backend.state != BackendState::Free);
        Ok(used
            .map(|(id, backend)| KnownBackend {
                id,
                address: SocketAddr::new(backend.addr.into(), backend.port.number()),
                generation: backend.generation,
                is_present: backend.state != BackendState::Gone,
            })
            .collect())
    }

    fn backends_end(&self) -> Result<usize, Error> {
        Ok(self.backends()?.last().map_or(0, |backend| backend.id as usize + 1))
    }
}

fn fill<K: Pod, V: Pod>(table: &Table<K, V>, mut each: impl FnMut(&K, &V)) -> Result<Fill, Error> {
    let mut entries = 0;
    table.visit(|key, value| {
        each(&key, &value);
        entries += 1;
        true
    })?;
    Ok(Fill { map: table.name(), entries, capacity: table.capacity() })
}

impl Active {
    fn add_flow<A>(&mut self, key: &Tuple<A>, flow: &Flow<A>) {
        if flow.direction == Direction::Original && goes_on(key.proto, flow.state, silence(flow.last_seen)) {
            self.add(flow.service, flow.backend);
        }
    }

    fn add_socket<A>(&mut self, peer: &SocketPeer<A>, target: &SocketTarget<A>) {
        if peer.way == SocketWay::Connection {
            self.add(target.service, target.backend);
        }
    }

    fn add(&mut self, service: u32, backend: u32) {
        *self.services.entry(service).or_default() += 1;
        *self.backends.entry(backend).or_default() += 1;
    }
}
