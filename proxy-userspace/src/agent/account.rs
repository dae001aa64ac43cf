//! What the loop tells others: how far it is, and what it counts. Whoever answers questions about it runs on tasks of
//! its own and never waits for the loop.

use std::{sync::Arc, time::Duration};

use jiff::Timestamp;
use tokio::time::Instant;

use crate::{
    config::Config,
    health, http,
    metrics::Metrics,
    progress::{IpFamily, Progress},
    source::{Change, Event},
};

/// What others may know of the loop.
#[derive(Debug)]
pub(super) struct Account {
    progress: Arc<Progress>,
    metrics: Metrics,
    /// Something has changed that the kernel does not have yet.
    has_news: bool,
}

impl Account {
    /// Starts to answer.
    pub(super) fn open(config: &Config) -> Self {
        let progress = Arc::new(Progress::new(health::patience(config.sync_period)));
        let metrics = Metrics::default();
        if let Some(address) = config.healthz {
            let router = health::router(Arc::clone(&progress), metrics.clone());
            tokio::spawn(http::serve_at(address, "/healthz, /livez and /readyz", router));
        }
        Self { progress, metrics, has_news: true }
    }

    /// A source has said something.
    pub(super) fn note(&mut self, event: &Event) {
        match event {
            Event::Services(change) => self.metrics.count_service_changes(size(change)),
            Event::EndpointSlices(change) => self.metrics.count_endpoint_changes(size(change)),
            Event::Nodes(_) | Event::ServiceCidrs(_) => {}
        }
        self.note_news();
    }

    /// Something else has changed that the kernel must have.
    pub(super) fn note_news(&mut self) {
        self.has_news = true;
    }

    /// What is new is going to be written now, or waits for the next attempt.
    pub(super) fn begin(&self, now: Instant) {
        if self.has_news {
            self.progress.queue(now.into_std());
            self.metrics.queued(Timestamp::now());
        }
    }

    /// Everything is in the kernel.
    pub(super) fn finish(&mut self, took: Duration, is_full: bool) {
        if std::mem::take(&mut self.has_news) {
            let now = Timestamp::now();
            for family in IpFamily::ALL {
                self.progress.finish(family, now);
            }
            self.metrics.synced(took, is_full, now);
        }
        self.progress.set_ready();
    }

    /// Whether load balancers may send traffic to this node.
    pub(super) fn set_node_eligible(&self, is_eligible: bool) {
        self.progress.set_node_eligible(is_eligible);
    }
}

fn size<T>(change: &Change<T>) -> usize {
    match change {
        Change::Replace(objects) => objects.len(),
        Change::Apply(_) | Change::Delete(_) => 1,
    }
}
