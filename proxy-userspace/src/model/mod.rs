//! Where the API's quirks end. In: objects as the API has them. Out: the Services and endpoints of this node's world, in
//! which nothing is optional that cannot be missing, and the names of the Services an event touched.

mod annotation;
mod defect;
mod node;
mod service;
mod slice;
mod source_ranges;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::Arc,
};

pub use annotation::{Spread, Weights};
pub use defect::{Defect, ObjectReference, Problem};
use k8s_openapi::{
    Metadata as _,
    api::{core::v1 as core, discovery::v1 as discovery},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
pub use node::Node;
use proxy_common::addr::Protocol;
pub use service::{Service, ServicePort, TrafficPolicy};
pub use slice::{Endpoint, Hints, Slice, SlicePort, endpoints};
pub use source_ranges::{SourceRanges, SourceScope};

use crate::source::{Change, Event};

/// Namespace and name of an object.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectName {
    /// Empty for a Node.
    pub namespace: String,
    /// Unique in its namespace, per kind.
    pub name: String,
}

impl ObjectName {
    /// The name in an object's metadata.
    pub fn of(metadata: &ObjectMeta) -> Self {
        let namespace = metadata.namespace.clone().unwrap_or_default();
        Self { namespace, name: metadata.name.clone().unwrap_or_default() }
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Escaped: a name that no API server would accept must not reach a terminal as it is.
        if self.namespace.is_empty() {
            return write!(f, "{}", self.name.escape_debug());
        }
        write!(f, "{}/{}", self.namespace.escape_debug(), self.name.escape_debug())
    }
}

/// Which port of which Service. A Service may have one name with several protocols.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServicePortName {
    /// The Service.
    pub service: ObjectName,
    /// Empty for the only port of a Service.
    pub port: String,
    /// Its protocol.
    pub protocol: Protocol,
}

impl fmt::Display for ServicePortName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.service)?;
        if !self.port.is_empty() {
            write!(f, ":{}", self.port.escape_debug())?;
        }
        write!(f, "/{}", self.protocol)
    }
}

/// What was touched since it was last asked for.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Dirty {
    /// Services whose own object or whose endpoints changed.
    pub services: BTreeSet<ObjectName>,
    /// The Node changed: its zone, its addresses or its fate.
    pub node: bool,
}

/// Everything that is known of the cluster.
#[derive(Debug)]
pub struct Model {
    node_name: String,
    services: BTreeMap<ObjectName, Arc<Service>>,
    /// By the Service they belong to, then by their own name.
    slices: BTreeMap<ObjectName, BTreeMap<String, Arc<Slice>>>,
    /// Slice → Service, because a label may change.
    slice_owner: BTreeMap<ObjectName, ObjectName>,
    /// The last slices with endpoints of the API server, IPv4 and not, when they should be gone: they stay until there
    /// is another.
    outlived: BTreeMap<bool, ObjectName>,
    node: Option<Node>,
    has_services: bool,
    has_slices: bool,
    has_node: bool,
    has_had_node: bool,
    dirty: Dirty,
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
            has_services: false,
            has_slices: false,
            has_node: false,
            has_had_node: false,
            dirty: Dirty::default(),
        }
    }

    /// Whether the lists of Services and of EndpointSlices were both complete once.
    pub fn is_complete(&self) -> bool {
        self.has_services && self.has_slices
    }

    /// Whether the source has said what it knows of the Node, be it nothing.
    pub fn knows_node(&self) -> bool {
        self.has_node
    }

    /// The Service with this name.
    pub fn service(&self, name: &ObjectName) -> Option<&Service> {
        self.services.get(name).map(Arc::as_ref)
    }

    /// The slices of a Service, in the order of their names.
    pub fn slices(&self, service: &ObjectName) -> impl Iterator<Item = &Slice> + Clone {
        self.slices.get(service).into_iter().flat_map(|slices| slices.values().map(Arc::as_ref))
    }

    /// This node.
    pub fn node(&self) -> Option<&Node> {
        self.node.as_ref()
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

    /// Takes an event in. What was wrong with the objects it carries is returned, for the log.
    pub fn absorb(&mut self, event: Event) -> Vec<Defect> {
        let mut defects = Vec::new();
        match event {
            Event::Services(change) => self.absorb_services(change, &mut defects),
            Event::EndpointSlices(change) => self.absorb_slices(change, &mut defects),
            Event::Nodes(change) => self.absorb_nodes(change, &mut defects),
        }
        defects
    }

    fn absorb_services(&mut self, change: Change<core::Service>, defects: &mut Vec<Defect>) {
        match change {
            Change::Replace(objects) => {
                self.has_services = true;
                let kept: BTreeSet<_> = objects.iter().map(|object| ObjectName::of(object.metadata())).collect();
                let gone: Vec<_> = self.services.keys().filter(|name| !kept.contains(name)).cloned().collect();
                for name in gone {
                    self.put_service(name, None);
                }
                for object in &objects {
                    self.apply_service(object, defects);
                }
            }
            Change::Apply(object) => self.apply_service(&object, defects),
            Change::Delete(name) => self.put_service(name, None),
        }
    }

    fn apply_service(&mut self, object: &core::Service, defects: &mut Vec<Defect>) {
        self.put_service(ObjectName::of(object.metadata()), Service::parse(object, defects));
    }

    fn put_service(&mut self, name: ObjectName, service: Option<Service>) {
        if self.services.get(&name).map(Arc::as_ref) == service.as_ref() {
            return;
        }
        match service {
            Some(service) => self.services.insert(name.clone(), Arc::new(service)),
            None => self.services.remove(&name),
        };
        self.dirty.services.insert(name);
    }

    fn absorb_slices(&mut self, change: Change<discovery::EndpointSlice>, defects: &mut Vec<Defect>) {
        match change {
            Change::Replace(objects) => {
                self.has_slices = true;
                let kept: BTreeSet<_> = objects.iter().map(|object| ObjectName::of(object.metadata())).collect();
                let gone: Vec<_> = self.slice_owner.keys().filter(|name| !kept.contains(name)).cloned().collect();
                for name in gone {
                    self.put_slice(&name, None);
                }
                for object in &objects {
                    self.apply_slice(object, defects);
                }
            }
            Change::Apply(object) => self.apply_slice(&object, defects),
            Change::Delete(name) => self.put_slice(&name, None),
        }
    }

    fn apply_slice(&mut self, object: &discovery::EndpointSlice, defects: &mut Vec<Defect>) {
        let slice = Slice::parse(object, &self.node_name, defects);
        self.put_slice(&ObjectName::of(object.metadata()), slice);
    }

    fn put_slice(&mut self, name: &ObjectName, slice: Option<Slice>) {
        if let Some(is_ipv4) = self.last_of_api_server(name, slice.as_ref()) {
            self.outlived.insert(is_ipv4, name.clone());
            return;
        }
        self.succeed_outlived(name, slice.as_ref());
        let owner = self.slice_owner.get(name);
        let old = owner.and_then(|owner| self.slices.get(owner)).and_then(|slices| slices.get(&name.name));
        if old.map(Arc::as_ref) == slice.as_ref() {
            return;
        }
        self.remove_slice(name);
        if let Some(slice) = slice {
            let owner = slice.service.clone();
            self.dirty.services.insert(owner.clone());
            self.slice_owner.insert(name.clone(), owner.clone());
            self.slices.entry(owner).or_default().insert(name.name.clone(), Arc::new(slice));
        }
    }

    /// Says of which family the API server would lose its last endpoint (IPv4?). It takes its own ones out before it is
    /// replaced, and an agent that let them go might never hear of the new ones.
    fn last_of_api_server(&self, name: &ObjectName, slice: Option<&Slice>) -> Option<bool> {
        let owner = self.slice_owner.get(name).filter(|owner| is_api_server(owner))?;
        let slices = self.slices.get(owner)?;
        let is_ipv4 = slices.get(&name.name)?.is_ipv4()?;
        let is_lost = slice.is_none_or(|slice| slice.service == *owner && slice.is_ipv4().is_none());
        let mut others = slices.iter().filter(|(other, _)| **other != name.name);
        (is_lost && !others.any(|(_, slice)| slice.is_ipv4() == Some(is_ipv4))).then_some(is_ipv4)
    }

    /// With new endpoints of the API server, what was kept in their stead goes; what has come back is no longer kept.
    fn succeed_outlived(&mut self, name: &ObjectName, slice: Option<&Slice>) {
        let family = slice.filter(|slice| is_api_server(&slice.service)).and_then(Slice::is_ipv4);
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

    fn absorb_nodes(&mut self, change: Change<core::Node>, defects: &mut Vec<Defect>) {
        let is_own = |object: &core::Node| object.metadata.name.as_deref() == Some(self.node_name.as_str());
        let node = match change {
            Change::Replace(objects) => {
                self.has_node = true;
                objects.iter().find(|object| is_own(object)).map(|object| Node::parse(object, defects))
            }
            Change::Apply(object) if is_own(&object) => Some(Node::parse(&object, defects)),
            Change::Delete(name) if name.name == self.node_name => None,
            Change::Apply(_) | Change::Delete(_) => return,
        };
        self.dirty.node |= self.node != node;
        self.has_had_node |= node.is_some();
        self.node = node;
    }
}

/// The Service that leads to the API server itself.
fn is_api_server(service: &ObjectName) -> bool {
    service.namespace == "default" && service.name == "kubernetes"
}
