//! Backends, as the maps have them, and which Service ports lead to them.

use std::net::{IpAddr, SocketAddr};

use proxy_common::{
    addr::{Address as _, Protocol},
    backend::BackendState,
};
use serde::Serialize;

use super::{InspectError, Names};
use crate::dataplane::FamilyReader;

/// A target of Services.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Backend {
    /// Where it is.
    pub address: SocketAddr,
    /// Its number in the maps, which another gets after it.
    pub id: u32,
    /// Whether it serves.
    pub state: State,
    /// It runs on this node.
    pub is_local: bool,
    /// Its node, where that matters.
    pub node: Option<IpAddr>,
    /// How often its number was given to another.
    pub generation: u32,
    /// The Service ports that lead to it, by name.
    pub services: Vec<String>,
}

/// What may be sent to a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Nothing: the number is nobody's.
    Free,
    /// Everything.
    Serving,
    /// What belongs to a TCP connection.
    NotServing,
    /// Nothing: its endpoint has left every slice.
    Gone,
}

impl State {
    /// In words.
    pub fn name(self) -> &'static str {
        match self {
            Self::Free => "free",
            Self::Serving => "serving",
            Self::NotServing => "not serving",
            Self::Gone => "gone",
        }
    }
}

impl From<BackendState> for State {
    fn from(state: BackendState) -> Self {
        match state {
            BackendState::Free => Self::Free,
            BackendState::Serving => Self::Serving,
            BackendState::NotServing => Self::NotServing,
            BackendState::Gone => Self::Gone,
        }
    }
}

/// Every backend of one family.
pub(super) fn all<R: FamilyReader>(maps: &R, slots: &[u32]) -> Result<Vec<Backend>, InspectError> {
    let backends = maps.all_backends()?;
    let users = users(maps, slots, backends.len())?;
    let used = (0_u32..).zip(backends).zip(users).filter(|((_, backend), _)| backend.state != BackendState::Free);
    let shown = used.map(|((id, backend), services)| Backend {
        address: SocketAddr::new(backend.addr.into(), backend.port.number()),
        id,
        state: backend.state.into(),
        is_local: backend.is_local != 0,
        node: (backend.node != R::Addr::ANY).then(|| backend.node.into()),
        generation: backend.generation,
        services,
    });
    Ok(shown.collect())
}

/// The Service ports that lead to each of so many backends.
fn users(maps: &impl FamilyReader, slots: &[u32], count: usize) -> Result<Vec<Vec<String>>, InspectError> {
    let names = Names::read(maps)?;
    let mut users = vec![Vec::new(); count];
    for (frontend, service) in maps.services()? {
        if frontend.proto == Protocol::Any {
            continue;
        }
        let name = format!("{}/{}", names.of(service.index), frontend.proto);
        let ranges = [service.internal, service.external].map(|range| {
            let first = range.first as usize;
            slots.get(first..first + range.count as usize).unwrap_or_default()
        });
        let mut ids = ranges.concat();
        ids.sort_unstable();
        ids.dedup();
        for id in ids {
            // One beyond the last was taken away between two looks.
            if let Some(users) = users.get_mut(id as usize) {
                users.push(name.clone());
            }
        }
    }
    for users in &mut users {
        users.sort_unstable();
        users.dedup();
    }
    Ok(users)
}
