//! Which endpoints of a Service port traffic may go to. In: its endpoints and where this node stands. Out: one list for
//! clients who may be sent anywhere and one for those who must stay on the node. The rules are those of kube-proxy's
//! pkg/proxy/topology.go.

use std::net::{IpAddr, SocketAddr};

use crate::model::Endpoint;

/// Where this node stands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// Its name.
    pub node: String,
    /// Its zone, when it has one.
    pub zone: Option<String>,
    /// Its primary addresses.
    pub addresses: Vec<IpAddr>,
}

/// The endpoints of a Service port that new connections may go to, in order of their addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lists {
    /// Anywhere in the cluster, as far as hints let this node use them.
    pub cluster: Vec<SocketAddr>,
    /// On this node.
    pub local: Vec<SocketAddr>,
    /// Some node has an endpoint that could answer: an empty `local` is then a matter of policy, not of absence.
    pub has_any: bool,
}

/// In the order of their addresses, each once.
type Endpoints<'a> = [(SocketAddr, &'a Endpoint)];

/// Selects both lists. Ready endpoints come first; when there are none, those that still answer while they shut down.
pub fn select(endpoints: &Endpoints<'_>, place: &Place) -> Lists {
    let mut cluster = filtered(endpoints, |endpoint| endpoint.is_ready);
    let audience = Audience::of(&cluster, place);
    cluster.retain(|(_, endpoint)| audience.is_meant(endpoint, place));
    if cluster.is_empty() {
        cluster = filtered(endpoints, is_draining);
    }
    let mut local = filtered(endpoints, |endpoint| endpoint.is_local && endpoint.is_ready);
    if local.is_empty() {
        local = filtered(endpoints, |endpoint| endpoint.is_local && is_draining(endpoint));
    }
    Lists {
        has_any: endpoints.iter().any(|(_, endpoint)| endpoint.is_ready || is_draining(endpoint)),
        cluster: addresses(&cluster),
        local: addresses(&local),
    }
}

fn addresses(endpoints: &Endpoints<'_>) -> Vec<SocketAddr> {
    endpoints.iter().map(|(address, _)| *address).collect()
}

fn is_draining(endpoint: &Endpoint) -> bool {
    endpoint.is_serving && endpoint.is_terminating
}

fn filtered<'a>(endpoints: &Endpoints<'a>, keep: impl Fn(&Endpoint) -> bool) -> Vec<(SocketAddr, &'a Endpoint)> {
    endpoints.iter().filter(|(_, endpoint)| keep(endpoint)).copied().collect()
}

/// Whom the hints of a Service port speak to, on this node.
enum Audience {
    ThisNode,
    ThisZone,
    Anyone,
}

impl Audience {
    /// Hints count only when every ready endpoint has one of the kind, and one of them names this node or zone: else some
    /// client would be left without an endpoint while the hints are being written.
    fn of(ready: &Endpoints<'_>, place: &Place) -> Self {
        let speaks = |has_hint: fn(&Endpoint) -> bool, audience: &Self| {
            ready.iter().all(|(_, endpoint)| has_hint(endpoint))
                && ready.iter().any(|(_, endpoint)| audience.is_meant(endpoint, place))
        };
        if speaks(|endpoint| !endpoint.hints.nodes.is_empty(), &Self::ThisNode) {
            return Self::ThisNode;
        }
        if speaks(|endpoint| !endpoint.hints.zones.is_empty(), &Self::ThisZone) {
            return Self::ThisZone;
        }
        Self::Anyone
    }

    fn is_meant(&self, endpoint: &Endpoint, place: &Place) -> bool {
        match self {
            Self::ThisNode => endpoint.hints.nodes.contains(&place.node),
            Self::ThisZone => place.zone.as_ref().is_some_and(|zone| endpoint.hints.zones.contains(zone)),
            Self::Anyone => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{net::SocketAddr, sync::Arc};

    use super::{Lists, Place, select};
    use crate::model::{Endpoint, Hints, NodeNumber};

    const READY: (bool, bool, bool) = (true, true, false);
    const UNREADY: (bool, bool, bool) = (false, false, false);
    const DRAINING: (bool, bool, bool) = (false, true, true);
    const DYING: (bool, bool, bool) = (false, false, true);

    fn endpoint((is_ready, is_serving, is_terminating): (bool, bool, bool)) -> Endpoint {
        Endpoint {
            address: [10, 0, 0, 1].into(),
            is_ready,
            is_serving,
            is_terminating,
            is_local: false,
            name: None,
            node: NodeNumber::default(),
            hints: Arc::default(),
        }
    }

    fn local(state: (bool, bool, bool)) -> Endpoint {
        Endpoint { is_local: true, ..endpoint(state) }
    }

    fn hinted(nodes: &[&str], zones: &[&str]) -> Endpoint {
        let owned = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        Endpoint { hints: Arc::new(Hints { nodes: owned(nodes), zones: owned(zones) }), ..endpoint(READY) }
    }

    /// The lists as indexes into the case.
    fn indexes(endpoints: &[Endpoint]) -> (Vec<u16>, Vec<u16>, bool) {
        let address = |index: usize| SocketAddr::from(([10, 0, 0, 1], index as u16));
        let endpoints: Vec<_> =
            endpoints.iter().enumerate().map(|(index, endpoint)| (address(index), endpoint)).collect();
        let place = Place { node: "here".into(), zone: Some("a".into()), ..Place::default() };
        let Lists { cluster, local, has_any } = select(&endpoints, &place);
        let ports = |list: Vec<SocketAddr>| list.iter().map(SocketAddr::port).collect();
        (ports(cluster), ports(local), has_any)
    }

    /// Trap 6: the endpoints that drain last are among them.
    #[test]
    fn lists_follow_the_tables_of_kube_proxy() {
        type Case = (&'static str, Vec<Endpoint>, (Vec<u16>, Vec<u16>, bool));
        let cases: Vec<Case> = vec![
            ("nothing", vec![], (vec![], vec![], false)),
            ("unready alone", vec![endpoint(UNREADY), endpoint(DYING)], (vec![], vec![], false)),
            ("ready before draining", vec![endpoint(DRAINING), endpoint(READY)], (vec![1], vec![], true)),
            ("draining for want of ready", vec![endpoint(DRAINING), endpoint(DYING)], (vec![0], vec![], true)),
            ("local draining beside remote ready", vec![local(DRAINING), endpoint(READY)], (vec![1], vec![0], true)),
            ("local ready before local draining", vec![local(DRAINING), local(READY)], (vec![1], vec![1], true)),
            ("hints for the zone", vec![hinted(&[], &["a"]), hinted(&[], &["b"])], (vec![0], vec![], true)),
            (
                "a hint for the node beats one for the zone",
                vec![hinted(&["here"], &["b"]), hinted(&["there"], &["a"])],
                (vec![0], vec![], true),
            ),
            (
                "hints for other nodes leave the zone's",
                vec![hinted(&["there"], &["a"]), hinted(&["there"], &["b"])],
                (vec![0], vec![], true),
            ),
            ("one without a hint", vec![hinted(&[], &["a"]), endpoint(READY)], (vec![0, 1], vec![], true)),
            ("hints for other zones alone", vec![hinted(&[], &["b"]), hinted(&[], &["c"])], (vec![0, 1], vec![], true)),
            (
                "an unready endpoint needs no hint",
                vec![hinted(&[], &["a"]), hinted(&[], &["b"]), endpoint(UNREADY)],
                (vec![0], vec![], true),
            ),
        ];
        for (name, endpoints, expected) in cases {
            assert_eq!(indexes(&endpoints), expected, "{name}");
        }
    }
}
