//! What the agent says about itself to the node, to load balancers and to whoever installs it: `/healthz`, `/livez` and
//! `/readyz` (KEP-3836). In: [`Progress`]. Out: HTTP. An API server that cannot be reached is no reason to fail: what is
//! known goes on being served.

mod listeners;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    Router,
    extract::State,
    http::{HeaderName, StatusCode, header},
    routing::get,
};
use jiff::Timestamp;
use serde_json::{Value, json};

pub(crate) use self::listeners::Listeners;
use crate::{
    metrics::Metrics,
    progress::{Health, IpFamily, Progress},
};

/// What an agent that has never written says: the zero time of Go, which readers of kube-proxy's body know.
const NEVER: &str = "0001-01-01T00:00:00Z";

/// Headers of every answer.
const HEADERS: [(HeaderName, &str); 2] =
    [(header::CONTENT_TYPE, "application/json"), (header::X_CONTENT_TYPE_OPTIONS, "nosniff")];

type Answer = (StatusCode, [(HeaderName, &'static str); 2], String);

/// How long an update may wait, given how often everything is written at the latest.
pub fn patience(sync_period: Duration) -> Duration {
    sync_period * 2
}

#[derive(Clone, Debug)]
struct Sources {
    progress: Arc<Progress>,
    metrics: Metrics,
}

/// The paths.
pub fn router(progress: Arc<Progress>, metrics: Metrics) -> Router {
    Router::new()
        .route("/healthz", get(healthz))
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .with_state(Sources { progress, metrics })
}

/// Whether a load balancer should send traffic here.
async fn healthz(State(sources): State<Sources>) -> Answer {
    let health = sources.progress.health(Instant::now());
    let is_well = health.is_healthy && health.is_node_eligible;
    let code = code(is_well);
    sources.metrics.count_healthz(code);
    let mut body = body(&health, is_well, Timestamp::now());
    body["nodeEligible"] = json!(health.is_node_eligible);
    (code, HEADERS, body.to_string())
}

/// Whether the agent should be started anew. What becomes of the node is no reason.
async fn livez(State(sources): State<Sources>) -> Answer {
    let health = sources.progress.health(Instant::now());
    let code = code(health.is_healthy);
    sources.metrics.count_livez(code);
    (code, HEADERS, body(&health, health.is_healthy, Timestamp::now()).to_string())
}

/// Whether the kernel holds a complete picture.
async fn readyz(State(sources): State<Sources>) -> Answer {
    let is_ready = sources.progress.health(Instant::now()).is_ready;
    (code(is_ready), HEADERS, json!({"ready": is_ready}).to_string())
}

fn code(is_well: bool) -> StatusCode {
    if is_well { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }
}

/// A healthy agent has always been updated just now: its readers, older than this rule, look whether that is recent.
fn body(health: &Health, is_well: bool, now: Timestamp) -> Value {
    let text = |at: Option<Timestamp>| at.map_or_else(|| NEVER.to_owned(), |at| at.to_string());
    let updated = health.families.iter().filter_map(|family| family.updated).max();
    let status: serde_json::Map<String, Value> = IpFamily::ALL
        .into_iter()
        .zip(&health.families)
        .map(|(family, status)| {
            let status = json!({"lastUpdated": text(status.updated), "healthy": status.is_healthy});
            (family.name().to_owned(), status)
        })
        .collect();
    json!({
        "lastUpdated": if is_well { now.to_string() } else { text(updated) },
        "currentTime": now.to_string(),
        "healthy": health.is_healthy,
        "status": status,
    })
}
