//! The programs under the fuzzer: what the model is told is written into their maps, what they have done is read back.

mod compare;
mod tell;

use std::{collections::BTreeMap, net::IpAddr};

use anyhow::{Context as _, Result};
use aya::{
    Pod,
    maps::{Array, HashMap, PerCpuArray},
};
use proxy_common::{
    addr::{Ipv4, Ipv6, Port},
    flow::Flow,
    outcome::{self, Hook, Outcome},
    service::{Affinity, Client},
    tuple::Tuple,
};

use crate::{
    model::{Chosen, Hop, Key, Oracle, World},
    testbed::{Ran, Testbed},
};

/// The programs, their maps, and what was written into them.
pub struct Rig<'a> {
    bed: &'a mut Testbed,
    told: Option<World>,
    /// What had been counted before the episode.
    before: BTreeMap<(Hook, Outcome), u64>,
}

/// An address as maps have it.
pub trait Wire: Pod + Copy + Default + Eq + Ord + Into<IpAddr> {
    /// Whether it is of IPv4.
    const IS_V4: bool;
    /// Its width in bits.
    const BITS: u32;
    /// `None` where it is of the other family.
    fn new(address: IpAddr) -> Option<Self>;
    /// The first so many bits.
    fn mask(bits: u32) -> Self;
}

impl Wire for Ipv4 {
    const IS_V4: bool = true;
    const BITS: u32 = 32;

    fn new(address: IpAddr) -> Option<Self> {
        if let IpAddr::V4(address) = address { Some(address.into()) } else { None }
    }

    fn mask(bits: u32) -> Self {
        Self { octets: (u32::MAX << (32 - bits)).to_be_bytes() }
    }
}

impl Wire for Ipv6 {
    const IS_V4: bool = false;
    const BITS: u32 = 128;

    fn new(address: IpAddr) -> Option<Self> {
        if let IpAddr::V6(address) = address { Some(address.into()) } else { None }
    }

    fn mask(bits: u32) -> Self {
        Self { octets: (u128::MAX << (128 - bits)).to_be_bytes() }
    }
}

/// A type of the kernel contract, whichever family it is of.
#[repr(transparent)]
#[derive(Clone, Copy)]
struct Raw<T>(T);

// SAFETY: it is used for map types of `proxy-common` alone, whose bytes are all initialised and may be anything the programs
// write; the same promise is made there for each of them, but not for all families at once.
unsafe impl<T: Copy + 'static> Pod for Raw<T> {}

fn name(map: &str, is_v4: bool) -> String {
    format!("{map}_{}", if is_v4 { "V4" } else { "V6" })
}

/// A key of the model's, as maps have it.
fn tuple<A: Wire>(key: &Key) -> Option<Tuple<A>> {
    Some(Tuple::new(
        A::new(key.source.0)?,
        A::new(key.destination.0)?,
        Port::new(key.source.1),
        Port::new(key.destination.1),
        key.proto,
        key.stage,
    ))
}

fn key<A: Wire>(tuple: &Tuple<A>) -> Key {
    Key {
        source: (tuple.saddr.into(), tuple.sport.number()),
        destination: (tuple.daddr.into(), tuple.dport.number()),
        proto: tuple.proto,
        stage: tuple.stage,
    }
}

/// Does something for both families, whose types differ.
macro_rules! both {
    ($rig:ident.$function:ident($($argument:expr),*)) => {{
        $rig.$function::<Ipv4>($($argument),*)?;
        $rig.$function::<Ipv6>($($argument),*)?;
    }};
}
use both;

impl<'a> Rig<'a> {
    /// Over programs that nobody else uses meanwhile.
    pub fn new(bed: &'a mut Testbed) -> Self {
        Self { bed, told: None, before: BTreeMap::new() }
    }

    fn hash<K: Pod, V: Pod>(&mut self, map: &str, is_v4: bool) -> Result<HashMap<&mut aya::maps::MapData, K, V>> {
        self.bed.hash(&name(map, is_v4))
    }

    fn array<V: Pod>(&mut self, map: &str) -> Result<Array<&mut aya::maps::MapData, V>> {
        Ok(Array::try_from(self.bed.map(map)?)?)
    }

    /// Runs a packet; `None` where the kernel takes none like it for this hook.
    pub fn run(&mut self, hook: Hook, bytes: &[u8]) -> Result<Option<Ran>> {
        self.bed.run_here(hook, bytes)
    }

    /// Lets time go by: everything that has happened was so many jiffies earlier.
    pub fn age(&mut self, jiffies: u32) -> Result<()> {
        both!(self.age_family(jiffies));
        Ok(())
    }

    fn age_family<A: Wire>(&mut self, jiffies: u32) -> Result<()> {
        for map in ["FLOWS", "EMBRYOS"] {
            for (tuple, mut flow) in self.flows::<A>(map)? {
                flow.last_seen = flow.last_seen.wrapping_sub(jiffies);
                self.hash(map, A::IS_V4)?.insert(Raw(tuple), Raw(flow), 0)?;
            }
        }
        for (client, mut affinity) in self.affinities::<A>()? {
            affinity.last_used = affinity.last_used.wrapping_sub(jiffies);
            self.hash("AFFINITY", A::IS_V4)?.insert(Raw(client), affinity, 0)?;
        }
        Ok(())
    }

    /// Takes one half of a pair out of the table, as the kernel does when it is full.
    pub fn evict(&mut self, flow: &Key) -> Result<()> {
        if flow.source.0.is_ipv4() { self.evict_from::<Ipv4>(flow) } else { self.evict_from::<Ipv6>(flow) }
    }

    fn evict_from<A: Wire>(&mut self, flow: &Key) -> Result<()> {
        let tuple = tuple::<A>(flow).context("a key of another family")?;
        for map in ["FLOWS", "EMBRYOS"] {
            // Absent from one of them.
            let _ = self.hash::<Raw<Tuple<A>>, Raw<Flow<A>>>(map, A::IS_V4)?.remove(&Raw(tuple));
        }
        Ok(())
    }

    fn flows<A: Wire>(&mut self, map: &str) -> Result<Vec<(Tuple<A>, Flow<A>)>> {
        let map = self.hash::<Raw<Tuple<A>>, Raw<Flow<A>>>(map, A::IS_V4)?;
        Ok(map.iter().map(|entry| entry.map(|(tuple, flow)| (tuple.0, flow.0))).collect::<Result<_, _>>()?)
    }

    fn affinities<A: Wire>(&mut self) -> Result<Vec<(Client<A>, Affinity)>> {
        let map = self.hash::<Raw<Client<A>>, Affinity>("AFFINITY", A::IS_V4)?;
        Ok(map.iter().map(|entry| entry.map(|(client, affinity)| (client.0, affinity))).collect::<Result<_, _>>()?)
    }

    fn flow<A: Wire>(&mut self, key: &Key) -> Option<Flow<A>> {
        let tuple = Raw(tuple::<A>(key)?);
        let find = |map| self.hash::<Raw<Tuple<A>>, Raw<Flow<A>>>(map, A::IS_V4).ok()?.get(&tuple, 0).ok();
        ["FLOWS", "EMBRYOS"].into_iter().find_map(find).map(|flow| flow.0)
    }
}

impl Oracle for Rig<'_> {
    fn chosen(&mut self, key: &Key) -> Option<Chosen> {
        fn chosen<A>(flow: &Flow<A>) -> Chosen {
            Chosen { backend: flow.backend, source_port: flow.rewrite.sport.number() }
        }
        if key.source.0.is_ipv4() {
            self.flow::<Ipv4>(key).map(|flow| chosen(&flow))
        } else {
            self.flow::<Ipv6>(key).map(|flow| chosen(&flow))
        }
    }

    fn affinity(&mut self, service: u32, client: IpAddr) -> Option<(u32, u32)> {
        let known: Affinity = match client {
            IpAddr::V4(client) => {
                let client = Client { addr: Ipv4::from(client), service, pad: 0 };
                self.hash("AFFINITY", true).ok()?.get(&client, 0).ok()?
            }
            IpAddr::V6(client) => {
                let client = Client { addr: Ipv6::from(client), service, pad: 0 };
                self.hash("AFFINITY", false).ok()?.get(&client, 0).ok()?
            }
        };
        Some((known.backend, known.slot))
    }

    fn next_hop(&mut self, key: &Key) -> Option<Hop> {
        let hop =
            if key.source.0.is_ipv4() { self.flow::<Ipv4>(key)?.next_hop } else { self.flow::<Ipv6>(key)?.next_hop };
        (hop.ifindex != 0).then_some(Hop { mac: hop.dmac.octets, mtu: hop.mtu })
    }

    fn count(&mut self, hook: Hook, outcome: Outcome) -> u64 {
        let index = outcome::counter(hook, outcome);
        let mut count = || -> Result<u64> {
            let map = PerCpuArray::<_, u64>::try_from(self.bed.map("COUNTERS")?)?;
            Ok(map.get(&index, 0)?.iter().sum())
        };
        let before = self.before.get(&(hook, outcome)).copied().unwrap_or(0);
        count().map_or(0, |count| count - before)
    }
}
