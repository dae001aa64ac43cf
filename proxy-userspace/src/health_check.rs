//! What load balancers ask this node about (`spec.healthCheckNodePort`). In: the model and the node's addresses. Out: at
//! each address and port, how many ready endpoints a Service has here. They count by their addresses and for the
//! family that is asked: a pod with many ports is one.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    num::NonZeroU16,
};

use proxy_common::node::local;

use crate::model::{self, Model, ObjectName, ObjectReference};

/// What is asked about at an address and port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subject {
    /// The Service.
    pub service: ObjectReference,
    /// Its ready endpoints on this node.
    pub local_endpoints: usize,
}

/// Where what is asked. Several Services at one address and port are a mistake: the first is the oldest and is answered for.
pub type Subjects = BTreeMap<SocketAddr, Vec<Subject>>;

/// What is asked about at the moment.
#[derive(Debug, Default)]
pub struct HealthChecks {
    services: BTreeMap<ObjectName, HealthCheck>,
    addresses: BTreeSet<IpAddr>,
    has_changed: bool,
}

/// A Service that is asked about.
#[derive(Clone, Debug, PartialEq, Eq)]
struct HealthCheck {
    created: i64,
    uid: String,
    port: NonZeroU16,
    /// Ready endpoints here, of IPv4 and IPv6; none of a family the Service does not have.
    local_endpoints: [Option<usize>; 2],
}

impl HealthChecks {
    /// Looks at a Service anew.
    pub fn update(&mut self, name: &ObjectName, model: &Model) {
        let new = HealthCheck::of(name, model);
        if self.services.get(name) != new.as_ref() {
            match new {
                Some(new) => self.services.insert(name.clone(), new),
                None => self.services.remove(name),
            };
            self.has_changed = true;
        }
    }

    /// Says which addresses the node has, with the bits of [`local`]. It is asked where it serves NodePorts.
    pub fn update_addresses(&mut self, addresses: &BTreeMap<IpAddr, u32>) {
        let serving = addresses.iter().filter(|(_, bits)| **bits & local::NODE_PORTS != 0);
        let addresses = serving.map(|(address, _)| *address).collect();
        self.has_changed |= self.addresses != addresses;
        self.addresses = addresses;
    }

    /// What is asked about, if that has changed since the last call.
    pub fn take_changed(&mut self) -> Option<Subjects> {
        std::mem::take(&mut self.has_changed).then(|| self.subjects())
    }

    fn subjects(&self) -> Subjects {
        let mut by_age: Vec<_> = self.services.iter().collect();
        by_age.sort_by_key(|(name, check)| (check.created, &check.uid, *name));
        let mut subjects = Subjects::new();
        for (name, check) in by_age {
            for address in &self.addresses {
                let Some(local_endpoints) = check.local_endpoints[family(*address)] else { continue };
                let service = ObjectReference { kind: "Service", name: name.clone(), uid: check.uid.clone() };
                let place = SocketAddr::new(*address, check.port.get());
                subjects.entry(place).or_default().push(Subject { service, local_endpoints });
            }
        }
        subjects
    }
}

impl HealthCheck {
    fn of(name: &ObjectName, model: &Model) -> Option<Self> {
        let service = model.service(name)?;
        let port = service.health_check_node_port?;
        let endpoints = model::endpoints(model.slices(name), |_| true);
        let ready =
            endpoints.iter().map(|(_, endpoint)| endpoint).filter(|endpoint| endpoint.is_local && endpoint.is_ready);
        let mut addresses = [BTreeSet::new(), BTreeSet::new()];
        for endpoint in ready {
            addresses[family(endpoint.address)].insert(endpoint.address);
        }
        let mut local_endpoints = [None, None];
        for cluster_ip in &service.cluster_ips {
            let family = family(*cluster_ip);
            local_endpoints[family] = Some(addresses[family].len());
        }
        Some(Self { created: service.created, uid: service.uid.clone(), port, local_endpoints })
    }
}

fn family(address: IpAddr) -> usize {
    usize::from(address.is_ipv6())
}

#[cfg(test)]
mod tests;
