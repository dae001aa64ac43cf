//! What would become of a packet: the real program, loaded once more over the pinned maps that programs only read and over maps of
//! its own for all that they write, is run over the packet. In: who calls whom, and where. Out: what the program said, and
//! what it went by. Nothing that is running notices: no flow is opened, nothing is counted, nobody's turn is taken.
//!
//! What a choice depends on is copied before: the flow if there is one, the client's affinity, whose turn it is, and how many
//! connections backends have.

mod changing;
mod maps;
mod run;
mod seen;

use std::{
    collections::BTreeMap,
    fmt::Debug,
    net::{IpAddr, SocketAddr},
    path::Path,
};

use aya::{Ebpf, Pod, maps::PerCpuArray};
use proxy_common::{
    addr::{Address, Port, Protocol},
    backend::{Backend, BackendId},
    flow::Flow,
    names::ServiceName,
    node::{Node, local},
    outcome::{Hook, Outcome, counter},
    service::{Affinity, Client, Frontend, Pick, Range, Service},
    tuple::{Stage, Tuple},
};

pub(super) use self::maps::maps;
use self::{
    changing::{Changing, Found, Names},
    maps::{Share, share},
    seen::{seen_flow, socket},
};
pub use self::{
    run::Action,
    seen::{AnyCall, Call, Moment, Place, Rehearsal, SeenAffinity, SeenBackend, SeenFlow, SeenService},
};
use super::{
    error::{Error, OpenError},
    family,
    flow_table::{goes_on, silence},
    load::{self, OBJECT, maps_directory},
    pinned::Pins,
    preflight,
    program::ProgramName,
    table::Table,
};

/// Tries a packet, which `build` makes for the client and moment that it is told.
pub fn rehearse(
    pin_path: &Path,
    call: &AnyCall,
    place: &Place,
    build: impl FnOnce(SocketAddr, Moment) -> Vec<u8>,
) -> Result<Rehearsal, OpenError> {
    preflight::capabilities()?;
    let object = open(pin_path, place.program, call.way())?;
    match call {
        AnyCall::V4(call) => Stand::new(pin_path, &object, *place, &changing::V4, &family::V4)?.perform(call, build),
        AnyCall::V6(call) => Stand::new(pin_path, &object, *place, &changing::V6, &family::V6)?.perform(call, build),
    }
}

/// Loads the program for packets of one way. It is attached nowhere, and gone when the object is dropped.
fn open(pin_path: &Path, program: ProgramName, way: u16) -> Result<Ebpf, OpenError> {
    let sizes = load::pinned_sizes(pin_path)?;
    let directory = maps_directory(pin_path);
    let mut loader = load::loader();
    // Of counts per Service nobody reads what is the rehearsal's own.
    loader.override_global("STATS", &0_u8, true).override_global("REHEARSED", &way, true);
    for (name, &entries) in &sizes {
        match share(name) {
            Share::Read => loader.map_pin_path(name, directory.join(name)).map_max_entries(name, entries),
            Share::Own(most) => loader.map_max_entries(name, entries.min(most)),
        };
    }
    let mut object = loader.load(OBJECT)?;
    load::load_program(&mut object, program)?;
    Ok(object)
}

/// Everything a rehearsal of one family goes by.
struct Stand<'a, A> {
    object: &'a Ebpf,
    place: Place,
    node: Node,
    services: Table<Frontend<A>, Service>,
    local_addrs: Table<A, u32>,
    backends: Table<BackendId, Backend<A>>,
    slots: Table<u32, BackendId>,
    names: Table<u32, ServiceName>,
    /// What the running programs have.
    live: Changing<A>,
    /// What this one has.
    own: Changing<A>,
}

impl<'a, A> Stand<'a, A>
where
    A: Address + Pod + Into<IpAddr> + Debug,
    Frontend<A>: Pod,
    Backend<A>: Pod,
    Client<A>: Pod,
    Tuple<A>: Pod,
    Flow<A>: Pod,
{
    fn new(
        pin_path: &Path,
        object: &'a Ebpf,
        place: Place,
        changing: &Names,
        read: &family::Names,
    ) -> Result<Self, OpenError> {
        let node: Table<u32, Node> = family::table(object, "NODE")?;
        Ok(Self {
            object,
            place,
            node: node.read(&0)?,
            services: family::table(object, read.services)?,
            local_addrs: family::table(object, read.local_addrs)?,
            backends: family::table(object, read.backends)?,
            slots: family::table(object, "SLOTS")?,
            names: family::table(object, read.called)?,
            live: Changing::open(&Pins(maps_directory(pin_path)), changing)?,
            own: Changing::open(object, changing)?,
        })
    }

    fn perform(
        &self,
        call: &Call<A>,
        build: impl FnOnce(SocketAddr, Moment) -> Vec<u8>,
    ) -> Result<Rehearsal, OpenError> {
        let key = self.key(call)?;
        let service = self.service(call)?;
        let known = self.live.flow(&key)?;
        let client = Client { addr: key.saddr, service: service.map_or(0, |(_, service)| service.index), pad: 0 };
        let affinity = self.live.affinity(&client)?;
        self.prepare(&key, service.map(|(_, service)| service), &client, affinity.as_ref())?;

        let moment = moment(call.protocol, known.as_ref());
        let packet = build(socket(key.saddr, key.sport), moment);
        let ran = self.run(&packet)?;

        let flow = self.own.flow(&key)?;
        let second_step = match &flow {
            Some((_, flow)) => self.own.second_step(&key, flow)?,
            None => None,
        };
        let range = service.map(|(_, service)| self.range(&service)).unwrap_or_default();
        Ok(Rehearsal {
            client: socket(key.saddr, key.sport),
            moment,
            action: ran.action,
            bytes: ran.bytes,
            outcomes: self.outcomes()?,
            known: known.as_ref().map(seen_flow),
            flow: flow.as_ref().map(seen_flow),
            second_step: second_step.as_ref().map(seen_flow),
            service: service.map(|(frontend, value)| SeenService {
                address: (frontend.addr != A::ANY).then(|| frontend.addr.into()),
                port: frontend.port.number(),
                value,
            }),
            name: match service {
                Some((_, service)) => self.names.find(&service.index)?,
                None => None,
            },
            backend: flow.map(|(_, flow)| self.backend(flow.backend)).transpose()?,
            candidates: self.candidates(range)?,
            affinity: affinity.map(|known| SeenAffinity { backend: known.backend, silence: silence(known.last_used) }),
        })
    }

    /// The tuple of the call. A client without a port gets the first one of those that hosts choose from which has no flow.
    fn key(&self, call: &Call<A>) -> Result<Tuple<A>, Error> {
        const DYNAMIC: std::ops::RangeInclusive<u16> = 49_152..=u16::MAX;
        let key = |sport| Tuple::new(call.saddr, call.daddr, sport, call.dport, call.protocol, self.stage());
        if let Some(sport) = call.sport {
            return Ok(key(sport));
        }
        for sport in DYNAMIC {
            let key = key(Port::new(sport));
            if self.live.flow(&key)?.is_none() {
                return Ok(key);
            }
        }
        Ok(key(Port::new(*DYNAMIC.start())))
    }

    fn stage(&self) -> Stage {
        if self.place.program == ProgramName::PodIn { Stage::FromPod } else { Stage::UplinkIn }
    }

    /// The Service that is called: as the programs find it, by its own address or as a NodePort.
    fn service(&self, call: &Call<A>) -> Result<Option<(Frontend<A>, Service)>, Error> {
        let own = Frontend::new(call.daddr, call.dport, call.protocol);
        if call.daddr == A::ANY {
            return Ok(None);
        }
        if let Some(service) = self.services.find(&own)? {
            return Ok(Some((own, service)));
        }
        let node_ports = self.node.node_port_first.number()..=self.node.node_port_last.number();
        let serves = self.local_addrs.find(&call.daddr)?.is_some_and(|flags| flags & local::NODE_PORTS != 0);
        if !serves || !node_ports.contains(&call.dport.number()) {
            return Ok(None);
        }
        let any = Frontend::new(A::ANY, call.dport, call.protocol);
        Ok(self.services.find(&any)?.map(|service| (any, service)))
    }

    /// Copies what the answer depends on into the rehearsal's own maps.
    fn prepare(
        &self,
        key: &Tuple<A>,
        service: Option<Service>,
        client: &Client<A>,
        affinity: Option<&Affinity>,
    ) -> Result<(), Error> {
        self.own.copy_flow(&self.live, key)?;
        self.own.copy_foreign(&self.live, key)?;
        let Some(service) = service else { return Ok(()) };
        if let Some(affinity) = affinity {
            self.own.put_affinity(client, affinity)?;
        }
        match service.pick {
            Pick::RoundRobin => self.own.copy_turn(&self.live, service.index),
            Pick::LeastConnections => self.own.copy_loads(&self.live, &self.slots_of(self.range(&service))?),
            Pick::Random | Pick::Hash | Pick::SourceHash => Ok(()),
        }
    }

    fn run(&self, packet: &[u8]) -> Result<run::Ran, OpenError> {
        let name = self.place.program.as_str();
        let program = self.object.program(name).ok_or(OpenError::Missing { what: "program", name })?;
        run::run(program, packet, self.place.ifindex).map_err(|source| OpenError::Run { program: name, source })
    }

    fn outcomes(&self) -> Result<Vec<Outcome>, OpenError> {
        const NAME: &str = "COUNTERS";
        let map = self.object.map(NAME).ok_or(OpenError::Missing { what: "map", name: NAME })?;
        let failed = |source| Error::Map { operation: "read", map: NAME, source: std::io::Error::other(source) };
        let counters: PerCpuArray<_, u64> = map.try_into().map_err(failed)?;
        let mut seen = Vec::new();
        for outcome in Outcome::ALL {
            for hook in Hook::ALL {
                let counts = counters.get(&counter(hook, outcome), 0).map_err(failed)?;
                if counts.iter().any(|count| *count > 0) {
                    seen.push(outcome);
                }
            }
        }
        Ok(seen)
    }

    /// The list that a call from here is answered from.
    fn range(&self, service: &Service) -> Range {
        if self.stage() == Stage::UplinkIn { service.external } else { service.internal }
    }

    fn slots_of(&self, range: Range) -> Result<Vec<BackendId>, Error> {
        let end = range.first.saturating_add(range.count) as usize;
        let mut slots = if range.count == 0 { Vec::new() } else { self.slots.values(end)? };
        Ok(slots.split_off(slots.len().min(range.first as usize)))
    }

    fn candidates(&self, range: Range) -> Result<Vec<(SeenBackend, u32)>, Error> {
        let mut shares = BTreeMap::<BackendId, u32>::new();
        for id in self.slots_of(range)? {
            *shares.entry(id).or_default() += 1;
        }
        shares.into_iter().map(|(id, slots)| Ok((self.backend(id)?, slots))).collect()
    }

    fn backend(&self, id: BackendId) -> Result<SeenBackend, Error> {
        let backend = self.backends.read(&id)?;
        Ok(SeenBackend {
            id,
            address: socket(backend.addr, backend.port),
            node: (backend.node != A::ANY).then(|| backend.node.into()),
            state: backend.state,
            is_local: backend.is_local != 0,
            generation: backend.generation,
        })
    }
}

/// A connection that goes on is asked for its next packet: a first one might begin another on its tuple.
fn moment<A>(protocol: Protocol, known: Option<&Found<A>>) -> Moment {
    match known {
        Some((_, flow)) if goes_on(protocol, flow.state, silence(flow.last_seen)) => Moment::Later,
        _ => Moment::First,
    }
}
