//! Watches: one JSON object per line, for as long as the client asked.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use axum::{
    body::{Body, Bytes},
    response::Response,
};
use futures::stream;
use serde_json::{Value, json};
use tokio::{
    sync::watch::Receiver,
    time::{Instant, timeout_at},
};

use super::{
    Shared,
    fault::Fault,
    resource::{Query, Resource},
    status,
    store::{Happened, What},
};

/// A real server chooses at random between 30 and 60 minutes.
const DEFAULT_TIMEOUT: Duration = Duration::from_hours(1);

/// One watch.
struct Watch {
    shared: Arc<Shared>,
    news: Receiver<u64>,
    resource: Resource,
    query: Query,
    /// Everything up to here was sent.
    version: u64,
    epoch: u64,
    deadline: Instant,
    fault: Option<Fault>,
    waiting: VecDeque<Value>,
    /// Nothing is sent after what waits.
    is_over: bool,
}

pub(super) fn answer(shared: &Arc<Shared>, resource: Resource, query: &Query, fault: Option<Fault>) -> Response {
    if query.wants_initial_events && shared.world().refuses_streaming_lists {
        return status::no_streaming_lists();
    }
    let mut watch = Watch::new(shared, resource, query, fault);
    watch.begin();
    let lines = stream::unfold(watch, |mut watch| async move { Some((watch.next().await?, watch)) });
    let mut response = status::response(200, &Value::Null);
    *response.body_mut() = Body::from_stream(lines);
    response
}

impl Watch {
    fn new(shared: &Arc<Shared>, resource: Resource, query: &Query, fault: Option<Fault>) -> Self {
        let timeout = query.timeout_seconds.map_or(DEFAULT_TIMEOUT, Duration::from_secs);
        Self {
            news: shared.version.subscribe(),
            shared: Arc::clone(shared),
            resource,
            query: query.clone(),
            version: 0,
            epoch: shared.world().watch_epoch,
            deadline: Instant::now() + timeout,
            fault,
            waiting: VecDeque::new(),
            is_over: false,
        }
    }

    /// From a version on, from what is there now, or an error.
    fn begin(&mut self) {
        // What happened before this watch began may be news to it.
        self.news.mark_changed();
        let world = self.shared.world();
        let asked: u64 = self.query.resource_version.parse().unwrap_or(0);
        if asked > 0 && !world.store.remembers(asked) {
            let message = format!("too old resource version: {asked} ({})", world.store.compacted());
            self.waiting.push_back(json!({"type": "ERROR", "object": status::object(410, "Expired", &message)}));
            self.is_over = true;
            return;
        }
        self.version = if asked == 0 || self.query.wants_initial_events { world.store.version() } else { asked };
        if asked > 0 && !self.query.wants_initial_events {
            return;
        }
        let objects = world.store.all(self.resource);
        drop(world);
        let matching = objects.values().filter(|object| self.query.selector.matches(object));
        self.waiting.extend(matching.map(|object| json!({"type": "ADDED", "object": **object})));
        if self.query.wants_initial_events {
            self.waiting.push_back(self.bookmark(self.version, true));
        }
    }

    async fn next(&mut self) -> Option<std::io::Result<Bytes>> {
        match self.fault {
            Some(Fault::Stall) => std::future::pending().await,
            Some(Fault::BreakOff) if self.waiting.len() <= 1 => {
                return Some(Err(std::io::ErrorKind::ConnectionReset.into()));
            }
            _ => {}
        }
        loop {
            if let Some(event) = self.waiting.pop_front() {
                return Some(Ok(format!("{event}\n").into()));
            }
            if self.is_over || !self.collect().await {
                return None;
            }
        }
    }

    /// Waits for news. False when the watch is over.
    async fn collect(&mut self) -> bool {
        if timeout_at(self.deadline, self.news.changed()).await.is_err() {
            return false;
        }
        let world = self.shared.world();
        if world.watch_epoch != self.epoch {
            return false;
        }
        if !world.store.remembers(self.version) {
            let message = format!("too old resource version: {} ({})", self.version, world.store.compacted());
            self.waiting.push_back(json!({"type": "ERROR", "object": status::object(410, "Expired", &message)}));
            self.is_over = true;
            return true;
        }
        let news = world.store.since(self.version);
        drop(world);
        for happened in news {
            self.version = happened.version;
            self.waiting.extend(self.event(&happened));
        }
        true
    }

    /// A change as this watch's selector sees it: an object that does not match any more is deleted for it.
    fn event(&self, happened: &Happened) -> Option<Value> {
        let What::Changed { resource, before, after } = &happened.what else {
            return self.query.wants_bookmarks.then(|| self.bookmark(happened.version, false));
        };
        if *resource != self.resource {
            return None;
        }
        let matching =
            |object: &Option<Arc<Value>>| object.clone().filter(|object| self.query.selector.matches(object));
        match (matching(before), matching(after)) {
            (None, Some(after)) => Some(json!({"type": "ADDED", "object": *after})),
            (Some(_), Some(after)) => Some(json!({"type": "MODIFIED", "object": *after})),
            (Some(before), None) => {
                let mut last = Value::clone(&before);
                last["metadata"]["resourceVersion"] = json!(happened.version.to_string());
                Some(json!({"type": "DELETED", "object": last}))
            }
            (None, None) => None,
        }
    }

    fn bookmark(&self, version: u64, ends_initial_events: bool) -> Value {
        let mut object = self.resource.hollow();
        object["kind"] = json!(self.resource.kind());
        object["apiVersion"] = json!(self.resource.api_version());
        object["metadata"] = json!({"resourceVersion": version.to_string()});
        if ends_initial_events {
            object["metadata"]["annotations"] = json!({"k8s.io/initial-events-end": "true"});
        }
        json!({"type": "BOOKMARK", "object": object})
    }
}
