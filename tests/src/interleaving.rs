//! A small world of Services, slices and a Node that changes by chance, and what its Services mean, by rules written down a second time:
//! every ready endpoint of every slice that bears a Service's name, once; if there is none, those that still serve while they end.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use crate::{api::Resource, fuzz::chance::Chance};

/// How many Services there can be.
const SERVICES: u8 = 5;
/// How many slices there can be.
const SLICES: u8 = 8;
/// How many endpoints there are, wherever they are listed.
const ENDPOINTS: usize = 12;

/// Namespace of everything.
const NAMESPACE: &str = "test";

/// What is told of a change.
#[derive(Clone, Debug)]
pub enum Change {
    /// This is so now.
    Apply(Value),
    /// This is no more: kind, namespace and name.
    Delete(Resource, &'static str, String),
}

/// Which endpoints answer where: `address:port/PROTOCOL`, with the unspecified address for a `NodePort`.
pub type Meaning = BTreeMap<String, BTreeSet<String>>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Ready,
    Unready,
    Leaving,
}

#[derive(Clone, Copy, Debug)]
struct Service {
    has_v6: bool,
    has_udp: bool,
    has_node_port: bool,
}

#[derive(Clone, Debug)]
struct Slice {
    service: u8,
    is_v6: bool,
    port: u16,
    has_udp: bool,
    endpoints: BTreeSet<usize>,
}

/// The world.
#[derive(Clone, Debug)]
pub struct World {
    chance: Chance,
    services: BTreeMap<u8, Service>,
    slices: BTreeMap<u8, Slice>,
    states: [State; ENDPOINTS],
}

impl World {
    /// An empty one; what becomes of it follows from the seed.
    pub fn new(seed: u64) -> Self {
        let (services, slices) = (BTreeMap::new(), BTreeMap::new());
        Self { chance: Chance::new(seed, 7), services, slices, states: [State::Ready; ENDPOINTS] }
    }

    /// Something happens. What is told of it may be of several objects.
    pub fn happen(&mut self) -> Vec<Change> {
        match self.chance.below(16) {
            0..4 => vec![self.put_service()],
            4 => self.delete_service(),
            5..10 => vec![self.put_slice()],
            10 => self.delete_slice(),
            11..13 => self.relabel(),
            13..15 => self.change_state(),
            _ => vec![self.touch_node()],
        }
    }

    /// Everything there is, as a list would have it.
    pub fn objects(&self) -> Vec<Value> {
        let services = self.services.iter().map(|(name, service)| service.object(*name));
        services.chain(self.slices.keys().map(|name| self.slice_object(*name))).collect()
    }

    fn put_service(&mut self) -> Change {
        let name = self.chance.below(SERVICES.into()) as u8;
        let service = Service {
            has_v6: self.chance.percent(50),
            has_udp: self.chance.percent(50),
            has_node_port: self.chance.percent(50),
        };
        self.services.insert(name, service);
        Change::Apply(service.object(name))
    }

    fn delete_service(&mut self) -> Vec<Change> {
        let name = self.chance.below(SERVICES.into()) as u8;
        let is_gone = self.services.remove(&name).is_some();
        is_gone.then(|| Change::Delete(Resource::Services, NAMESPACE, format!("s{name}"))).into_iter().collect()
    }

    fn put_slice(&mut self) -> Change {
        let name = self.chance.below(SLICES.into()) as u8;
        let count = self.chance.below(5);
        let slice = Slice {
            service: self.chance.below(SERVICES.into()) as u8,
            // The family of a slice never changes.
            is_v6: name.is_multiple_of(3),
            port: self.chance.of(&[8080, 9090]),
            has_udp: self.chance.percent(70),
            endpoints: (0..count).map(|_| self.chance.below(ENDPOINTS)).collect(),
        };
        self.slices.insert(name, slice);
        Change::Apply(self.slice_object(name))
    }

    fn delete_slice(&mut self) -> Vec<Change> {
        let name = self.chance.below(SLICES.into()) as u8;
        let is_gone = self.slices.remove(&name).is_some();
        is_gone.then(|| Change::Delete(Resource::EndpointSlices, NAMESPACE, format!("e{name}"))).into_iter().collect()
    }

    /// A slice becomes another Service's.
    fn relabel(&mut self) -> Vec<Change> {
        let name = self.chance.below(SLICES.into()) as u8;
        let service = self.chance.below(SERVICES.into()) as u8;
        let Some(slice) = self.slices.get_mut(&name) else { return Vec::new() };
        slice.service = service;
        vec![Change::Apply(self.slice_object(name))]
    }

    /// An endpoint is ready or not, wherever it is listed.
    fn change_state(&mut self) -> Vec<Change> {
        let endpoint = self.chance.below(ENDPOINTS);
        self.states[endpoint] = self.chance.of(&[State::Ready, State::Ready, State::Unready, State::Leaving]);
        let listing = self.slices.iter().filter(|(_, slice)| slice.endpoints.contains(&endpoint));
        listing.map(|(name, _)| Change::Apply(self.slice_object(*name))).collect()
    }

    /// Nothing that matters to the Services of this world.
    fn touch_node(&mut self) -> Change {
        let zone = self.chance.of(&["zone-a", "zone-b"]);
        Change::Apply(node(zone))
    }

    fn slice_object(&self, name: u8) -> Value {
        let slice = &self.slices[&name];
        let endpoints = slice.endpoints.iter().map(|endpoint| {
            let (ready, serving, terminating) = match self.states[*endpoint] {
                State::Ready => (true, true, false),
                State::Unready => (false, false, false),
                State::Leaving => (false, true, true),
            };
            let host = endpoint + 1;
            let address = if slice.is_v6 { format!("fd00:1::{host:x}") } else { format!("10.0.0.{host}") };
            json!({
                "addresses": [address],
                "conditions": {"ready": ready, "serving": serving, "terminating": terminating},
            })
        });
        let port = |name: &str, protocol: &str, port: u16| json!({"name": name, "protocol": protocol, "port": port});
        let mut ports = vec![port("http", "TCP", slice.port)];
        ports.extend(slice.has_udp.then(|| port("dns", "UDP", slice.port + 1)));
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {
                "namespace": NAMESPACE, "name": format!("e{name}"),
                "labels": {"kubernetes.io/service-name": format!("s{}", slice.service)},
            },
            "addressType": if slice.is_v6 { "IPv6" } else { "IPv4" },
            "endpoints": endpoints.collect::<Vec<_>>(), "ports": ports,
        })
    }

    /// What all of it means. Addresses are written as the standard library does, which is why none ends in zero.
    pub fn meaning(&self) -> Meaning {
        let mut meaning = Meaning::new();
        for (name, service) in &self.services {
            let host = name + 1;
            for is_v6 in [false, true].into_iter().filter(|is_v6| !is_v6 || service.has_v6) {
                let (address, any) =
                    if is_v6 { (format!("[fd00:96::{host}]"), "[::]") } else { (format!("10.96.0.{host}"), "0.0.0.0") };
                let http = self.endpoints(*name, is_v6, false);
                if service.has_node_port {
                    meaning.insert(format!("{any}:{}/TCP", 30_000 + u16::from(*name)), http.clone());
                }
                meaning.insert(format!("{address}:80/TCP"), http);
                if service.has_udp {
                    meaning.insert(format!("{address}:53/UDP"), self.endpoints(*name, is_v6, true));
                }
            }
        }
        meaning
    }

    fn endpoints(&self, service: u8, is_v6: bool, is_udp: bool) -> BTreeSet<String> {
        let slices = self
            .slices
            .values()
            .filter(|slice| slice.service == service && slice.is_v6 == is_v6 && (!is_udp || slice.has_udp));
        let mut by_state: [BTreeSet<String>; 2] = Default::default();
        for (slice, endpoint) in slices.flat_map(|slice| slice.endpoints.iter().map(move |endpoint| (slice, *endpoint)))
        {
            let (host, port) = (endpoint + 1, slice.port + u16::from(is_udp));
            let target = if is_v6 { format!("[fd00:1::{host:x}]:{port}") } else { format!("10.0.0.{host}:{port}") };
            match self.states[endpoint] {
                State::Ready => drop(by_state[0].insert(target)),
                State::Leaving => drop(by_state[1].insert(target)),
                State::Unready => {}
            }
        }
        let [ready, leaving] = by_state;
        if ready.is_empty() { leaving } else { ready }
    }
}

impl Service {
    fn object(self, name: u8) -> Value {
        let host = name + 1;
        let (v4, v6) = (format!("10.96.0.{host}"), format!("fd00:96::{host}"));
        let cluster_ips = if self.has_v6 { vec![v4, v6] } else { vec![v4] };
        let node_port = if self.has_node_port { json!(30_000 + u16::from(name)) } else { Value::Null };
        let mut ports = vec![json!({"name": "http", "protocol": "TCP", "port": 80, "nodePort": node_port})];
        ports.extend(self.has_udp.then(|| json!({"name": "dns", "protocol": "UDP", "port": 53})));
        json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"namespace": NAMESPACE, "name": format!("s{name}"), "uid": format!("u{name}")},
            "spec": {
                "type": if self.has_node_port { "NodePort" } else { "ClusterIP" },
                "clusterIP": cluster_ips[0], "clusterIPs": cluster_ips, "ports": ports,
            },
        })
    }
}

/// The Node on which agents run.
pub fn node(zone: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": crate::api::object::NODE, "labels": {"topology.kubernetes.io/zone": zone}},
        "spec": {}, "status": {},
    })
}

#[cfg(test)]
mod tests {
    use super::World;

    #[test]
    fn a_world_follows_from_its_seed_and_fills() {
        let [mut one, mut same] = [World::new(3), World::new(3)];
        for _ in 0..200 {
            one.happen();
            same.happen();
            assert_eq!(one.meaning(), same.meaning());
        }
        assert!(one.meaning().values().any(|endpoints| endpoints.len() > 2), "{:?}", one.meaning());
    }
}
