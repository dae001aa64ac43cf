//! `/metrics`, `/proxyMode` and `/configz`, as kube-proxy has them. What they read of the kernel is read on a thread that
//! may wait.

use std::sync::Arc;

use axum::{
    Router,
    extract::State,
    http::{HeaderMap, HeaderName, StatusCode, header},
    routing::get,
};
use prometheus_client::{encoding::text::encode, registry::Registry};
use serde_json::{Value, json};
use tokio::task::spawn_blocking;

use crate::config::{Config, Source};

/// For those who ask for it.
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
/// For all others. Its readers understand the same text.
const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";

type Answer = (StatusCode, [(HeaderName, &'static str); 1], String);

#[derive(Clone, Debug)]
struct Sources {
    registry: Arc<Registry>,
    configuration: Arc<str>,
}

/// The paths.
pub fn router(registry: Registry, configuration: &Value) -> Router {
    Router::new()
        .route("/metrics", get(metrics))
        .route("/proxyMode", get(async || "sluice"))
        .route("/configz", get(configz))
        .with_state(Sources { registry: Arc::new(registry), configuration: configuration.to_string().into() })
}

async fn metrics(State(sources): State<Sources>, headers: HeaderMap) -> Answer {
    let accepted = headers.get(header::ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let kind = if accepted.contains("application/openmetrics-text") { OPEN_METRICS } else { TEXT };
    let text = spawn_blocking(move || {
        let mut text = String::new();
        encode(&mut text, &sources.registry).map(|()| text)
    });
    if let Ok(Ok(text)) = text.await {
        return (StatusCode::OK, [(header::CONTENT_TYPE, kind)], text);
    }
    let said = "the metrics could not be written down\n".to_owned();
    (StatusCode::INTERNAL_SERVER_ERROR, [(header::CONTENT_TYPE, TEXT)], said)
}

async fn configz(State(sources): State<Sources>) -> Answer {
    (StatusCode::OK, [(header::CONTENT_TYPE, "application/json")], sources.configuration.to_string())
}

/// The configuration that is in effect. It names files that hold secrets, and none of the secrets.
pub fn configuration(config: &Config) -> Value {
    let patterns = |patterns: &[crate::dataplane::DevicePattern]| -> Vec<String> {
        patterns.iter().map(ToString::to_string).collect()
    };
    let source = match &config.source {
        Source::Kubernetes(server) => {
            json!({"kubeconfig": server.kubeconfig, "master": server.urls.iter().map(|url| without_password(url)).collect::<Vec<_>>()})
        }
        Source::Files(directory) => json!({"files": directory}),
    };
    let dataplane = &config.dataplane;
    json!({"sluice": {
        "source": source,
        "hostname": config.node.name,
        "nodePortAddresses": config.node.node_port_addresses.to_string(),
        "nodePortRange": config.node_ports.to_string(),
        "sourcePortRange": config.source_ports.to_string(),
        "masqueradeAll": config.masquerade.all,
        "masqueradeLocalBackends": config.masquerade.local_backends,
        "healthzBindAddress": config.healthz,
        "metricsBindAddress": config.metrics,
        "syncPeriodSeconds": config.sync_period.as_secs_f64(),
        "pinPath": dataplane.pin_path,
        "cgroup": dataplane.cgroup,
        "socketLB": format!("{:?}", dataplane.socket_lb),
        "uplinkMode": format!("{:?}", dataplane.uplink_mode),
        "uplinks": patterns(&dataplane.uplinks),
        "podDevices": patterns(&dataplane.pod_devices),
        "flowTableSize": dataplane.flow_table.to_string(),
        "mapSizes": dataplane.sizes,
    }})
}

/// A URL without who asks and what with.
fn without_password(url: &str) -> String {
    match url.split_once("://") {
        Some((scheme, rest)) => {
            let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
            let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
            format!("{scheme}://{host}{path}")
        }
        None => url.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::without_password;

    #[test]
    fn a_password_in_a_url_is_not_told() {
        assert_eq!(without_password("https://name:secret@host:6443/path@x"), "https://host:6443/path@x");
        assert_eq!(without_password("https://host:6443"), "https://host:6443");
        assert_eq!(without_password("host"), "host");
    }
}
