//! Services, as the maps have them: by port, with every frontend and whom it leads to.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
};

use proxy_common::{
    addr::Protocol,
    backend::Backend,
    service::{self, Pick, Service, WhenEmpty, flag},
};
use serde::Serialize;

use super::{Family, InspectError, Names, PortName, State};
use crate::dataplane::FamilyReader;

/// A port of a Service, in one family.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct ServicePort {
    /// What it is called.
    #[serde(flatten)]
    pub name: PortName,
    /// TCP, UDP or SCTP.
    pub protocol: String,
    /// Of its frontends.
    pub family: Family,
    /// Its number in the maps, which another gets after it.
    pub index: u32,
    /// How a backend is chosen.
    pub algorithm: &'static str,
    /// How long a client that opens no connection is remembered; none without session affinity.
    pub affinity_seconds: Option<u32>,
    /// By address.
    pub frontends: Vec<Frontend>,
}

/// What a packet is addressed to.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[expect(clippy::struct_excessive_bools, reason = "each is a field of the answer, and none excludes another")]
pub struct Frontend {
    /// What kind of address.
    pub kind: Kind,
    /// Unspecified for a NodePort, which is served on addresses of the node.
    pub address: IpAddr,
    /// The Service's port, or the NodePort.
    pub port: u16,
    /// The client's address is kept on the way to other nodes, too (`externalTrafficPolicy: Local`).
    pub keeps_source: bool,
    /// Only some clients are served (`loadBalancerSourceRanges`).
    pub has_source_ranges: bool,
    /// Backends' nodes answer clients directly.
    pub is_dispatched: bool,
    /// Backends are of the other family.
    pub is_crossed: bool,
    /// For pods and processes of this node.
    pub internal: Range,
    /// For clients whose packets come in by an uplink.
    pub external: Range,
}

/// What kind of address a frontend has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// The Service's own, inside the cluster.
    ClusterIp,
    /// Of a load balancer, or an externalIP.
    External,
    /// Addresses of the node.
    NodePort,
}

/// Whom clients are led to.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Range {
    /// Places in the table that a backend is chosen from.
    pub slots: u32,
    /// What clients are told if there is none.
    pub when_empty: Empty,
    /// Who stands in these places, by address.
    pub backends: Vec<Share>,
}

/// What happens where nobody serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Empty {
    /// The client is told so.
    Reject,
    /// Nothing: its policy is Local, and another node may serve.
    Drop,
}

/// A backend among those of a range.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Share {
    /// Where it is.
    pub address: SocketAddr,
    /// Its number in the maps.
    pub id: u32,
    /// Whether it serves.
    pub state: State,
    /// How many of the range's places are its own.
    pub slots: u32,
}

impl ServicePort {
    /// Everybody a client may be led to.
    pub fn backends(&self) -> BTreeSet<SocketAddr> {
        let ranges = self.frontends.iter().flat_map(|frontend| [&frontend.internal, &frontend.external]);
        ranges.flat_map(|range| &range.backends).map(|share| share.address).collect()
    }
}

/// Every port of one family.
pub(super) fn ports(maps: &impl FamilyReader, slots: &[u32]) -> Result<Vec<ServicePort>, InspectError> {
    let names = Names::read(maps)?;
    let room = Room { slots, backends: &maps.all_backends()? };
    let mut ports: BTreeMap<(u32, String), ServicePort> = BTreeMap::new();
    for (frontend, service) in maps.services()? {
        // What stands for the undefined ports of an address is no Service port.
        if frontend.proto == Protocol::Any {
            continue;
        }
        let protocol = frontend.proto.to_string();
        let port = ports.entry((service.index, protocol)).or_insert_with_key(|(index, protocol)| ServicePort {
            name: names.of(*index),
            protocol: protocol.clone(),
            family: Family::of(frontend.addr.into()),
            index: *index,
            algorithm: algorithm(service.pick),
            affinity_seconds: (service.flags & flag::AFFINITY != 0).then_some(service.affinity_seconds),
            frontends: Vec::new(),
        });
        port.frontends.push(room.frontend(&frontend, &service));
    }
    let mut ports: Vec<_> = ports.into_values().collect();
    for port in &mut ports {
        port.frontends.sort();
    }
    Ok(ports)
}

/// Where ranges lead.
struct Room<'a, A> {
    slots: &'a [u32],
    backends: &'a [Backend<A>],
}

impl<A: proxy_common::addr::Address + Into<IpAddr>> Room<'_, A> {
    fn frontend(&self, frontend: &service::Frontend<A>, service: &Service) -> Frontend {
        let has = |bit: u8| service.flags & bit != 0;
        Frontend {
            kind: if frontend.addr == A::ANY {
                Kind::NodePort
            } else if has(flag::EXTERNAL) {
                Kind::External
            } else {
                Kind::ClusterIp
            },
            address: frontend.addr.into(),
            port: frontend.port.number(),
            keeps_source: has(flag::SOURCE_KEPT),
            has_source_ranges: has(flag::SOURCE_RANGES),
            is_dispatched: has(flag::DISPATCHED),
            is_crossed: has(flag::CROSS),
            internal: self.range(service.internal, service.internal_empty),
            external: self.range(service.external, service.external_empty),
        }
    }

    fn range(&self, range: service::Range, when_empty: WhenEmpty) -> Range {
        let first = range.first as usize;
        let ids = self.slots.get(first..first + range.count as usize).unwrap_or_default();
        let mut counts: BTreeMap<u32, u32> = BTreeMap::new();
        for id in ids {
            *counts.entry(*id).or_default() += 1;
        }
        let mut backends: Vec<Share> = counts.into_iter().filter_map(|(id, slots)| self.share(id, slots)).collect();
        backends.sort();
        let when_empty = match when_empty {
            WhenEmpty::Reject => Empty::Reject,
            WhenEmpty::Drop => Empty::Drop,
        };
        Range { slots: range.count, when_empty, backends }
    }

    fn share(&self, id: u32, slots: u32) -> Option<Share> {
        let backend = self.backends.get(id as usize)?;
        let address = SocketAddr::new(backend.addr.into(), backend.port.number());
        Some(Share { address, id, state: backend.state.into(), slots })
    }
}

/// How a backend is chosen. Maglev's and source-hash's tables are made alike, and read by different hashes.
pub(crate) fn algorithm(pick: Pick) -> &'static str {
    match pick {
        Pick::Random => "random",
        Pick::Hash => "maglev",
        Pick::SourceHash => "source-hash",
        Pick::RoundRobin => "round-robin",
        Pick::LeastConnections => "least-connections",
    }
}
