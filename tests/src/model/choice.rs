//! From a Service to a backend: what may be chosen for a new flow, and whether what was chosen is among it.

use std::net::IpAddr;

use proxy_common::{
    addr::Protocol,
    backend::BackendState,
    outcome::Outcome,
    service::{Pick, Range, Service, WhenEmpty, flag},
};

use super::{Key, Model, Objection, Oracle, table::Table};

/// Whom a client stays with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Affinity {
    /// The backend.
    pub backend: u32,
    /// Its generation.
    pub generation: u32,
    /// The slot it was found in.
    pub slot: u32,
    /// When the client last opened a flow.
    pub used: u64,
}

/// What a hash is made of: equal content means an equal choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Hashed {
    client: IpAddr,
    tuple: Option<(u16, IpAddr, u16, Protocol)>,
    count: u32,
}

/// What may be chosen.
pub(super) enum Choice {
    /// One of these slots.
    Slots(Vec<u32>),
    /// Nothing, for a reason.
    Refused(Outcome),
}

impl Model {
    /// The slots a new flow may get.
    pub(super) fn choices(
        &mut self,
        service: &Service,
        key: &Key,
        is_internal: bool,
        oracle: &mut dyn Oracle,
    ) -> Result<Choice, Objection> {
        let client = key.source.0;
        if service.flags & flag::SOURCE_RANGES != 0 && !self.world.is_allowed(service.index, client, key.destination.0)
        {
            return Ok(Choice::Refused(Outcome::DropSource));
        }
        let (range, empty) = if is_internal {
            (service.internal, service.internal_empty)
        } else {
            (service.external, service.external_empty)
        };
        if range.count == 0 {
            return Ok(Choice::Refused(match empty {
                WhenEmpty::Reject => Outcome::RejectNoEndpoint,
                WhenEmpty::Drop => Outcome::DropNoLocalEndpoint,
            }));
        }
        if service.flags & flag::AFFINITY == 0 {
            return Ok(Choice::Slots(self.picked(service, range, key)));
        }
        self.stay(service, range, key, oracle).map(|slot| Choice::Slots(vec![slot]))
    }

    /// The slot of a client that stays with its backend, from now on the one it has.
    fn stay(&mut self, service: &Service, range: Range, key: &Key, oracle: &mut dyn Oracle) -> Result<u32, Objection> {
        let client = key.source.0;
        let Some((backend, slot)) = oracle.affinity(service.index, client) else {
            return Objection::wrong("a client of a Service with affinity was not remembered");
        };
        let allowed = match self.recall(service, range, key) {
            Some(slots) => slots,
            None => self.picked(service, range, key),
        };
        if !allowed.contains(&slot) || self.world.slots.get(slot as usize) != Some(&backend) {
            return Objection::wrong(format!("slot {slot}, backend {backend} is not one of slots {allowed:?}"));
        }
        let generation = self.world.backend(key.is_v4(), backend).map_or(0, |it| it.generation);
        let affinity = Affinity { backend, generation, slot, used: self.now };
        self.affinities.insert((service.index, client), affinity);
        Ok(slot)
    }

    /// The slots that hold the backend a client has, if it may still have it.
    fn recall(&self, service: &Service, range: Range, key: &Key) -> Option<Vec<u32>> {
        let known = self.affinities.get(&(service.index, key.source.0))?;
        let second = u64::from(self.world.node.jiffies_per_second);
        if self.now - known.used > u64::from(service.affinity_seconds) * second {
            return None;
        }
        self.world.backend(key.is_v4(), known.backend).filter(|it| it.generation == known.generation)?;
        let slots = range.first..range.first + range.count;
        let holds = |slot: &u32| self.world.slots.get(*slot as usize) == Some(&known.backend);
        if slots.contains(&known.slot) && holds(&known.slot) {
            return Some(vec![known.slot]);
        }
        slots.into_iter().find(holds).map(|slot| vec![slot])
    }

    /// The slots a Service's pick allows. A turn is taken, where it takes turns.
    fn picked(&mut self, service: &Service, range: Range, key: &Key) -> Vec<u32> {
        let all = range.first..range.first + range.count;
        match service.pick {
            Pick::Random => all.collect(),
            Pick::RoundRobin => {
                let turn = self.turns.entry((key.is_v4(), service.index)).or_default();
                let index = *turn % u64::from(range.count);
                *turn += 1;
                vec![range.first + index as u32]
            }
            Pick::LeastConnections => {
                let load = |slot: u32| load(&self.table, key, self.world.slots.get(slot as usize));
                // Of two different ones the busier is not taken.
                all.clone()
                    .filter(|one| {
                        range.count < 2 || all.clone().any(|other| other != *one && load(*one) <= load(other))
                    })
                    .collect()
            }
            Pick::Hash | Pick::SourceHash => match self.hashed.get(&hashed(service, range, key)) {
                Some(indices) => indices.iter().map(|index| range.first + index).collect(),
                None => all.collect(),
            },
        }
    }

    /// Remembers what a hash led to: one of these slots, which hold the same backend.
    pub(super) fn note_choice(&mut self, service: &Service, is_internal: bool, key: &Key, slots: &[u32]) {
        let range = if is_internal { service.internal } else { service.external };
        if matches!(service.pick, Pick::Hash | Pick::SourceHash) && service.flags & flag::AFFINITY == 0 {
            let indices = slots.iter().map(|slot| slot - range.first).collect();
            self.hashed.insert(hashed(service, range, key), indices);
        }
    }

    /// Whether a slot leads nowhere.
    pub(super) fn is_free(&self, is_v4: bool, slot: u32) -> bool {
        let backend = self.world.slots.get(slot as usize).and_then(|id| self.world.backend(is_v4, *id));
        backend.is_none_or(|it| matches!(it.state, BackendState::Gone | BackendState::Free))
    }
}

fn load(table: &Table, key: &Key, backend: Option<&u32>) -> u32 {
    backend.map_or(u32::MAX, |id| table.active.get(&(key.is_v4(), *id)).copied().unwrap_or(0))
}

fn hashed(service: &Service, range: Range, key: &Key) -> Hashed {
    let by_tuple = service.pick == Pick::Hash && service.flags & flag::AFFINITY == 0;
    let tuple = (key.source.1, key.destination.0, key.destination.1, key.proto);
    Hashed { client: key.source.0, tuple: by_tuple.then_some(tuple), count: range.count }
}
