//! A look into the maps of a node's agent, and a hand in them: what the agent does not write yet, or would not write on its
//! own, a test writes by the pins. The agent leaves it until the object behind it changes.

use std::net::IpAddr;

use anyhow::{Context as _, Result};
use aya::{
    Pod,
    maps::{Array, HashMap, Map, MapData, PerCpuArray, RingBuf},
};
use proxy_common::{
    addr,
    backend::{Backend, BackendState},
    event::{Event, watch},
    node,
    outcome::{self, Hook, Outcome},
    service::{Affinity, Client, Frontend, Service},
    socket::{SocketPeer, SocketTarget},
};

use super::{Node, address::Family};
use crate::traffic::{Protocol, Target};

impl Node {
    /// How often something was counted, over all CPUs.
    pub fn counted(&self, hook: Hook, outcome: Outcome) -> Result<u64> {
        let counters = PerCpuArray::<_, u64>::try_from(Map::PerCpuArray(self.map("COUNTERS")?))?;
        Ok(counters.get(&outcome::counter(hook, outcome), 0)?.iter().sum())
    }

    /// Jiffies until which the programs tell of what happens.
    pub fn watched_until(&self) -> Result<u32> {
        Ok(Array::<_, u32>::try_from(Map::Array(self.map("WATCH")?))?.get(&watch::UNTIL, 0)?)
    }

    /// What they have told that nobody has taken.
    pub fn events(&self) -> Result<Vec<Event>> {
        let mut records = RingBuf::try_from(Map::RingBuf(self.map("EVENTS")?))?;
        let mut events = Vec::new();
        while let Some(record) = records.next() {
            events.extend(Event::read(&record));
        }
        Ok(events)
    }

    /// Changes the entry of a frontend, or adds one.
    pub fn edit_service(&self, frontend: Target, change: impl FnOnce(&mut Service)) -> Result<()> {
        match frontend.address {
            std::net::SocketAddr::V4(address) => {
                self.edit("SERVICES_V4", key(addr::Ipv4::from(*address.ip()), frontend), change)
            }
            std::net::SocketAddr::V6(address) => {
                self.edit("SERVICES_V6", key(addr::Ipv6::from(*address.ip()), frontend), change)
            }
        }
    }

    fn edit<A>(&self, name: &str, key: Frontend<A>, change: impl FnOnce(&mut Service)) -> Result<()>
    where
        Frontend<A>: Pod,
    {
        let mut services: HashMap<_, Frontend<A>, Service> = Map::HashMap(self.map(name)?).try_into()?;
        let mut service = services.get(&key, 0).unwrap_or_default();
        change(&mut service);
        Ok(services.insert(key, service, 0)?)
    }

    /// Changes what the agent has told of the node.
    pub fn edit_node(&self, change: impl FnOnce(&mut node::Node)) -> Result<()> {
        let mut map: Array<_, node::Node> = Map::Array(self.map("NODE")?).try_into()?;
        let mut entry = map.get(&0, 0)?;
        change(&mut entry);
        Ok(map.set(0, entry, 0)?)
    }

    /// Sets the state of every backend with that address, and says how many there are.
    pub fn set_backend_state(&self, family: Family, pod: &str, state: BackendState) -> Result<usize> {
        let (_, addresses) = super::address::pod(pod).with_context(|| format!("no pod {pod}"))?;
        match family {
            Family::V4 => self.set_state("BACKENDS_V4", addr::Ipv4::from(addresses.v4), state),
            Family::V6 => self.set_state("BACKENDS_V6", addr::Ipv6::from(addresses.v6), state),
        }
    }

    fn set_state<A: PartialEq + Copy>(&self, name: &str, addr: A, state: BackendState) -> Result<usize>
    where
        Backend<A>: Pod,
    {
        let found = self.ids(name, addr)?;
        let mut backends: Array<_, Backend<A>> = Map::Array(self.map(name)?).try_into()?;
        for (id, backend) in &found {
            backends.set(*id, Backend { state, ..*backend }, 0)?;
        }
        Ok(found.len())
    }

    /// Every backend with that address, by its id.
    fn ids<A: PartialEq + Copy>(&self, name: &str, addr: A) -> Result<Vec<(u32, Backend<A>)>>
    where
        Backend<A>: Pod,
    {
        let backends: Array<_, Backend<A>> = Map::Array(self.map(name)?).try_into()?;
        let mut found = Vec::new();
        for id in 0..1_024 {
            let backend = backends.get(&id, 0)?;
            if backend.addr == addr && backend.state != BackendState::Free {
                found.push((id, backend));
            }
        }
        Ok(found)
    }

    /// How many connections the programs believe the backends with that address to have.
    pub fn active(&self, family: Family, pod: &str) -> Result<u32> {
        let (_, addresses) = super::address::pod(pod).with_context(|| format!("no pod {pod}"))?;
        match family {
            Family::V4 => self.count_active("ACTIVE_V4", "BACKENDS_V4", addr::Ipv4::from(addresses.v4)),
            Family::V6 => self.count_active("ACTIVE_V6", "BACKENDS_V6", addr::Ipv6::from(addresses.v6)),
        }
    }

    fn count_active<A: PartialEq + Copy>(&self, active: &str, backends: &str, addr: A) -> Result<u32>
    where
        Backend<A>: Pod,
    {
        let counts: Array<_, u32> = Map::Array(self.map(active)?).try_into()?;
        self.ids(backends, addr)?.iter().map(|(id, _)| Ok(counts.get(id, 0)?)).sum()
    }

    /// Whom the clients of a family stay with, by their addresses.
    pub fn affinities(&self, family: Family) -> Result<Vec<(IpAddr, Affinity)>> {
        fn read<A: Into<IpAddr> + Copy>(map: MapData) -> Result<Vec<(IpAddr, Affinity)>>
        where
            Client<A>: Pod,
        {
            let map: HashMap<_, Client<A>, Affinity> = Map::LruHashMap(map).try_into()?;
            map.iter()
                .map(|entry| entry.map(|(client, affinity)| (client.addr.into(), affinity)).map_err(Into::into))
                .collect()
        }
        match family {
            Family::V4 => read::<addr::Ipv4>(self.map("AFFINITY_V4")?),
            Family::V6 => read::<addr::Ipv6>(self.map("AFFINITY_V6")?),
        }
    }

    /// Has the last connection of every client of a family be that many seconds longer ago.
    pub fn age_affinities(&self, family: Family, seconds: u32) -> Result<()> {
        fn age<A>(map: MapData, jiffies: u32) -> Result<()>
        where
            Client<A>: Pod,
        {
            let mut map: HashMap<_, Client<A>, Affinity> = Map::LruHashMap(map).try_into()?;
            let entries: Vec<_> = map.iter().collect::<Result<_, _>>()?;
            for (client, affinity) in entries {
                let last_used = affinity.last_used.wrapping_sub(jiffies);
                map.insert(client, Affinity { last_used, ..affinity }, 0)?;
            }
            Ok(())
        }
        let node: Array<_, node::Node> = Map::Array(self.map("NODE")?).try_into()?;
        let jiffies = seconds * node.get(&0, 0)?.jiffies_per_second;
        match family {
            Family::V4 => age::<addr::Ipv4>(self.map("AFFINITY_V4")?, jiffies),
            Family::V6 => age::<addr::Ipv6>(self.map("AFFINITY_V6")?, jiffies),
        }
    }

    /// Entries of `SOCKETS_V4` and `SOCKETS_V6`.
    pub fn known_sockets(&self) -> Result<usize> {
        let v4: HashMap<_, SocketPeer<addr::Ipv4>, SocketTarget<addr::Ipv4>> =
            Map::LruHashMap(self.map("SOCKETS_V4")?).try_into()?;
        let v6: HashMap<_, SocketPeer<addr::Ipv6>, SocketTarget<addr::Ipv6>> =
            Map::LruHashMap(self.map("SOCKETS_V6")?).try_into()?;
        Ok(v4.keys().count() + v6.keys().count())
    }

    fn map(&self, name: &str) -> Result<MapData> {
        MapData::from_pin(self.pins().join("maps").join(name)).with_context(|| format!("no map {name}"))
    }
}

fn key<A>(addr: A, frontend: Target) -> Frontend<A> {
    let protocol = match frontend.protocol {
        Protocol::Tcp => addr::Protocol::Tcp,
        Protocol::Udp => addr::Protocol::Udp,
    };
    Frontend::new(addr, addr::Port::new(frontend.address.port()), protocol)
}
