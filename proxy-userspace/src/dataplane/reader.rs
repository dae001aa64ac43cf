//! The entries of a family's maps as they are, for whoever shows them to people.

use std::{collections::HashMap, net::IpAddr};

use aya::{Pod, maps::lpm_trie::Key};
use proxy_common::{
    addr::Address,
    backend::Backend,
    flow::{Flow, Tier},
    names::ServiceName,
    service::{Affinity, Client, Frontend, Service, Source},
    socket::{SocketPeer, SocketTarget},
    stats::Stats,
    tuple::Tuple,
};

use super::{error::Error, observer::FamilyObserver};

/// Entries of a map, by key.
type Entries<K, V> = Result<Vec<(K, V)>, Error>;

/// Is shown entries of the flow table.
pub type FlowVisitor<'a, A> = dyn FnMut(Tier, &Tuple<A>, &Flow<A>) + 'a;

/// Reads the maps of one family, whichever.
pub trait FamilyReader {
    /// Its addresses.
    type Addr: Address + Into<IpAddr>;

    /// `SERVICES_*`
    fn services(&self) -> Entries<Frontend<Self::Addr>, Service>;
    /// `BACKENDS_*`: the index is the id.
    fn all_backends(&self) -> Result<Vec<Backend<Self::Addr>>, Error>;
    /// `LOCAL_ADDRS_*`: addresses of the node.
    fn local_addresses(&self) -> Result<Vec<Self::Addr>, Error>;
    /// `NAMES_*`
    fn names(&self) -> Result<HashMap<u32, ServiceName>, Error>;
    /// `EMBRYOS_*` and then `FLOWS_*`: a flow that moves on meanwhile is seen twice rather than not at all.
    fn visit_flows(&self, each: &mut FlowVisitor<'_, Self::Addr>) -> Result<(), Error>;
    /// `AFFINITY_*`
    fn affinities(&self) -> Entries<Client<Self::Addr>, Affinity>;
    /// `SOURCES_*`: index of a Service port, prefix, and its length.
    fn sources(&self) -> Result<Vec<(u32, Self::Addr, u32)>, Error>;
    /// `SERVICE_STATS_*`, below an index.
    fn service_counts(&self, end: u32) -> Result<Vec<Stats>, Error>;
    /// `BACKEND_STATS_*`, below an id.
    fn backend_counts(&self, end: u32) -> Result<Vec<Stats>, Error>;
}

impl<A> FamilyReader for FamilyObserver<A>
where
    A: Address + Pod + Into<IpAddr>,
    Frontend<A>: Pod,
    Backend<A>: Pod + Default + PartialEq,
    Source<A>: Pod,
    Client<A>: Pod,
    Tuple<A>: Pod,
    Flow<A>: Pod,
    SocketPeer<A>: Pod,
    SocketTarget<A>: Pod,
{
    type Addr = A;

    fn services(&self) -> Entries<Frontend<A>, Service> {
        self.services.entries()
    }

    fn all_backends(&self) -> Result<Vec<Backend<A>>, Error> {
        self.backend_entries()
    }

    fn local_addresses(&self) -> Result<Vec<A>, Error> {
        Ok(self.local_addrs.entries()?.into_iter().map(|(address, _)| address).collect())
    }

    fn names(&self) -> Result<HashMap<u32, ServiceName>, Error> {
        Ok(self.names.entries()?.into_iter().collect())
    }

    fn visit_flows(&self, each: &mut FlowVisitor<'_, A>) -> Result<(), Error> {
        for (tier, table) in [Tier::Embryos, Tier::Flows].into_iter().zip(&self.flows) {
            table.visit(|key, flow| {
                each(tier, &key, &flow);
                true
            })?;
        }
        Ok(())
    }

    fn affinities(&self) -> Entries<Client<A>, Affinity> {
        self.affinity.entries()
    }

    fn sources(&self) -> Result<Vec<(u32, A, u32)>, Error> {
        let entries = self.sources.entries()?;
        let prefix = |key: &Key<Source<A>>| {
            let source = key.data();
            (source.service, source.addr, key.prefix_len().saturating_sub(Source::<A>::BITS))
        };
        Ok(entries.iter().map(|(key, _)| prefix(key)).collect())
    }

    fn service_counts(&self, end: u32) -> Result<Vec<Stats>, Error> {
        self.service_stats.values(end as usize)
    }

    fn backend_counts(&self, end: u32) -> Result<Vec<Stats>, Error> {
        self.backend_stats.values(end as usize)
    }
}
