//! The maps as an agent has left them, through their pins: for whoever compares them with what they should hold, while the agent
//! runs or not.

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
};

use aya::Pod;
use proxy_common::{
    addr::Address,
    backend::BackendState,
    filter::{Filter, Hashed},
};

use super::{
    error::{Error, OpenError},
    family::{self, FamilyMaps, Maps},
    load::maps_directory,
    observer,
    table::Table,
};
use crate::diff::{FamilyState, KernelState};

/// A directory of pinned maps.
pub(super) struct Pins(pub(super) PathBuf);

impl Maps for Pins {
    fn table<K: Pod, V: Pod>(&self, name: &'static str) -> Result<Table<K, V>, OpenError> {
        Ok(observer::open(&self.0, name)?)
    }
}

/// What the maps pinned under a path hold.
pub fn read_pinned(pin_path: &Path) -> Result<KernelState, OpenError> {
    let pins = Pins(maps_directory(pin_path));
    let v4 = FamilyMaps::new(&pins, &family::V4)?;
    let v6 = FamilyMaps::new(&pins, &family::V6)?;
    let (v4, v6) = (v4.read_assigned()?, v6.read_assigned()?);
    Ok(super::state(v4, v6, &pins.table("SLOTS")?, &pins.table("SERVICE_CIDRS")?)?)
}

/// An address that programs do not ask about, though there is an entry for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Unfiltered {
    /// Whose packets go untranslated.
    pub address: IpAddr,
    /// `INBOUND` or `OUTBOUND`.
    pub filter: &'static str,
}

/// The addresses in `state` that the address filters pinned under a path do not let through.
pub fn unfiltered(pin_path: &Path, state: &KernelState) -> Result<Vec<Unfiltered>, Error> {
    let filters = Filters::open(&maps_directory(pin_path))?;
    let mut found = filters.missing(&state.v4);
    found.extend(filters.missing(&state.v6));
    found.sort_unstable();
    found.dedup();
    Ok(found)
}

struct Filters {
    inbound: Box<Filter>,
    outbound: Box<Filter>,
}

impl Filters {
    fn open(directory: &Path) -> Result<Self, Error> {
        let read = |name| -> Result<Box<Filter>, Error> {
            let map: Table<u32, Filter> = observer::open(directory, name)?;
            Ok(Box::new(map.read(&0)?))
        };
        Ok(Self { inbound: read("INBOUND")?, outbound: read("OUTBOUND")? })
    }

    fn missing<A: Address + Hashed + Into<IpAddr>>(&self, state: &FamilyState<A>) -> Vec<Unfiltered> {
        let frontends = state.services.keys().map(|frontend| frontend.addr).filter(|address| *address != A::ANY);
        let inbound = frontends.chain(state.local_addrs.keys().copied());
        let backends = state.backends.iter().filter(|backend| backend.state == BackendState::Serving);
        let inbound =
            inbound.filter(|address| !self.inbound.may_have(address.bit())).map(|address| (address, "INBOUND"));
        let outbound = backends.map(|backend| backend.addr).filter(|address| !self.outbound.may_have(address.bit()));
        let outbound = outbound.map(|address| (address, "OUTBOUND"));
        inbound.chain(outbound).map(|(address, filter)| Unfiltered { address: address.into(), filter }).collect()
    }
}
