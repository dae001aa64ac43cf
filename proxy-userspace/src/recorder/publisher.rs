//! Sends Events. One that was sent a while ago already is counted up instead, as one of a series.

use std::{collections::HashMap, time::Duration};

use k8s_openapi::{
    api::events::v1 as events,
    apimachinery::pkg::apis::meta::v1::MicroTime,
    jiff::{SignedDuration, Timestamp},
};
use kube::{
    Api, Client,
    api::{Patch, PatchParams, PostParams},
};
use serde_json::json;
use tokio::{sync::mpsc::Receiver, time::timeout};
use tracing::debug;

use super::report::Report;
use crate::metrics::Metrics;

/// An Event that happens again within this time is one of a series, as for client-go.
const SERIES: SignedDuration = SignedDuration::from_mins(6);
/// For an answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// Sends Events one after the other.
pub(super) struct Publisher {
    client: Client,
    node: String,
    metrics: Metrics,
    /// The last ones: no more than were let through in the time of a series.
    sent: HashMap<Report, Sent>,
}

/// An Event the server has.
struct Sent {
    name: String,
    count: i32,
    last: Timestamp,
}

impl Publisher {
    pub(super) fn new(client: Client, node: &str, metrics: Metrics) -> Self {
        Self { client, node: node.to_owned(), metrics, sent: HashMap::new() }
    }

    /// Sends what comes until nothing can come any more. Nothing is tried again.
    pub(super) async fn run(mut self, mut reports: Receiver<Report>) {
        while let Some(report) = reports.recv().await {
            let outcome = timeout(PATIENCE, self.publish(report)).await;
            match &outcome {
                Ok(Ok(())) => {}
                // The server repeats what the object says.
                Ok(Err(error)) => debug!("an Event is lost: {}", error.to_string().escape_debug()),
                Err(_) => debug!("an Event is lost: no answer"),
            }
            self.metrics.count_event(matches!(outcome, Ok(Ok(()))));
        }
    }

    async fn publish(&mut self, report: Report) -> Result<(), kube::Error> {
        let now = Timestamp::now();
        self.sent.retain(|_, sent| now.duration_since(sent.last) < SERIES);
        let events: Api<events::Event> = Api::namespaced(self.client.clone(), report.namespace());
        if let Some(sent) = self.sent.get_mut(&report) {
            let series = json!({"series": {"count": sent.count + 1, "lastObservedTime": MicroTime(now)}});
            match events.patch(&sent.name, &PatchParams::default(), &Patch::Merge(&series)).await {
                // The server forgets its Events after a while.
                Err(kube::Error::Api(status)) if status.code == 404 => {}
                Err(error) => return Err(error),
                Ok(_) => {
                    (sent.count, sent.last) = (sent.count + 1, now);
                    return Ok(());
                }
            }
        }
        let event = events.create(&PostParams::default(), &report.event(&self.node, now)).await?;
        self.sent.insert(report, Sent { name: event.metadata.name.unwrap_or_default(), count: 1, last: now });
        Ok(())
    }
}
