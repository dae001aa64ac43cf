//! (have, want) → an ordered plan, as data.

use std::collections::BTreeMap;

use proxy_common::{
    addr::{Ipv4, Ipv6},
    backend::{Backend, BackendId},
    service::{Frontend, Service},
};

/// What the kernel holds, as read back from its maps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KernelState {
    /// IPv4.
    pub v4: FamilyState<Ipv4>,
    /// IPv6.
    pub v6: FamilyState<Ipv6>,
    /// `SLOTS` from index 0 to the end of the last range that a service uses.
    pub slots: Vec<BackendId>,
}

/// What the kernel holds of one family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FamilyState<A: Ord> {
    /// `SERVICES_*`.
    pub services: BTreeMap<Frontend<A>, Service>,
    /// `BACKENDS_*` by id, up to the last entry that was ever written.
    pub backends: Vec<Backend<A>>,
    /// `LOCAL_ADDRS_*`.
    pub local_addrs: BTreeMap<A, u32>,
}

impl<A: Ord> Default for FamilyState<A> {
    fn default() -> Self {
        Self { services: BTreeMap::new(), backends: Vec::new(), local_addrs: BTreeMap::new() }
    }
}

/// Writes that make the kernel equal to what is wanted. The families do not depend on each other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// IPv4.
    pub v4: Vec<Step<Ipv4>>,
    /// IPv6.
    pub v6: Vec<Step<Ipv6>>,
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
