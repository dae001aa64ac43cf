//! kube-proxy's own tables of nftables, one for each family. Everything of its mode nftables is in them.

use netlink_packet_netfilter::NetfilterProtoFamily;

use super::Family;
use crate::dataplane::netlink::netfilter::{self, Chain};

/// What it calls them (`kubeProxyTable` of `pkg/proxy/nftables/proxier.go`).
pub(super) const TABLE: &str = "kube-proxy";

/// Chains of Service ports begin with it; those of their endpoints and their further frontends otherwise.
const SERVICE: &str = "service-";

/// One of them.
#[derive(Clone, Debug)]
pub(super) struct Piece {
    pub(super) family: Family,
    pub(super) chains: Vec<String>,
}

impl From<Family> for NetfilterProtoFamily {
    fn from(family: Family) -> Self {
        match family {
            Family::Ipv4 => Self::IPv4,
            Family::Ipv6 => Self::IPv6,
        }
    }
}

/// Picks them out of all tables and chains.
pub(super) fn find(tables: &[(NetfilterProtoFamily, String)], chains: &[Chain]) -> Vec<Piece> {
    let piece = |family: Family| {
        let protocol = NetfilterProtoFamily::from(family);
        let is_there = tables.iter().any(|(of, name)| *of == protocol && name == TABLE);
        let own = chains.iter().filter(|chain| chain.family == protocol && chain.table == TABLE);
        is_there.then(|| Piece { family, chains: own.map(|chain| chain.name.clone()).collect() })
    };
    [Family::Ipv4, Family::Ipv6].into_iter().filter_map(piece).collect()
}

impl Piece {
    /// How many Service ports it is of. Chains that are not made of a name have no slash in theirs.
    pub(super) fn services(&self) -> usize {
        self.chains.iter().filter(|chain| chain.starts_with(SERVICE) && chain.contains('/')).count()
    }

    /// Takes it out.
    pub(super) fn remove(&self) -> Result<(), String> {
        netfilter::delete_table(self.family.into(), TABLE)
            .map_err(|error| format!("table {TABLE} of nftables of {} is still there: {error}", self.family.name()))
    }
}
