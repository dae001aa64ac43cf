//! What the loop tells others: how far it is, and what it counts. Whoever answers questions about it runs on tasks of
//! its own and never waits for the loop.

use std::{sync::Arc, time::Duration};

use jiff::Timestamp;
use proxy_common::names::ServiceName;
use tokio::time::Instant;
use tracing::{debug, warn};

use crate::{
    config::Config,
    dataplane::{self, Dataplane, Observer, Presence},
    desired::{NoLocal, Tables},
    diff::{KernelState, Plan},
    health,
    health_check::Subjects,
    http,
    metrics::{self, Kernel, Metrics, Policy},
    model::{Defect, Trigger},
    progress::{IpFamily, Progress},
    recorder::Recorder,
    source::{Change, Event},
};

/// Between two looks at how full the flow table is.
const EXPIRE: Duration = Duration::from_secs(10);

/// Between two counts of connections, for Services that go by them.
const RECOUNT: Duration = Duration::from_secs(30);

/// What others may know of the loop.
#[derive(Debug)]
pub(super) struct Account {
    progress: Arc<Progress>,
    metrics: Metrics,
    kernel: Arc<Kernel>,
    recorder: Recorder,
    presence: Arc<Presence>,
    started: Timestamp,
    /// For load balancers that ask about Services.
    listeners: health::Listeners,
    /// Something has changed that the kernel does not have yet.
    has_news: bool,
    /// The kernel was read anew, so that everything is compared.
    is_full: bool,
}

/// What answers whether the agent lives, from its first moment on.
#[derive(Debug)]
pub(super) struct Pulse {
    progress: Arc<Progress>,
    metrics: Metrics,
}

impl Pulse {
    /// Starts to answer. The programs are loaded after that, which may take longer than a kubelet waits.
    pub(super) fn begin(config: &Config, metrics: Metrics) -> Self {
        let progress = Arc::new(Progress::new(health::patience(config.sync_period)));
        if let Some(address) = config.healthz {
            let router = health::router(Arc::clone(&progress), metrics.clone());
            tokio::spawn(http::serve_at(address, "/healthz, /livez and /readyz", router));
        }
        Self { progress, metrics }
    }
}

impl Account {
    /// Starts to count, and to tell the API server.
    pub(super) fn open(
        config: &Config,
        client: Option<kube::Client>,
        Pulse { progress, metrics }: Pulse,
    ) -> Result<Self, dataplane::Error> {
        let kernel = Arc::new(Kernel::new(Observer::open(&config.dataplane.pin_path)?, config.metrics_per_backend));
        let presence =
            Presence::begin(&config.dataplane.pin_path, &config.node.algorithm.to_string(), config.confined)?;
        let presence = Arc::new(presence);
        if let Some(address) = config.metrics {
            let registry = metrics.registry_with(Arc::clone(&kernel));
            let router = metrics::router(registry, &metrics::configuration(config));
            tokio::spawn(http::serve_at(address, "/metrics, /proxyMode and /configz", router));
        }
        tokio::spawn(recount(Arc::clone(&kernel)));
        tokio::spawn(expire(Arc::clone(&kernel), Arc::clone(&presence)));
        let recorder = Recorder::start(client, &config.node.name, metrics.clone());
        let listeners = health::Listeners::new(Arc::clone(&progress));
        Ok(Self {
            progress,
            metrics,
            kernel,
            recorder,
            presence,
            started: Timestamp::now(),
            listeners,
            has_news: true,
            is_full: true,
        })
    }

    /// Counts the sweeps of the dataplane, from now on.
    pub(super) fn count_sweeps(&self, dataplane: &Dataplane) {
        let metrics = self.metrics.clone();
        dataplane.tell_sweeps(move |swept| metrics.swept(swept));
    }

    /// The kernel's state was read anew, and the tables are computed that it should hold.
    pub(super) fn adopt(&self, state: &KernelState, tables: &Tables) {
        let (v4, v6) = (self.kernel.owners(IpFamily::V4), self.kernel.owners(IpFamily::V6));
        let port_v4 = |frontend: &_| tables.v4.services.get(frontend).map(|service| Arc::clone(&service.port));
        let port_v6 = |frontend: &_| tables.v6.services.get(frontend).map(|service| Arc::clone(&service.port));
        v4.adopt(&state.v4, &port_v4, &self.kernel.counts(IpFamily::V4));
        v6.adopt(&state.v6, &port_v6, &self.kernel.counts(IpFamily::V6));
    }

    /// This is going to be written.
    pub(super) fn follow(&self, plan: &Plan, tables: &Tables) {
        let (v4, v6) = (self.kernel.owners(IpFamily::V4), self.kernel.owners(IpFamily::V6));
        let port_v4 = |frontend: &_| tables.v4.services.get(frontend).map(|service| Arc::clone(&service.port));
        let port_v6 = |frontend: &_| tables.v6.services.get(frontend).map(|service| Arc::clone(&service.port));
        v4.follow(&plan.v4, &port_v4, &self.kernel.counts(IpFamily::V4));
        v6.follow(&plan.v6, &port_v6, &self.kernel.counts(IpFamily::V6));
    }

    /// What Service ports are called that have lately got an index, of IPv4 and of IPv6.
    pub(super) fn unnamed(&self) -> [Vec<(u32, ServiceName)>; 2] {
        IpFamily::ALL.map(|family| self.kernel.owners(family).unnamed())
    }

    /// That is in the kernel.
    pub(super) fn note_named(&self) {
        for family in IpFamily::ALL {
            self.kernel.owners(family).forget_unnamed();
        }
    }

    /// A source has said something.
    pub(super) fn note(&mut self, event: &Event) {
        match event {
            Event::Services(change) => self.metrics.count_service_changes(size(change)),
            Event::EndpointSlices(change) => self.metrics.count_endpoint_changes(size(change)),
            Event::Nodes(_) | Event::Peers(_) | Event::ServiceCidrs(_) => {}
            Event::Defect(_) => return,
        }
        self.presence.hear();
        self.note_news();
    }

    /// This is wrong, and was not before.
    pub(super) fn tell(&mut self, defects: &[Defect]) {
        for defect in defects {
            warn!("{defect}");
        }
        self.record(defects);
    }

    /// The same, where the log has it already.
    pub(super) fn record(&mut self, defects: &[Defect]) {
        self.recorder.tell(defects, std::time::Instant::now());
    }

    /// Answers load balancers that ask about these Services.
    pub(super) fn answer_for(&mut self, subjects: Option<Subjects>, now: Instant) {
        let defects = match subjects {
            Some(subjects) => self.listeners.update(subjects, now),
            None => self.listeners.retry(now),
        };
        self.tell(&defects);
    }

    /// When there is something to do here even if nothing happens.
    pub(super) fn wakes_at(&self) -> Option<Instant> {
        self.listeners.retry_at()
    }

    /// Something else has changed that the kernel must have.
    pub(super) fn note_news(&mut self) {
        self.has_news = true;
    }

    /// The kernel's state is not known any more.
    pub(super) fn note_failure(&mut self) {
        self.has_news = true;
        self.is_full = true;
        say(self.presence.fail());
    }

    /// What is new is going to be written now, or waits for the next attempt.
    pub(super) fn begin(&self, now: Instant) {
        if self.has_news {
            self.progress.queue(now.into_std());
            self.metrics.queued(Timestamp::now());
        }
    }

    /// Changes of endpoints are in the kernel. What was made before the agent started it could not be quick about.
    pub(super) fn note_programmed(&self, triggers: &[Trigger]) {
        let now = Timestamp::now();
        for Trigger { is_ipv4, at } in triggers.iter().filter(|trigger| trigger.at >= self.started) {
            let family = if *is_ipv4 { IpFamily::V4 } else { IpFamily::V6 };
            self.metrics.programmed(family, now.duration_since(*at).try_into().unwrap_or_default());
        }
    }

    /// So many ports of IPv4 and of IPv6 have no endpoint where their Service wants one.
    pub(super) fn note_no_local(&self, ports: [NoLocal; 2]) {
        for (family, NoLocal { internal, external }) in IpFamily::ALL.into_iter().zip(ports) {
            self.metrics.set_no_local_endpoints(family, Policy::Internal, internal);
            self.metrics.set_no_local_endpoints(family, Policy::External, external);
        }
    }

    /// Everything is in the kernel.
    pub(super) fn finish(&mut self, took: Duration) {
        let is_full = std::mem::take(&mut self.is_full);
        if std::mem::take(&mut self.has_news) {
            let now = Timestamp::now();
            for family in IpFamily::ALL {
                self.progress.finish(family, now);
            }
            self.metrics.synced(took, is_full, now);
            say(self.presence.sync());
        }
    }

    /// The kernel has held the first complete picture, and programs that go by it.
    pub(super) fn set_ready(&self) {
        self.progress.set_ready();
    }

    /// So many programs are not where they should be.
    pub(super) fn note_attach_failures(&self, programs: usize) {
        self.metrics.set_attach_failures(programs);
    }

    /// So many connections of another proxy go on.
    pub(super) fn note_foreign(&self, connections: usize) {
        self.metrics.set_foreign_connections(connections);
    }

    /// Whether load balancers may send traffic to this node.
    pub(super) fn set_node_eligible(&self, is_eligible: bool) {
        self.progress.set_node_eligible(is_eligible);
    }
}

/// What people read is not worth another attempt: the next time is soon.
fn say(said: Result<(), dataplane::Error>) {
    if let Err(error) = said {
        debug!("{error}");
    }
}

/// Corrects what the programs believe about how many connections backends have, for as long as the agent runs.
async fn recount(kernel: Arc<Kernel>) {
    loop {
        tokio::time::sleep(RECOUNT).await;
        let kernel = Arc::clone(&kernel);
        if let Ok(Err(error)) = tokio::task::spawn_blocking(move || kernel.recount()).await {
            warn!("connections could not be counted: {error}");
        }
    }
}

/// Takes flows out that are over when the flow table is nearly full, and says that the agent is there, for as long as it runs.
async fn expire(kernel: Arc<Kernel>, presence: Arc<Presence>) {
    loop {
        tokio::time::sleep(EXPIRE).await;
        say(presence.live());
        let kernel = Arc::clone(&kernel);
        match tokio::task::spawn_blocking(move || kernel.expire()).await {
            Ok(Err(error)) => warn!("flows that are over could not be taken out: {error}"),
            Ok(Ok(count)) if count > 0 => {
                debug!("the flow table was nearly full: {count} entries are out that were over");
            }
            _ => {}
        }
    }
}

fn size<T>(change: &Change<T>) -> usize {
    match change {
        Change::Replace(objects) => objects.len(),
        Change::Listed(_) | Change::Apply(_) | Change::Delete(_) => 1,
        Change::Begin | Change::End => 0,
    }
}
