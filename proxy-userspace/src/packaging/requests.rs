//! What the agent asks an API server for, found by letting it ask.

use std::{collections::BTreeSet, convert::Infallible, time::Duration};

use http::{Method, Request, Response};
use kube::{Client, client::Body};
use serde_json::{Value, json};
use tokio::{sync::watch, time::timeout};

use crate::{
    metrics::Metrics,
    model::{Defect, ObjectReference, Problem},
    recorder::Recorder,
    source::{
        self,
        kubernetes::{Watches, start_with, watch_peers},
    },
};

/// A kind of request, as the rules of a role know it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Asked {
    pub(super) group: String,
    pub(super) resource: String,
    pub(super) verb: String,
}

/// What was asked so far.
#[derive(Debug, Default)]
struct Log {
    asked: BTreeSet<Asked>,
    /// Watches of which each one waits for what happens next.
    open: usize,
}

/// One for each of the agent's kinds of objects, and one for other nodes.
const WATCHES: usize = 5;
const NODE: &str = "here";

/// All of it.
pub(super) async fn all() -> BTreeSet<Asked> {
    let (sender, mut log) = watch::channel(Log::default());
    let client = Client::new(tower::service_fn(move |request| answer(request, sender.clone())), "default");
    let (events, _events) = tokio::sync::mpsc::channel(source::QUEUE);
    let metrics = Metrics::default();
    start_with(&client, NODE, Watches::default(), &events, &metrics);
    watch_peers(&client, NODE, Watches::default(), &events, &metrics);
    let mut recorder = Recorder::start(Some(client), NODE, metrics);
    for _ in ["an Event", "and the same again, which changes it"] {
        let defect = Defect { object: ObjectReference::of_node(NODE), problem: Problem::watch("Node", "no") };
        recorder.tell(&[defect], std::time::Instant::now());
    }
    let is_all = |log: &Log| log.open == WATCHES && log.asked.iter().any(|asked| asked.verb == "patch");
    let waited = timeout(Duration::from_secs(20), log.wait_for(is_all)).await;
    waited.unwrap_or_else(|_| panic!("the agent does not ask for all it needs")).unwrap().asked.clone()
}

async fn answer(request: Request<Body>, log: watch::Sender<Log>) -> Result<Response<Body>, Infallible> {
    let asked = asked(&request);
    let (verb, resource) = (asked.verb.clone(), asked.resource.clone());
    log.send_modify(|log| {
        log.asked.insert(asked);
    });
    let is_stream = request.uri().query().is_some_and(|query| query.contains("sendInitialEvents"));
    Ok(match &*verb {
        // As a server does that does not know lists that come as a stream.
        "watch" if is_stream => {
            response(400, &json!({"kind": "Status", "status": "Failure", "message": "", "reason": "", "code": 400}))
        }
        "watch" => {
            log.send_modify(|log| log.open += 1);
            std::future::pending().await
        }
        "list" => response(200, &json!({"kind": resource, "metadata": {"resourceVersion": "1"}, "items": []})),
        _ => response(200, &json!({"metadata": {"name": "the-first", "namespace": "default"}})),
    })
}

fn response(code: u16, body: &Value) -> Response<Body> {
    Response::builder().status(code).body(Body::from(body.to_string().into_bytes())).unwrap()
}

/// By the paths of the API: `/api/v1/…` and `/apis/GROUP/VERSION/…`, perhaps `namespaces/NAME/`, the resource, perhaps a name.
fn asked(request: &Request<Body>) -> Asked {
    let path = request.uri().path().trim_matches('/');
    let (group, rest) = match path.strip_prefix("apis/") {
        Some(rest) => {
            let (group, rest) = rest.split_once('/').unwrap();
            (group, rest.split_once('/').unwrap().1)
        }
        None => ("", path.strip_prefix("api/v1/").unwrap()),
    };
    let rest = rest.strip_prefix("namespaces/").and_then(|rest| rest.split_once('/')).map_or(rest, |(_, rest)| rest);
    let (resource, name) = rest.split_once('/').map_or((rest, None), |(resource, name)| (resource, Some(name)));
    let is_watch = request.uri().query().is_some_and(|query| query.contains("watch=true"));
    let verb = match (request.method(), name) {
        (&Method::GET, None) if is_watch => "watch",
        (&Method::GET, None) => "list",
        (&Method::GET, Some(_)) => "get",
        (&Method::POST, _) => "create",
        (&Method::PATCH, _) => "patch",
        (method, _) => panic!("no verb of a role is {method}"),
    };
    Asked { group: group.into(), resource: resource.into(), verb: verb.into() }
}
