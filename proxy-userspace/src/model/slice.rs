//! An EndpointSlice: endpoints of one family, and the ports all of them have.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    num::NonZeroU16,
    sync::{Arc, LazyLock},
};

use k8s_openapi::api::discovery::v1 as discovery;
use proxy_common::addr::Protocol;

use super::{
    ObjectName, ServicePortName,
    defect::{Defect, ObjectReference, Problem},
    peers::{NodeNames, NodeNumber},
    service::{parse_address, parse_port, parse_protocol},
};

/// Names the Service a slice belongs to.
pub const SERVICE_NAME: &str = "kubernetes.io/service-name";
/// Marks slices of headless Services.
pub const HEADLESS: &str = "service.kubernetes.io/headless";

/// The endpoints of a Service, or some of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slice {
    /// The Service it belongs to.
    pub service: ObjectName,
    /// All of one family.
    pub endpoints: Box<[Endpoint]>,
    /// The ports of every endpoint.
    pub ports: Box<[SlicePort]>,
}

/// A port of a slice's endpoints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlicePort {
    /// Equal to the Service port's.
    pub name: String,
    /// Equal to the Service port's.
    pub protocol: Protocol,
    /// Where the endpoints listen.
    pub port: NonZeroU16,
}

/// A pod, or something else that answers.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "conditions of the API are independent of each other")]
pub struct Endpoint {
    /// Its address.
    pub address: IpAddr,
    /// New connections go to it.
    pub is_ready: bool,
    /// It answers, perhaps while it shuts down.
    pub is_serving: bool,
    /// It is being shut down.
    pub is_terminating: bool,
    /// It runs on this node.
    pub is_local: bool,
    /// Name of the pod, or of what else it stands for.
    pub name: Option<Box<str>>,
    /// On which node it runs.
    pub node: NodeNumber,
    /// Whom it is meant for; endpoints of a slice that agree share it.
    pub hints: Arc<Hints>,
}

/// Whom an endpoint is meant for. Empty means that nothing is said.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hints {
    /// Names of nodes.
    pub nodes: Vec<String>,
    /// Names of zones.
    pub zones: Vec<String>,
}

impl Hints {
    /// The same for all endpoints that have none.
    fn none() -> Arc<Self> {
        static NONE: LazyLock<Arc<Hints>> = LazyLock::new(Arc::default);
        Arc::clone(&NONE)
    }
}

impl Slice {
    /// None for a slice that belongs to no Service, or to a headless one, or holds no IP addresses.
    pub(super) fn parse(
        object: &discovery::EndpointSlice,
        node_name: &str,
        names: &mut NodeNames,
        defects: &mut Vec<Defect>,
    ) -> Option<Self> {
        let labels = object.metadata.labels.as_ref()?;
        let service = labels.get(SERVICE_NAME).filter(|name| !name.is_empty())?;
        if labels.contains_key(HEADLESS) {
            return None;
        }
        let reference = ObjectReference::of("EndpointSlice", &object.metadata);
        let service = ObjectName { namespace: reference.name.namespace.clone(), name: service.as_str().into() };
        let mut note = |problem| defects.push(Defect { object: reference.clone(), problem });
        let is_ipv4 = match object.address_type.as_str() {
            "IPv4" => true,
            "IPv6" => false,
            "FQDN" => return None,
            other => {
                note(Problem::address_type(other));
                return None;
            }
        };
        let ports = object.ports.iter().flatten().filter_map(|port| parse_slice_port(port, &mut note)).collect();
        let mut hints = Hints::none();
        let endpoints = object.endpoints.iter().flatten();
        let endpoints = endpoints
            .filter_map(|endpoint| {
                share(&mut hints, parse_hints(endpoint.hints.as_ref()));
                let mut parsed = parse_endpoint(endpoint, is_ipv4, &hints, &mut note)?;
                parsed.is_local = endpoint.node_name.as_deref() == Some(node_name);
                parsed.node = endpoint.node_name.as_deref().map_or(NodeNumber::default(), |name| names.number(name));
                Some(parsed)
            })
            .collect();
        Some(Self { service, endpoints, ports })
    }

    /// What an earlier agent knew of a Service port: its endpoints, and which of them are local.
    pub(super) fn inherited(
        port: &ServicePortName,
        number: NonZeroU16,
        endpoints: &BTreeMap<SocketAddr, bool>,
    ) -> Self {
        let endpoint = |(address, is_local): (&SocketAddr, &bool)| Endpoint {
            address: address.ip(),
            is_ready: true,
            is_serving: true,
            is_terminating: false,
            is_local: *is_local,
            name: None,
            node: NodeNumber::default(),
            hints: Hints::none(),
        };
        Self {
            service: port.service.clone(),
            endpoints: endpoints.iter().map(endpoint).collect(),
            ports: [SlicePort { name: port.port.clone(), protocol: port.protocol, port: number }].into(),
        }
    }

    /// The family of its endpoints, if it has any.
    pub fn is_ipv4(&self) -> Option<bool> {
        self.endpoints.first().map(|endpoint| endpoint.address.is_ipv4())
    }
}

/// The endpoints of every port of some slices that `wanted` lets through, in the order of their addresses, each once. Of two
/// entries for one address and port, one that does not terminate is used, then one that is ready, then the one of the slice
/// that comes first.
pub fn endpoints<'a>(
    slices: impl Iterator<Item = &'a Slice>,
    wanted: impl Fn(&SlicePort) -> bool,
) -> Vec<(SocketAddr, &'a Endpoint)> {
    let merged = merge(slices, |port| wanted(port).then_some(())).into_iter();
    merged.map(|((address, ()), endpoint)| (address, endpoint)).collect()
}

/// A port of a slice, by what tells it from the others: its name and protocol.
type PortKey<'a> = (&'a str, Protocol);

/// The same for all ports, each by itself: one address may be an endpoint of several, and ready for some of them only.
pub fn endpoints_by_port<'a>(
    slices: impl Iterator<Item = &'a Slice>,
) -> Vec<((SocketAddr, PortKey<'a>), &'a Endpoint)> {
    merge(slices, |port| Some((port.name.as_str(), port.protocol)))
}

/// Endpoints by address and by what tells ports apart; ports without that are left out. Most Services have a few: a sorted
/// list takes less than a map.
fn merge<'a, K: Ord + Copy>(
    slices: impl Iterator<Item = &'a Slice>,
    key: impl Fn(&'a SlicePort) -> Option<K>,
) -> Vec<((SocketAddr, K), &'a Endpoint)> {
    let rank = |endpoint: &Endpoint| (endpoint.is_terminating, !endpoint.is_ready);
    let mut endpoints: Vec<((SocketAddr, K), &Endpoint)> = Vec::new();
    for slice in slices {
        for (port, key) in slice.ports.iter().filter_map(|port| Some((port, key(port)?))) {
            let place = |endpoint: &Endpoint| (SocketAddr::new(endpoint.address, port.port.get()), key);
            endpoints.extend(slice.endpoints.iter().map(|endpoint| (place(endpoint), endpoint)));
        }
    }
    // Stable: of those that are as good as each other the first stays.
    endpoints.sort_by_key(|(place, endpoint)| (*place, rank(endpoint)));
    endpoints.dedup_by_key(|(place, _)| *place);
    endpoints
}

/// A port without a name or a number is one this proxy can do nothing with; it is no defect.
fn parse_slice_port(port: &discovery::EndpointPort, note: &mut impl FnMut(Problem)) -> Option<SlicePort> {
    let name = port.name.clone()?;
    let number = port.port.filter(|number| *number != 0)?;
    let parsed = parse_protocol("ports.protocol", port.protocol.as_deref())
        .and_then(|protocol| Ok(SlicePort { name, protocol, port: parse_port("ports.port", number)? }));
    parsed.map_err(note).ok()
}

/// All but on which node it runs.
fn parse_endpoint(
    endpoint: &discovery::Endpoint,
    is_ipv4: bool,
    hints: &Arc<Hints>,
    note: &mut impl FnMut(Problem),
) -> Option<Endpoint> {
    let text = endpoint.addresses.first()?;
    let address = parse_address("endpoints.addresses", text).map_err(&mut *note).ok()?;
    if address.is_ipv4() != is_ipv4 {
        note(Problem::address("endpoints.addresses", text));
        return None;
    }
    let conditions = endpoint.conditions.as_ref();
    let is_so = |condition: fn(&discovery::EndpointConditions) -> Option<bool>| conditions.and_then(condition);
    Some(Endpoint {
        address,
        is_ready: is_so(|conditions| conditions.ready).unwrap_or(true),
        is_serving: is_so(|conditions| conditions.serving).unwrap_or(true),
        is_terminating: is_so(|conditions| conditions.terminating).unwrap_or(false),
        is_local: false,
        node: NodeNumber::default(),
        name: endpoint.target_ref.as_ref().and_then(|target| target.name.as_deref()).map(Box::from),
        hints: Arc::clone(hints),
    })
}

/// Puts other hints in the place of those of the endpoint before.
fn share(hints: &mut Arc<Hints>, new: Hints) {
    if **hints != new {
        *hints = Arc::new(new);
    }
}

fn parse_hints(hints: Option<&discovery::EndpointHints>) -> Hints {
    let Some(hints) = hints else { return Hints::default() };
    Hints {
        nodes: hints.for_nodes.iter().flatten().map(|node| node.name.clone()).collect(),
        zones: hints.for_zones.iter().flatten().map(|zone| zone.name.clone()).collect(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::{NodeNames, Slice, endpoints};

    fn parse(object: Value) -> (Option<Slice>, Vec<String>) {
        let mut defects = Vec::new();
        let slice =
            Slice::parse(&serde_json::from_value(object).unwrap(), "here", &mut NodeNames::default(), &mut defects);
        (slice, defects.iter().map(ToString::to_string).collect())
    }

    fn object(endpoints: &Value, ports: &Value) -> Value {
        json!({
            "metadata": {"namespace": "test", "name": "web-1", "labels": {"kubernetes.io/service-name": "web"}},
            "addressType": "IPv4",
            "endpoints": endpoints,
            "ports": ports,
        })
    }

    fn http() -> Value {
        json!([{"name": "http", "port": 8080}])
    }

    #[test]
    fn conditions_that_are_not_there_mean_that_all_is_well() {
        let (slice, _) = parse(object(&json!([{"addresses": ["10.0.0.1"]}]), &http()));
        let endpoint = &slice.unwrap().endpoints[0];
        assert_eq!((endpoint.is_ready, endpoint.is_serving, endpoint.is_terminating), (true, true, false));
        let conditions = json!({"ready": null, "serving": false});
        let (slice, _) = parse(object(&json!([{"addresses": ["10.0.0.1"], "conditions": conditions}]), &http()));
        let endpoint = &slice.unwrap().endpoints[0];
        assert_eq!((endpoint.is_ready, endpoint.is_serving, endpoint.is_terminating), (true, false, false));
    }

    #[test]
    fn only_the_first_address_counts_and_only_this_node_is_local() {
        let endpoints = json!([
            {"addresses": ["10.0.0.1", "10.0.0.9"], "nodeName": "here"},
            {"addresses": ["10.0.0.2"], "nodeName": "there"},
            {"addresses": ["10.0.0.3"]},
            {"addresses": []},
        ]);
        let (slice, defects) = parse(object(&endpoints, &http()));
        let local: Vec<bool> = slice.unwrap().endpoints.iter().map(|endpoint| endpoint.is_local).collect();
        assert_eq!((local, defects), (vec![true, false, false], vec![]));
    }

    #[test]
    fn a_slice_of_no_service_or_of_names_or_of_a_headless_service_is_nothing() {
        let mut orphan = object(&json!([]), &http());
        orphan["metadata"]["labels"] = json!({});
        let mut names = object(&json!([{"addresses": ["example.invalid"]}]), &http());
        names["addressType"] = json!("FQDN");
        let mut headless = object(&json!([]), &http());
        headless["metadata"]["labels"]["service.kubernetes.io/headless"] = json!("");
        for (name, object) in [("orphan", orphan), ("names", names), ("headless", headless)] {
            assert_eq!(parse(object), (None, vec![]), "{name}");
        }
    }

    #[test]
    fn what_is_wrong_is_left_out_and_named_and_the_rest_counts() {
        let endpoints = json!([
            {"addresses": ["10.0.0.1"]}, {"addresses": ["fd00::1"]}, {"addresses": ["127.0.0.1"]}, {"addresses": ["x"]},
        ]);
        let ports = json!([
            {"name": "http", "port": 8080}, {"name": "large", "port": 70000}, {"name": "odd", "port": 1, "protocol": "X"},
            {"port": 9}, {"name": "unset"}, {"name": "zero", "port": 0},
        ]);
        let (slice, defects) = parse(object(&endpoints, &ports));
        let slice = slice.unwrap();
        assert_eq!((slice.endpoints.len(), slice.ports.len()), (1, 1));
        assert_eq!(defects.len(), 5, "{defects:#?}");
        assert!(defects.iter().all(|defect| defect.starts_with("EndpointSlice test/web-1: ")), "{defects:#?}");
    }

    /// Trap 21: one address in two slices that disagree.
    #[test]
    fn of_two_entries_for_one_endpoint_the_livelier_counts_then_the_first() {
        const READY: [bool; 2] = [true, false];
        const UNREADY: [bool; 2] = [false, false];
        const TERMINATING: [bool; 2] = [true, true];
        let slice = |[ready, terminating]: [bool; 2], node: &str| {
            let conditions = json!({"ready": ready, "terminating": terminating});
            let endpoint = json!({"addresses": ["10.0.0.1"], "conditions": conditions, "nodeName": node});
            parse(object(&json!([endpoint]), &http())).0.unwrap()
        };
        let cases = [
            (READY, TERMINATING, "first"),
            (TERMINATING, READY, "second"),
            (TERMINATING, UNREADY, "second"),
            (UNREADY, READY, "second"),
            (READY, READY, "first"),
        ];
        for (first, second, winner) in cases {
            let node = |which| if which == winner { "here" } else { "there" };
            let slices = [slice(first, node("first")), slice(second, node("second"))];
            let found = endpoints(slices.iter(), |_| true);
            assert_eq!(found.len(), 1);
            assert!(found.iter().all(|(_, endpoint)| endpoint.is_local), "{first:?} {second:?}");
        }
    }
}
