//! Connections of another proxy on this node, which the programs leave alone: `FOREIGN_V4` and `FOREIGN_V6`. In: what the
//! kernel's table of connections has. Out: the same in the maps.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr, SocketAddrV4, SocketAddrV6},
};

use aya::Ebpf;
use proxy_common::{
    addr::{Address, Ipv4, Ipv6, Port, Protocol},
    node::foreign,
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

    /// How many connections there are.
    pub(super) fn count(&self) -> Result<usize, Error> {
        Ok(count(&self.v4)? + count(&self.v6)?)
    }

    /// Enters the connections that were found. `own` are the node's addresses: a datagram of one of its processes is asked about
    /// before it is known which of them it leaves with. Returns how many there are now.
    pub(super) fn follow(
        &self,
        found: &BTreeSet<TranslatedConnection>,
        own: &BTreeSet<IpAddr>,
        unfound: Unfound,
    ) -> Result<usize, Error> {
        let (mut v4, mut v6) = (Wanted::default(), Wanted::default());
        for connection in found {
            let TranslatedConnection { protocol, client, frontend, backend, answered } = *connection;
            let is_own = protocol == Protocol::Udp && own.contains(&client.ip());
            match (client, frontend) {
                (SocketAddr::V4(client), SocketAddr::V4(frontend)) => v4.add(protocol, client, frontend, is_own),
                (SocketAddr::V6(client), SocketAddr::V6(frontend)) => v6.add(protocol, client, frontend, is_own),
                _ => {}
            }
            match (backend, answered) {
                (SocketAddr::V4(backend), SocketAddr::V4(answered)) => {
                    v4.add_answered(protocol, backend, answered);
                    // Flows between the families stand in the maps of IPv6.
                    v6.add_answered(protocol, Mapped(backend), Mapped(answered));
                }
                (SocketAddr::V6(backend), SocketAddr::V6(answered)) => v6.add_answered(protocol, backend, answered),
                _ => {}
            }
        }
        Ok(v4.enter(&self.v4, unfound)? + v6.enter(&self.v6, unfound)?)
    }
}

/// How many connections a table has: the tuples that clients send.
fn count<A>(table: &Table<Tuple<A>, u32>) -> Result<usize, Error>
where
    Tuple<A>: aya::Pod,
{
    Ok(table.entries()?.iter().filter(|(_, what)| *what == foreign::SENT).count())
}

/// The tuples that a map is to have, with what each is.
struct Wanted<A> {
    sent: BTreeSet<Tuple<A>>,
    answered: BTreeSet<Tuple<A>>,
}

impl<A: Ord> Default for Wanted<A> {
    fn default() -> Self {
        Self { sent: BTreeSet::new(), answered: BTreeSet::new() }
    }
}

impl<A> Wanted<A>
where
    A: Address,
    Tuple<A>: aya::Pod,
{
    /// `is_own`: the client is a process of the node.
    fn add<E: End<A>>(&mut self, protocol: Protocol, client: E, frontend: E, is_own: bool) {
        let tuple = tuple(protocol, client, frontend);
        self.sent.extend(is_own.then_some(Tuple { saddr: A::ANY, ..tuple }));
        self.sent.insert(tuple);
    }

    fn add_answered<E: End<A>>(&mut self, protocol: Protocol, backend: E, answered: E) {
        self.answered.insert(tuple(protocol, backend, answered));
    }

    /// Returns how many connections there are then.
    fn enter(&self, table: &Table<Tuple<A>, u32>, unfound: Unfound) -> Result<usize, Error> {
        let mut there: BTreeMap<Tuple<A>, u32> = table.entries()?.into_iter().collect();
        if unfound == Unfound::Go {
            let is_gone = |tuple: &Tuple<A>| !self.sent.contains(tuple) && !self.answered.contains(tuple);
            let gone: Vec<Tuple<A>> = there.extract_if(.., |tuple, _| is_gone(tuple)).map(|(tuple, _)| tuple).collect();
            table.remove_all(&gone)?;
        }
        // A table that is full takes those that it has room for: the others are taken for new connections. What is answered has half of
        // it at most, since those are broken that are not known by what their clients send.
        let half = table.capacity() as usize / 2;
        for (tuples, what, most) in [(&self.sent, foreign::SENT, 2 * half), (&self.answered, foreign::ANSWERED, half)] {
            let own = there.values().filter(|is| **is == what).count();
            let room = (2 * half).saturating_sub(there.len()).min(most.saturating_sub(own));
            let is_new = |tuple: &&Tuple<A>| !there.contains_key(*tuple);
            let added: Vec<Tuple<A>> = tuples.iter().filter(is_new).copied().take(room).collect();
            table.put_all(&added, &vec![what; added.len()])?;
            there.extend(added.into_iter().map(|tuple| (tuple, what)));
        }
        Ok(there.values().filter(|is| **is == foreign::SENT).count())
    }
}

/// An end of IPv4 as it stands in the maps of IPv6.
struct Mapped(SocketAddrV4);

impl End<Ipv6> for Mapped {
    fn parts(self) -> (Ipv6, Port) {
        (Ipv6::mapped((*self.0.ip()).into()), Port::new(self.0.port()))
    }
}

/// An end of a connection.
trait End<A> {
    fn parts(self) -> (A, Port);
}

impl End<Ipv4> for SocketAddrV4 {
    fn parts(self) -> (Ipv4, Port) {
        (Ipv4::from(*self.ip()), Port::new(self.port()))
    }
}

impl End<Ipv6> for SocketAddrV6 {
    fn parts(self) -> (Ipv6, Port) {
        (Ipv6::from(*self.ip()), Port::new(self.port()))
    }
}

fn tuple<A: Address, E: End<A>>(protocol: Protocol, from: E, to: E) -> Tuple<A> {
    let ((saddr, sport), (daddr, dport)) = (from.parts(), to.parts());
    Tuple::new(saddr, daddr, sport, dport, protocol, Stage::FromPod)
}
