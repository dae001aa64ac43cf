//! Lists, in pages. All pages of a list are of the version of its first one.

use std::{sync::Arc, time::Duration};

use anyhow::{Context as _, Result};
use axum::{
    body::{Body, Bytes},
    response::Response,
};
use base64::{Engine as _, engine::general_purpose::STANDARD_NO_PAD};
use futures::{StreamExt as _, stream};
use serde_json::{Value, json};

use super::{
    Shared,
    fault::Fault,
    resource::{Query, Resource},
    status,
};

/// Where a list goes on.
struct Token {
    version: u64,
    start: String,
}

impl Token {
    fn encode(&self) -> String {
        STANDARD_NO_PAD.encode(json!({"v": "meta.k8s.io/v1", "rv": self.version, "start": self.start}).to_string())
    }

    fn decode(text: &str) -> Result<Self> {
        let bytes = STANDARD_NO_PAD.decode(text).context("illegal base64 data")?;
        let token: Value = serde_json::from_slice(&bytes)?;
        let start = token["start"].as_str().context("no start")?.to_owned();
        Ok(Self { version: token["rv"].as_u64().context("no rv")?, start })
    }
}

pub(super) fn answer(shared: &Arc<Shared>, resource: Resource, query: &Query, fault: Option<Fault>) -> Response {
    let token = match query.continue_token.as_deref().map(Token::decode).transpose() {
        Ok(token) => token,
        Err(error) => return status::bad_request(&error.context("invalid continue token")),
    };
    let Some(list) = page(shared, resource, query, token) else {
        return status::expired(
            "The provided continue parameter is too old to display a consistent list result. You can start a new list without the continue parameter.",
        );
    };
    match fault {
        Some(Fault::BreakOff) => broken(&list, false),
        Some(Fault::Stall) => broken(&list, true),
        _ => status::response(200, &list),
    }
}

fn page(shared: &Shared, resource: Resource, query: &Query, token: Option<Token>) -> Option<Value> {
    let mut world = shared.world();
    let limit = [query.limit, world.largest_page].into_iter().flatten().min().unwrap_or(usize::MAX);
    let (version, start) = match token {
        Some(token) => (token.version, token.start),
        None => (world.store.keep(resource), String::new()),
    };
    let objects = world.store.kept(resource, version)?;
    let mut matching = objects.range(start..).filter(|(_, object)| query.selector.matches(object));
    let items: Vec<(&String, Value)> = matching.by_ref().take(limit).map(|(key, object)| (key, item(object))).collect();
    let remaining = matching.count();
    let mut metadata = json!({"resourceVersion": version.to_string()});
    if let (Some((key, _)), true) = (items.last(), remaining > 0) {
        metadata["continue"] = json!(Token { version, start: format!("{key}\0") }.encode());
        if query.selector.is_empty() {
            metadata["remainingItemCount"] = json!(remaining);
        }
    }
    let items: Vec<Value> = items.into_iter().map(|(_, item)| item).collect();
    Some(json!({
        "kind": format!("{}List", resource.kind()),
        "apiVersion": resource.api_version(),
        "metadata": metadata,
        "items": items,
    }))
}

/// Items of a typed list do not name their kind.
fn item(object: &Value) -> Value {
    let mut item = object.clone();
    if let Some(fields) = item.as_object_mut() {
        fields.remove("kind");
        fields.remove("apiVersion");
    }
    item
}

/// The first half of the body, and then the end or nothing.
fn broken(list: &Value, stalls: bool) -> Response {
    let text = list.to_string();
    let half = Bytes::copy_from_slice(&text.as_bytes()[..text.len() / 2]);
    let rest = stream::once(async move {
        if stalls {
            std::future::pending::<()>().await;
        }
        // Long enough for the first half to be on its way: else both are one error.
        tokio::time::sleep(Duration::from_millis(20)).await;
        Err(std::io::Error::from(std::io::ErrorKind::ConnectionReset))
    });
    let mut response = status::response(200, &Value::Null);
    *response.body_mut() = Body::from_stream(stream::once(async { Ok(half) }).chain(rest));
    response
}
