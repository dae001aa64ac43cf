//! Events that are written: created, and counted up by a merge patch of their series. The rules are those of
//! pkg/apis/core/validation/events.go in Kubernetes.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use axum::{http::Method, response::Response};
use serde_json::Value;

use super::{resource::Verb, status};

/// A request that writes an Event.
#[derive(Debug)]
pub(super) enum Write {
    Create { namespace: String },
    Patch { namespace: String, name: String },
}

impl Write {
    pub(super) fn at(method: &Method, path: &str) -> Option<Self> {
        let parts: Vec<&str> = path.strip_prefix("/apis/events.k8s.io/v1/namespaces/")?.split('/').collect();
        match (method, &parts[..]) {
            (&Method::POST, [namespace, "events"]) => Some(Self::Create { namespace: (*namespace).into() }),
            (&Method::PATCH, [namespace, "events", name]) => {
                Some(Self::Patch { namespace: (*namespace).into(), name: (*name).into() })
            }
            _ => None,
        }
    }

    pub(super) fn verb(&self) -> Verb {
        match self {
            Self::Create { .. } => Verb::Create,
            Self::Patch { .. } => Verb::Patch,
        }
    }

    pub(super) fn answer(&self, events: &mut BTreeMap<String, Value>, body: &[u8]) -> Response {
        let body: Value = match serde_json::from_slice(body) {
            Ok(body) => body,
            Err(error) => return status::bad_request(&error.into()),
        };
        match self {
            Self::Create { namespace } => create(events, namespace, &body),
            Self::Patch { namespace, name } => match events.get_mut(&format!("{namespace}/{name}")) {
                Some(event) => patch(event, &body),
                None => status::not_found(name),
            },
        }
    }
}

fn create(events: &mut BTreeMap<String, Value>, namespace: &str, event: &Value) -> Response {
    if let Err(error) = check(namespace, event) {
        return status::invalid(&format!("{error:#}"));
    }
    let name = event["metadata"]["name"].as_str().unwrap_or_default();
    let key = format!("{namespace}/{name}");
    if events.contains_key(&key) {
        return status::response(409, &status::object(409, "AlreadyExists", name));
    }
    events.insert(key, event.clone());
    status::response(201, event)
}

fn patch(event: &mut Value, change: &Value) -> Response {
    let is_series_alone = change.as_object().is_some_and(|change| change.keys().eq(["series"]));
    if !is_series_alone || change["series"]["count"].as_u64().is_none_or(|count| count < 2) {
        return status::invalid(&format!("only a series of two or more can be patched, not {change}"));
    }
    event["series"] = change["series"].clone();
    status::response(200, event)
}

fn check(namespace: &str, event: &Value) -> Result<()> {
    let text = |field: &str| event[field].as_str().filter(|text| !text.is_empty());
    let metadata = &event["metadata"];
    ensure!(metadata["namespace"] == namespace, "metadata.namespace does not match that of the request");
    let regarding = event["regarding"]["namespace"].as_str().unwrap_or("default");
    ensure!(regarding == namespace, "regarding.namespace does not match metadata.namespace");
    ensure!(metadata["name"].as_str().is_some_and(is_subdomain), "metadata.name: {}", metadata["name"]);
    text("eventTime").context("eventTime is required")?;
    for (field, most) in [("reportingController", 253), ("reportingInstance", 128), ("action", 128), ("reason", 128)] {
        let length = text(field).with_context(|| format!("{field} is required"))?.len();
        ensure!(length <= most, "{field} can have at most {most} bytes");
    }
    ensure!(text("note").is_none_or(|note| note.len() <= 1024), "note can have at most 1024 bytes");
    ensure!(["Normal", "Warning"].map(Some).contains(&text("type")), "type has an invalid value");
    Ok(())
}

fn is_subdomain(name: &str) -> bool {
    let is_allowed = |letter: char| letter.is_ascii_lowercase() || letter.is_ascii_digit() || letter == '-';
    let is_label = |label: &str| !label.is_empty() && label.chars().all(is_allowed);
    name.len() <= 253
        && name.split('.').all(|label| is_label(label) && !label.starts_with('-') && !label.ends_with('-'))
}
