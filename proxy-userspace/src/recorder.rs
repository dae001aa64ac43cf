//! Tells the API server what is wrong with its objects, by Events of type Warning about them (events.k8s.io/v1). In:
//! defects. Out: requests, from a task of its own.
//!
//! Nothing waits for it. What comes too fast is left out and counted; what the server does not take is forgotten: the log
//! has all of it.

mod bucket;
mod publisher;
mod report;

use std::time::Instant;

use kube::Client;
use tokio::sync::mpsc::{self, Sender};
use tracing::warn;

use self::{bucket::Bucket, publisher::Publisher, report::Report};
use crate::{metrics::Metrics, model::Defect};

/// Reports that wait for the ones before them.
const QUEUE: usize = 64;

/// Takes defects in and lets so many of them through as an API server can bear from every node of a cluster.
#[derive(Debug)]
pub struct Recorder {
    /// None where there is no API server.
    queue: Option<Sender<Report>>,
    bucket: Bucket,
    /// It was said that some are left out.
    has_told: bool,
    metrics: Metrics,
}

impl Recorder {
    /// For a node of this name. Without a client it tells nobody.
    pub fn start(client: Option<Client>, node: &str, metrics: Metrics) -> Self {
        let queue = client.map(|client| {
            let (queue, reports) = mpsc::channel(QUEUE);
            tokio::spawn(Publisher::new(client, node, metrics.clone()).run(reports));
            queue
        });
        Self { queue, bucket: Bucket::new(Instant::now()), has_told: false, metrics }
    }

    /// Tells of what is new.
    pub fn tell(&mut self, defects: &[Defect], now: Instant) {
        let Some(queue) = &self.queue else { return };
        if self.bucket.is_full(now) {
            self.has_told = false;
        }
        for report in report::reports(defects) {
            if self.bucket.take(now) && queue.try_send(report).is_ok() {
                continue;
            }
            self.metrics.count_suppressed_event();
            if !std::mem::replace(&mut self.has_told, true) {
                warn!("too much is wrong for an Event each: some are left out, this log has all of it");
            }
        }
    }
}
