//! From events to plans, without any I/O. In: what sources and netlink say, and what was read back from the kernel. Out:
//! what to write. Each event costs what it touches; only after a failure is everything compared.

use std::{collections::BTreeSet, net::IpAddr, ops::RangeInclusive, time::Instant};

use crate::{
    addresses::{self, NodePortAddresses, Primary},
    algorithm::AlgorithmName,
    dataplane::{DevicePattern, netlink::NodeNetwork},
    desired::{Desired, ExternalIps, Listener, NoLocal, Rules, Tables},
    diff::{Capacity, KernelState, Ledger, Overflow, Plan},
    health_check::{HealthChecks, Subjects},
    model::{self, Defect, Dirty, Model, ObjectName, ObjectReference, Problem, Trigger},
    node_port_mode::NodePortMode,
    source::Event,
    topology::Place,
};

/// What the operator decides about the node.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// Name of its Node object.
    pub name: String,
    /// On which of its addresses NodePorts are served.
    pub node_port_addresses: NodePortAddresses,
    /// Its uplinks, where the address of masqueraded flows is looked for; empty means every device that carries a default route.
    pub uplinks: Vec<DevicePattern>,
    /// How connections to Services are spread that do not say it.
    pub algorithm: AlgorithmName,
    /// Which external IPs Services may have.
    pub external_ips: ExternalIps,
    /// How packets from outside get to other nodes, for Services that do not say it.
    pub node_port_mode: NodePortMode,
    /// Services may be served to clients of the family that they have no address of.
    pub crosses: bool,
    /// Where NodePorts are; anywhere, if nobody says.
    pub node_ports: Option<RangeInclusive<u16>>,
}

/// The pure half of the agent.
#[derive(Debug)]
pub struct Reconciler {
    settings: Settings,
    place: Place,
    rules: Rules,
    /// Who listens on the node, when that was looked at last.
    listeners: BTreeSet<Listener>,
    model: Model,
    desired: Desired,
    health_checks: HealthChecks,
    network: Option<NodeNetwork>,
    primary: Primary,
    further: Vec<IpAddr>,
    capacity: Capacity,
    ledger: Option<Ledger>,
    /// The kernel's state was read anew, or something found no room: the next plan compares everything.
    compares_all: bool,
    has_stale_addresses: bool,
    has_new_peers: bool,
}

impl Reconciler {
    /// Knows nothing yet.
    pub fn new(settings: Settings, capacity: Capacity) -> Self {
        let mut model = Model::new(settings.name.clone());
        if settings.node_port_mode != NodePortMode::Snat {
            model.want_peers();
        }
        Self {
            rules: Rules::default(),
            listeners: BTreeSet::new(),
            place: Place { node: settings.name.clone(), ..Place::default() },
            model,
            desired: Desired::new(settings.algorithm, settings.node_port_mode, settings.crosses),
            health_checks: HealthChecks::default(),
            settings,
            network: None,
            primary: Primary::default(),
            further: Vec::new(),
            capacity,
            ledger: None,
            compares_all: false,
            has_stale_addresses: false,
            has_new_peers: true,
        }
    }

    /// Takes in what a source has learned. What was wrong with it is returned, for the log.
    pub fn absorb(&mut self, event: Event) -> Vec<Defect> {
        self.model.absorb(event)
    }

    /// Takes in what netlink says.
    pub fn absorb_network(&mut self, network: NodeNetwork) {
        self.network = Some(network);
        self.has_stale_addresses = true;
    }

    /// Whether what the next plan decides depends on who listens on the node: a Service wants an address of the node.
    pub fn asks_for_listeners(&self) -> bool {
        let rules = Rules::of(&self.model, self.settings.external_ips.clone());
        let asks = |service: &model::Service| rules.asks_for_listeners(service);
        let mut touched = self.model.dirty_services().filter_map(|name| self.model.service(name));
        let has_other_addresses = rules.node_addresses != self.rules.node_addresses;
        touched.any(asks) || has_other_addresses && self.model.services().any(asks)
    }

    /// Takes in who listens on the node. Only ports that some Service wants at an address of the node are of interest.
    pub fn absorb_listeners(&mut self, listeners: BTreeSet<Listener>) {
        let rules = Rules::of(&self.model, self.settings.external_ips.clone());
        let asking = self.model.services().filter(|service| rules.asks_for_listeners(service));
        let ports: BTreeSet<u16> = asking.flat_map(|service| &service.ports).map(|port| port.port.get()).collect();
        self.listeners = listeners.into_iter().filter(|(_, socket)| ports.contains(&socket.port())).collect();
    }

    /// Services that may not have what they ask for, as far as that has changed since the last call.
    pub fn take_defects(&mut self) -> Vec<Defect> {
        self.desired.take_defects()
    }

    /// When the changes of endpoints were made that plans since the last call have taken in.
    pub fn take_triggers(&mut self) -> Vec<Trigger> {
        self.model.take_triggers()
    }

    /// Of IPv4 and of IPv6: ports that have no endpoint where their Service wants one, as of the last plan.
    pub fn no_local(&self) -> [NoLocal; 2] {
        self.desired.no_local()
    }

    /// What load balancers ask this node about, as of the last plan, if that has changed since the last call.
    pub fn take_health_checks(&mut self) -> Option<Subjects> {
        self.health_checks.take_changed()
    }

    /// Takes over what was read back from the kernel: at the start, and after a write failed.
    pub fn adopt(&mut self, state: KernelState, now: Instant) {
        self.ledger = Some(Ledger::adopt(state, self.capacity, now));
        self.compares_all = true;
    }

    /// Whether everything is known that the tables are made of. Nothing is written before.
    pub fn is_complete(&self) -> bool {
        self.knows_all() && self.ledger.is_some()
    }

    /// The same, but for what the kernel holds.
    pub fn knows_all(&self) -> bool {
        self.model.is_complete() && self.network.is_some()
    }

    /// Whether the source has said what it knows of the Node, and of others if they matter, be it nothing. The tables can do
    /// without.
    pub fn knows_nodes(&self) -> bool {
        self.model.knows_node() && (self.model.knows_peers() || !self.wants_peers())
    }

    /// Whether other nodes matter: packets may be dispatched to them.
    pub fn wants_peers(&self) -> bool {
        self.model.wants_peers()
    }

    /// The addresses of other nodes, if they have changed since the last call.
    pub fn take_peers(&mut self) -> Option<BTreeSet<IpAddr>> {
        std::mem::take(&mut self.has_new_peers).then(|| self.model.peer_addresses())
    }

    /// Whether load balancers may send traffic to this node.
    pub fn is_node_eligible(&self) -> bool {
        self.model.is_node_eligible()
    }

    /// The node's primary addresses, as of the last plan.
    pub fn primary(&self) -> Primary {
        self.primary
    }

    /// What else masqueraded flows may bear, as of the last plan.
    pub fn further(&self) -> &[IpAddr] {
        &self.further
    }

    /// The tables, as of the last plan.
    pub fn tables(&self) -> &Tables {
        self.desired.tables()
    }

    /// What to write now; nothing before the picture is complete. What finds no room is tried again by the next plan.
    pub fn plan(&mut self, now: Instant) -> (Plan, Vec<Overflow>) {
        if !self.is_complete() {
            return (Plan::default(), Vec::new());
        }
        if self.compares_all {
            self.inherit_api_server();
        }
        self.recompute();
        let touched = self.desired.take_touched();
        let Some(ledger) = &mut self.ledger else { return (Plan::default(), Vec::new()) };
        let (plan, overflows) = if self.compares_all {
            drop(touched);
            ledger.plan_all(self.desired.tables(), now)
        } else {
            ledger.plan(self.desired.tables(), &touched, now)
        };
        self.compares_all = overflows.iter().any(|overflow| !overflow.is_compromise());
        (plan, overflows)
    }

    /// What found no room, as a defect of its Service.
    pub fn defect(&self, overflow: &Overflow) -> Option<Defect> {
        let service = self.model.service(overflow.service()?)?;
        let object = ObjectReference { kind: "Service", name: service.name.clone(), uid: service.uid.clone() };
        Some(Defect { object, problem: Problem::NoRoom(overflow.to_string()) })
    }

    /// When the next plan has something to write even if nothing happens until then.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.ledger.as_ref().and_then(Ledger::next_deadline)
    }

    fn recompute(&mut self) {
        let Dirty { mut services, node, peers } = self.model.take_dirty();
        self.has_new_peers |= peers || node;
        if node || self.has_stale_addresses {
            self.recompute_addresses();
        }
        let place = self.place_now();
        if place != self.place {
            self.place = place;
            services.extend(self.model.service_names().cloned());
        }
        let mut rules = Rules::of(&self.model, self.settings.external_ips.clone());
        rules.listeners.clone_from(&self.listeners);
        rules.node_ports.clone_from(&self.settings.node_ports);
        rules.on_devices = self.network.iter().flat_map(addresses::on_devices).collect();
        // Of all rules the one that changes often, and that matters to hardly any Service.
        let before = std::mem::replace(&mut self.rules.on_devices, rules.on_devices.clone());
        if before != rules.on_devices {
            let is_moved = |address: &IpAddr| before.contains(address) != rules.on_devices.contains(address);
            let moved = self.model.services().filter(|service| service.cluster_ips.iter().any(is_moved));
            services.extend(moved.map(|service| service.name.clone()));
        }
        if rules != self.rules {
            self.rules = rules;
            services.extend(self.model.services().filter(|service| service.has_external_ips()).map(|s| s.name.clone()));
        }
        self.desired.update_service_ranges(self.model.service_ranges());
        for name in &services {
            self.desired.update(name, &self.model, &self.place, &self.rules);
            self.health_checks.update(name, &self.model);
        }
    }

    /// The API server's own Service never goes to zero endpoints, an agent's restart included.
    fn inherit_api_server(&mut self) {
        let Some(ledger) = &self.ledger else { return };
        let Some(service) = self.model.service(&ObjectName::of_api_server()).cloned() else { return };
        for port in &service.ports {
            for address in &service.cluster_ips {
                let endpoints = ledger.endpoints(*address, port.port.get(), port.name.protocol);
                self.model.inherit_api_server(&port.name, &endpoints);
            }
        }
    }

    fn place_now(&self) -> Place {
        let Primary { v4, v6 } = self.primary;
        Place {
            node: self.settings.name.clone(),
            zone: self.model.node().and_then(|node| node.zone.clone()),
            addresses: v4.map(IpAddr::from).into_iter().chain(v6.map(IpAddr::from)).collect(),
        }
    }

    fn recompute_addresses(&mut self) {
        let Some(network) = &self.network else { return };
        self.primary = Primary::of(network, self.model.node(), &self.settings.uplinks);
        self.further = self.primary.further(network, self.model.node());
        let choice = &self.settings.node_port_addresses;
        let mut addresses = addresses::local_addresses(network, self.primary, choice);
        self.health_checks.update_addresses(&addresses);
        if self.settings.crosses {
            addresses::add_mapped(&mut addresses);
        }
        self.desired.update_addresses(&addresses);
        self.has_stale_addresses = false;
    }
}

#[cfg(test)]
mod tests;
