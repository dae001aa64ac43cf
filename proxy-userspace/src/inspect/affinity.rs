//! Clients that stay with a backend.

use std::net::{IpAddr, SocketAddr};

use proxy_common::service::flag;
use serde::Serialize;

use super::{InspectError, Names, PortName, State};
use crate::dataplane::{FamilyReader, silence};

/// A client of a Service port with session affinity.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Affinity {
    /// The Service port.
    #[serde(flatten)]
    pub service: PortName,
    /// The client.
    pub client: IpAddr,
    /// Whom it stays with.
    pub backend: SocketAddr,
    /// Whether that one serves: if not, the next connection goes to another.
    pub state: State,
    /// Seconds since its last new connection.
    pub idle_seconds: u32,
    /// Seconds after which it is forgotten; none if the Service has no affinity any more.
    pub timeout_seconds: Option<u32>,
}

impl Affinity {
    /// Whether its next connection goes anywhere.
    pub fn is_over(&self) -> bool {
        self.state != State::Serving || self.timeout_seconds.is_none_or(|timeout| self.idle_seconds > timeout)
    }
}

/// Every entry of one family.
pub(super) fn all(maps: &impl FamilyReader) -> Result<Vec<Affinity>, InspectError> {
    let names = Names::read(maps)?;
    let backends = maps.all_backends()?;
    let services = maps.services()?;
    let timeouts: std::collections::HashMap<u32, u32> = services
        .iter()
        .filter(|(_, service)| service.flags & flag::AFFINITY != 0)
        .map(|(_, service)| (service.index, service.affinity_seconds))
        .collect();
    let shown = maps.affinities()?.into_iter().filter_map(|(client, affinity)| {
        let backend = backends.get(affinity.backend as usize)?;
        let is_same = backend.generation == affinity.backend_generation;
        Some(Affinity {
            service: names.of(client.service),
            client: client.addr.into(),
            backend: SocketAddr::new(backend.addr.into(), backend.port.number()),
            state: if is_same { backend.state.into() } else { State::Gone },
            idle_seconds: silence(affinity.last_used),
            timeout_seconds: timeouts.get(&client.service).copied(),
        })
    });
    Ok(shown.collect())
}
