//! Which endpoint has which backend id. An endpoint that has left every slice serves nobody new; one that comes back
//! within the grace is what it was, and its connections go on. After that it is gone, which ends them, and its id may go
//! to another.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::Instant,
};

use proxy_common::{
    addr::Address,
    backend::{Backend, BackendId, BackendState},
};

use super::{GRACE, ids::Ids};
use crate::desired::{DesiredBackend, Target};

/// The backends of one family.
#[derive(Debug)]
pub(super) struct Backends<A> {
    /// What the kernel holds, by id.
    entries: Vec<Backend<A>>,
    /// Serving, not serving and gone ones.
    by_target: BTreeMap<Target<A>, BackendId>,
    /// Endpoints that have left and are not gone yet, by the time they left.
    left_at: BTreeMap<BackendId, Instant>,
    /// The same in the order of time, and perhaps some behind the first that came back.
    leaving: VecDeque<(Instant, BackendId)>,
    /// Given to nobody else, even if they are free.
    unchanged: BTreeSet<BackendId>,
    ids: Ids,
}

impl<A: Address> Backends<A> {
    /// Takes over what the kernel holds.
    pub(super) fn adopt(entries: Vec<Backend<A>>, capacity: u32, now: Instant) -> Self {
        let mut backends = Self {
            entries,
            by_target: BTreeMap::new(),
            left_at: BTreeMap::new(),
            leaving: VecDeque::new(),
            unchanged: BTreeSet::new(),
            ids: Ids::new(capacity),
        };
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

    /// The endpoint with an id, as the kernel holds it.
    pub(super) fn get(&self, id: BackendId) -> Option<&Backend<A>> {
        self.entries.get(id as usize).filter(|entry| entry.state != BackendState::Free)
    }

    /// To these ids lead frontends that could not be changed for want of room, whoever has them.
    pub(super) fn set_unchanged(&mut self, ids: BTreeSet<BackendId>) {
        self.unchanged = ids;
    }

    /// Makes an endpoint's entry what it should be. `Ok(None)`: it is already; an error: every id is taken.
    pub(super) fn put(
        &mut self,
        target: Target<A>,
        desired: DesiredBackend<A>,
        now: Instant,
    ) -> Result<Option<(BackendId, Backend<A>)>, Full> {
        let id = match self.by_target.get(&target) {
            Some(id) => *id,
            None => self.take(target, now)?,
        };
        if self.left_at.remove(&id).is_some() {
            self.forget_returned();
        }
        let wanted = Backend {
            addr: target.addr,
            node: desired.node,
            port: target.port,
            state: desired.state,
            is_local: desired.is_local.into(),
            generation: self.generation(id),
        };
        Ok(self.write(id, wanted))
    }

    /// Takes an endpoint out of service that has left every slice.
    pub(super) fn leave(&mut self, target: &Target<A>, now: Instant) -> Option<(BackendId, Backend<A>)> {
        let id = self.id(target).filter(|id| self.is_present(*id) && !self.left_at.contains_key(id))?;
        self.left_at.insert(id, now);
        self.leaving.push_back((now, id));
        self.write(id, Backend { state: BackendState::NotServing, ..self.entry(id) })
    }

    /// The next endpoint whose grace is over, now gone.
    pub(super) fn bury(&mut self, now: Instant) -> Option<(BackendId, Backend<A>)> {
        let (since, id) = *self.leaving.front()?;
        if now.saturating_duration_since(since) < GRACE {
            return None;
        }
        self.left_at.remove(&id);
        self.forget_returned();
        self.ids.put_back(id, now);
        self.write(id, Backend { state: BackendState::Gone, ..self.entry(id) })
    }

    /// When there will be something to [`bury`](Self::bury).
    pub(super) fn next_burial(&self) -> Option<Instant> {
        self.leaving.front().map(|(since, _)| *since + GRACE)
    }

    /// The first in the queue is one that is still away.
    fn forget_returned(&mut self) {
        while self.leaving.front().is_some_and(|(since, id)| self.left_at.get(id) != Some(since)) {
            self.leaving.pop_front();
        }
    }

    /// One that was gone is another when it comes back: its old connections have been told so.
    fn generation(&mut self, id: BackendId) -> u32 {
        let entry = self.entry(id);
        if entry.state != BackendState::Gone {
            return entry.generation;
        }
        self.ids.revive(id);
        entry.generation.wrapping_add(1)
    }

    /// A number nobody uses, of a new generation: what remembers it for somebody else notices.
    fn take(&mut self, target: Target<A>, now: Instant) -> Result<BackendId, Full> {
        let mut id = self.ids.take(now).ok_or(Full)?;
        while self.unchanged.contains(&id) {
            self.ids.put_back(id, now);
            id = self.ids.take(now).ok_or(Full)?;
        }
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

    const SERVING: DesiredBackend<Ipv4> =
        DesiredBackend { is_local: false, node: Ipv4 { octets: [0; 4] }, state: BackendState::Serving };

    fn target(host: u8) -> Target<Ipv4> {
        Target { addr: Ipv4 { octets: [10, 0, 0, host] }, port: Port::new(80) }
    }

    fn empty(capacity: u32) -> Backends<Ipv4> {
        Backends::adopt(Vec::new(), capacity, Instant::now())
    }

    /// What happens to backend ids at a time.
    fn buried(backends: &mut Backends<Ipv4>, now: Instant) -> Vec<(u32, Backend<Ipv4>)> {
        std::iter::from_fn(|| backends.bury(now)).collect()
    }

    #[test]
    fn an_endpoint_that_comes_back_in_time_is_what_it_was() {
        let (mut backends, now) = (empty(8), Instant::now());
        let first = backends.put(target(1), SERVING, now).unwrap().unwrap();
        let (_, left) = backends.leave(&target(1), now).unwrap();
        assert_eq!(left, Backend { state: BackendState::NotServing, ..first.1 });
        assert_eq!(backends.leave(&target(1), now + GRACE / 2), None, "it has left already");
        assert_eq!(backends.next_burial(), Some(now + GRACE));
        assert_eq!(backends.put(target(1), SERVING, now + GRACE).unwrap(), Some(first));
        assert_eq!(backends.next_burial(), None);
        assert!(buried(&mut backends, now + GRACE).is_empty());
        // Leaving again, it has all the time again.
        backends.leave(&target(1), now + GRACE).unwrap();
        assert_eq!(backends.next_burial(), Some(now + 2 * GRACE));
    }

    #[test]
    fn an_endpoint_that_stays_away_is_gone_and_another_when_it_comes_back() {
        let (mut backends, now) = (empty(8), Instant::now());
        let (id, first) = backends.put(target(1), SERVING, now).unwrap().unwrap();
        backends.leave(&target(1), now).unwrap();
        assert_eq!(buried(&mut backends, now + GRACE), [(id, Backend { state: BackendState::Gone, ..first })]);
        let (id_again, again) = backends.put(target(1), SERVING, now + GRACE).unwrap().unwrap();
        assert_eq!((id_again, again.generation), (id, first.generation + 1));
        // The id is not at rest any more.
        assert_ne!(backends.put(target(2), SERVING, now + 3 * GRACE).unwrap().unwrap().0, id);
    }

    /// Trap 5: a flow that remembers a backend id must not go to whoever has it now.
    #[test]
    fn an_id_given_to_another_endpoint_has_another_generation() {
        let (mut backends, now) = (empty(2), Instant::now());
        let (id, first) = backends.put(target(1), SERVING, now).unwrap().unwrap();
        backends.leave(&target(1), now).unwrap();
        assert!(backends.put(target(2), SERVING, now + GRACE).is_err(), "it may come back");
        buried(&mut backends, now + GRACE);
        assert!(backends.put(target(2), SERVING, now + GRACE).is_err(), "the id rests");
        let (other_id, other) = backends.put(target(2), SERVING, now + 2 * GRACE).unwrap().unwrap();
        assert_eq!(other_id, id);
        assert_eq!(other.generation, first.generation + 1);
        assert_eq!(backends.id(&target(1)), None);
    }

    #[test]
    fn an_agent_that_is_started_anew_gives_those_that_left_their_grace_again() {
        let (mut backends, now) = (empty(8), Instant::now());
        backends.put(target(1), SERVING, now).unwrap();
        backends.leave(&target(1), now).unwrap();
        let mut restarted = Backends::adopt(backends.entries.clone(), 8, now + GRACE);
        assert_eq!(restarted.leave(&target(1), now + GRACE), None, "nothing to write");
        assert!(buried(&mut restarted, now + GRACE).is_empty());
        assert_eq!(buried(&mut restarted, now + 2 * GRACE).len(), 1);
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
