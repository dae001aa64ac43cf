//! Where the API's quirks end. In: objects as the API has them. Out: the Services and endpoints of this node's world, in
//! which nothing is optional that cannot be missing, and the names of the Services an event touched.

mod annotation;
mod defect;
mod defects;
mod listing;
mod name;
mod node;
mod peers;
mod service;
mod service_cidr;
mod slice;
mod slices;
mod sloppy;
mod source_ranges;
mod trigger;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    num::NonZeroU16,
    sync::Arc,
};

pub use annotation::{Spread, Weights};
pub use defect::{Defect, ObjectReference, Problem, Taken, escaped};
pub use defects::Defects;
use ipnet::IpNet;
use k8s_openapi::{
    Metadata as _,
    api::{core::v1 as core, discovery::v1 as discovery, networking::v1 as networking},
};
use listing::Listing;
pub use name::{ObjectName, ServicePortName};
pub use node::Node;
use peers::Peers;
pub use peers::{NodeNumber, Peer};
pub use service::{Service, ServicePort, TrafficPolicy};
use service_cidr::ServiceCidr;
pub use slice::{Endpoint, HEADLESS, Hints, SERVICE_NAME, Slice, SlicePort, endpoints, endpoints_by_port};
use slices::Slices;
pub use source_ranges::{SourceRanges, SourceScope};
use trigger::Triggers;
pub use trigger::{TRIGGER_TIME, Trigger};

use crate::source::{Change, Event};

/// What was touched since it was last asked for.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Dirty {
    /// Services whose own object or whose endpoints changed.
    pub services: BTreeSet<ObjectName>,
    /// The Node changed: its zone, its addresses or its fate.
    pub node: bool,
    /// The addresses of other nodes changed.
    pub peers: bool,
}

/// Of which kinds a complete list was received.
#[derive(Debug, Default)]
struct Heard {
    services: bool,
    slices: bool,
    node: bool,
}

/// Everything that is known of the cluster.
#[derive(Debug)]
pub struct Model {
    node_name: String,
    services: BTreeMap<ObjectName, Arc<Service>>,
    /// By the Service they belong to, then by their own name.
    slices: BTreeMap<ObjectName, Slices>,
    /// Slice → Service, because a label may change.
    slice_owner: BTreeMap<ObjectName, ObjectName>,
    /// The last slices with endpoints of the API server, IPv4 and not, when they should be gone: they stay until there
    /// is another.
    outlived: BTreeMap<bool, ObjectName>,
    node: Option<Node>,
    peers: Peers,
    /// A Service has asked to be dispatched to other nodes.
    wants_peers: bool,
    service_cidrs: BTreeMap<ObjectName, ServiceCidr>,
    listed_services: Listing<Service>,
    listed_slices: Listing<Slice>,
    listed_nodes: Vec<core::Node>,
    listed_service_cidrs: Vec<networking::ServiceCIDR>,
    /// The ranges of all of them; none while no list was complete.
    service_ranges: Option<Vec<IpNet>>,
    defects: Defects,
    heard: Heard,
    has_had_node: bool,
    dirty: Dirty,
    triggers: Triggers,
    listed_triggers: Triggers,
}

impl Model {
    /// Knows nothing but the name of its node.
    pub fn new(node_name: String) -> Self {
        Self {
            node_name,
            services: BTreeMap::new(),
            slices: BTreeMap::new(),
            slice_owner: BTreeMap::new(),
            outlived: BTreeMap::new(),
            node: None,
            peers: Peers::default(),
            wants_peers: false,
            service_cidrs: BTreeMap::new(),
            listed_services: Listing::default(),
            listed_slices: Listing::default(),
            listed_nodes: Vec::new(),
            listed_service_cidrs: Vec::new(),
            service_ranges: None,
            defects: Defects::default(),
            heard: Heard::default(),
            has_had_node: false,
            dirty: Dirty::default(),
            triggers: Triggers::default(),
            listed_triggers: Triggers::default(),
        }
    }

    /// Whether the lists of Services and of EndpointSlices were both complete once.
    pub fn is_complete(&self) -> bool {
        self.heard.services && self.heard.slices
    }

    /// Whether the source has said what it knows of the Node, be it nothing.
    pub fn knows_node(&self) -> bool {
        self.heard.node
    }

    /// The Service with this name.
    pub fn service(&self, name: &ObjectName) -> Option<&Service> {
        self.services.get(name).map(Arc::as_ref)
    }

    /// The Service with this name, to keep.
    pub fn shared_service(&self, name: &ObjectName) -> Option<Arc<Service>> {
        self.services.get(name).cloned()
    }

    /// The slices of a Service, in the order of their names.
    pub fn slices(&self, service: &ObjectName) -> impl Iterator<Item = &Slice> + Clone {
        self.slices.get(service).into_iter().flat_map(Slices::iter).map(|(_, slice)| slice.as_ref())
    }

    /// This node.
    pub fn node(&self) -> Option<&Node> {
        self.node.as_ref()
    }

    /// Another node, if others matter.
    pub fn peer(&self, number: NodeNumber) -> Option<&Peer> {
        self.peers.get(number).filter(|_| self.wants_peers)
    }

    /// The addresses of all nodes but this one, if others matter.
    pub fn peer_addresses(&self) -> BTreeSet<IpAddr> {
        if !self.wants_peers {
            return BTreeSet::new();
        }
        let own = self.node.as_ref().map(|node| &node.addresses);
        let addresses = self.peers.all().flat_map(|peer| &peer.addresses);
        addresses.filter(|address| !own.is_some_and(|own| own.contains(address))).copied().collect()
    }

    /// From now on other nodes matter: packets may go to them as they are. That a Service asked for it is not forgotten with it.
    pub fn want_peers(&mut self) {
        if !std::mem::replace(&mut self.wants_peers, true) {
            self.dirty.peers = true;
            self.dirty.services.extend(self.services.keys().chain(self.slices.keys()).cloned());
        }
    }

    /// Whether other nodes matter.
    pub fn wants_peers(&self) -> bool {
        self.wants_peers
    }

    /// Whether the source has said what other nodes it knows.
    pub fn knows_peers(&self) -> bool {
        self.peers.are_known()
    }

    /// Every Service.
    pub fn services(&self) -> impl Iterator<Item = &Service> {
        self.services.values().map(Arc::as_ref)
    }

    /// The Services that were touched since [`Self::take_dirty`] was called last.
    pub fn dirty_services(&self) -> impl Iterator<Item = &ObjectName> {
        self.dirty.services.iter()
    }

    /// The names of all Services, and of all that a slice names.
    pub fn service_names(&self) -> impl Iterator<Item = &ObjectName> {
        self.services.keys().chain(self.slices.keys())
    }

    /// Whether load balancers may send traffic to this node. One whose Node was never there counts as eligible: sources
    /// need not have Nodes.
    pub fn is_node_eligible(&self) -> bool {
        self.node.as_ref().map_or(!self.has_had_node, |node| !node.is_leaving)
    }

    /// What was touched since the last call.
    pub fn take_dirty(&mut self) -> Dirty {
        std::mem::take(&mut self.dirty)
    }

    /// When the changes of endpoints were made that came since the last call.
    pub fn take_triggers(&mut self) -> Vec<Trigger> {
        self.triggers.take()
    }

    /// Ranges of addresses that only Services have; none while that is not known.
    pub fn service_ranges(&self) -> Option<&[IpNet]> {
        self.service_ranges.as_deref()
    }

    /// Takes an event in. What is wrong with the objects it carries, and was not before, is returned.
    pub fn absorb(&mut self, event: Event) -> Vec<Defect> {
        match event {
            Event::Services(change) => self.absorb_services(change),
            Event::EndpointSlices(change) => self.absorb_slices(change),
            Event::Nodes(change) => self.absorb_nodes(change),
            Event::Peers(change) => self.absorb_peers(change),
            Event::ServiceCidrs(change) => self.absorb_service_cidrs(change),
            Event::Defect(defect) => return vec![*defect],
        }
        self.defects.take_news()
    }

    fn absorb_services(&mut self, change: Change<core::Service>) {
        match change {
            Change::Replace(objects) => {
                self.listed_services.begin();
                for object in &objects {
                    self.list_service(object);
                }
                self.replace_services();
            }
            Change::Begin => self.listed_services.begin(),
            Change::Listed(object) => self.list_service(&object),
            Change::End => self.replace_services(),
            Change::Apply(object) => {
                let (name, mut defects) = (ObjectName::of(object.metadata()), Vec::new());
                let service = Service::parse(&object, &mut defects);
                self.defects.replace("Service", &name, defects);
                self.put_service(name, service.map(Arc::new));
            }
            Change::Delete(name) => {
                self.defects.replace("Service", &name, Vec::new());
                self.put_service(name, None);
            }
        }
    }

    fn list_service(&mut self, object: &core::Service) {
        let (name, mut defects) = (ObjectName::of(object.metadata()), Vec::new());
        let service = Service::parse(object, &mut defects);
        let known = self.services.get(&name);
        self.listed_services.add(name, service, known, defects);
    }

    fn replace_services(&mut self) {
        self.heard.services = true;
        let listed = self.listed_services.take();
        self.defects.retain("Service", &listed);
        let gone: Vec<_> = self.services.keys().filter(|name| !listed.contains_key(name)).cloned().collect();
        for name in gone {
            self.put_service(name, None);
        }
        for (name, (service, defects)) in listed {
            self.defects.replace("Service", &name, defects);
            self.put_service(name, service);
        }
    }

    fn put_service(&mut self, name: ObjectName, service: Option<Arc<Service>>) {
        if self.services.get(&name) == service.as_ref() {
            return;
        }
        if service.as_ref().is_some_and(|service| service.dispatches()) {
            self.want_peers();
        }
        match service {
            Some(service) => self.services.insert(name.clone(), service),
            None => self.services.remove(&name),
        };
        self.dirty.services.insert(name);
    }

    fn absorb_slices(&mut self, change: Change<discovery::EndpointSlice>) {
        match change {
            Change::Replace(objects) => {
                self.begin_slices();
                for object in &objects {
                    self.list_slice(object);
                }
                self.replace_slices();
            }
            Change::Begin => self.begin_slices(),
            Change::Listed(object) => self.list_slice(&object),
            Change::End => self.replace_slices(),
            Change::Apply(object) => {
                let (name, mut defects) = (ObjectName::of(object.metadata()), Vec::new());
                let slice = Slice::parse(&object, &self.node_name, self.peers.names(), &mut defects);
                self.defects.replace("EndpointSlice", &name, defects);
                if self.put_slice(&name, slice.map(Arc::new)) {
                    self.triggers.note(&name, &object);
                }
            }
            Change::Delete(name) => {
                self.defects.replace("EndpointSlice", &name, Vec::new());
                self.put_slice(&name, None);
            }
        }
    }

    fn begin_slices(&mut self) {
        self.listed_slices.begin();
        self.listed_triggers = Triggers::default();
    }

    fn list_slice(&mut self, object: &discovery::EndpointSlice) {
        let (name, mut defects) = (ObjectName::of(object.metadata()), Vec::new());
        let slice = Slice::parse(object, &self.node_name, self.peers.names(), &mut defects);
        let owner = self.slice_owner.get(&name);
        let known = owner.and_then(|owner| self.slices.get(owner)).and_then(|slices| slices.get(&name.name));
        // The first list tells of changes from before the agent's time.
        if self.heard.slices {
            self.listed_triggers.note(&name, object);
        }
        self.listed_slices.add(name, slice, known, defects);
    }

    fn replace_slices(&mut self) {
        self.heard.slices = true;
        let (listed, triggers) = (self.listed_slices.take(), std::mem::take(&mut self.listed_triggers));
        self.defects.retain("EndpointSlice", &listed);
        let gone: Vec<_> = self.slice_owner.keys().filter(|name| !listed.contains_key(name)).cloned().collect();
        for name in gone {
            self.put_slice(&name, None);
        }
        for (name, (slice, defects)) in listed {
            self.defects.replace("EndpointSlice", &name, defects);
            if self.put_slice(&name, slice) {
                self.triggers.follow(&name, &triggers);
            }
        }
    }

    /// Says whether that changes anything.
    fn put_slice(&mut self, name: &ObjectName, slice: Option<Arc<Slice>>) -> bool {
        if let Some(is_ipv4) = self.last_of_api_server(name, slice.as_deref()) {
            self.outlived.insert(is_ipv4, name.clone());
            return false;
        }
        self.succeed_outlived(name, slice.as_deref());
        let owner = self.slice_owner.get(name);
        let old = owner.and_then(|owner| self.slices.get(owner)).and_then(|slices| slices.get(&name.name));
        if old == slice.as_ref() {
            return false;
        }
        if owner.is_some() {
            self.remove_slice(name);
        }
        if let Some(slice) = slice {
            let owner = slice.service.clone();
            self.dirty.services.insert(owner.clone());
            self.slice_owner.insert(name.clone(), owner.clone());
            self.slices.entry(owner).or_default().insert(&name.name, slice);
        }
        true
    }

    /// Endpoints of the API server that an earlier agent left in the kernel. They count as long as no slice has any of
    /// their family: the server may be away, and its slice with it, just when an agent starts.
    pub fn inherit_api_server(&mut self, port: &ServicePortName, endpoints: &BTreeMap<SocketAddr, bool>) {
        let owner = ObjectName::of_api_server();
        let Some(first) = endpoints.keys().next().copied() else { return };
        let is_known = |slice: &Slice| slice.is_ipv4() == Some(first.is_ipv4());
        let Some(number) = NonZeroU16::new(first.port()).filter(|_| !self.slices(&owner).any(is_known)) else { return };
        // No object has such a name.
        let name =
            ObjectName { name: format!("inherited/{}", if first.is_ipv4() { 4 } else { 6 }).into(), ..owner.clone() };
        self.put_slice(&name, Some(Arc::new(Slice::inherited(port, number, endpoints))));
        self.outlived.insert(first.is_ipv4(), name);
    }

    /// Says of which family the API server would lose its last endpoint (IPv4?). It takes its own ones out before it is
    /// replaced, and an agent that let them go might never hear of the new ones.
    fn last_of_api_server(&self, name: &ObjectName, slice: Option<&Slice>) -> Option<bool> {
        let owner = self.slice_owner.get(name).filter(|owner| owner.is_api_server())?;
        let slices = self.slices.get(owner)?;
        let is_ipv4 = slices.get(&name.name)?.is_ipv4()?;
        let is_lost = slice.is_none_or(|slice| slice.service == *owner && slice.is_ipv4().is_none());
        let mut others = slices.iter().filter(|(other, _)| **other != *name.name);
        (is_lost && !others.any(|(_, slice)| slice.is_ipv4() == Some(is_ipv4))).then_some(is_ipv4)
    }

    /// With new endpoints of the API server, what was kept in their stead goes; what has come back is no longer kept.
    fn succeed_outlived(&mut self, name: &ObjectName, slice: Option<&Slice>) {
        let family = slice.filter(|slice| slice.service.is_api_server()).and_then(Slice::is_ipv4);
        let outlived = family.and_then(|is_ipv4| self.outlived.remove(&is_ipv4));
        if let Some(outlived) = outlived.filter(|outlived| outlived != name) {
            self.remove_slice(&outlived);
        }
    }

    fn remove_slice(&mut self, name: &ObjectName) {
        let Some(owner) = self.slice_owner.remove(name) else { return };
        if let Some(slices) = self.slices.get_mut(&owner) {
            slices.remove(&name.name);
            if slices.is_empty() {
                self.slices.remove(&owner);
            }
        }
        self.dirty.services.insert(owner);
    }

    fn absorb_nodes(&mut self, change: Change<core::Node>) {
        match change {
            Change::Begin => self.listed_nodes.clear(),
            Change::Listed(object) => self.listed_nodes.push(*object),
            Change::End => {
                let objects = std::mem::take(&mut self.listed_nodes);
                self.absorb_nodes(Change::Replace(objects));
            }
            Change::Replace(objects) => {
                self.heard.node = true;
                self.put_node(objects.iter().find(|object| self.is_own(object)));
            }
            Change::Apply(object) if self.is_own(&object) => self.put_node(Some(&object)),
            Change::Delete(name) if *name.name == *self.node_name => self.put_node(None),
            Change::Apply(_) | Change::Delete(_) => {}
        }
    }

    fn is_own(&self, object: &core::Node) -> bool {
        object.metadata.name.as_deref() == Some(self.node_name.as_str())
    }

    fn put_node(&mut self, object: Option<&core::Node>) {
        let mut defects = Vec::new();
        let node = object.map(|object| Node::parse(object, &mut defects));
        let name = ObjectName { namespace: "".into(), name: self.node_name.as_str().into() };
        self.defects.replace("Node", &name, defects);
        self.dirty.node |= self.node != node;
        self.has_had_node |= node.is_some();
        self.node = node;
    }

    fn absorb_peers(&mut self, change: Change<core::Node>) {
        let changed = match change {
            Change::Begin => return self.peers.begin(),
            Change::Listed(object) if self.is_own(&object) => return,
            Change::Listed(object) => return self.peers.list(&object),
            Change::Replace(objects) => {
                self.peers.begin();
                let node_name = self.node_name.as_str();
                let is_other = |object: &&core::Node| object.metadata.name.as_deref() != Some(node_name);
                objects.iter().filter(is_other).for_each(|object| self.peers.list(object));
                return self.absorb_peers(Change::End);
            }
            Change::End => self.peers.end(),
            Change::Apply(object) if self.is_own(&object) => return,
            Change::Apply(object) => self.peers.apply(&object).into_iter().collect(),
            Change::Delete(name) => self.peers.delete(&name.name).into_iter().collect(),
        };
        if changed.is_empty() {
            return;
        }
        self.dirty.peers = true;
        let is_touched = |slice: &Slice| slice.endpoints.iter().any(|endpoint| changed.contains(&endpoint.node));
        let touched = self.slices.iter().filter(|(_, slices)| slices.iter().any(|(_, slice)| is_touched(slice)));
        self.dirty.services.extend(touched.map(|(service, _)| service.clone()));
    }

    fn absorb_service_cidrs(&mut self, change: Change<networking::ServiceCIDR>) {
        match change {
            Change::Begin => return self.listed_service_cidrs.clear(),
            Change::Listed(object) => return self.listed_service_cidrs.push(*object),
            Change::End => {
                let objects = std::mem::take(&mut self.listed_service_cidrs);
                return self.absorb_service_cidrs(Change::Replace(objects));
            }
            Change::Replace(objects) => {
                let kept = objects.iter().map(|object| (ObjectName::of(object.metadata()), ())).collect();
                self.defects.retain("ServiceCIDR", &kept);
                self.service_cidrs.clear();
                self.service_ranges = Some(Vec::new());
                for object in &objects {
                    self.apply_service_cidr(object);
                }
            }
            Change::Apply(object) => self.apply_service_cidr(&object),
            Change::Delete(name) => {
                self.defects.replace("ServiceCIDR", &name, Vec::new());
                self.service_cidrs.remove(&name);
            }
        }
        let mut defects = Vec::new();
        if self.service_ranges.is_some() {
            self.service_ranges = Some(service_cidr::ranges(self.service_cidrs.values(), &mut defects));
        }
        // No object's own: which of them find no room depends on all.
        self.defects.replace("ServiceCIDRs", &ObjectName::default(), defects);
    }

    fn apply_service_cidr(&mut self, object: &networking::ServiceCIDR) {
        let mut defects = Vec::new();
        let cidr = ServiceCidr::parse(object, &mut defects);
        self.defects.replace("ServiceCIDR", cidr.name(), defects);
        self.service_cidrs.insert(cidr.name().clone(), cidr);
    }
}
