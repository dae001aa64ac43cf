//! What the maps should hold. In: the model and the node's addresses. Out: tables, and which of their entries were
//! touched. A Service is computed alone; where Services meet, in a frontend both claim or an endpoint both have, the
//! outcome does not depend on who came first.

mod conflicts;
mod contribution;
mod crossing;
mod range;
mod rules;
mod sources;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt::{Debug, Display},
    net::IpAddr,
    sync::Arc,
};

use conflicts::Conflicts;
pub use contribution::NoLocal;
use contribution::{Contribution, World, contribution};
use ipnet::IpNet;
use proxy_common::{
    addr::{Address, Ipv4, Ipv6, Port},
    backend::BackendState,
    node::{Cidr, ServiceCidrs},
    service::{Frontend, Pick, WhenEmpty},
};
pub use rules::{ExternalIps, Listener, Rules};
pub use sources::Sources;

use crate::{
    algorithm::AlgorithmName,
    model::{Defect, Defects, Model, ObjectName, ObjectReference, ServicePortName},
    node_port_mode::NodePortMode,
    topology::Place,
};

/// Everything the kernel should know, both families.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tables {
    /// IPv4.
    pub v4: FamilyTables<Ipv4>,
    /// IPv6.
    pub v6: FamilyTables<Ipv6>,
    /// Where ClusterIPs are taken from; none while that is not known.
    pub service_cidrs: Option<ServiceCidrs>,
}

/// Everything the kernel should know of one family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FamilyTables<A: Ord> {
    /// Frontends and what stands behind them. A NodePort has the unspecified address.
    pub services: BTreeMap<Frontend<A>, Arc<DesiredService<A>>>,
    /// Every endpoint that stands in a slice of a Service, used by a frontend or not.
    pub backends: BTreeMap<Target<A>, DesiredBackend<A>>,
    /// Addresses of this node, with the bits of [`proxy_common::node::local`].
    pub local_addrs: BTreeMap<A, u32>,
}

impl<A: Ord> Default for FamilyTables<A> {
    fn default() -> Self {
        Self { services: BTreeMap::new(), backends: BTreeMap::new(), local_addrs: BTreeMap::new() }
    }
}

/// The identity of a backend. Protocols share it: what a pod can do on a port is the pod's state, not the protocol's, and
/// so the identity can be read back from the kernel, whose entries have no protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Target<A> {
    /// Address of the endpoint.
    pub addr: A,
    /// Port of the endpoint.
    pub port: Port,
}

/// A range of addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Prefix<A> {
    /// Its first address.
    pub addr: A,
    /// How many bits of that count.
    pub bits: u8,
}

/// What a frontend should lead to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DesiredService<A> {
    /// Whose frontend it is; for all undefined ports of a ClusterIP, that of one that is defined.
    pub port: Arc<ServicePortName>,
    /// How a slot is chosen.
    pub pick: Pick,
    /// Bits of [`proxy_common::service::flag`].
    pub flags: u8,
    /// How long a client stays with its backend; 0 without affinity.
    pub affinity_seconds: u32,
    /// From where it may be used; of no meaning without [`proxy_common::service::flag::SOURCE_RANGES`]. All restricted
    /// frontends of a Service port have the same.
    pub sources: Sources<A>,
    /// Content of the range for clients on this node, in slot order.
    pub internal: Arc<[Target<A>]>,
    /// Content of the range for clients beyond an uplink, in slot order.
    pub external: Arc<[Target<A>]>,
    /// Content of the range for packets that other nodes have dispatched here, in slot order.
    pub local: Arc<[Target<A>]>,
    /// UDP: the endpoints that answer for the Service port, in order, each once. A flow that has one of them may stay with it,
    /// whatever policies and hints say of new ones.
    pub serving: Arc<[Target<A>]>,
    /// What an empty `internal` means.
    pub internal_empty: WhenEmpty,
    /// What an empty `external` means.
    pub external_empty: WhenEmpty,
}

/// What is known of a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DesiredBackend<A> {
    /// It runs on this node.
    pub is_local: bool,
    /// Address of the node it runs on, where that matters and is known; else the unspecified one.
    pub node: A,
    /// What may be sent to it.
    pub state: BackendState,
}

/// Entries of the tables that may differ from what they were.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Touched {
    /// IPv4.
    pub v4: FamilyTouched<Ipv4>,
    /// IPv6.
    pub v6: FamilyTouched<Ipv6>,
}

/// Entries of the tables of one family that may differ from what they were.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FamilyTouched<A: Ord> {
    /// Keys of `services`.
    pub frontends: BTreeSet<Frontend<A>>,
    /// Keys of `backends`.
    pub targets: BTreeSet<Target<A>>,
    /// Keys of `local_addrs`.
    pub local_addrs: BTreeSet<A>,
}

impl<A: Ord> Default for FamilyTouched<A> {
    fn default() -> Self {
        Self { frontends: BTreeSet::new(), targets: BTreeSet::new(), local_addrs: BTreeSet::new() }
    }
}

/// An address family, as the control plane sees it.
pub trait Family: Address + Debug + Display {
    /// Whether its tables have a place for the other family's addresses: as mapped ones.
    const HAS_BOTH: bool;

    /// The address, if it is of this family.
    fn of(address: IpAddr) -> Option<Self>;

    /// The address as it stands in this family's tables, if it has a place there.
    fn mixed(address: IpAddr) -> Option<Self>;
}

impl Family for Ipv4 {
    const HAS_BOTH: bool = false;

    fn of(address: IpAddr) -> Option<Self> {
        match address {
            IpAddr::V4(v4) => Some(v4.into()),
            IpAddr::V6(_) => None,
        }
    }

    fn mixed(address: IpAddr) -> Option<Self> {
        Self::of(address)
    }
}

impl Family for Ipv6 {
    const HAS_BOTH: bool = true;

    fn of(address: IpAddr) -> Option<Self> {
        match address {
            IpAddr::V4(_) => None,
            IpAddr::V6(v6) => Some(v6.into()),
        }
    }

    fn mixed(address: IpAddr) -> Option<Self> {
        Some(match address {
            IpAddr::V4(v4) => Self::mapped(v4.into()),
            IpAddr::V6(v6) => v6.into(),
        })
    }
}

impl<A: Family> Prefix<A> {
    /// The range, if it is of this family.
    pub fn of(net: IpNet) -> Option<Self> {
        Some(Self { addr: A::of(net.network())?, bits: net.prefix_len() })
    }

    /// The range as it stands in this family's tables.
    fn mixed(net: IpNet) -> Option<Self> {
        let addr = A::mixed(net.network())?;
        let is_mapped = A::of(net.network()).is_none();
        let before = if is_mapped { 128 - 32 } else { 0 };
        Some(Self { addr, bits: net.prefix_len() + before })
    }
}

/// The tables, kept up to date Service by Service.
#[derive(Debug, Default)]
pub struct Desired {
    v4: FamilyDesired<Ipv4>,
    v6: FamilyDesired<Ipv6>,
    tables: Tables,
    touched: Touched,
    usual: AlgorithmName,
    mode: NodePortMode,
    crosses: bool,
    /// Addresses that Services may not have.
    refused: Defects,
}

impl Desired {
    /// Nothing yet. The algorithm and the mode are those of Services which name none; and the node may translate between the
    /// families.
    pub fn new(usual: AlgorithmName, mode: NodePortMode, crosses: bool) -> Self {
        Self { usual, mode, crosses, ..Self::default() }
    }

    /// The tables as they should be now.
    pub fn tables(&self) -> &Tables {
        &self.tables
    }

    /// What was touched since the last call.
    pub fn take_touched(&mut self) -> Touched {
        std::mem::take(&mut self.touched)
    }

    /// Computes a Service anew.
    pub fn update(&mut self, name: &ObjectName, model: &Model, place: &Place, rules: &Rules) {
        let world = World { model, place, rules, usual: self.usual, mode: self.mode, crosses: self.crosses };
        let v4 = contribution(name, &world);
        let v6 = contribution(name, &world);
        self.note_refused(name, v4.as_ref(), v6.as_ref());
        self.v4.update(name, v4, &mut self.tables.v4, &mut self.touched.v4);
        self.v6.update(name, v6, &mut self.tables.v6, &mut self.touched.v6);
    }

    fn note_refused(&mut self, name: &ObjectName, v4: Option<&Contribution<Ipv4>>, v6: Option<&Contribution<Ipv6>>) {
        if v4.is_none_or(|v4| v4.refused.is_empty()) && v6.is_none_or(|v6| v6.refused.is_empty()) {
            return self.refused.replace("Service", name, Vec::new());
        }
        let uid = v4.and_then(Contribution::claim).or(v6.and_then(Contribution::claim)).map(|claim| claim.uid);
        let uid = uid.unwrap_or_default().to_owned();
        let object = ObjectReference { kind: "Service", name: name.clone(), uid };
        let refused = v4.iter().flat_map(|v4| &v4.refused).chain(v6.iter().flat_map(|v6| &v6.refused));
        let defects = refused.map(|problem| Defect { object: object.clone(), problem: problem.clone() }).collect();
        self.refused.replace("Service", name, defects);
    }

    /// Services that may not have what they ask for, as far as that was not known at the last call.
    pub fn take_defects(&mut self) -> Vec<Defect> {
        let mut news = self.refused.take_news();
        news.extend(self.v4.take_defects());
        news.extend(self.v6.take_defects());
        news
    }

    /// Of IPv4 and of IPv6: ports that have no endpoint where their Service wants one.
    pub fn no_local(&self) -> [NoLocal; 2] {
        [self.v4.no_local, self.v6.no_local]
    }

    /// Says where ClusterIPs are taken from, if that is known; as many ranges of each family as there is room for.
    pub fn update_service_ranges(&mut self, ranges: Option<&[IpNet]>) {
        self.tables.service_cidrs = ranges.map(service_cidrs);
    }

    /// Says which addresses the node has, with the bits of [`proxy_common::node::local`].
    pub fn update_addresses(&mut self, addresses: &BTreeMap<IpAddr, u32>) {
        replace_addresses(addresses, &mut self.tables.v4, &mut self.touched.v4);
        replace_addresses(addresses, &mut self.tables.v6, &mut self.touched.v6);
    }
}

fn service_cidrs(ranges: &[IpNet]) -> ServiceCidrs {
    let mut cidrs = ServiceCidrs::NONE;
    let of_v4 = ranges.iter().filter_map(|range| cidr(*range));
    cidrs.v4.iter_mut().zip(of_v4).for_each(|(place, cidr)| *place = cidr);
    let of_v6 = ranges.iter().filter_map(|range| cidr(*range));
    cidrs.v6.iter_mut().zip(of_v6).for_each(|(place, cidr)| *place = cidr);
    cidrs
}

fn cidr<A: Family>(range: IpNet) -> Option<Cidr<A>> {
    Some(Cidr { addr: A::of(range.network())?, mask: A::of(range.netmask())? })
}

fn replace_addresses<A: Family>(
    addresses: &BTreeMap<IpAddr, u32>,
    tables: &mut FamilyTables<A>,
    touched: &mut FamilyTouched<A>,
) {
    let wanted = addresses.iter().filter_map(|(address, bits)| Some((A::of(*address)?, *bits))).collect();
    let old = std::mem::replace(&mut tables.local_addrs, wanted);
    let now = &tables.local_addrs;
    touched.local_addrs.extend(old.keys().filter(|address| !now.contains_key(address)));
    touched.local_addrs.extend(now.iter().filter(|(address, bits)| old.get(address) != Some(bits)).map(|(a, _)| *a));
}

/// Contributions by number, and where they meet. There are more frontends and endpoints than anything else, so what is
/// known of each is a number and no name.
#[derive(Debug)]
struct FamilyDesired<A: Ord> {
    numbers: HashMap<ObjectName, u32>,
    /// Numbers are not given out again.
    next_number: u32,
    contributions: BTreeMap<u32, Contribution<A>>,
    claims: BTreeSet<(Frontend<A>, u32)>,
    owners: BTreeSet<(Target<A>, u32)>,
    conflicts: Conflicts<A>,
    /// Of all contributions.
    no_local: NoLocal,
}

impl<A: Ord> Default for FamilyDesired<A> {
    fn default() -> Self {
        Self {
            numbers: HashMap::new(),
            next_number: 0,
            contributions: BTreeMap::new(),
            claims: BTreeSet::new(),
            owners: BTreeSet::new(),
            conflicts: Conflicts::default(),
            no_local: NoLocal::default(),
        }
    }
}

impl<A: Family> FamilyDesired<A> {
    fn update(
        &mut self,
        name: &ObjectName,
        contribution: Option<Contribution<A>>,
        tables: &mut FamilyTables<A>,
        touched: &mut FamilyTouched<A>,
    ) {
        let (frontends, targets) = self.exchange(name, contribution);
        for frontend in frontends {
            let is_contested = self.claimants(&frontend).nth(1).is_some();
            self.conflicts.suspect(frontend, is_contested);
            let winner = self.claimants(&frontend).min_by_key(|contribution| contribution.claim_to(&frontend));
            let service = winner.and_then(|winner| winner.service(&frontend)).cloned();
            if put(&mut tables.services, frontend, service) {
                touched.frontends.insert(frontend);
            }
        }
        for target in targets {
            let backend = self.backend(&target);
            if put(&mut tables.backends, target, backend) {
                touched.targets.insert(target);
            }
        }
    }

    /// Puts a contribution in the place of the one before. Returns the keys either of them has, in order, each once.
    fn exchange(&mut self, name: &ObjectName, new: Option<Contribution<A>>) -> (Vec<Frontend<A>>, Vec<Target<A>>) {
        let old = self.numbers.remove(name).and_then(|number| Some((number, self.contributions.remove(&number)?)));
        let both = || old.iter().map(|(_, old)| old).chain(new.iter());
        let frontends = in_order(both().flat_map(Contribution::frontends));
        let targets = in_order(both().flat_map(Contribution::targets));
        if let Some((number, old)) = &old {
            self.withdraw(*number, old);
        }
        if let Some(new) = new {
            let number = old.map_or(self.next_number, |(number, _)| number);
            self.next_number = self.next_number.max(number + 1);
            self.numbers.insert(name.clone(), number);
            self.put_forward(number, new);
        }
        (frontends, targets)
    }

    fn withdraw(&mut self, number: u32, old: &Contribution<A>) {
        self.no_local.internal -= old.no_local.internal;
        self.no_local.external -= old.no_local.external;
        for frontend in old.frontends() {
            self.claims.remove(&(frontend, number));
        }
        for target in old.targets() {
            self.owners.remove(&(target, number));
        }
    }

    fn put_forward(&mut self, number: u32, new: Contribution<A>) {
        self.no_local.internal += new.no_local.internal;
        self.no_local.external += new.no_local.external;
        self.claims.extend(new.frontends().map(|frontend| (frontend, number)));
        self.owners.extend(new.targets().map(|target| (target, number)));
        self.contributions.insert(number, new);
    }

    /// Who wants a frontend.
    fn claimants(&self, frontend: &Frontend<A>) -> impl Iterator<Item = &Contribution<A>> {
        let claims = self.claims.range((*frontend, 0)..=(*frontend, u32::MAX));
        claims.filter_map(|(_, number)| self.contributions.get(number))
    }

    /// Where Services disagree about an endpoint they share, the better opinion counts.
    fn backend(&self, target: &Target<A>) -> Option<DesiredBackend<A>> {
        let owners = self.owners.range((*target, 0)..=(*target, u32::MAX));
        let opinions = owners.filter_map(|(_, number)| self.contributions.get(number)?.backend(target));
        opinions.reduce(DesiredBackend::better)
    }

    fn take_defects(&mut self) -> Vec<Defect> {
        let mut conflicts = std::mem::take(&mut self.conflicts);
        let news = conflicts.take_news(|frontend| {
            self.claimants(frontend).filter_map(|claimant| claimant.claim_to(frontend)).collect()
        });
        self.conflicts = conflicts;
        news
    }
}

fn in_order<K: Ord>(keys: impl Iterator<Item = K>) -> Vec<K> {
    let mut keys: Vec<K> = keys.collect();
    keys.sort_unstable();
    keys.dedup();
    keys
}

/// Sets or clears an entry; says whether that changed anything.
fn put<K: Ord, V: PartialEq>(map: &mut BTreeMap<K, V>, key: K, value: Option<V>) -> bool {
    match value {
        Some(value) if map.get(&key) == Some(&value) => false,
        Some(value) => {
            map.insert(key, value);
            true
        }
        None => map.remove(&key).is_some(),
    }
}
