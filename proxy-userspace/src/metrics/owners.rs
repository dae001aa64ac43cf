//! Whose the programs' counts are. A Service port's index and a backend's id are given to another owner after a while, and
//! the counts go on from where they were; so for each owner it is remembered where it began. In: plans, before they are
//! carried out. Out: names and differences.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use proxy_common::{
    addr::Address,
    backend::{Backend, BackendState},
    names::ServiceName,
    service::{Frontend, Service},
    stats::Stats,
};

use crate::{
    diff::{FamilyState, Step},
    model::ServicePortName,
};

/// Whose the counts of one family are; shared by the loop, which gives numbers out, and by whoever reads counts.
#[derive(Debug, Default)]
pub struct Owners {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// By index.
    services: BTreeMap<u32, Owner>,
    /// By id: the generation they are for and where that one began. Those that began with nothing are not in here.
    backends: HashMap<u32, (u32, Stats)>,
    /// Indexes that have got an owner and whose names are not written yet.
    unnamed: BTreeSet<u32>,
}

#[derive(Debug)]
struct Owner {
    port: Arc<ServicePortName>,
    base: Stats,
}

/// Reads the count of a number, for its new owner. What cannot be read counts as nothing.
pub trait Counts {
    /// Of an index.
    fn service(&self, index: u32) -> Stats;
    /// Of an id.
    fn backend(&self, id: u32) -> Stats;
}

impl Owners {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes over what the kernel holds: the counts of before an agent's start are not its own.
    pub fn adopt<A: Address>(
        &self,
        state: &FamilyState<A>,
        owner: &impl Fn(&Frontend<A>) -> Option<Arc<ServicePortName>>,
        counts: &impl Counts,
    ) {
        for (frontend, service) in &state.services {
            self.note_service(frontend, service, owner, counts);
        }
        for (id, backend) in (0..).zip(&state.backends) {
            if backend.state != BackendState::Free {
                self.note_backend(id, backend, 0, counts);
            }
        }
    }

    /// Takes in what is going to be written.
    pub fn follow<A: Address>(
        &self,
        steps: &[Step<A>],
        owner: &impl Fn(&Frontend<A>) -> Option<Arc<ServicePortName>>,
        counts: &impl Counts,
    ) {
        for step in steps {
            match step {
                Step::PutService(frontend, service) => self.note_service(frontend, service, owner, counts),
                // The first owner of an id began with nothing.
                Step::PutBackend(id, backend) => self.note_backend(*id, backend, 1, counts),
                _ => {}
            }
        }
    }

    fn note_service<A: Address>(
        &self,
        frontend: &Frontend<A>,
        service: &Service,
        owner: &impl Fn(&Frontend<A>) -> Option<Arc<ServicePortName>>,
        counts: &impl Counts,
    ) {
        // What stands for the undefined ports of an address is no Service port, and nothing is counted for it.
        if service.index == 0 {
            return;
        }
        let Some(port) = owner(frontend) else { return };
        let mut state = self.state();
        if state.services.get(&service.index).is_none_or(|owner| owner.port != port) {
            state.services.insert(service.index, Owner { port, base: counts.service(service.index) });
            state.unnamed.insert(service.index);
        }
    }

    fn note_backend<A>(&self, id: u32, backend: &Backend<A>, first_generation: u32, counts: &impl Counts) {
        let mut state = self.state();
        let known = state.backends.get(&id).map(|(generation, _)| *generation);
        if backend.generation <= first_generation || known == Some(backend.generation) {
            return;
        }
        state.backends.insert(id, (backend.generation, counts.backend(id)));
    }

    /// Names to be written, by index.
    pub fn unnamed(&self) -> Vec<(u32, ServiceName)> {
        let state = self.state();
        let named = |index: &u32| Some((*index, state.services.get(index)?.port.as_ref().into()));
        state.unnamed.iter().filter_map(named).collect()
    }

    /// They are written.
    pub fn forget_unnamed(&self) {
        self.state().unnamed.clear();
    }

    /// Whose an index is, and what was counted for it.
    pub fn service(&self, index: u32, counted: &Stats) -> Option<(Arc<ServicePortName>, Stats)> {
        let state = self.state();
        let owner = state.services.get(&index)?;
        Some((Arc::clone(&owner.port), since(counted, &owner.base)))
    }

    /// What was counted for a backend.
    pub fn backend(&self, id: u32, generation: u32, counted: &Stats) -> Stats {
        let state = self.state();
        let base = state.backends.get(&id).filter(|(known, _)| *known == generation);
        base.map_or(*counted, |(_, base)| since(counted, base))
    }
}

fn since(now: &Stats, base: &Stats) -> Stats {
    Stats {
        opened: now.opened.wrapping_sub(base.opened),
        packets: now.packets.wrapping_sub(base.packets),
        bytes: now.bytes.wrapping_sub(base.bytes),
        reply_packets: now.reply_packets.wrapping_sub(base.reply_packets),
        reply_bytes: now.reply_bytes.wrapping_sub(base.reply_bytes),
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, sync::Arc};

    use proxy_common::{
        addr::{Ipv4, Port, Protocol},
        backend::{Backend, BackendState},
        service::{Frontend, Service},
        stats::Stats,
    };

    use super::{Counts, Owners};
    use crate::{
        diff::{FamilyState, Step},
        model::{ObjectName, ServicePortName},
    };

    /// So many of everything.
    struct All(u64);

    impl Counts for All {
        fn service(&self, _: u32) -> Stats {
            stats(self.0)
        }

        fn backend(&self, _: u32) -> Stats {
            stats(self.0)
        }
    }

    fn stats(count: u64) -> Stats {
        Stats { opened: count, packets: count, bytes: count, reply_packets: count, reply_bytes: count }
    }

    const FRONTEND: Frontend<Ipv4> = Frontend::new(Ipv4 { octets: [10, 96, 0, 1] }, Port::new(80), Protocol::Tcp);

    /// Every frontend belongs to a Service of this name.
    fn owned_by(name: &str) -> impl Fn(&Frontend<Ipv4>) -> Option<Arc<ServicePortName>> {
        let service = ObjectName { namespace: "test".into(), name: name.into() };
        let port = Arc::new(ServicePortName { service, port: String::new(), protocol: Protocol::Tcp });
        move |_| Some(Arc::clone(&port))
    }

    fn put_service(index: u32) -> Step<Ipv4> {
        Step::PutService(FRONTEND, Service { index, ..Service::default() })
    }

    fn backend(generation: u32) -> Backend<Ipv4> {
        Backend { generation, state: BackendState::Serving, ..Backend::default() }
    }

    #[test]
    fn an_index_given_to_another_service_does_not_bring_its_counts_along() {
        let owners = Owners::default();
        owners.follow(&[put_service(1)], &owned_by("first"), &All(0));
        assert_eq!(owners.service(1, &stats(5)).unwrap().1, stats(5));
        // Written again, for the same owner.
        owners.follow(&[put_service(1)], &owned_by("first"), &All(5));
        assert_eq!(owners.service(1, &stats(7)).unwrap().1, stats(7));
        owners.follow(&[put_service(1)], &owned_by("second"), &All(7));
        let (port, counted) = owners.service(1, &stats(8)).unwrap();
        assert_eq!((&*port.service.name, counted), ("second", stats(1)));
        assert!(owners.service(2, &stats(8)).is_none());
    }

    #[test]
    fn an_id_given_to_another_backend_does_not_bring_its_counts_along() {
        let owners = Owners::default();
        owners.follow(&[Step::PutBackend(1, backend(1))], &owned_by("any"), &All(0));
        assert_eq!(owners.backend(1, 1, &stats(5)), stats(5));
        owners.follow(&[Step::PutBackend(1, backend(2))], &owned_by("any"), &All(5));
        // Another state of the same one.
        owners.follow(&[Step::PutBackend(1, backend(2))], &owned_by("any"), &All(6));
        assert_eq!(owners.backend(1, 2, &stats(7)), stats(2));
    }

    #[test]
    fn what_was_counted_before_the_agent_started_is_not_its_own() {
        let owners = Owners::default();
        let service = Service { index: 1, ..Service::default() };
        let state = FamilyState {
            services: BTreeMap::from([(FRONTEND, service)]),
            backends: vec![Backend::default(), backend(1)],
            ..FamilyState::default()
        };
        owners.adopt(&state, &owned_by("first"), &All(9));
        assert_eq!(owners.service(1, &stats(10)).unwrap().1, stats(1));
        assert_eq!(owners.backend(1, 1, &stats(10)), stats(1));
    }
}
