//! Objects from a Kubernetes API server: Services, EndpointSlices, `ServiceCIDRs` and this node's own Node, each by a watch
//! of its own, so that one that is refused does not hold up the others.
//!
//! A list replaces what was known only once it is complete; until then, and while the server cannot be reached, what was
//! known last counts. Its objects are passed on as they come, or thousands of them would be in memory at once, ten times
//! as large as what is kept of them. A list is asked for as a stream first, and in pages from servers that refuse. An object that cannot
//! be read counts as absent, and is named in the log.

mod connection;
mod heard;
mod memory;
mod received;
mod servers;

use std::{borrow::Cow, error::Error, fmt::Debug, pin::pin, time::Duration};

use futures::StreamExt as _;
use k8s_openapi::{Resource as _, api::networking::v1::ServiceCIDR, apimachinery::pkg::apis::meta::v1::ObjectMeta};
use kube::{
    Api, Client, Resource, ResourceExt as _,
    core::Status,
    runtime::{
        WatchStreamExt as _,
        watcher::{self, watcher},
    },
};
use serde::de::DeserializeOwned;
use tokio::time::{Instant, sleep_until};
use tracing::{debug, info, warn};

pub use self::connection::OpenError;
pub(crate) use self::memory::{FILES as MEMORY, Memory, Remembered};
use self::received::Received;
use super::{Change, Event, Sender};
use crate::{
    config::ApiServer,
    metrics::{self, Metrics},
    model::{Defect, ObjectName, ObjectReference, Problem, TRIGGER_TIME},
    supervise,
};

/// Services that bear this label belong to another proxy, those without a ClusterIP to none.
const SERVICES: (&str, &str) = ("!service.kubernetes.io/service-proxy-name", "spec.clusterIP!=None");
/// Slices of headless Services are many and of no use here.
const SLICES: &str = "!service.kubernetes.io/headless";

/// A server that refuses every version it has given out is asked no more often than this.
const PAUSE: Duration = Duration::from_secs(1);

/// Settings of the watches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Watches {
    /// Objects per page of a list.
    pub page_size: u32,
    /// Seconds after which the server ends a watch. A server that is silent for five more is given up.
    pub timeout: u32,
}

impl Default for Watches {
    fn default() -> Self {
        Self { page_size: 500, timeout: 290 }
    }
}

/// Opens the connection's settings and starts the watches. A server that cannot be reached is no error: it is tried
/// again for ever. The client may be used for other requests, too.
pub async fn start(
    server: &ApiServer,
    node_name: &str,
    sender: Sender,
    metrics: &Metrics,
) -> Result<Client, OpenError> {
    let client = connection::open(server).await?;
    start_with(&client, node_name, Watches::default(), &sender, metrics);
    Ok(client)
}

/// Starts the watches. They end when nobody listens any more.
pub fn start_with(client: &Client, node_name: &str, watches: Watches, sender: &Sender, metrics: &Metrics) {
    let config = watcher::Config::default().page_size(watches.page_size).timeout(watches.timeout);
    let services = config.clone().labels(SERVICES.0).fields(SERVICES.1);
    let slices = config.clone().labels(SLICES);
    let nodes = config.clone().fields(&format!("metadata.name={node_name}"));
    let listener = |resource| Listener::new(sender, node_name, metrics.watch(resource));
    spawn(client, config, Event::ServiceCidrs, listener("servicecidrs"));
    spawn(client, services, Event::Services, listener("services"));
    spawn(client, slices, Event::EndpointSlices, listener("endpointslices"));
    spawn(client, nodes, Event::Nodes, listener("nodes"));
}

/// Starts a watch of all Nodes, of which packets may be dispatched to the others. Their agents tell what is wrong with them.
pub fn watch_peers(client: &Client, node_name: &str, watches: Watches, sender: &Sender, metrics: &Metrics) {
    let config = watcher::Config::default().page_size(watches.page_size).timeout(watches.timeout);
    // The same resource as the own Node's, and another watch.
    spawn(client, config, Event::Peers, Listener::new(sender, node_name, metrics.watch("peers")));
}

/// A client with this source's settings, for [`start_with`].
pub async fn client(server: &ApiServer) -> Result<Client, OpenError> {
    connection::open(server).await
}

/// Who is told.
#[derive(Clone)]
struct Listener {
    sender: Sender,
    /// What defects are about that are not an object's own.
    node: ObjectReference,
    /// Counts what is heard, and what fails.
    watch: metrics::Watch,
}

/// Nobody listens any more.
struct Unheard;

impl Listener {
    fn new(sender: &Sender, node_name: &str, watch: metrics::Watch) -> Self {
        Self { sender: sender.clone(), node: ObjectReference::of_node(node_name), watch }
    }

    /// An attempt has failed.
    fn count<K: Resource<DynamicType = ()>>(&self, error: &watcher::Error) {
        if is_too_old::<K>(error) { self.watch.forget() } else { self.watch.fail() }
    }

    async fn tell(&self, event: Event) -> Result<(), Unheard> {
        self.sender.send(event).await.or(Err(Unheard))
    }
}

fn spawn<K>(client: &Client, config: watcher::Config, event: fn(Change<K>) -> Event, listener: Listener)
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + 'static,
{
    let api: Api<Received<K>> = Api::all(heard::counted(client, &listener.watch));
    supervise::spawn("a watch of the API server", move || watch(api.clone(), config.clone(), event, listener.clone()));
}

async fn watch<K>(api: Api<Received<K>>, config: watcher::Config, event: fn(Change<K>) -> Event, listener: Listener)
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + 'static,
{
    let mut strategy = Strategy::Stream;
    loop {
        let began = Instant::now();
        match follow(api.clone(), &config, strategy, event, &listener).await {
            Ok(Ended::Refused) => strategy = Strategy::Pages,
            Ok(Ended::Expired) => sleep_until(began + PAUSE).await,
            Err(Unheard) => return,
        }
    }
}

/// How a list is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Strategy {
    /// By a watch that begins with everything (KEP-3157).
    Stream,
    /// In pages.
    Pages,
}

/// Why a watch was given up.
enum Ended {
    /// The server does not know streaming lists.
    Refused,
    /// The version the watch would go on from is gone, and the server said so before it began.
    Expired,
}

async fn follow<K>(
    api: Api<Received<K>>,
    config: &watcher::Config,
    strategy: Strategy,
    event: fn(Change<K>) -> Event,
    listener: &Listener,
) -> Result<Ended, Unheard>
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + 'static,
{
    let config = match strategy {
        Strategy::Stream => config.clone().streaming_lists(),
        Strategy::Pages => config.clone(),
    };
    let mut watch = pin!(watcher(api, config).default_backoff());
    let mut listed = 0;
    let mut trouble = Trouble::default();
    while let Some(next) = watch.next().await {
        match next {
            Ok(next) => {
                trouble.end::<K>();
                let (change, broken) = advance(next, &mut listed);
                if let Some(broken) = broken {
                    listener.tell(Event::Defect(broken)).await?;
                }
                if let Some(change) = change {
                    listener.tell(event(change)).await?;
                }
            }
            Err(error) if strategy == Strategy::Stream && is_refusal(&error) => return Ok(Ended::Refused),
            Err(error) => {
                listener.count::<K>(&error);
                if is_expiry(&error) {
                    return Ok(Ended::Expired);
                }
                if let Some(problem) = trouble.note::<K>(&error) {
                    let defect = Defect { object: listener.node.clone(), problem };
                    listener.tell(Event::Defect(Box::new(defect))).await?;
                }
            }
        }
    }
    Ok(Ended::Expired)
}

/// What an event means; counts the objects of a list.
fn advance<K>(event: watcher::Event<Received<K>>, listed: &mut usize) -> (Option<Change<K>>, Option<Box<Defect>>)
where
    K: Resource<DynamicType = ()>,
{
    match event {
        watcher::Event::Init => {
            *listed = 0;
            (Some(Change::Begin), None)
        }
        watcher::Event::InitApply(received) => match read(received) {
            Ok(object) => {
                *listed += 1;
                (Some(Change::Listed(Box::new(object))), None)
            }
            Err(broken) => (None, Some(broken)),
        },
        watcher::Event::InitDone => {
            debug!(objects = *listed, "all {}s are known", K::kind(&()));
            (Some(Change::End), None)
        }
        watcher::Event::Apply(received) => match read(received) {
            Ok(object) => (Some(Change::Apply(Box::new(object))), None),
            Err(broken) => (Some(Change::Delete(broken.object.name.clone())), Some(broken)),
        },
        watcher::Event::Delete(received) => (Some(Change::Delete(name(received.meta()))), None),
    }
}

/// The object; of one that does not have the shape of its kind, what is wrong with it.
fn read<K: Resource<DynamicType = ()>>(received: Received<K>) -> Result<K, Box<Defect>> {
    let kind = match K::kind(&()) {
        Cow::Borrowed(kind) => kind,
        Cow::Owned(_) => "Object",
    };
    match received {
        Received::Whole(object) => Ok(pruned(object)),
        Received::Broken { metadata, reason } => {
            let object = ObjectReference::of(kind, &metadata);
            Err(Box::new(Defect { object, problem: Problem::unreadable(&reason) }))
        }
    }
}

fn name(metadata: &ObjectMeta) -> ObjectName {
    ObjectName::of(metadata)
}

/// Without what nobody here reads and what is most of an object's bytes.
fn pruned<K: Resource>(mut object: K) -> K {
    object.managed_fields_mut().clear();
    object.annotations_mut().retain(|name, _| name.starts_with("service.sluice.dev/") || name == TRIGGER_TIME);
    object.meta_mut().owner_references = None;
    object
}

/// An older server says that it does not know the parameter: 422 with the feature turned off, 400 before it existed.
fn is_refusal(error: &watcher::Error) -> bool {
    let code = |error: &kube::Error| matches!(error, kube::Error::Api(status) if [400, 422].contains(&status.code));
    matches!(error, watcher::Error::WatchStartFailed(error) if code(error))
}

/// A watcher whose resource version is refused with a status, not an event, would ask for it again for ever.
fn is_expiry(error: &watcher::Error) -> bool {
    matches!(error, watcher::Error::WatchStartFailed(kube::Error::Api(status)) if status.code == 410)
}

/// What a server says that answers, and will not let us watch until somebody changes that.
fn denial(error: &watcher::Error) -> Option<&Status> {
    use watcher::Error::{InitialListFailed, NoResourceVersion, WatchError, WatchFailed, WatchStartFailed};
    let status = match error {
        InitialListFailed(kube::Error::Api(status))
        | WatchStartFailed(kube::Error::Api(status))
        | WatchFailed(kube::Error::Api(status))
        | WatchError(status) => status,
        InitialListFailed(_) | WatchStartFailed(_) | WatchFailed(_) | NoResourceVersion => return None,
    };
    [401, 403, 404].contains(&status.code).then_some(status)
}

/// Kubernetes before 1.33 has no `ServiceCIDR`s of this version, and nothing needs them to be served.
fn is_too_old<K: Resource<DynamicType = ()>>(error: &watcher::Error) -> bool {
    K::kind(&()) == ServiceCIDR::KIND && denial(error).is_some_and(|status| status.code == 404)
}

/// An error and what caused it. A library's error may or may not say itself what its cause says: that is not repeated.
fn with_causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let said = cause.to_string();
        if !text.contains(&said) {
            text = format!("{text}: {said}");
        }
        next = cause.source();
    }
    text
}

/// Errors since the watch worked last: told when they begin and when they are over, not at each attempt.
#[derive(Debug, Default)]
struct Trouble {
    last: Option<String>,
}

impl Trouble {
    /// Says it, unless it was the last thing said. What the server denies is a matter for
    /// its operators, too.
    fn note<K: Resource<DynamicType = ()>>(&mut self, error: &watcher::Error) -> Option<Problem> {
        let kind = K::kind(&());
        let text = with_causes(error);
        let is_news = self.last.as_ref() != Some(&text);
        let is_told = is_news && !is_too_old::<K>(error);
        let problem = denial(error).filter(|_| is_told).map(|status| Problem::watch(&kind, &status.message));
        if !is_news {
            debug!("watching {kind}s: {text}; trying again");
        } else if !is_told {
            info!(
                "the server has no {kind}s of networking.k8s.io/v1: packets to ClusterIPs that no Service has are not dropped"
            );
        } else if problem.is_none() {
            warn!("watching {kind}s: {text}; what is known is kept, trying again");
        }
        self.last = Some(text);
        problem
    }

    fn end<K: Resource<DynamicType = ()>>(&mut self) {
        if self.last.take().is_some() {
            info!("watching {}s again", K::kind(&()));
        }
    }
}
