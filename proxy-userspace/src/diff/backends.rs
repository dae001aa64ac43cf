//! Which endpoint has which backend id. An endpoint that left keeps its id, marked gone, until another one needs it; one
//! that comes back before that gets its old id, and its connections go on.

use std::{collections::BTreeMap, time::Instant};

use proxy_common::{
    addr::Address,
    backend::{Backend, BackendId, BackendState},
};

use super::ids::Ids;
use crate::desired::{DesiredBackend, Target};

/// The backends of one family.
#[derive(Debug)]
pub(super) struct Backends<A> {
    /// What the kernel holds, by id.
    entries: Vec<Backend<A>>,
    /// Serving, not serving and gone ones.
    by_target: BTreeMap<Target<A>, BackendId>,
    ids: Ids,
}

impl<A: Address> Backends<A> {
    /// Takes over what the kernel holds.
    pub(super) fn adopt(entries: Vec<Backend<A>>, capacity: u32, now: Instant) -> Self {
        let mut backends = Self { entries, by_target: BTreeMap::new(), ids: Ids::new(capacity) };
        for id in 1..backends.entries.len() {
            backends.adopt_entry(id as BackendId, now);
        }
        backends
    }

    fn adopt_entry(&mut self, id: BackendId, now: Instant) {
        let entry = self.entries[id as usize];
        if entry.state == BackendState::Free {
            return;
        }
        self.ids.claim(id);
        if entry.state == BackendState::Gone {
            self.ids.put_back(id, now);
        }
        let target = Target { addr: entry.addr, port: entry.port };
        let is_better = self.by_target.get(&target).is_none_or(|other| !self.is_present(*other));
        if is_better {
            self.by_target.insert(target, id);
        }
    }

    fn is_present(&self, id: BackendId) -> bool {
        matches!(self.entry(id).state, BackendState::Serving | BackendState::NotServing)
    }

    fn entry(&self, id: BackendId) -> Backend<A> {
        self.entries.get(id as usize).copied().unwrap_or_default()
    }

    /// Endpoints the kernel knows, the gone ones included.
    pub(super) fn targets(&self) -> impl Iterator<Item = Target<A>> {
        self.by_target.keys().copied()
    }

    /// The id of an endpoint.
    pub(super) fn id(&self, target: &Target<A>) -> Option<BackendId> {
        self.by_target.get(target).copied()
    }

    /// Makes an endpoint's entry what it should be. `Ok(None)`: it is already; an error: every id is taken.
    pub(super) fn put(
        &mut self,
        target: Target<A>,
        desired: DesiredBackend,
        now: Instant,
    ) -> Result<Option<(BackendId, Backend<A>)>, Full> {
        let id = match self.by_target.get(&target) {
            Some(id) => self.revived(*id),
            None => self.take(target, now)?,
        };
        let wanted = Backend {
            addr: target.addr,
            port: target.port,
            state: desired.state,
            is_local: desired.is_local.into(),
            generation: self.entry(id).generation,
        };
        Ok(self.write(id, wanted))
    }

    /// Marks the entry of an endpoint that left every slice.
    pub(super) fn leave(&mut self, target: &Target<A>, now: Instant) -> Option<(BackendId, Backend<A>)> {
        let id = self.id(target).filter(|id| self.is_present(*id))?;
        self.ids.put_back(id, now);
        self.write(id, Backend { state: BackendState::Gone, ..self.entry(id) })
    }

    fn revived(&mut self, id: BackendId) -> BackendId {
        if self.entry(id).state == BackendState::Gone {
            self.ids.revive(id);
        }
        id
    }

    /// A number nobody uses, of a new generation: what remembers it for somebody else notices.
    fn take(&mut self, target: Target<A>, now: Instant) -> Result<BackendId, Full> {
        let id = self.ids.take(now).ok_or(Full)?;
        let entry = self.entry(id);
        let former = Target { addr: entry.addr, port: entry.port };
        if self.by_target.get(&former) == Some(&id) {
            self.by_target.remove(&former);
        }
        let generation = entry.generation.wrapping_add(1);
        *super::at(&mut self.entries, id as usize) = Backend { generation, ..Backend::default() };
        self.by_target.insert(target, id);
        Ok(id)
    }

    fn write(&mut self, id: BackendId, wanted: Backend<A>) -> Option<(BackendId, Backend<A>)> {
        let entry = super::at(&mut self.entries, id as usize);
        (*entry != wanted).then(|| {
            *entry = wanted;
            (id, wanted)
        })
    }
}

/// Every id is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Full;

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use proxy_common::{
        addr::{Ipv4, Port},
        backend::{Backend, BackendState},
    };

    use super::Backends;
    use crate::{
        desired::{DesiredBackend, Target},
        diff::GRACE,
    };

    const SERVING: DesiredBackend = DesiredBackend { is_local: false, state: BackendState::Serving };

    fn target(host: u8) -> Target<Ipv4> {
        Target { addr: Ipv4 { octets: [10, 0, 0, host] }, port: Port::new(80) }
    }

    fn empty(capacity: u32) -> Backends<Ipv4> {
        Backends::adopt(Vec::new(), capacity, Instant::now())
    }

    #[test]
    fn an_endpoint_that_comes_back_gets_its_id_and_generation_back() {
        let (mut backends, now) = (empty(8), Instant::now());
        let first = backends.put(target(1), SERVING, now).unwrap().unwrap();
        backends.leave(&target(1), now).unwrap();
        assert_eq!(backends.put(target(1), SERVING, now + GRACE).unwrap(), Some(first));
        // The id is not at rest any more.
        assert_ne!(backends.put(target(2), SERVING, now + 2 * GRACE).unwrap().unwrap().0, first.0);
    }

    #[test]
    fn an_id_given_to_another_endpoint_has_another_generation() {
        let (mut backends, now) = (empty(2), Instant::now());
        let (id, first) = backends.put(target(1), SERVING, now).unwrap().unwrap();
        let (_, gone) = backends.leave(&target(1), now).unwrap();
        assert_eq!(gone, Backend { state: BackendState::Gone, ..first });
        assert!(backends.put(target(2), SERVING, now).is_err(), "the id rests");
        let (other_id, other) = backends.put(target(2), SERVING, now + GRACE).unwrap().unwrap();
        assert_eq!(other_id, id);
        assert_eq!(other.generation, first.generation + 1);
        assert_eq!(backends.id(&target(1)), None);
    }

    #[test]
    fn what_the_kernel_holds_is_not_written_again() {
        let (mut backends, now) = (empty(8), Instant::now());
        backends.put(target(1), SERVING, now).unwrap();
        backends.put(target(2), SERVING, now).unwrap();
        let mut restarted = Backends::adopt(backends.entries.clone(), 8, now);
        assert_eq!(restarted.put(target(2), SERVING, now).unwrap(), None);
        assert_eq!(restarted.id(&target(1)), backends.id(&target(1)));
    }
}
