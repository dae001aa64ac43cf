//! The agent between two events: what it knows, what it has yet to write, and when to try again.

use std::{collections::BTreeSet, net::IpAddr, time::Duration};

use proxy_common::addr::{Ipv4, Ipv6};
use tokio::{sync::watch, time::Instant};
use tracing::{debug, error, info, warn};

use super::{
    NODE_PATIENCE,
    account::Account,
    seed,
    takeover::{self, Takeover},
};
use crate::{
    addresses::Primary,
    config::Config,
    dataplane::{
        self, Dataplane, NodeSettings,
        netlink::{
            LinkLayerAddress, NetworkEvent, NodeNetwork,
            conntrack::{self, TranslatedConnection},
        },
    },
    diff::{Capacity, GRACE, KernelState, Overflow},
    reconcile::Reconciler,
    source::{
        Event,
        kubernetes::{Memory, Remembered},
    },
    verify::socket::Question,
};

/// Waits between attempts after failures: the first, and the longest.
const RETRY: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(10));

/// After a failure, news is tried this soon.
const NEWS_RETRY: Duration = Duration::from_millis(250);

/// The address filters are swept this long after a change: it reads every flow, and a bit too many costs a packet
/// nanoseconds.
const PRUNE_AFTER: Duration = Duration::from_mins(10);

/// Until programs that could not be attached at first are tried again: nothing is ready before.
const ATTACH_AGAIN: Duration = Duration::from_secs(1);
/// Until a connection whose first packet is on its way through the kernel stands in its table.
const CONFIRMED: Duration = Duration::from_millis(50);

/// Which connections others translate; nothing, if that cannot be read.
fn look() -> Option<BTreeSet<TranslatedConnection>> {
    conntrack::translated()
        .inspect_err(|error| {
            warn!("the kernel's table of connections cannot be read: {error}; those of another proxy may break");
        })
        .ok()
}

/// Those who watch something for the agent are told here what it wants to know.
#[derive(Debug)]
pub(super) struct Watches {
    /// Addresses of other nodes, to watch where they are.
    pub(super) peers: watch::Sender<BTreeSet<IpAddr>>,
    /// Whether to look for connections that others translate.
    pub(super) foreign: watch::Sender<bool>,
}

/// What the agent knows and has.
pub(super) struct Agent {
    pub(super) dataplane: Dataplane,
    pub(super) config: Config,
    reconciler: Reconciler,
    pub(super) network: Option<NodeNetwork>,
    /// When programs are attached next: at once after news of the network, and else now and then, because what others have
    /// detached is not told.
    pub(super) attach_at: Option<Instant>,
    /// How that went the last time. Of interest until it has gone well, for the first time.
    attached: Attached,
    has_new_routes: bool,
    /// The kernel's state is not known: at the start, and after a failure.
    pub(super) is_blind: bool,
    failures: u32,
    failed_at: Instant,
    retry_at: Option<Instant>,
    stage: Stage,
    overflows: BTreeSet<Overflow>,
    /// When bits of the address filters that nothing needs any more are cleared.
    prune_at: Option<Instant>,
    account: Account,
    /// What the kernel held when the agent started, until it is known whose it is.
    pub(super) adopted: Option<KernelState>,
    /// What the agent before has known of the API server itself, until it is used or of no use.
    pub(super) remembered: Option<Remembered>,
    /// The same for the next one.
    memory: Option<Memory>,
    watches: Watches,
    /// Another proxy beside us.
    takeover: Takeover,
    /// Connections that others translate, if they are not in the kernel yet.
    new_foreign: Option<BTreeSet<TranslatedConnection>>,
    /// Addresses of other nodes that are not in the kernel yet.
    new_peer_addresses: Option<BTreeSet<IpAddr>>,
    /// Where they are on this node's links, if that is not in the kernel yet.
    new_peers: Option<BTreeSet<LinkLayerAddress>>,
}

/// How far the agent has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Something is missing that the tables are made of. Nothing is written.
    Incomplete,
    /// Only the Node object is missing, and waited for until then.
    WaitingForNode(Instant),
    /// The tables are being written for the first time.
    Begun,
    /// The kernel has held the first complete picture.
    InSync,
}

/// What is where it should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Attached {
    /// It was not tried, or could not be.
    Nothing,
    /// Not the programs without which nothing is ready.
    Part,
    /// Those, and others as far as they can be.
    Everything,
}

impl Agent {
    pub(super) fn new(
        dataplane: Dataplane,
        config: Config,
        account: Account,
        watches: Watches,
    ) -> Result<Self, dataplane::Error> {
        let (remembered, memory) = seed::heritage(&config);
        Ok(Self {
            takeover: Takeover::new(&dataplane, config.hands_over)?,
            new_foreign: None,
            dataplane,
            remembered,
            memory,
            reconciler: Reconciler::new(config.node.clone(), Capacity::default()),
            config,
            network: None,
            attach_at: None,
            attached: Attached::Nothing,
            has_new_routes: false,
            is_blind: true,
            failures: 0,
            failed_at: Instant::now(),
            retry_at: None,
            stage: Stage::Incomplete,
            overflows: BTreeSet::new(),
            prune_at: None,
            account,
            adopted: None,
            watches,
            new_peer_addresses: None,
            new_peers: None,
        })
    }

    pub(super) fn absorb(&mut self, event: Event) {
        self.hurry();
        self.account.note(&event);
        if let Some(memory) = &mut self.memory {
            memory.note(&event);
        }
        let defects = self.reconciler.absorb(event);
        self.account.tell(&defects);
        self.account.set_node_eligible(self.reconciler.is_node_eligible());
    }

    pub(super) fn absorb_network(&mut self, event: NetworkEvent) {
        match event {
            NetworkEvent::Changed(network) => {
                self.hurry();
                let network = network.or_default_routes_of(self.network.as_ref());
                self.reconciler.absorb_network(network.clone());
                self.network = Some(network);
                self.attach_at = Some(Instant::now());
                self.has_new_routes = true;
                self.account.note_news();
            }
            NetworkEvent::RoutesChanged => self.has_new_routes = true,
        }
    }

    /// Takes in where other nodes are on the links of this one.
    pub(super) fn absorb_peers(&mut self, macs: BTreeSet<LinkLayerAddress>) {
        self.hurry();
        self.new_peers = Some(macs);
    }

    /// Takes in which connections others translate.
    pub(super) fn absorb_foreign(&mut self, found: BTreeSet<TranslatedConnection>) {
        self.new_foreign = Some(found);
    }

    /// Says what the kernel should hold.
    pub(super) fn answer(&self, question: Question) {
        // Who asked may be gone.
        let _ = question.send((self.stage == Stage::InSync).then(|| self.reconciler.tables().clone()));
    }

    /// Whether other nodes matter.
    pub(super) fn wants_peers(&self) -> bool {
        self.reconciler.wants_peers()
    }

    /// When there is something to do even if nothing happens. After a failure all else waits for the next attempt.
    pub(super) fn wakes_at(&self) -> Option<Instant> {
        if self.failures > 0 {
            return self.retry_at;
        }
        let node_deadline = match self.stage {
            Stage::WaitingForNode(deadline) => Some(deadline),
            _ => None,
        };
        let next_plan = self.reconciler.next_deadline().map(Instant::from_std);
        let attach_at = self.attach_at.filter(|_| self.has_begun());
        let own = [self.retry_at, node_deadline, self.prune_at, next_plan, attach_at];
        own.into_iter().chain([self.account.wakes_at()]).flatten().min()
    }

    /// News does not wait as long as what has failed again and again: it may be of something else.
    fn hurry(&mut self) {
        if let Some(retry_at) = self.retry_at.as_mut().filter(|_| self.failures > 0) {
            *retry_at = (self.failed_at + NEWS_RETRY).min(*retry_at);
        }
    }

    /// Makes the kernel hold what should be there.
    pub(super) fn sync(&mut self) {
        if self.retry_at.is_some_and(|at| self.failures > 0 && at > Instant::now()) {
            return;
        }
        self.retry_at = None;
        match self.try_sync() {
            Ok(()) => self.failures = 0,
            Err(error) => self.fail(&error),
        }
    }

    fn try_sync(&mut self) -> Result<(), dataplane::Error> {
        let began = Instant::now();
        if self.has_begun() {
            self.account.begin(began);
        }
        if self.is_blind {
            let state = self.dataplane.read()?;
            self.adopted = (self.stage != Stage::InSync).then(|| state.clone());
            self.reconciler.adopt(state, std::time::Instant::now());
            self.is_blind = false;
        }
        if self.has_new_routes {
            self.dataplane.bump_routes()?;
            self.has_new_routes = false;
        }
        if !self.is_ready() {
            return self.seed();
        }
        self.account.begin(began);
        self.dataplane.put_newcomers(self.takeover.newcomers())?;
        self.write_tables()?;
        self.account.note_programmed(&self.reconciler.take_triggers());
        self.account.note_no_local(self.reconciler.no_local());
        let is_attached = self.attach();
        let is_whole = is_attached && self.attached != Attached::Part;
        // A load balancer that hears of endpoints sends traffic, and at first nothing here would translate it.
        if is_whole || self.stage == Stage::InSync {
            self.account.answer_for(self.reconciler.take_health_checks(), began);
        }
        if !is_attached {
            return Ok(());
        }
        self.take_over()?;
        self.account.finish(began.elapsed());
        if is_whole {
            self.announce();
        }
        self.prune()
    }

    /// Whether the picture is complete. The Node object is waited for, but not for ever.
    fn is_ready(&mut self) -> bool {
        if self.stage == Stage::Incomplete && self.reconciler.is_complete() {
            self.stage = Stage::WaitingForNode(Instant::now() + NODE_PATIENCE);
        }
        if let Stage::WaitingForNode(deadline) = self.stage
            && (self.reconciler.knows_nodes() || deadline <= Instant::now())
        {
            self.stage = Stage::Begun;
        }
        self.has_begun()
    }

    fn has_begun(&self) -> bool {
        matches!(self.stage, Stage::Begun | Stage::InSync)
    }

    fn write_tables(&mut self) -> Result<(), dataplane::Error> {
        let began = Instant::now();
        self.look_for_listeners();
        let (plan, overflows) = self.reconciler.plan(began.into_std());
        if let Some(state) = self.adopted.take() {
            self.account.adopt(&state, self.reconciler.tables());
        }
        self.account.follow(&plan, self.reconciler.tables());
        let defects = self.reconciler.take_defects();
        self.account.tell(&defects);
        self.dataplane.put_node(&self.node_settings(&self.reconciler))?;
        self.dataplane.apply(&plan)?;
        if !plan.is_empty() {
            self.prune_at.get_or_insert(began + PRUNE_AFTER);
            debug!(writes = plan.len(), elapsed = ?began.elapsed(), "kernel follows");
        }
        drop(plan);
        let [v4, v6] = self.account.unnamed();
        self.dataplane.put_names(&v4, &v6)?;
        self.account.note_named();
        self.report(overflows);
        self.write_peers()
    }

    /// Addresses of other nodes, which are watched from then on, and then where they are.
    fn write_peers(&mut self) -> Result<(), dataplane::Error> {
        if let Some(addresses) = self.reconciler.take_peers() {
            self.watches.peers.send_replace(addresses.clone());
            self.new_peer_addresses = Some(addresses);
        }
        if let Some(addresses) = &self.new_peer_addresses {
            self.dataplane.put_peer_addresses(addresses)?;
            self.new_peer_addresses = None;
        }
        if let Some(macs) = &self.new_peers {
            self.dataplane.put_peers(macs)?;
            self.new_peers = None;
        }
        Ok(())
    }

    /// Who listens on the node is looked at only when it matters: where there are many sockets, that takes a while.
    fn look_for_listeners(&mut self) {
        if self.reconciler.asks_for_listeners() {
            match dataplane::listeners() {
                Ok(listeners) => self.reconciler.absorb_listeners(listeners),
                Err(error) => warn!("cannot see who listens on this node: {error}"),
            }
        }
    }

    /// As of the last plan of a reconciler.
    pub(super) fn node_settings(&self, reconciler: &Reconciler) -> NodeSettings {
        let Primary { v4, v6 } = reconciler.primary();
        let all = &self.config.source_ports;
        // Without such flows there is nothing to keep apart.
        let (source_ports, cross_ports) =
            if self.config.node.crosses { all.split() } else { (all.0.clone(), all.0.clone()) };
        NodeSettings {
            masquerade_v4: v4.map(Ipv4::from).unwrap_or_default(),
            masquerade_v6: v6.map(Ipv6::from).unwrap_or_default(),
            further: reconciler.further().to_vec(),
            node_ports: self.config.node_ports.0.clone(),
            source_ports,
            cross_ports,
            masquerade_all: self.config.masquerade.all,
            masquerade_local_backends: self.config.masquerade.local_backends,
        }
    }

    /// What found no room is told once and tried again.
    fn report(&mut self, overflows: Vec<Overflow>) {
        let overflows: BTreeSet<Overflow> = overflows.into_iter().collect();
        let news: Vec<_> = overflows.difference(&self.overflows).collect();
        for overflow in &news {
            error!("{overflow}");
        }
        let defects: Vec<_> = news.into_iter().filter_map(|overflow| self.reconciler.defect(overflow)).collect();
        self.account.record(&defects);
        if overflows.iter().any(|overflow| !overflow.is_compromise()) {
            self.retry_at = Some(Instant::now() + GRACE);
        }
        self.overflows = overflows;
    }

    /// Attaches if it is time to. Says whether that went well, or, where it was not, whether it ever has. What cannot be attached does not
    /// keep tables from being written.
    pub(super) fn attach(&mut self) -> bool {
        let now = Instant::now();
        let Some(network) = self.network.as_ref().filter(|_| self.attach_at.is_some_and(|at| at <= now)) else {
            return self.attached != Attached::Nothing || self.stage == Stage::InSync;
        };
        self.attach_at = Some(now + self.config.sync_period);
        self.dataplane.reserve_ports(&self.config.source_ports.0);
        match self.dataplane.attach(network) {
            Ok(report) => {
                self.attached = Attached::Everything;
                self.account.note_attach_failures(report.failures());
                if self.stage != Stage::InSync && report.lacks_programs() {
                    self.attached = Attached::Part;
                    self.attach_at = Some(now + ATTACH_AGAIN);
                    warn!("not ready before what cannot be attached is: trying again in {ATTACH_AGAIN:?}");
                }
            }
            Err(error) => {
                self.attached = Attached::Nothing;
                error!("{error}; trying again in {:?}", self.config.sync_period);
            }
        }
        self.attached != Attached::Nothing
    }

    /// Goes on with taking another proxy's place. The first look is waited for: until then nothing is ours.
    fn take_over(&mut self) -> Result<(), dataplane::Error> {
        if self.takeover.is_begun() && self.network.is_some() {
            // Without it, those that programs have seen go on.
            let found = takeover::to_services(look().unwrap_or_default(), self.reconciler.tables());
            self.absorb_translated(&found)?;
            if self.takeover.follows() && found.is_empty() {
                // Somebody began to speak to a Service that nobody serves, or another proxy's first connection has just begun.
                std::thread::sleep(CONFIRMED);
                self.new_foreign = look();
            }
        }
        if let Some(found) = self.new_foreign.take() {
            let found = takeover::to_services(found, self.reconciler.tables());
            self.absorb_translated(&found)?;
        }
        let follows = self.takeover.follows();
        self.watches.foreign.send_if_modified(|wanted| std::mem::replace(wanted, follows) != follows);
        Ok(())
    }

    fn absorb_translated(&mut self, found: &BTreeSet<TranslatedConnection>) -> Result<(), dataplane::Error> {
        let addresses = self.network.iter().flat_map(|network| &network.addresses);
        let own = addresses.map(|address| address.net.addr()).collect();
        let connections = self.takeover.absorb(&mut self.dataplane, found, &own)?;
        self.account.note_foreign(connections);
        Ok(())
    }

    fn prune(&mut self) -> Result<(), dataplane::Error> {
        if self.prune_at.is_some_and(|at| at <= Instant::now()) {
            self.dataplane.prune_filters()?;
            self.prune_at = None;
        }
        Ok(())
    }

    fn announce(&mut self) {
        self.account.set_ready();
        if std::mem::replace(&mut self.stage, Stage::InSync) != Stage::InSync {
            let tables = self.reconciler.tables();
            let frontends = tables.v4.services.len() + tables.v6.services.len();
            let backends = tables.v4.backends.len() + tables.v6.backends.len();
            info!(frontends, backends, "in sync");
        }
    }

    fn fail(&mut self, error: &dataplane::Error) {
        self.is_blind = true;
        self.account.note_failure();
        self.failed_at = Instant::now();
        self.failures = self.failures.saturating_add(1);
        let wait = RETRY.0.saturating_mul(1 << self.failures.min(16)).min(RETRY.1);
        self.retry_at = Some(Instant::now() + wait);
        error!("{error}; trying again in {wait:?}");
    }
}
