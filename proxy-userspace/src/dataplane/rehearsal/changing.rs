//! The maps of one family that programs go by and write: those of the running programs, which are only read here, and those of a
//! rehearsal, into which is copied what the answer depends on.

use aya::Pod;
use proxy_common::{
    backend::BackendId,
    flow::{Flow, Tier},
    service::{Affinity, Client},
    tuple::{Stage, Tuple},
};

use crate::dataplane::{
    error::{Error, OpenError},
    family::Maps,
    pair::{is_second_step, second_steps, twin_key},
    table::Table,
};

/// The names of one family's.
pub(super) struct Names {
    embryos: &'static str,
    flows: &'static str,
    affinity: &'static str,
    active: &'static str,
    turns: &'static str,
    foreign: &'static str,
}

/// IPv4.
pub(super) const V4: Names = Names {
    embryos: "EMBRYOS_V4",
    flows: "FLOWS_V4",
    affinity: "AFFINITY_V4",
    active: "ACTIVE_V4",
    turns: "TURNS_V4",
    foreign: "FOREIGN_V4",
};

/// IPv6.
pub(super) const V6: Names = Names {
    embryos: "EMBRYOS_V6",
    flows: "FLOWS_V6",
    affinity: "AFFINITY_V6",
    active: "ACTIVE_V6",
    turns: "TURNS_V6",
    foreign: "FOREIGN_V6",
};

/// A flow, and the tier it is in.
pub(super) type Found<A> = (Tier, Flow<A>);

/// The same with its key.
type Keyed<A> = (Tuple<A>, Found<A>);

/// What programs go by and write.
pub(super) struct Changing<A> {
    embryos: Table<Tuple<A>, Flow<A>>,
    flows: Table<Tuple<A>, Flow<A>>,
    affinity: Table<Client<A>, Affinity>,
    active: Table<BackendId, u32>,
    turns: Table<u32, u64>,
    foreign: Table<Tuple<A>, u32>,
}

impl<A> Changing<A>
where
    A: Copy,
    Client<A>: Pod,
    Tuple<A>: Pod,
    Flow<A>: Pod,
{
    pub(super) fn open(maps: &impl Maps, names: &Names) -> Result<Self, OpenError> {
        Ok(Self {
            embryos: maps.table(names.embryos)?,
            flows: maps.table(names.flows)?,
            affinity: maps.table(names.affinity)?,
            active: maps.table(names.active)?,
            turns: maps.table(names.turns)?,
            foreign: maps.table(names.foreign)?,
        })
    }

    /// The flow of a tuple, as a program finds it.
    pub(super) fn flow(&self, key: &Tuple<A>) -> Result<Option<Found<A>>, Error> {
        if let Some(flow) = self.flows.find(key)? {
            return Ok(Some((Tier::Flows, flow)));
        }
        Ok(self.embryos.find(key)?.map(|flow| (Tier::Embryos, flow)))
    }

    /// That another proxy translates the connection of a tuple, if it does.
    pub(super) fn copy_foreign(&self, from: &Self, key: &Tuple<A>) -> Result<(), Error> {
        let key = Tuple { stage: Stage::FromPod, ..*key };
        from.foreign.find(&key)?.map_or(Ok(()), |value| self.foreign.put(&key, &value))
    }

    /// Whom a client stays with.
    pub(super) fn affinity(&self, client: &Client<A>) -> Result<Option<Affinity>, Error> {
        self.affinity.find(client)
    }

    pub(super) fn put_affinity(&self, client: &Client<A>, affinity: &Affinity) -> Result<(), Error> {
        self.affinity.put(client, affinity)
    }

    /// Whose turn it is.
    pub(super) fn copy_turn(&self, from: &Self, service: u32) -> Result<(), Error> {
        self.turns.put(&service, &from.turns.read(&service)?)
    }

    /// How many connections backends have.
    pub(super) fn copy_loads(&self, from: &Self, backends: &[BackendId]) -> Result<(), Error> {
        let Some(last) = backends.iter().max() else { return Ok(()) };
        let loads = from.active.values(*last as usize + 1)?;
        let ids: Vec<BackendId> = (0..).take(loads.len()).collect();
        self.active.put_all(&ids, &loads)
    }

    /// The flow of a tuple, with its other half and with those of its second step.
    pub(super) fn copy_flow(&self, from: &Self, key: &Tuple<A>) -> Result<(), Error> {
        let Some((_, flow)) = from.flow(key)? else { return Ok(()) };
        let mut keys = vec![*key, twin_key(key, &flow)];
        if let Some((step, (_, second))) = from.step(key, &flow)? {
            keys.extend([step, twin_key(&step, &second)]);
        }
        keys.iter().try_for_each(|key| self.copy_entry(from, key))
    }

    fn copy_entry(&self, from: &Self, key: &Tuple<A>) -> Result<(), Error> {
        match from.flow(key)? {
            Some((Tier::Flows, flow)) => self.flows.put(key, &flow),
            Some((Tier::Embryos, flow)) => self.embryos.put(key, &flow),
            None => Ok(()),
        }
    }

    /// The entry by which the source of a flow is replaced where it leaves.
    pub(super) fn second_step(&self, key: &Tuple<A>, flow: &Flow<A>) -> Result<Option<Found<A>>, Error> {
        Ok(self.step(key, flow)?.map(|(_, found)| found))
    }

    fn step(&self, key: &Tuple<A>, flow: &Flow<A>) -> Result<Option<Keyed<A>>, Error> {
        for step in second_steps(key, flow) {
            let found = self.flow(&step)?;
            if let Some(found) = found.filter(|(_, flow)| is_second_step(flow)) {
                return Ok(Some((step, found)));
            }
        }
        Ok(None)
    }
}
