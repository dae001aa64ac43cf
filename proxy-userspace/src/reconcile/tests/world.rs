//! Anything may happen in any order, and some of it unheard: the agent ends up with the tables of one that was started
//! just now, and whenever it has carried out a plan, the kernel holds what its tables say.
//!
//! `PROPTEST_CASES` says how many lives are lived.

mod objects;

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use k8s_openapi::{
    Metadata,
    api::{
        core::v1::{Node, Service},
        discovery::v1::EndpointSlice,
        networking::v1::ServiceCIDR,
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use proptest::prelude::*;
use proxy_common::addr::Protocol;

use super::{assert_equal, settle};
use crate::{
    dataplane::netlink::{Link, LinkAddress, NodeNetwork},
    diff::{Capacity, GRACE, KernelState, Plan},
    model::ObjectName,
    reconcile::{Reconciler, Settings},
    source::{Change, Event},
};

/// Hash tables find room, also while those before them rest.
const ROOMY: Capacity = Capacity { services: 64, backends: 256, slots: 262_144, sources: 256 };

/// Of lives, when nothing is said.
const CASES: u32 = 200;

/// One thing that happens.
#[derive(Clone, Debug)]
enum Happening {
    Service(Box<Service>),
    NoService(u8),
    Slice(Box<EndpointSlice>),
    NoSlice(u8),
    Node(Box<Node>),
    NoNode,
    ServiceCidr(Box<ServiceCIDR>),
    NoServiceCidr(u8),
    /// The addresses of the node's devices change.
    Network(u8),
    /// From here to the next list, changes are not heard of.
    Deafness,
    /// Everything again.
    Relist(Manner),
    Plan,
    Wait,
    Restart,
}

/// How a list is told.
#[derive(Clone, Copy, Debug)]
enum Manner {
    Whole,
    /// Object by object, with a plan in between.
    InParts,
    /// Object by object, and not to the end.
    BrokenOff,
}

fn happening() -> impl Strategy<Value = Happening> {
    let manner = prop_oneof![Just(Manner::Whole), Just(Manner::InParts), Just(Manner::BrokenOff)];
    prop_oneof![
        6 => objects::service().prop_map(|service| Happening::Service(Box::new(service))),
        1 => (0..4_u8).prop_map(Happening::NoService),
        8 => objects::slice().prop_map(|slice| Happening::Slice(Box::new(slice))),
        2 => (0..5_u8).prop_map(Happening::NoSlice),
        2 => objects::node().prop_map(|node| Happening::Node(Box::new(node))),
        1 => Just(Happening::NoNode),
        1 => objects::service_cidr().prop_map(|cidr| Happening::ServiceCidr(Box::new(cidr))),
        1 => (0..3_u8).prop_map(Happening::NoServiceCidr),
        1 => (0..4_u8).prop_map(Happening::Network),
        1 => Just(Happening::Deafness),
        2 => manner.prop_map(Happening::Relist),
        4 => Just(Happening::Plan),
        2 => Just(Happening::Wait),
        1 => Just(Happening::Restart),
    ]
}

/// The objects of a kind, and how changes to them are told.
#[derive(Clone)]
struct Objects<T> {
    known: BTreeMap<ObjectName, T>,
    event: fn(Change<T>) -> Event,
}

impl<T: Metadata<Ty = ObjectMeta> + Clone> Objects<T> {
    fn new(event: fn(Change<T>) -> Event) -> Self {
        Self { known: BTreeMap::new(), event }
    }

    fn apply(&mut self, object: &T) -> Event {
        self.known.insert(ObjectName::of(object.metadata()), object.clone());
        (self.event)(Change::Apply(Box::new(object.clone())))
    }

    fn delete(&mut self, namespace: &str, name: &str) -> Event {
        let name = ObjectName { namespace: namespace.into(), name: name.into() };
        self.known.remove(&name);
        (self.event)(Change::Delete(name))
    }

    fn list(&self, manner: Manner) -> Vec<Event> {
        let objects: Vec<T> = self.known.values().cloned().collect();
        let changes = match manner {
            Manner::Whole => vec![Change::Replace(objects)],
            Manner::InParts | Manner::BrokenOff => {
                let listed = objects.into_iter().map(|object| Change::Listed(Box::new(object)));
                let mut changes: Vec<_> = std::iter::once(Change::Begin).chain(listed).collect();
                if matches!(manner, Manner::InParts) {
                    changes.push(Change::End);
                }
                changes
            }
        };
        changes.into_iter().map(self.event).collect()
    }
}

/// The truth, and an agent that is told of it.
struct World {
    services: Objects<Service>,
    slices: Objects<EndpointSlice>,
    nodes: Objects<Node>,
    service_cidrs: Objects<ServiceCIDR>,
    network: NodeNetwork,
    reconciler: Reconciler,
    kernel: KernelState,
    now: Instant,
    is_deaf: bool,
}

impl World {
    fn new() -> Self {
        let mut world = Self {
            services: Objects::new(Event::Services),
            slices: Objects::new(Event::EndpointSlices),
            nodes: Objects::new(Event::Nodes),
            service_cidrs: Objects::new(Event::ServiceCidrs),
            network: network(0),
            reconciler: Reconciler::new(settings(), ROOMY),
            kernel: KernelState::default(),
            now: Instant::now(),
            is_deaf: false,
        };
        world.start();
        world
    }

    fn start(&mut self) {
        self.reconciler = Reconciler::new(settings(), ROOMY);
        self.reconciler.adopt(self.kernel.clone(), self.now);
        self.reconciler.absorb_network(self.network.clone());
        self.relist(Manner::Whole);
    }

    fn relist(&mut self, manner: Manner) {
        self.is_deaf = false;
        let events = self.lists(manner);
        for (number, event) in events.into_iter().enumerate() {
            if number == 3 {
                self.settle();
            }
            self.reconciler.absorb(event);
        }
        self.is_deaf = matches!(manner, Manner::BrokenOff);
    }

    fn lists(&self, manner: Manner) -> Vec<Event> {
        let (services, slices) = (self.services.list(manner), self.slices.list(manner));
        let (nodes, service_cidrs) = (self.nodes.list(manner), self.service_cidrs.list(manner));
        [slices, service_cidrs, services, nodes].concat()
    }

    fn hear(&mut self, event: Event) {
        if !self.is_deaf {
            self.reconciler.absorb(event);
        }
    }

    fn live_through(&mut self, happenings: &[Happening]) {
        for happening in happenings {
            self.happen(happening);
        }
        if self.is_deaf {
            self.relist(Manner::Whole);
        }
        self.settle();
        self.now += GRACE;
        self.settle();
    }

    /// As the agent does: it waits for the Node, or a restart would not go on where it was.
    fn settle(&mut self) -> Plan {
        if !self.reconciler.knows_nodes() {
            return Plan::default();
        }
        look(&mut self.reconciler);
        let plan = settle(&mut self.reconciler, &mut self.kernel, self.now);
        if self.reconciler.is_complete() {
            assert_equal(&self.kernel, self.reconciler.tables());
        }
        plan
    }

    /// The tables of an agent that was started just now.
    fn fresh(&self) -> Reconciler {
        let mut fresh = Reconciler::new(settings(), ROOMY);
        fresh.adopt(KernelState::default(), self.now);
        fresh.absorb_network(self.network.clone());
        self.lists(Manner::Whole).into_iter().for_each(|event| drop(fresh.absorb(event)));
        look(&mut fresh);
        fresh.plan(self.now);
        fresh
    }

    fn happen(&mut self, happening: &Happening) {
        match happening {
            Happening::Service(service) => {
                let event = self.services.apply(service);
                self.hear(event);
            }
            Happening::NoService(name) => {
                let event = self.services.delete("test", &format!("s{name}"));
                self.hear(event);
            }
            Happening::Slice(slice) => {
                let event = self.slices.apply(slice);
                self.hear(event);
            }
            Happening::NoSlice(name) => {
                let event = self.slices.delete("test", &format!("e{name}"));
                self.hear(event);
            }
            Happening::Node(node) => {
                let event = self.nodes.apply(node);
                self.hear(event);
            }
            Happening::NoNode => {
                let event = self.nodes.delete("", "here");
                self.hear(event);
            }
            Happening::ServiceCidr(service_cidr) => {
                let event = self.service_cidrs.apply(service_cidr);
                self.hear(event);
            }
            Happening::NoServiceCidr(name) => {
                let event = self.service_cidrs.delete("", &format!("c{name}"));
                self.hear(event);
            }
            Happening::Network(number) => {
                self.network = network(*number);
                self.reconciler.absorb_network(self.network.clone());
            }
            Happening::Deafness => self.is_deaf = true,
            Happening::Relist(manner) => self.relist(*manner),
            Happening::Plan => drop(self.settle()),
            Happening::Wait => self.now += GRACE + Duration::from_secs(1),
            Happening::Restart => self.start(),
        }
    }
}

fn settings() -> Settings {
    Settings { name: "here".into(), ..Settings::default() }
}

/// As the agent does before each plan. The same process listens all the time.
fn look(reconciler: &mut Reconciler) {
    if reconciler.asks_for_listeners() {
        let listener = (Protocol::Tcp, "192.0.2.1:80".parse().unwrap());
        reconciler.absorb_listeners([listener].into());
    }
}

fn network(number: u8) -> NodeNetwork {
    let address = |text: &str, is_secondary| LinkAddress {
        ifindex: 2,
        net: text.parse().unwrap(),
        is_global: true,
        is_secondary,
        is_usable: true,
        is_deprecated: false,
    };
    let addresses = match number {
        0 => vec![],
        1 => vec![address("192.0.2.1/24", false)],
        2 => vec![address("192.0.2.1/24", false), address("192.0.2.2/24", true), address("2001:db8::9/64", false)],
        _ => vec![address("198.51.100.7/24", false)],
    };
    NodeNetwork {
        links: vec![Link { ifindex: 2, name: "eth0".into(), has_default_route: true, ..Link::default() }],
        addresses,
    }
}

fn config() -> ProptestConfig {
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(CASES);
    ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn any_interleaving_ends_where_a_fresh_start_ends(happenings in proptest::collection::vec(happening(), 0..40)) {
        let mut world = World::new();
        world.live_through(&happenings);
        let fresh = world.fresh();
        prop_assert_eq!(world.reconciler.tables(), fresh.tables());
        prop_assert_eq!(world.reconciler.is_node_eligible() || world.nodes.known.is_empty(), fresh.is_node_eligible());
        prop_assert_eq!(world.reconciler.next_deadline(), None, "what has left is gone");
    }

    #[test]
    fn a_restart_with_equal_input_writes_nothing(happenings in proptest::collection::vec(happening(), 0..40)) {
        let mut world = World::new();
        world.live_through(&happenings);
        world.happen(&Happening::Restart);
        let plan = world.settle();
        prop_assert!(plan.is_empty(), "{plan:?}");
    }
}
