//! Who is behind the numbers and addresses in records: backends, and Service ports by name.

use std::{
    collections::{HashMap, HashSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::{Duration, Instant},
};

use proxy_common::{addr::Address as _, backend::BackendState, event::Event};

use super::{InspectError, Inspector, Names, PortName};
use crate::dataplane::FamilyReader;

/// How old it may be: less than a number rests before another gets it.
const FRESH: Duration = Duration::from_secs(2);

/// What the maps of both families say, as of a moment ago.
#[derive(Debug)]
pub struct Roster {
    read_at: Instant,
    v4: Family,
    v6: Family,
}

#[derive(Debug)]
struct Family {
    names: Names,
    /// By id, with the generation.
    backends: HashMap<u32, (u32, SocketAddr)>,
    /// Index by what a packet is addressed to.
    frontends: HashMap<(IpAddr, u16, u8), u32>,
    /// Index of some port of the Service that has the address.
    addresses: HashMap<IpAddr, u32>,
    /// The node's own.
    local: HashSet<IpAddr>,
}

impl Roster {
    /// Reads it.
    pub fn read(inspector: &Inspector) -> Result<Self, InspectError> {
        let observer = inspector.observer();
        Ok(Self { read_at: Instant::now(), v4: Family::read(observer.v4())?, v6: Family::read(observer.v6())? })
    }

    /// Reads it anew if it is too old.
    pub fn refresh(&mut self, inspector: &Inspector) -> Result<(), InspectError> {
        if self.read_at.elapsed() >= FRESH {
            *self = Self::read(inspector)?;
        }
        Ok(())
    }

    /// Whom a record's packet went to.
    pub fn backend(&self, record: &Event) -> Option<SocketAddr> {
        let (generation, address) = self.family(record)?.backends.get(&record.backend)?;
        (*generation == record.backend_generation).then_some(*address)
    }

    /// What it was for: known with a backend, else found as the programs find it.
    pub fn service(&self, record: &Event) -> Option<PortName> {
        let family = self.family(record)?;
        if record.backend != 0 {
            return Some(family.names.of(record.service));
        }
        let daddr = IpAddr::V6(Ipv6Addr::from(record.daddr.octets));
        let daddr = if record.family == 4 { daddr.to_canonical() } else { daddr };
        let port = |address| family.frontends.get(&(address, record.dport.number(), record.proto));
        if let Some(index) = port(daddr) {
            return Some(family.names.of(*index));
        }
        match family.addresses.get(&daddr) {
            // Which of its ports was meant is not to be known.
            Some(index) => Some(PortName { port: String::new(), ..family.names.of(*index) }),
            None if daddr.is_unspecified() || family.local.contains(&daddr) => {
                port(any(daddr)).map(|index| family.names.of(*index))
            }
            None => None,
        }
    }

    fn family(&self, record: &Event) -> Option<&Family> {
        match record.family {
            4 => Some(&self.v4),
            6 => Some(&self.v6),
            _ => None,
        }
    }
}

/// What NodePorts stand under in the tables.
fn any(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        IpAddr::V6(address) if address.to_ipv4_mapped().is_some() => Ipv4Addr::UNSPECIFIED.to_ipv6_mapped().into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    }
}

impl Family {
    fn read<R: FamilyReader>(maps: &R) -> Result<Self, InspectError> {
        let backends = (0_u32..).zip(maps.all_backends()?);
        let used = backends.filter(|(_, backend)| backend.state != BackendState::Free);
        let services = maps.services()?;
        let of_services = services.iter().filter(|(frontend, _)| frontend.addr != R::Addr::ANY);
        let key = |address: R::Addr, port: u16, proto| (address.into(), port, proto as u8);
        Ok(Self {
            names: Names::read(maps)?,
            backends: used
                .map(|(id, backend)| {
                    (id, (backend.generation, SocketAddr::new(backend.addr.into(), backend.port.number())))
                })
                .collect(),
            addresses: of_services.map(|(frontend, service)| (frontend.addr.into(), service.index)).collect(),
            local: maps.local_addresses()?.into_iter().map(Into::into).collect(),
            frontends: services
                .iter()
                .map(|(frontend, service)| (key(frontend.addr, frontend.port.number(), frontend.proto), service.index))
                .collect(),
        })
    }
}
