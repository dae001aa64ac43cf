//! Who wants a frontend that another Service has.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Display,
};

use proxy_common::{
    addr::{Address, Protocol},
    service::Frontend,
};

use super::contribution::Claim;
use crate::model::{Defect, ObjectName, ObjectReference, Problem};

/// Whose a claim is, in the order of claims.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Party {
    created: i64,
    uid: String,
    service: ObjectName,
}

impl From<Claim<'_>> for Party {
    fn from(claim: Claim<'_>) -> Self {
        Self { created: claim.created, uid: claim.uid.to_owned(), service: claim.service.clone() }
    }
}

/// The frontends that several claim.
#[derive(Debug)]
pub(super) struct Conflicts<A: Ord> {
    /// Losers and the winner of a frontend.
    lost: BTreeMap<Frontend<A>, BTreeMap<Party, Party>>,
    /// Frontends whose claims have changed.
    suspects: BTreeSet<Frontend<A>>,
}

impl<A: Ord> Default for Conflicts<A> {
    fn default() -> Self {
        Self { lost: BTreeMap::new(), suspects: BTreeSet::new() }
    }
}

impl<A: Address + Display> Conflicts<A> {
    /// Notes that the claims to a frontend have changed. What is meant by it is seen when all changes are known.
    pub(super) fn suspect(&mut self, frontend: Frontend<A>, is_contested: bool) {
        // A conflict over an address as a whole is one over its ports as well, or none that anybody would notice.
        if frontend.proto != Protocol::Any && (is_contested || self.lost.contains_key(&frontend)) {
            self.suspects.insert(frontend);
        }
    }

    /// Who has lost a frontend, or lost it to another, since the last call.
    pub(super) fn take_news<'a>(&mut self, claims: impl Fn(&Frontend<A>) -> BTreeSet<Claim<'a>>) -> Vec<Defect> {
        let mut news = Vec::new();
        for frontend in std::mem::take(&mut self.suspects) {
            let mut claims = claims(&frontend).into_iter().map(Party::from);
            let winner = claims.next();
            let lost: BTreeMap<Party, Party> = claims.filter_map(|loser| Some((loser, winner.clone()?))).collect();
            let before = self.lost.remove(&frontend).unwrap_or_default();
            let is_news = |(loser, winner): &(&Party, &Party)| before.get(loser) != Some(winner);
            news.extend(lost.iter().filter(is_news).map(|(loser, winner)| defect(&frontend, loser, winner)));
            if !lost.is_empty() {
                self.lost.insert(frontend, lost);
            }
        }
        news
    }
}

fn defect<A: Address + Display>(frontend: &Frontend<A>, loser: &Party, winner: &Party) -> Defect {
    let (address, port, protocol) = (&frontend.addr, frontend.port, frontend.proto);
    let name = if *address == A::ANY {
        format!("node port {port}/{protocol}")
    } else {
        format!("{address} port {port}/{protocol}")
    };
    Defect {
        object: ObjectReference { kind: "Service", name: loser.service.clone(), uid: loser.uid.clone() },
        problem: Problem::Conflict { frontend: name, winner: winner.service.clone() },
    }
}
