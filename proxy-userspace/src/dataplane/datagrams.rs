//! UDP flows whose Service port has lost their backend while another one has it still. The programs go by `BACKENDS_*`, where
//! the best opinion counts, so such flows would stay for as long as their clients send. They are taken out, and what
//! unconnected sockets remember with them: the next datagram finds nobody it belongs to, and chooses among those who answer now.
//!
//! In: who answers for which Service port, and the tables, read anew each time. Out: removed entries. It is the work of the
//! thread that ends sockets (`sockets.rs`), and none as long as no Service port has lost anybody.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use aya::{Ebpf, Pod};
use proxy_common::{
    addr::Protocol,
    backend::BackendId,
    flow::{Flow, Tier, Turnover},
    socket::{SocketOrigin, SocketPeer, SocketTarget, SocketWay},
    tuple::Tuple,
};

use super::{
    error::{Error, OpenError},
    family, flow_table,
    table::Table,
};
use crate::diff::{Serving, ServingChanges};

/// Entries taken out after one look at a table, at most.
const AT_ONCE: usize = 65_536;

/// Who answers for UDP Service ports, of IPv4 and of IPv6, as of the last plan that was carried out: shared between the loop
/// and the thread that sweeps.
#[derive(Clone, Debug, Default)]
pub(super) struct Opinions(Arc<Mutex<[FamilyOpinions; 2]>>);

#[derive(Debug, Default)]
struct FamilyOpinions {
    /// In order, by index of the Service port.
    serving: HashMap<u32, Arc<[BackendId]>>,
    /// Service ports that have lost somebody since these were taken.
    suspects: BTreeSet<u32>,
}

impl FamilyOpinions {
    fn expect(&mut self, changes: &ServingChanges) {
        for (index, change) in &changes.ports {
            let (Some(known), Some(Serving { backends, .. })) = (self.serving.get_mut(index), change) else { continue };
            if backends.iter().any(|id| known.binary_search(id).is_err()) {
                let both: BTreeSet<BackendId> = known.iter().chain(&**backends).copied().collect();
                *known = both.into_iter().collect();
            }
        }
    }

    fn follow(&mut self, changes: &ServingChanges) {
        if changes.is_all {
            *self = Self::default();
        }
        for (index, change) in &changes.ports {
            let Some(Serving { backends, has_lost }) = change else {
                self.serving.remove(index);
                continue;
            };
            self.serving.insert(*index, Arc::clone(backends));
            if *has_lost {
                self.suspects.insert(*index);
            }
        }
    }
}

impl Opinions {
    fn lock(&self) -> MutexGuard<'_, [FamilyOpinions; 2]> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes in who answers once a plan is carried out that is about to be: from then on flows may have them.
    pub(super) fn expect(&self, changes: [&ServingChanges; 2]) {
        self.lock().iter_mut().zip(changes).for_each(|(family, changes)| family.expect(changes));
    }

    /// Takes in what a plan has changed that is carried out. Says whether somebody is lost.
    pub(super) fn follow(&self, changes: [&ServingChanges; 2]) -> bool {
        let mut families = self.lock();
        families.iter_mut().zip(changes).for_each(|(family, changes)| family.follow(changes));
        families.iter().any(|family| !family.suspects.is_empty())
    }

    /// Moves the Service ports that have lost somebody to those that are looked at already.
    pub(super) fn take_suspects(&self, suspects: &mut [BTreeSet<u32>; 2]) {
        for (family, suspects) in self.lock().iter_mut().zip(suspects) {
            suspects.append(&mut family.suspects);
        }
    }

    /// What to judge flows of some Service ports by, as of now. Those that are gone are not judged: flows outlive them.
    fn of(&self, is_v6: bool, suspects: &BTreeSet<u32>) -> Judge {
        let families = self.lock();
        let serving = &families[usize::from(is_v6)].serving;
        Judge(suspects.iter().filter_map(|index| Some((*index, Arc::clone(serving.get(index)?)))).collect())
    }
}

/// What is judged of a flow: its protocol, the index of its Service port, its backend.
type Subject = (Protocol, u32, BackendId);

/// Who answers for some Service ports.
#[derive(Debug, Default)]
pub(super) struct Judge(pub(super) BTreeMap<u32, Arc<[BackendId]>>);

impl Judge {
    /// Whether a flow has to leave its backend. What is of another Service port is none of this one's affairs.
    pub(super) fn is_lost(&self, (protocol, service, backend): Subject) -> bool {
        let has_left = |serving: &Arc<[BackendId]>| serving.binary_search(&backend).is_err();
        protocol == Protocol::Udp && self.0.get(&service).is_some_and(has_left)
    }
}

/// The flow table of one family.
pub(super) struct Flows<A> {
    /// Embryos first: a flow that moves on meanwhile is seen twice rather than not at all.
    tables: [Table<Tuple<A>, Flow<A>>; 2],
    expired: Table<u32, u64>,
    is_v6: bool,
    opinions: Opinions,
}

impl<A: Copy> Flows<A>
where
    Tuple<A>: Pod,
    Flow<A>: Pod,
{
    pub(super) fn new(
        object: &Ebpf,
        names: &family::Names,
        is_v6: bool,
        opinions: &Opinions,
    ) -> Result<Self, OpenError> {
        let [flows, embryos] = names.flows;
        Ok(Self {
            tables: [family::table(object, embryos)?, family::table(object, flows)?],
            expired: family::table(object, "EXPIRED")?,
            is_v6,
            opinions: opinions.clone(),
        })
    }

    /// What to judge flows of these Service ports by, as of now.
    pub(super) fn judge(&self, suspects: &BTreeSet<u32>) -> Judge {
        self.opinions.of(self.is_v6, suspects)
    }

    /// Takes out the flows of these Service ports that have to leave their backends: both halves, and what replaces their source.
    /// Returns how many entries. What packets of such a flow were not added up yet is lost with it, as at an eviction.
    pub(super) fn remove_lost(&self, suspects: &BTreeSet<u32>) -> Result<usize, Error> {
        let mut sum = 0;
        for (tier, table) in [Tier::Embryos, Tier::Flows].into_iter().zip(&self.tables) {
            let subject = |key: &Tuple<A>, flow: &Flow<A>| Some((key.proto, flow.service, flow.backend));
            let removed = remove(table, || self.judge(suspects), subject)?;
            flow_table::note_expired(&self.expired, Turnover::index(tier, self.is_v6), removed as u64)?;
            sum += removed;
        }
        Ok(sum)
    }

    /// Has datagrams of sockets that name these Service ports choose anew, where they have to leave their backends. Sockets that are
    /// connected are ended, and what they remember goes with them.
    pub(super) fn forget_lost(
        &self,
        sockets: &Table<SocketPeer<A>, SocketTarget<A>>,
        suspects: &BTreeSet<u32>,
    ) -> Result<usize, Error>
    where
        SocketPeer<A>: Pod,
        SocketTarget<A>: Pod,
    {
        let subject = |peer: &SocketPeer<A>, target: &SocketTarget<A>| {
            let is_asked = peer.way == SocketWay::ToBackend && target.origin == SocketOrigin::Sent;
            is_asked.then_some((target.proto, target.service, target.backend))
        };
        remove(sockets, || self.judge(suspects), subject)
    }
}

/// Takes out what is lost, in as many rounds as it takes; returns how many entries that were. Each is looked at again before, and by
/// what is known then: who has chosen meanwhile has chosen well. One that chooses the same backend once more between this look
/// and the removal, because it is back, chooses again.
fn remove<K: Pod, V: Pod>(
    table: &Table<K, V>,
    judge: impl Fn() -> Judge,
    subject: impl Fn(&K, &V) -> Option<Subject>,
) -> Result<usize, Error> {
    let mut removed = 0;
    loop {
        let (known, mut lost) = (judge(), Vec::new());
        table.visit(|key, value| {
            let found = subject(&key, &value).filter(|found| known.is_lost(*found));
            lost.extend(found.map(|found| (key, found)));
            lost.len() < AT_ONCE
        })?;
        let known = judge();
        for (key, found) in lost.iter().filter(|(_, found)| known.is_lost(*found)) {
            let now = table.find(key)?.and_then(|value| subject(key, &value));
            if now == Some(*found) && table.take(key)? {
                removed += 1;
            }
        }
        if lost.len() < AT_ONCE {
            return Ok(removed);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proxy_common::addr::Protocol;

    use super::Opinions;
    use crate::diff::{Serving, ServingChanges};

    type Change<'a> = (u32, Option<(&'a [u32], bool)>);

    fn changes(is_all: bool, ports: &[Change<'_>]) -> ServingChanges {
        let serving = |(backends, has_lost): (&[u32], bool)| Serving { backends: backends.into(), has_lost };
        ServingChanges { is_all, ports: ports.iter().map(|(index, change)| (*index, change.map(serving))).collect() }
    }

    #[test]
    fn a_flow_is_judged_by_its_own_service_port_alone() {
        let opinions = Opinions::default();
        let nothing = ServingChanges::default();
        assert!(
            !opinions.follow([&changes(false, &[(7, Some((&[1, 2], false))), (8, Some((&[1], false)))]), &nothing])
        );
        assert!(opinions.follow([&changes(false, &[(7, Some((&[2], true)))]), &nothing]));
        let mut suspects = [BTreeSet::new(), BTreeSet::new()];
        opinions.take_suspects(&mut suspects);
        assert_eq!(suspects, [BTreeSet::from([7]), BTreeSet::new()]);
        assert!(!opinions.follow([&nothing, &nothing]), "they are taken");
        let judge = opinions.of(false, &suspects[0]);
        let cases = [
            ("whom it has lost", Protocol::Udp, 7, 1, true),
            ("whom it has", Protocol::Udp, 7, 2, false),
            ("another Service port", Protocol::Udp, 8, 1, false),
            ("one that has lost nobody", Protocol::Udp, 8, 2, false),
            ("a connection", Protocol::Tcp, 7, 1, false),
            ("nobody's index", Protocol::Udp, 9, 1, false),
        ];
        for (name, protocol, service, backend, expected) in cases {
            assert_eq!(judge.is_lost((protocol, service, backend)), expected, "{name}");
        }
    }

    #[test]
    fn what_came_back_or_is_gone_meanwhile_is_not_judged_by_what_was() {
        let opinions = Opinions::default();
        let nothing = ServingChanges::default();
        let both = changes(true, &[(7, Some((&[1], true))), (8, Some((&[1], true)))]);
        opinions.follow([&nothing, &both]);
        let mut suspects = [BTreeSet::new(), BTreeSet::new()];
        opinions.take_suspects(&mut suspects);
        assert!(opinions.of(true, &suspects[1]).is_lost((Protocol::Udp, 7, 2)));
        opinions.follow([&nothing, &changes(false, &[(7, Some((&[1, 2], false))), (8, None)])]);
        let judge = opinions.of(true, &suspects[1]);
        assert!(!judge.is_lost((Protocol::Udp, 7, 2)) && !judge.is_lost((Protocol::Udp, 8, 2)));
        opinions.follow([&nothing, &changes(true, &[])]);
        assert!(!opinions.of(true, &suspects[1]).is_lost((Protocol::Udp, 7, 3)), "nothing is known of it any more");
    }

    #[test]
    fn who_is_about_to_answer_is_lost_to_nobody() {
        let opinions = Opinions::default();
        let nothing = ServingChanges::default();
        opinions.follow([&changes(false, &[(7, Some((&[1, 3], true)))]), &nothing]);
        let is_lost = |backend| opinions.of(false, &BTreeSet::from([7])).is_lost((Protocol::Udp, 7, backend));
        let next = changes(false, &[(7, Some((&[2, 3], true))), (8, Some((&[1], false))), (9, None)]);
        opinions.expect([&next, &nothing]);
        assert_eq!([1, 2, 3, 4].map(is_lost), [false, false, false, true], "it is not carried out yet");
        opinions.follow([&next, &nothing]);
        assert_eq!([1, 2, 3, 4].map(is_lost), [true, false, false, true]);
    }
}
