//! Other nodes: where backends are, and who puts packets on the link.

use std::net::IpAddr;

use anyhow::Result;
use aya::maps::Array;
use proxy_common::{
    addr::{Ipv4, Ipv6, Mac, Protocol},
    backend::Backend,
    flow::{Direction, Flow, Output},
    service::{Range, Service, flag},
    tuple::{Stage, Tuple},
};

use super::Testbed;
use crate::frame::Family;

impl Testbed {
    /// Adds a backend of another node that has an address, and returns its id.
    pub fn add_backend_of(&mut self, address: IpAddr, node: IpAddr) -> Result<u32> {
        let id = self.add_backend(address, false)?;
        match node {
            IpAddr::V4(node) => {
                let mut backends = Array::<_, Backend<Ipv4>>::try_from(self.map("BACKENDS_V4")?)?;
                let backend = backends.get(&id, 0)?;
                backends.set(id, Backend { node: node.into(), ..backend }, 0)?;
            }
            IpAddr::V6(node) => {
                let mut backends = Array::<_, Backend<Ipv6>>::try_from(self.map("BACKENDS_V6")?)?;
                let backend = backends.get(&id, 0)?;
                backends.set(id, Backend { node: node.into(), ..backend }, 0)?;
            }
        }
        Ok(id)
    }

    /// Tells of another node: its address on the link, and one of its others.
    pub fn add_peer(&mut self, mac: [u8; 6], address: IpAddr) -> Result<()> {
        self.hash::<Mac, u32>("PEERS")?.insert(Mac { octets: mac }, 1, 0)?;
        match address {
            IpAddr::V4(address) => self.hash::<Ipv4, u32>("PEER_ADDRS_V4")?.insert(Ipv4::from(address), 1, 0)?,
            IpAddr::V6(address) => self.hash::<Ipv6, u32>("PEER_ADDRS_V6")?.insert(Ipv6::from(address), 1, 0)?,
        }
        self.let_in(address)
    }

    /// Makes a frontend lead to backends by direct server return, to those of this node for what was dispatched to it.
    pub fn add_dispatched(
        &mut self,
        (address, port): (IpAddr, u16),
        proto: Protocol,
        all: &[u32],
        local: &[u32],
    ) -> Result<()> {
        let (all, local) = (self.add_slots(all)?, self.add_slots(local)?);
        let local = if local.count == 0 { Range::default() } else { local };
        let flags = flag::EXTERNAL | flag::DISPATCHED;
        let service = Service { index: 1, flags, internal: all, external: all, local, ..Service::default() };
        self.set_service(address, port, proto, service)
    }

    /// What the flow table holds of a family in a tier, `FLOWS` or `EMBRYOS`.
    pub fn kinds(&mut self, family: Family, tier: &str) -> Result<Vec<Kind>> {
        Ok(match family {
            Family::V4 => self.flows(&format!("{tier}_V4"))?.iter().map(kind).collect(),
            Family::V6 => self.flows_v6(&format!("{tier}_V6"))?.iter().map(kind).collect(),
        })
    }
}

/// What an entry of the flow table does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind {
    /// Where it is looked up.
    pub stage: Stage,
    /// Where packets go.
    pub output: Output,
    /// Which half it is.
    pub direction: Direction,
    /// What is known of the connection.
    pub state: u8,
    /// The backend.
    pub backend: u32,
    /// From where to where what it dispatches goes.
    pub addresses: (IpAddr, IpAddr),
}

fn kind<A: Copy + Into<IpAddr>>((key, flow): &(Tuple<A>, Flow<A>)) -> Kind {
    Kind {
        stage: key.stage,
        output: flow.output,
        direction: flow.direction,
        state: flow.state,
        backend: flow.backend,
        addresses: (flow.rewrite.saddr.into(), flow.rewrite.daddr.into()),
    }
}
