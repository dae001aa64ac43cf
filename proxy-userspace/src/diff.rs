//! (have, want) → an ordered plan, as data. In: what was read back from the kernel, and the tables it should hold. Out:
//! the writes that make the one into the other, in an order in which no entry ever points at an absent one.

mod backends;
mod ids;
mod indexes;
mod ledger;
mod ranges;
mod serving;
mod sources;

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

pub use ledger::{Capacity, Ledger, Overflow};
use proxy_common::{
    addr::{Address, Ipv4, Ipv6},
    backend::{Backend, BackendId},
    node::ServiceCidrs,
    service::{Frontend, Service},
};
pub use serving::{Serving, ServingChanges};

use crate::desired::Prefix;

/// How long a freed range of slots, backend id or service index is left alone before something else gets it. A packet
/// on its way holds what it read for microseconds; the rest is generosity.
pub const GRACE: Duration = Duration::from_secs(5);

/// What the maps hold, read back from the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelState {
    /// IPv4.
    pub v4: FamilyState<Ipv4>,
    /// IPv6.
    pub v6: FamilyState<Ipv6>,
    /// `SLOTS` from index 0; trailing zeros may be left out.
    pub slots: Vec<BackendId>,
    /// `SERVICE_CIDRS`
    pub service_cidrs: ServiceCidrs,
}

impl Default for KernelState {
    fn default() -> Self {
        let (v4, v6) = (FamilyState::default(), FamilyState::default());
        Self { v4, v6, slots: Vec::new(), service_cidrs: ServiceCidrs::NONE }
    }
}

/// What the maps of one family hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FamilyState<A: Ord> {
    /// `SERVICES_*`.
    pub services: BTreeMap<Frontend<A>, Service>,
    /// `BACKENDS_*`: the index is the id; trailing free entries may be left out.
    pub backends: Vec<Backend<A>>,
    /// `LOCAL_ADDRS_*`.
    pub local_addrs: BTreeMap<A, u32>,
    /// `SOURCES_*`: the index of a Service port and a range of its clients.
    pub sources: BTreeSet<(u32, Prefix<A>)>,
}

impl<A: Ord> Default for FamilyState<A> {
    fn default() -> Self {
        Self { services: BTreeMap::new(), backends: Vec::new(), local_addrs: BTreeMap::new(), sources: BTreeSet::new() }
    }
}

/// One write to the kernel's maps of one family. Steps are carried out in order; any of them may be repeated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step<A> {
    /// Write an entry of `BACKENDS_*`.
    PutBackend(BackendId, Backend<A>),
    /// Write consecutive entries of `SLOTS`, beginning at the index.
    PutSlots(u32, Vec<BackendId>),
    /// Write an entry of `LOCAL_ADDRS_*`.
    PutLocalAddr(A, u32),
    /// Remove an entry of `LOCAL_ADDRS_*`.
    RemoveLocalAddr(A),
    /// Write an entry of `SOURCES_*`: these clients may use the Service port with this index.
    PutSource(u32, Prefix<A>),
    /// Remove an entry of `SOURCES_*`.
    RemoveSource(u32, Prefix<A>),
    /// Write an entry of `SERVICES_*`.
    PutService(Frontend<A>, Service),
    /// Remove an entry of `SERVICES_*`.
    RemoveService(Frontend<A>),
}

/// What to write. The families are independent of each other; within one the order matters: backends, slots, ranges of
/// clients, services, and only then what nothing leads to any more.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// IPv4.
    pub v4: Vec<Step<Ipv4>>,
    /// IPv6.
    pub v6: Vec<Step<Ipv6>>,
    /// The entry of `SERVICE_CIDRS`, after all else: what a Service has is known before the rest of a range is dropped.
    pub service_cidrs: Option<ServiceCidrs>,
    /// Who answers for UDP Service ports of IPv4.
    pub serving_v4: ServingChanges,
    /// The same of IPv6.
    pub serving_v6: ServingChanges,
}

impl Plan {
    /// Whether there is nothing to write.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many writes.
    pub fn len(&self) -> usize {
        self.v4.len() + self.v6.len() + usize::from(self.service_cidrs.is_some())
    }
}

impl KernelState {
    /// What the kernel holds after a plan was carried out.
    pub fn carry_out(&mut self, plan: &Plan) {
        for step in &plan.v4 {
            self.v4.carry_out(&mut self.slots, step);
        }
        for step in &plan.v6 {
            self.v6.carry_out(&mut self.slots, step);
        }
        self.service_cidrs = plan.service_cidrs.unwrap_or(self.service_cidrs);
    }
}

impl<A: Address> FamilyState<A> {
    fn carry_out(&mut self, slots: &mut Vec<BackendId>, step: &Step<A>) {
        match step {
            Step::PutBackend(id, backend) => *at(&mut self.backends, *id as usize) = *backend,
            Step::PutSlots(first, ids) => {
                for (index, id) in (*first as usize..).zip(ids) {
                    *at(slots, index) = *id;
                }
            }
            Step::PutLocalAddr(address, bits) => drop(self.local_addrs.insert(*address, *bits)),
            Step::RemoveLocalAddr(address) => drop(self.local_addrs.remove(address)),
            Step::PutSource(service, prefix) => drop(self.sources.insert((*service, *prefix))),
            Step::RemoveSource(service, prefix) => drop(self.sources.remove(&(*service, *prefix))),
            Step::PutService(frontend, service) => drop(self.services.insert(*frontend, *service)),
            Step::RemoveService(frontend) => drop(self.services.remove(frontend)),
        }
    }
}

/// The element at an index of an array that is as long as its last element in use.
fn at<T: Clone + Default>(array: &mut Vec<T>, index: usize) -> &mut T {
    if array.len() <= index {
        array.resize(index + 1, T::default());
    }
    &mut array[index]
}
