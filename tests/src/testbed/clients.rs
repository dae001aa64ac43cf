//! What the programs know of clients: from where they may come, whom they stay with, and how many flows they have open.

use std::net::IpAddr;

use anyhow::{Result, bail};
use aya::maps::{Array, LpmTrie, lpm_trie::Key};
use proxy_common::{
    addr::{Ipv4, Ipv6, Port, Protocol},
    node::ServiceCidrs,
    service::{Affinity, Client, Source},
    tuple::{Stage, Tuple},
};

use super::Testbed;

impl Testbed {
    /// Lets a prefix use a Service port that has source ranges.
    pub fn add_source(&mut self, service: u32, address: IpAddr, bits: u32) -> Result<()> {
        match address {
            IpAddr::V4(address) => {
                let source = Source { service, pad: 0, addr: Ipv4::from(address) };
                let key = Key::new(Source::<Ipv4>::BITS + bits, source);
                LpmTrie::<_, Source<Ipv4>, u32>::try_from(self.map("SOURCES_V4")?)?.insert(&key, 1, 0)?;
            }
            IpAddr::V6(address) => {
                let source = Source { service, pad: 0, addr: Ipv6::from(address) };
                let key = Key::new(Source::<Ipv6>::BITS + bits, source);
                LpmTrie::<_, Source<Ipv6>, u32>::try_from(self.map("SOURCES_V6")?)?.insert(&key, 1, 0)?;
            }
        }
        Ok(())
    }

    /// Takes such a range back.
    pub fn remove_source(&mut self, service: u32, address: IpAddr, bits: u32) -> Result<()> {
        match address {
            IpAddr::V4(address) => {
                let source = Source { service, pad: 0, addr: Ipv4::from(address) };
                let key = Key::new(Source::<Ipv4>::BITS + bits, source);
                LpmTrie::<_, Source<Ipv4>, u32>::try_from(self.map("SOURCES_V4")?)?.remove(&key)?;
            }
            IpAddr::V6(address) => {
                let source = Source { service, pad: 0, addr: Ipv6::from(address) };
                let key = Key::new(Source::<Ipv6>::BITS + bits, source);
                LpmTrie::<_, Source<Ipv6>, u32>::try_from(self.map("SOURCES_V6")?)?.remove(&key)?;
            }
        }
        Ok(())
    }

    /// Whom the IPv4 clients stay with.
    pub fn affinities(&mut self) -> Result<Vec<(Client<Ipv4>, Affinity)>> {
        Ok(self.hash::<Client<Ipv4>, Affinity>("AFFINITY_V4")?.iter().collect::<Result<_, _>>()?)
    }

    /// Whom the IPv6 clients stay with.
    pub fn affinities_v6(&mut self) -> Result<Vec<(Client<Ipv6>, Affinity)>> {
        Ok(self.hash::<Client<Ipv6>, Affinity>("AFFINITY_V6")?.iter().collect::<Result<_, _>>()?)
    }

    /// Changes whom every IPv4 client stays with.
    pub fn change_affinities(&mut self, change: impl Fn(Affinity) -> Affinity) -> Result<()> {
        for (client, affinity) in self.affinities()? {
            self.hash("AFFINITY_V4")?.insert(client, change(affinity), 0)?;
        }
        Ok(())
    }

    /// How many active IPv4 flows a backend has.
    pub fn active(&mut self, backend: u32) -> Result<u32> {
        Ok(Array::<_, u32>::try_from(self.map("ACTIVE_V4")?)?.get(&backend, 0)?)
    }

    /// Says how many active IPv4 flows a backend has.
    pub fn set_active(&mut self, backend: u32, count: u32) -> Result<()> {
        Ok(Array::<_, u32>::try_from(self.map("ACTIVE_V4")?)?.set(backend, count, 0)?)
    }

    /// Notes a tuple of another proxy's connection: as its client sends, or as its backend answers ([`proxy_common::node::foreign`]).
    pub fn add_foreign(&mut self, proto: Protocol, from: (IpAddr, u16), to: (IpAddr, u16), what: u32) -> Result<()> {
        let (sport, dport) = (Port::new(from.1), Port::new(to.1));
        match (from.0, to.0) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                let tuple = Tuple::new(Ipv4::from(from), Ipv4::from(to), sport, dport, proto, Stage::FromPod);
                self.hash("FOREIGN_V4")?.insert(tuple, what, 0)?;
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                let tuple = Tuple::new(Ipv6::from(from), Ipv6::from(to), sport, dport, proto, Stage::FromPod);
                self.hash("FOREIGN_V6")?.insert(tuple, what, 0)?;
            }
            _ => bail!("{} and {} are of two families", from.0, to.0),
        }
        Ok(())
    }

    /// How many IPv4 or IPv6 connections are noted as another proxy's.
    pub fn foreign(&mut self, is_ipv4: bool) -> Result<usize> {
        Ok(if is_ipv4 {
            self.hash::<Tuple<Ipv4>, u32>("FOREIGN_V4")?.keys().count()
        } else {
            self.hash::<Tuple<Ipv6>, u32>("FOREIGN_V6")?.keys().count()
        })
    }

    /// Says where ClusterIPs are taken from.
    pub fn set_service_cidrs(&mut self, cidrs: ServiceCidrs) -> Result<()> {
        Ok(Array::<_, ServiceCidrs>::try_from(self.map("SERVICE_CIDRS")?)?.set(0, cidrs, 0)?)
    }
}
