//! (have, want) → an ordered plan, as data. In: what was read back from the kernel, and the tables it should hold. Out:
//! the writes that make the one into the other, in an order in which no entry ever points at an absent one.

mod backends;
mod ids;
mod indexes;
mod ledger;
mod ranges;

use std::{collections::BTreeMap, time::Duration};

pub use ledger::{Capacity, Ledger, Overflow};
use proxy_common::{
    addr::{Address, Ipv4, Ipv6},
    backend::{Backend, BackendId},
    service::{Frontend, Service},
};

/// How long a freed range of slots, backend id or service index is left alone before something else gets it. A packet
/// on its way holds what it read for microseconds; the rest is generosity.
pub const GRACE: Duration = Duration::from_secs(5);

/// What the maps hold, read back from the kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KernelState {
    /// IPv4.
    pub v4: FamilyState<Ipv4>,
    /// IPv6.
    pub v6: FamilyState<Ipv6>,
    /// `SLOTS` from index 0; trailing zeros may be left out.
    pub slots: Vec<BackendId>,
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
}

impl<A: Ord> Default for FamilyState<A> {
    fn default() -> Self {
        Self { services: BTreeMap::new(), backends: Vec::new(), local_addrs: BTreeMap::new() }
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
    /// Write an entry of `SERVICES_*`.
    PutService(Frontend<A>, Service),
    /// Remove an entry of `SERVICES_*`.
    RemoveService(Frontend<A>),
}

/// What to write. The families are independent of each other; within one the order matters: backends, slots, services
/// and only then the backends that nothing leads to any more.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// IPv4.
    pub v4: Vec<Step<Ipv4>>,
    /// IPv6.
    pub v6: Vec<Step<Ipv6>>,
}

impl Plan {
    /// Whether there is nothing to write.
    pub fn is_empty(&self) -> bool {
        self.v4.is_empty() && self.v6.is_empty()
    }

    /// How many writes.
    pub fn len(&self) -> usize {
        self.v4.len() + self.v6.len()
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
