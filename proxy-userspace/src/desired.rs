//! What the maps should hold.

use std::collections::BTreeMap;

use proxy_common::{
    addr::{Ipv4, Ipv6, Port, Protocol},
    backend::BackendState,
    service::{Frontend, Pick, WhenEmpty},
};

/// Everything the kernel should know, both families.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tables {
    /// IPv4.
    pub v4: FamilyTables<Ipv4>,
    /// IPv6.
    pub v6: FamilyTables<Ipv6>,
}

/// Everything the kernel should know of one family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FamilyTables<A: Ord> {
    /// Frontends and what stands behind them. A NodePort has the unspecified address.
    pub services: BTreeMap<Frontend<A>, DesiredService<A>>,
    /// Every endpoint that stands in a slice of a Service, used by a frontend or not.
    pub backends: BTreeMap<Target<A>, DesiredBackend>,
    /// Addresses of this node, with the bits of [`proxy_common::node::local`].
    pub local_addrs: BTreeMap<A, u32>,
    /// Source address of masqueraded flows.
    pub masquerade: Option<A>,
}

impl<A: Ord> Default for FamilyTables<A> {
    fn default() -> Self {
        Self { services: BTreeMap::new(), backends: BTreeMap::new(), local_addrs: BTreeMap::new(), masquerade: None }
    }
}

/// The identity of a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Target<A> {
    /// Address of the endpoint.
    pub addr: A,
    /// Port of the endpoint.
    pub port: Port,
    /// Transport protocol.
    pub proto: Protocol,
}

/// What a frontend should lead to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DesiredService<A> {
    /// `namespace/name:port`, for people.
    pub name: String,
    /// How a slot is chosen.
    pub pick: Pick,
    /// Content of the range for clients on this node, in slot order.
    pub internal: Vec<Target<A>>,
    /// Content of the range for clients beyond an uplink, in slot order.
    pub external: Vec<Target<A>>,
    /// What an empty `internal` means.
    pub internal_empty: WhenEmpty,
    /// What an empty `external` means.
    pub external_empty: WhenEmpty,
}

/// What is known of a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DesiredBackend {
    /// It runs on this node.
    pub is_local: bool,
    /// What may be sent to it.
    pub state: BackendState,
}
