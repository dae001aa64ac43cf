//! What the programs are told: maps emptied, and written as the world has it.

use anyhow::Result;
use aya::{
    Pod,
    maps::{LpmTrie, lpm_trie::Key as Prefix},
};
use proxy_common::{
    addr::{Ipv4, Ipv6, Port},
    backend::Backend,
    filter::Filter,
    flow::Flow,
    fragment::{Fragmented, Ports},
    node::{Cidr, SERVICE_CIDRS, ServiceCidrs},
    service::{Affinity, Client, Frontend, Service, Source},
    tuple::Tuple,
};

use super::{Raw, Rig, Wire, both, name};
use crate::{fuzz::scene::BACKENDS, model::World};

impl Rig<'_> {
    /// Forgets all flows and begins with another world.
    pub fn begin(&mut self, world: &World) -> Result<()> {
        both!(self.clear());
        self.array("MASKED")?.set(0, Filter::EMPTY, 0)?;
        self.told = None;
        self.before = self.counters()?;
        self.tell(world)
    }

    fn clear<A: Wire>(&mut self) -> Result<()> {
        self.clear_map::<Raw<Tuple<A>>, Raw<Flow<A>>>("FLOWS", A::IS_V4)?;
        self.clear_map::<Raw<Tuple<A>>, Raw<Flow<A>>>("EMBRYOS", A::IS_V4)?;
        self.clear_map::<Raw<Client<A>>, Affinity>("AFFINITY", A::IS_V4)?;
        self.clear_map::<Raw<Fragmented<A>>, Ports>("FRAGMENTS", A::IS_V4)?;
        self.clear_map::<Raw<Frontend<A>>, Service>("SERVICES", A::IS_V4)?;
        self.clear_map::<A, u32>("LOCAL_ADDRS", A::IS_V4)?;
        let mut sources = LpmTrie::<_, Raw<Source<A>>, u32>::try_from(self.bed.map(&name("SOURCES", A::IS_V4))?)?;
        let keys: Vec<_> = sources.keys().collect::<Result<_, _>>()?;
        for key in keys {
            sources.remove(&key)?;
        }
        for id in 0..=BACKENDS {
            self.array::<u32>(&name("ACTIVE", A::IS_V4))?.set(id, 0, 0)?;
        }
        for index in 0..64 {
            self.array::<u64>(&name("TURNS", A::IS_V4))?.set(index, 0, 0)?;
        }
        Ok(())
    }

    fn clear_map<K: Pod, V: Pod>(&mut self, map: &str, is_v4: bool) -> Result<()> {
        let mut map = self.hash::<K, V>(map, is_v4)?;
        let keys: Vec<K> = map.keys().collect::<Result<_, _>>()?;
        for key in keys {
            map.remove(&key)?;
        }
        Ok(())
    }

    /// Writes what is new in the world.
    pub fn tell(&mut self, world: &World) -> Result<()> {
        let told = self.told.take();
        let is_first = told.is_none();
        self.array("NODE")?.set(0, world.node, 0)?;
        let mut slots = self.array::<u32>("SLOTS")?;
        for (index, id) in world.slots.iter().enumerate().skip(told.as_ref().map_or(0, |told| told.slots.len())) {
            slots.set(index as u32, id, 0)?;
        }
        if told.as_ref().is_none_or(|told| told.inbound.words != world.inbound.words) {
            self.array("INBOUND")?.set(0, *world.inbound, 0)?;
        }
        if told.as_ref().is_none_or(|told| told.outbound.words != world.outbound.words) {
            self.array("OUTBOUND")?.set(0, *world.outbound, 0)?;
        }
        both!(self.tell_services(world, told.as_ref()));
        if is_first {
            both!(self.tell_node(world));
            let mut cidrs = ServiceCidrs::NONE;
            fill(&mut cidrs.v4, world);
            fill(&mut cidrs.v6, world);
            self.array("SERVICE_CIDRS")?.set(0, cidrs, 0)?;
        }
        self.told = Some(world.clone());
        Ok(())
    }

    fn tell_services<A: Wire>(&mut self, world: &World, told: Option<&World>) -> Result<()> {
        let mut backends = self.array::<Raw<Backend<A>>>(&name("BACKENDS", A::IS_V4))?;
        for ((is_v4, id), target) in &world.backends {
            let is_new = told.is_none_or(|told| told.backends.get(&(*is_v4, *id)) != Some(target));
            if let (Some(addr), true) = (A::new(target.address), is_new) {
                let (port, is_local) = (Port::new(target.port), u8::from(target.is_local));
                let (state, generation) = (target.state, target.generation);
                backends.set(*id, Raw(Backend { addr, node: A::default(), port, state, is_local, generation }), 0)?;
            }
        }
        let mut services = self.hash::<_, Service>("SERVICES", A::IS_V4)?;
        for (frontend, service) in &world.services {
            let is_new = told.is_none_or(|told| told.services.get(frontend) != Some(service));
            if let (Some(addr), true) = (A::new(frontend.0), is_new) {
                services.insert(Raw(Frontend::new(addr, Port::new(frontend.1), frontend.2)), service, 0)?;
            }
        }
        for frontend in told.iter().flat_map(|told| told.services.keys()) {
            if let (Some(addr), false) = (A::new(frontend.0), world.services.contains_key(frontend)) {
                services.remove(&Raw(Frontend::new(addr, Port::new(frontend.1), frontend.2)))?;
            }
        }
        Ok(())
    }

    fn tell_node<A: Wire>(&mut self, world: &World) -> Result<()> {
        let mut local = self.hash::<A, u32>("LOCAL_ADDRS", A::IS_V4)?;
        for (address, flags) in &world.local {
            if let Some(address) = A::new(*address) {
                local.insert(address, flags, 0)?;
            }
        }
        let mut sources = LpmTrie::<_, Raw<Source<A>>, u32>::try_from(self.bed.map(&name("SOURCES", A::IS_V4))?)?;
        for (service, address, bits) in &world.sources {
            if let Some(addr) = A::new(*address) {
                let source = Raw(Source { service: *service, pad: 0, addr });
                sources.insert(&Prefix::new(Source::<A>::BITS + bits, source), 1, 0)?;
            }
        }
        Ok(())
    }
}

fn fill<A: Wire>(cidrs: &mut [Cidr<A>; SERVICE_CIDRS], world: &World) {
    let own = world.service_cidrs.iter().filter_map(|(address, bits)| Some((A::new(*address)?, *bits)));
    for (place, (addr, bits)) in cidrs.iter_mut().zip(own) {
        *place = Cidr { addr, mask: A::mask(bits) };
    }
}
