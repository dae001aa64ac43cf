//! What the agent counts of itself, under the names kube-proxy gives the same things, so that dashboards made for it go
//! on working. In: what the loop and the health server say. Out: a registry that is read when it is asked for.
//!
//! Cloning is cheap and every clone counts into the same numbers.

mod kernel;
mod labels;
mod owners;
mod process;
mod server;
mod watch;

use std::{
    sync::{Arc, atomic::AtomicU64},
    time::Duration,
};

use axum::http::StatusCode;
use jiff::Timestamp;
use prometheus_client::{
    metrics::{
        counter::Counter,
        family::{Family, MetricConstructor},
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::Registry,
};

pub(crate) use self::kernel::named;
use self::labels::{CodeLabel, FamilyLabel, OutcomeLabel, PolicyLabel};
pub use self::{
    kernel::{Kernel, PerBackend},
    labels::Policy,
    owners::Owners,
    server::{configuration, router},
    watch::Watch,
};
use crate::{dataplane::Swept, progress::IpFamily};

type Seconds = Family<FamilyLabel, Gauge<f64, AtomicU64>>;
type Durations = Family<FamilyLabel, Histogram, Buckets>;

/// Makes a histogram.
#[derive(Clone, Copy, Debug)]
enum Buckets {
    /// Of a sync: from a millisecond to 16 seconds.
    Sync,
    /// From an endpoint's change to its being in the kernel: from a quarter of a second to five minutes.
    NetworkProgramming,
}

impl MetricConstructor<Histogram> for Buckets {
    fn new_metric(&self) -> Histogram {
        match self {
            Self::Sync => Histogram::new(exponential_buckets(0.001, 2.0, 15)),
            Self::NetworkProgramming => Histogram::new(network_programming_buckets()),
        }
    }
}

fn network_programming_buckets() -> impl Iterator<Item = f64> {
    let seconds = (1..60).chain((60..120).step_by(5)).chain((120..=300).step_by(30));
    [0.25, 0.5].into_iter().chain(seconds.map(f64::from))
}

/// The numbers.
#[derive(Clone, Debug)]
pub struct Metrics {
    handles: Arc<Handles>,
}

#[derive(Debug)]
struct Handles {
    network_programming: Durations,
    sync: Durations,
    full_sync: Durations,
    partial_sync: Durations,
    last_synced: Seconds,
    last_queued: Seconds,
    pending_since: Gauge<f64, AtomicU64>,
    service_changes: Changes,
    endpoint_changes: Changes,
    no_local_endpoints: Family<PolicyLabel, Gauge>,
    healthz: Family<CodeLabel, Counter>,
    livez: Family<CodeLabel, Counter>,
    reconciler_deleted: Family<FamilyLabel, Counter>,
    reconciler_sync: Durations,
    api_events: Family<OutcomeLabel, Counter>,
    foreign_connections: Gauge,
    attach_failures: Gauge,
    watches: watch::Watches,
}

/// Changes of one kind of object.
#[derive(Debug, Default)]
struct Changes {
    pending: Family<FamilyLabel, Gauge>,
    total: Family<FamilyLabel, Counter>,
}

impl Changes {
    fn count(&self, changes: usize) {
        for family in IpFamily::ALL {
            self.pending.get_or_create(&family.into()).inc_by(changes.try_into().unwrap_or(i64::MAX));
            self.total.get_or_create(&family.into()).inc_by(changes as u64);
        }
    }

    fn settle(&self) {
        for family in IpFamily::ALL {
            self.pending.get_or_create(&family.into()).set(0);
        }
    }
}

impl Default for Metrics {
    fn default() -> Self {
        let handles = Handles {
            network_programming: Family::new_with_constructor(Buckets::NetworkProgramming),
            sync: Family::new_with_constructor(Buckets::Sync),
            full_sync: Family::new_with_constructor(Buckets::Sync),
            partial_sync: Family::new_with_constructor(Buckets::Sync),
            last_synced: Family::default(),
            last_queued: Family::default(),
            pending_since: Gauge::default(),
            service_changes: Changes::default(),
            endpoint_changes: Changes::default(),
            no_local_endpoints: Family::default(),
            healthz: Family::default(),
            livez: Family::default(),
            reconciler_deleted: Family::default(),
            reconciler_sync: Family::new_with_constructor(Buckets::Sync),
            api_events: Family::default(),
            foreign_connections: Gauge::default(),
            attach_failures: Gauge::default(),
            watches: watch::Watches::default(),
        };
        handles.begin();
        Self { handles: Arc::new(handles) }
    }
}

impl Handles {
    /// Everything is there from the start, with nothing in it, so that its absence means something.
    fn begin(&self) {
        for family in IpFamily::ALL {
            let label = family.into();
            for durations in
                [&self.network_programming, &self.sync, &self.full_sync, &self.partial_sync, &self.reconciler_sync]
            {
                drop(durations.get_or_create(&label));
            }
            drop(self.last_synced.get_or_create(&label));
            drop(self.last_queued.get_or_create(&label));
            drop(self.reconciler_deleted.get_or_create(&label));
            for changes in [&self.service_changes, &self.endpoint_changes] {
                drop(changes.pending.get_or_create(&label));
                drop(changes.total.get_or_create(&label));
            }
            for policy in Policy::ALL {
                drop(self.no_local_endpoints.get_or_create(&PolicyLabel::new(family, policy)));
            }
        }
        for outcome in OutcomeLabel::ALL {
            drop(self.api_events.get_or_create(&outcome));
        }
    }

    fn register(&self, registry: &mut Registry) {
        let durations = [
            ("network_programming", "from an endpoint's change to its being in the kernel", &self.network_programming),
            ("sync_proxy_rules", "of a sync", &self.sync),
            ("sync_full_proxy_rules", "of a sync that compared everything", &self.full_sync),
            ("sync_partial_proxy_rules", "of a sync of what had changed", &self.partial_sync),
            (
                "conntrack_reconciler_sync",
                "of looking for sockets and UDP flows whose backend has gone",
                &self.reconciler_sync,
            ),
        ];
        for (name, what, durations) in durations {
            let name = format!("kubeproxy_{name}_duration_seconds");
            registry.register(name, format!("Seconds {what}"), durations.clone());
        }
        self.register_syncs(registry);
        let (deleted, local) = (self.reconciler_deleted.clone(), self.no_local_endpoints.clone());
        registry.register(
            "kubeproxy_conntrack_reconciler_deleted_entries",
            "Sockets ended because their backend has gone, and entries taken out of UDP flows whose Service has lost it",
            deleted,
        );
        let what = "Service ports whose policy is Local and that have no endpoint on this node";
        registry.register("kubeproxy_sync_proxy_rules_no_local_endpoints_total", what, local);
        registry.register("kubeproxy_proxy_healthz", "Answers to /healthz", self.healthz.clone());
        registry.register("kubeproxy_proxy_livez", "Answers to /livez", self.livez.clone());
        registry.register("sluice_api_events", "Events about objects, for the API server", self.api_events.clone());
        let what = "Connections that another proxy of this node has had since before the takeover";
        registry.register("sluice_foreign_connections", what, self.foreign_connections.clone());
        let what = "Programs that could not be attached in the last round; the log names them";
        registry.register("sluice_attach_failures", what, self.attach_failures.clone());
        self.watches.register(registry);
    }

    fn register_syncs(&self, registry: &mut Registry) {
        let name = |rest: &str| format!("kubeproxy_sync_proxy_rules_{rest}");
        let (synced, queued) = (self.last_synced.clone(), self.last_queued.clone());
        registry.register(name("last_timestamp_seconds"), "When the kernel followed last", synced);
        registry.register(name("last_queued_timestamp_seconds"), "When something to write came last", queued);
        let what = "Since when the oldest change waits to be written, 0 if none does";
        registry.register("sluice_sync_pending_since_timestamp_seconds", what, self.pending_since.clone());
        for (kind, changes) in [("service", &self.service_changes), ("endpoint", &self.endpoint_changes)] {
            let (pending, total) = (changes.pending.clone(), changes.total.clone());
            registry.register(name(&format!("{kind}_changes_pending")), "Changes not yet in the kernel", pending);
            registry.register(name(&format!("{kind}_changes")), "Changes seen", total);
        }
    }
}

impl Metrics {
    /// Everything that is to be read when somebody asks.
    pub fn registry(&self) -> Registry {
        let mut registry = Registry::default();
        self.handles.register(&mut registry);
        registry.register_collector(Box::new(process::Process));
        registry
    }

    /// And of the kernel's maps.
    pub fn registry_with(&self, kernel: Arc<Kernel>) -> Registry {
        let mut registry = self.registry();
        registry.register_collector(Box::new(kernel));
        registry
    }

    /// `/healthz` was answered.
    pub fn count_healthz(&self, code: StatusCode) {
        self.handles.healthz.get_or_create(&code.into()).inc();
    }

    /// `/livez` was answered.
    pub fn count_livez(&self, code: StatusCode) {
        self.handles.livez.get_or_create(&code.into()).inc();
    }

    /// A resource of the API server is going to be watched, by its name in the API's paths.
    pub fn watch(&self, resource: &'static str) -> Watch {
        self.handles.watches.begin(resource)
    }

    /// An Event was offered to the API server.
    pub fn count_event(&self, is_published: bool) {
        let outcome = if is_published { OutcomeLabel::PUBLISHED } else { OutcomeLabel::FAILED };
        self.handles.api_events.get_or_create(&outcome).inc();
    }

    /// An Event was not offered to the API server, because there were too many.
    pub fn count_suppressed_event(&self) {
        self.handles.api_events.get_or_create(&OutcomeLabel::SUPPRESSED).inc();
    }

    /// So many programs are not where they should be.
    pub fn set_attach_failures(&self, programs: usize) {
        self.handles.attach_failures.set(programs.try_into().unwrap_or(i64::MAX));
    }

    /// So many connections of another proxy go on.
    pub fn set_foreign_connections(&self, connections: usize) {
        self.handles.foreign_connections.set(connections.try_into().unwrap_or(i64::MAX));
    }

    /// So many Services have changed.
    pub fn count_service_changes(&self, changes: usize) {
        self.handles.service_changes.count(changes);
    }

    /// So many EndpointSlices have changed.
    pub fn count_endpoint_changes(&self, changes: usize) {
        self.handles.endpoint_changes.count(changes);
    }

    /// Something is to be written.
    pub fn queued(&self, at: Timestamp) {
        for family in IpFamily::ALL {
            self.handles.last_queued.get_or_create(&family.into()).set(at.as_duration().as_secs_f64());
        }
        if self.handles.pending_since.get() <= 0.0 {
            self.handles.pending_since.set(at.as_duration().as_secs_f64());
        }
    }

    /// The kernel has everything. Both families are written in one go.
    pub fn synced(&self, took: Duration, is_full: bool, at: Timestamp) {
        let handles = &*self.handles;
        let kind = if is_full { &handles.full_sync } else { &handles.partial_sync };
        for family in IpFamily::ALL {
            let label = family.into();
            handles.sync.get_or_create(&label).observe(took.as_secs_f64());
            kind.get_or_create(&label).observe(took.as_secs_f64());
            handles.last_synced.get_or_create(&label).set(at.as_duration().as_secs_f64());
        }
        handles.pending_since.set(0.0);
        handles.service_changes.settle();
        handles.endpoint_changes.settle();
    }

    /// The sockets whose backends may have gone were looked at.
    pub fn swept(&self, swept: Swept) {
        let deleted = swept.ended.into_iter().zip(swept.forgotten).map(|(ended, forgotten)| ended + forgotten);
        for (family, deleted) in IpFamily::ALL.into_iter().zip(deleted) {
            let label = family.into();
            self.handles.reconciler_sync.get_or_create(&label).observe(swept.took.as_secs_f64());
            self.handles.reconciler_deleted.get_or_create(&label).inc_by(deleted as u64);
        }
    }

    /// An endpoint's change is in the kernel.
    pub fn programmed(&self, family: IpFamily, after: Duration) {
        self.handles.network_programming.get_or_create(&family.into()).observe(after.as_secs_f64());
    }

    /// So many Service ports have no endpoint where their policy wants one.
    pub fn set_no_local_endpoints(&self, family: IpFamily, policy: Policy, count: usize) {
        let gauge = self.handles.no_local_endpoints.get_or_create(&PolicyLabel::new(family, policy));
        gauge.set(count.try_into().unwrap_or(i64::MAX));
    }
}

/// Every name there is, with a series of each.
#[cfg(test)]
pub(crate) fn everything() -> String {
    let metrics = Metrics::default();
    metrics.count_healthz(StatusCode::OK);
    metrics.count_livez(StatusCode::OK);
    drop(metrics.watch("services"));
    let mut registry = metrics.registry();
    registry.register_collector(Box::new(kernel::sample()));
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry).unwrap_or_default();
    text
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use jiff::Timestamp;
    use prometheus_client::encoding::text::encode;

    use super::{Metrics, network_programming_buckets};

    #[test]
    fn the_buckets_of_network_programming_are_those_of_kube_proxy() {
        let buckets: Vec<f64> = network_programming_buckets().collect();
        assert_eq!(buckets.len(), 2 + 59 + 12 + 7);
        assert_eq!((buckets[2], buckets[60], buckets[61], buckets[62]), (1.0, 59.0, 60.0, 65.0));
        assert_eq!(buckets[72..75], [115.0, 120.0, 150.0]);
        assert_eq!(buckets.last(), Some(&300.0));
    }

    #[test]
    fn what_waits_has_waited_since_its_first_attempt() {
        let metrics = Metrics::default();
        let said = || {
            let mut text = String::new();
            encode(&mut text, &metrics.registry()).unwrap();
            let line = text.lines().find(|line| line.starts_with("sluice_sync_pending_since_timestamp_seconds "));
            line.unwrap().rsplit(' ').next().unwrap().parse::<f64>().unwrap()
        };
        let at = |second| Timestamp::from_second(second).unwrap();
        assert!(said() <= 0.0);
        metrics.queued(at(7));
        metrics.queued(at(9));
        assert!((said() - 7.0).abs() < 0.5);
        metrics.synced(Duration::ZERO, true, at(11));
        assert!(said() <= 0.0);
        metrics.queued(at(13));
        assert!((said() - 13.0).abs() < 0.5);
    }

    #[test]
    fn every_name_of_kube_proxy_is_there_from_the_start() {
        let metrics = Metrics::default();
        metrics.count_healthz(axum::http::StatusCode::OK);
        metrics.count_livez(axum::http::StatusCode::SERVICE_UNAVAILABLE);
        let mut text = String::new();
        encode(&mut text, &metrics.registry()).unwrap();
        let family = "{ip_family=\"IPv6\"}";
        let expected = [
            format!("kubeproxy_network_programming_duration_seconds_count{family} 0"),
            format!("kubeproxy_sync_proxy_rules_duration_seconds_count{family} 0"),
            format!("kubeproxy_sync_full_proxy_rules_duration_seconds_count{family} 0"),
            format!("kubeproxy_sync_partial_proxy_rules_duration_seconds_count{family} 0"),
            format!("kubeproxy_sync_proxy_rules_last_timestamp_seconds{family} 0"),
            format!("kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds{family} 0"),
            format!("kubeproxy_sync_proxy_rules_service_changes_pending{family} 0"),
            format!("kubeproxy_sync_proxy_rules_service_changes_total{family} 0"),
            format!("kubeproxy_sync_proxy_rules_endpoint_changes_pending{family} 0"),
            format!("kubeproxy_sync_proxy_rules_endpoint_changes_total{family} 0"),
            format!("kubeproxy_conntrack_reconciler_deleted_entries_total{family} 0"),
            format!("kubeproxy_conntrack_reconciler_sync_duration_seconds_count{family} 0"),
            "kubeproxy_sync_proxy_rules_no_local_endpoints_total{ip_family=\"IPv4\",traffic_policy=\"external\"} 0"
                .into(),
            "kubeproxy_proxy_healthz_total{code=\"200\"} 1".into(),
            "kubeproxy_proxy_livez_total{code=\"503\"} 1".into(),
            "process_resident_memory_bytes ".into(),
            "process_cpu_seconds_total ".into(),
            "process_start_time_seconds ".into(),
            "process_open_fds ".into(),
        ];
        for line in expected {
            assert!(text.contains(&format!("\n{line}")), "{line}\n{text}");
        }
    }
}
