//! Connections of another proxy on this node, which the programs leave alone: `FOREIGN_V4` and `FOREIGN_V6`. In: what the
//! kernel's table of connections has. Out: the same in the maps.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
};

use aya::Ebpf;
use proxy_common::{
    addr::{Address, Ipv4, Ipv6, Port, Protocol},
    tuple::{Stage, Tuple},
};

use super::{
    error::{Error, OpenError},
    family,
    netlink::conntrack::TranslatedConnection,
    table::Table,
};

/// The two maps.
pub(super) struct Foreign {
    v4: Table<Tuple<Ipv4>, u32>,
    v6: Table<Tuple<Ipv6>, u32>,
}

/// What becomes of entries whose connection was not found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unfound {
    /// They stay: the programs have noted them since it was looked for them.
    Stay,
    /// They go: their connections are over.
    Go,
}

impl Foreign {
    pub(super) fn new(object: &Ebpf) -> Result<Self, OpenError> {
        Ok(Self { v4: family::table(object, "FOREIGN_V4")?, v6: family::table(object, "FOREIGN_V6")? })
    }

    /// How many entries there are.
    pub(super) fn count(&self) -> Result<usize, Error> {
        Ok(self.v4.entries()?.len() + self.v6.entries()?.len())
    }

    /// Enters the connections that were found. `own` are the node's addresses: a datagram of one of its processes is asked about
    /// before it is known which of them it leaves with. Returns how many there are now.
    pub(super) fn follow(
        &self,
        found: &BTreeSet<TranslatedConnection>,
        own: &BTreeSet<IpAddr>,
        unfound: Unfound,
    ) -> Result<usize, Error> {
        let (mut v4, mut v6) = (BTreeSet::new(), BTreeSet::new());
        for connection in found {
            let is_own = connection.protocol == Protocol::Udp && own.contains(&connection.client.ip());
            match (connection.client, connection.frontend) {
                (SocketAddr::V4(client), SocketAddr::V4(frontend)) => {
                    let tuple = tuple(Ipv4::from(*client.ip()), Ipv4::from(*frontend.ip()), connection);
                    v4.extend(is_own.then_some(Tuple { saddr: Ipv4::ANY, ..tuple }));
                    v4.insert(tuple);
                }
                (SocketAddr::V6(client), SocketAddr::V6(frontend)) => {
                    let tuple = tuple(Ipv6::from(*client.ip()), Ipv6::from(*frontend.ip()), connection);
                    v6.extend(is_own.then_some(Tuple { saddr: Ipv6::ANY, ..tuple }));
                    v6.insert(tuple);
                }
                _ => {}
            }
        }
        Ok(follow(&self.v4, &v4, unfound)? + follow(&self.v6, &v6, unfound)?)
    }
}

fn tuple<A: Address>(client: A, frontend: A, connection: &TranslatedConnection) -> Tuple<A> {
    let (sport, dport) = (Port::new(connection.client.port()), Port::new(connection.frontend.port()));
    Tuple::new(client, frontend, sport, dport, connection.protocol, Stage::FromPod)
}

fn follow<A>(table: &Table<Tuple<A>, u32>, wanted: &BTreeSet<Tuple<A>>, unfound: Unfound) -> Result<usize, Error>
where
    A: Copy + Ord,
    Tuple<A>: aya::Pod,
{
    let there: BTreeSet<Tuple<A>> = table.entries()?.into_iter().map(|(tuple, _)| tuple).collect();
    // A table that is full takes those that it has room for: the others are taken for new connections.
    let room = (table.capacity() as usize).saturating_sub(there.len());
    let added: Vec<Tuple<A>> = wanted.difference(&there).copied().take(room).collect();
    table.put_all(&added, &vec![1; added.len()])?;
    if unfound == Unfound::Stay {
        return Ok(there.len() + added.len());
    }
    let gone: Vec<Tuple<A>> = there.difference(wanted).copied().collect();
    table.remove_all(&gone)?;
    Ok(there.len() + added.len() - gone.len())
}
