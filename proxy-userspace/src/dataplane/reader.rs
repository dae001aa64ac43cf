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
    tuple::{Stage, Tuple},
};

use super::{
    error::Error,
    observer::FamilyObserver,
    pair::{is_second_step, second_steps, twin_key},
};

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
    /// The entries of `EMBRYOS_*` and `FLOWS_*` that a packet with these ends meets at any hook, in the order of hooks, each
    /// followed by its other half and by those of its second step. The tuple's stage does not matter.
    fn connection(&self, ends: &Tuple<Self::Addr>) -> Entries<Tuple<Self::Addr>, Flow<Self::Addr>>;
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
        self.backends.assigned()
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

    fn connection(&self, ends: &Tuple<A>) -> Entries<Tuple<A>, Flow<A>> {
        let mut found = Vec::new();
        for stage in [Stage::FromPod, Stage::UplinkIn, Stage::ToPod, Stage::UplinkOut, Stage::Cross] {
            let key = Tuple { stage, ..*ends };
            let Some(flow) = self.take(&key, &mut found)? else { continue };
            self.take(&twin_key(&key, &flow), &mut found)?;
            for step in second_steps(&key, &flow) {
                let second = self.flow(&step)?.filter(is_second_step);
                if let Some(second) = second {
                    self.take(&step, &mut found)?;
                    self.take(&twin_key(&step, &second), &mut found)?;
                }
            }
        }
        Ok(found)
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

impl<A> FamilyObserver<A>
where
    Tuple<A>: Pod + PartialEq,
    Flow<A>: Pod,
{
    fn flow(&self, key: &Tuple<A>) -> Result<Option<Flow<A>>, Error> {
        for table in self.flows.iter().rev() {
            if let Some(flow) = table.find(key)? {
                return Ok(Some(flow));
            }
        }
        Ok(None)
    }

    /// Adds an entry to those that were found, once.
    fn take(&self, key: &Tuple<A>, found: &mut Vec<(Tuple<A>, Flow<A>)>) -> Result<Option<Flow<A>>, Error> {
        let flow = self.flow(key)?;
        found.extend(flow.filter(|_| found.iter().all(|(known, _)| known != key)).map(|flow| (*key, flow)));
        Ok(flow)
    }
}
