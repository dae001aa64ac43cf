//! Whom UDP flows may stay with. `BACKENDS_*` holds the best opinion that any Service has of an endpoint, and by that the
//! programs go; but a Service port that has lost an endpoint is left by its flows also where another one has it still.
//! In: the endpoints that answer for each UDP Service port. Out: what has changed, for whoever goes through the flows.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use proxy_common::backend::BackendId;

/// Who answers for UDP Service ports, as far as that has changed. It holds once the plan is carried out, and is none of its writes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServingChanges {
    /// What was known before is void: these are all ports there are, and any of them may have lost somebody.
    pub is_all: bool,
    /// By index of the Service port; `None` when that is nobody's any more.
    pub ports: BTreeMap<u32, Option<Serving>>,
}

/// Who answers for a UDP Service port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Serving {
    /// In order, each once.
    pub backends: Arc<[BackendId]>,
    /// Somebody has answered before and does so no more.
    pub has_lost: bool,
}

/// Who answers for the UDP Service ports of one family.
#[derive(Debug)]
pub(super) struct ServingBackends {
    by_index: HashMap<u32, Arc<[BackendId]>>,
    changes: ServingChanges,
}

impl ServingBackends {
    /// The kernel does not tell who has answered for a port before: flows are all there is to know of it.
    pub(super) fn adopt() -> Self {
        Self { by_index: HashMap::new(), changes: ServingChanges { is_all: true, ports: BTreeMap::new() } }
    }

    /// Notes who answers for a port.
    pub(super) fn put(&mut self, index: u32, mut backends: Vec<BackendId>) {
        backends.sort_unstable();
        backends.dedup();
        let before = self.by_index.get(&index);
        if before.is_some_and(|before| **before == *backends) {
            return;
        }
        let is_lost = |id: &BackendId| backends.binary_search(id).is_err();
        let has_lost = before.map_or(self.changes.is_all, |before| before.iter().any(is_lost));
        let is_untold = matches!(self.changes.ports.get(&index), Some(Some(Serving { has_lost: true, .. })));
        let backends: Arc<[BackendId]> = backends.into();
        self.by_index.insert(index, Arc::clone(&backends));
        self.changes.ports.insert(index, Some(Serving { backends, has_lost: has_lost || is_untold }));
    }

    /// Forgets a port. Its flows outlive it.
    pub(super) fn remove(&mut self, index: u32) {
        if self.by_index.remove(&index).is_some() {
            self.changes.ports.insert(index, None);
        }
    }

    /// What has changed since the last call.
    pub(super) fn take_changes(&mut self) -> ServingChanges {
        std::mem::take(&mut self.changes)
    }
}

#[cfg(test)]
mod tests {
    use super::{Serving, ServingBackends};

    fn serving(backends: &[u32], has_lost: bool) -> Serving {
        Serving { backends: backends.into(), has_lost }
    }

    #[test]
    fn a_port_has_lost_whom_it_had_and_has_no_more() {
        let mut ports = ServingBackends::adopt();
        ports.take_changes();
        let cases: [(&str, &[u32], Option<Serving>); 6] = [
            ("a new port", &[2, 1, 2], Some(serving(&[1, 2], false))),
            ("the same in another order", &[1, 2], None),
            ("one more", &[1, 2, 3], Some(serving(&[1, 2, 3], false))),
            ("one less", &[1, 3], Some(serving(&[1, 3], true))),
            ("one for another", &[1, 4], Some(serving(&[1, 4], true))),
            ("none", &[], Some(serving(&[], true))),
        ];
        for (name, backends, expected) in cases {
            ports.put(7, backends.to_vec());
            let changes = ports.take_changes();
            assert_eq!(changes.ports.get(&7).cloned().flatten(), expected, "{name}");
            assert!(!changes.is_all && changes.ports.len() <= 1, "{name}");
        }
    }

    #[test]
    fn what_is_lost_stays_lost_until_it_is_told() {
        let mut ports = ServingBackends::adopt();
        ports.put(7, vec![1, 2]);
        ports.take_changes();
        ports.put(7, vec![1]);
        ports.put(7, vec![1, 3]);
        assert_eq!(ports.take_changes().ports[&7], Some(serving(&[1, 3], true)));
    }

    #[test]
    fn at_the_start_any_port_may_have_lost_somebody() {
        let mut ports = ServingBackends::adopt();
        ports.put(7, vec![1]);
        let changes = ports.take_changes();
        assert!(changes.is_all);
        assert_eq!(changes.ports[&7], Some(serving(&[1], true)));
    }

    #[test]
    fn a_port_that_is_gone_is_told_once() {
        let mut ports = ServingBackends::adopt();
        ports.put(7, vec![1]);
        ports.take_changes();
        ports.remove(7);
        ports.remove(8);
        assert!(ports.take_changes().ports.into_iter().eq([(7, None)]));
        ports.put(7, vec![2]);
        assert_eq!(ports.take_changes().ports[&7], Some(serving(&[2], false)), "it is another's by now");
    }
}
