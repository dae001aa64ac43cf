//! A fake Kubernetes API server over real HTTP: lists in pages, watches with bookmarks, streaming lists, selectors,
//! compaction; and, on request, everything that goes wrong with such a server. What it says is taught from what a real
//! one said (`fixtures/api`); it is to be trusted for nothing else.
//!
//! It runs in a thread of its own and is told what to do from the test's: objects are applied and deleted as JSON, as
//! they would be with kubectl. Dropping it ends every connection.

mod event;
mod fault;
mod list;
pub mod object;
mod resource;
mod selector;
mod status;
mod store;
mod tls;
mod watch;

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
};

use anyhow::{Context as _, Result};
use axum::{
    Router,
    body::Bytes,
    extract::{RawQuery, State},
    http::{HeaderMap, Method, Uri, header},
    response::Response,
};
use serde_json::Value;
use tokio::sync::{oneshot, watch as signal};

use self::{fault::Faults, resource::Query, store::Store, tls::Listener};
pub use self::{
    fault::{Fault, On},
    resource::{Resource, Verb},
    tls::Authority,
};

/// A running server.
#[derive(Debug)]
pub struct ApiServer {
    address: SocketAddr,
    shared: Arc<Shared>,
    /// None while it is stopped.
    running: Option<Running>,
}

/// The thread that serves.
#[derive(Debug)]
struct Running {
    stop: oneshot::Sender<()>,
    thread: JoinHandle<()>,
}

/// A request that was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// What it asked for.
    pub resource: Resource,
    /// How.
    pub verb: Verb,
    /// Its parameters, as they came.
    pub query: String,
}

/// What handlers and the test share.
#[derive(Debug)]
struct Shared {
    world: Mutex<World>,
    /// The version of the store; watches wait for it to change.
    version: signal::Sender<u64>,
}

#[derive(Debug, Default)]
struct World {
    store: Store,
    faults: Faults,
    requests: Vec<Request>,
    events: BTreeMap<String, Value>,
    refuses_streaming_lists: bool,
    /// Objects per page of a list, whatever is asked for.
    largest_page: Option<usize>,
    /// Who does not bear it is refused.
    token: Option<String>,
    /// Whose certificate new connections are shown; none without TLS.
    authority: Option<Authority>,
    /// Raised to end every watch that began before.
    watch_epoch: u64,
}

impl Shared {
    fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the world and wakes the watches.
    fn change<T>(&self, change: impl FnOnce(&mut World) -> T) -> T {
        let mut world = self.world();
        let result = change(&mut world);
        let version = world.store.version();
        drop(world);
        self.version.send_replace(version);
        result
    }
}

impl ApiServer {
    /// A server on a port of the loopback device of the calling thread's network namespace.
    pub fn start() -> Result<Self> {
        Self::start_at((Ipv4Addr::LOCALHOST, 0).into())
    }

    /// A server at an address of the calling thread's network namespace.
    pub fn start_at(address: SocketAddr) -> Result<Self> {
        Self::over(Arc::new(Shared { world: Mutex::default(), version: signal::Sender::new(0) }), address)
    }

    /// Another server of the same cluster, at an address of the calling thread's network namespace.
    pub fn replica(&self, address: SocketAddr) -> Result<Self> {
        Self::over(Arc::clone(&self.shared), address)
    }

    fn over(shared: Arc<Shared>, address: SocketAddr) -> Result<Self> {
        let mut server = Self { address, shared, running: None };
        server.resume()?;
        Ok(server)
    }

    /// Ends every connection and does not listen any more. What it knows stays.
    pub fn stop(&mut self) {
        if let Some(Running { stop, thread }) = self.running.take() {
            drop(stop);
            // A panic there has been printed already.
            let _ = thread.join();
        }
    }

    /// Listens again, at the same address, in the calling thread's network namespace.
    pub fn resume(&mut self) -> Result<()> {
        let address = self.address;
        let listener = TcpListener::bind(address).with_context(|| format!("cannot listen on {address}"))?;
        listener.set_nonblocking(true)?;
        self.address = listener.local_addr()?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (stop, stopped) = oneshot::channel();
        let shared = Arc::clone(&self.shared);
        let router = Router::new().fallback(answer).with_state(Arc::clone(&shared));
        let serve = async move {
            let listener = Listener::new(tokio::net::TcpListener::from_std(listener)?, shared);
            tokio::select! {
                served = axum::serve(listener, router) => served,
                _ = stopped => Ok(()),
            }
        };
        let thread = std::thread::Builder::new().name("api-server".into()).spawn(move || {
            if let Err(error) = runtime.block_on(serve) {
                eprintln!("the fake API server ended: {error}");
            }
        })?;
        self.running = Some(Running { stop, thread });
        Ok(())
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Its URL.
    pub fn url(&self) -> String {
        let scheme = if self.shared.world().authority.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", self.address)
    }

    /// Shows new connections a certificate of this authority. Those that are open stay as they are.
    pub fn secure(&self, authority: &Authority) {
        self.shared.change(|world| world.authority = Some(authority.clone()));
    }

    /// Refuses whoever does not bear this token from now on.
    pub fn require_token(&self, token: &str) {
        self.shared.change(|world| world.token = Some(token.to_owned()));
    }

    /// Writes a kubeconfig that leads to it.
    pub fn write_kubeconfig(&self, directory: &Path) -> Result<PathBuf> {
        let path = directory.join("kubeconfig");
        let text = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: fake\nclusters: [{{name: fake, cluster: {{server: \"{}\"}}}}]\n\
             contexts: [{{name: fake, context: {{cluster: fake, user: fake}}}}]\nusers: [{{name: fake, user: {{}}}}]\n",
            self.url()
        );
        std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(path)
    }

    /// Creates an object or replaces it. It names its kind.
    pub fn apply(&self, object: Value) -> Result<()> {
        self.shared.change(|world| world.store.apply(object))
    }

    /// Deletes an object; the namespace of a Node is empty.
    pub fn delete(&self, resource: Resource, namespace: &str, name: &str) -> Result<()> {
        self.shared.change(|world| world.store.delete(resource, namespace, name))
    }

    /// Forgets all history: who goes on from an older version is told 410.
    pub fn compact(&self) {
        self.shared.change(|world| world.store.compact());
    }

    /// Sends a bookmark to every watch that takes them.
    pub fn bookmark(&self) {
        self.shared.change(|world| world.store.bookmark());
    }

    /// Ends every watch, as a server that restarts does.
    pub fn end_watches(&self) {
        self.shared.change(|world| world.watch_epoch += 1);
    }

    /// Makes something go wrong, as many times as said.
    pub fn inject(&self, on: On, fault: Fault, times: usize) {
        self.shared.change(|world| world.faults.add(on, fault, times));
    }

    /// Lets nothing go wrong any more. What is stalled already stays so.
    pub fn heal(&self) {
        self.shared.change(|world| world.faults.clear());
    }

    /// Refuses streaming lists, as servers do that do not have them.
    pub fn refuse_streaming_lists(&self) {
        self.shared.change(|world| world.refuses_streaming_lists = true);
    }

    /// Gives lists in pages of no more than this.
    pub fn limit_pages(&self, objects: usize) {
        self.shared.change(|world| world.largest_page = Some(objects));
    }

    /// Every Event it was told.
    pub fn events(&self) -> Vec<Value> {
        self.shared.world().events.values().cloned().collect()
    }

    /// Forgets every Event, as a server does after an hour.
    pub fn forget_events(&self) {
        self.shared.world().events.clear();
    }

    /// Every request so far.
    pub fn requests(&self) -> Vec<Request> {
        self.shared.world().requests.clone()
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        self.stop();
    }
}

async fn answer(
    State(shared): State<Arc<Shared>>,
    method: Method,
    headers: HeaderMap,
    uri: Uri,
    RawQuery(raw): RawQuery,
    body: Bytes,
) -> Response {
    let raw = raw.unwrap_or_default();
    if !is_known(&shared, &headers) {
        return status::refusal(401);
    }
    let writes = event::Write::at(&method, uri.path());
    let resource = if writes.is_some() { Some(Resource::Events) } else { Resource::at(uri.path()) };
    let Some(resource) = resource else { return status::not_found(uri.path()) };
    let query = match Query::parse(&raw) {
        Ok(query) => Query { writes: writes.as_ref().map(event::Write::verb), ..query },
        Err(error) => return status::bad_request(&error),
    };
    let fault = {
        let mut world = shared.world();
        world.requests.push(Request { resource, verb: query.verb(), query: raw });
        world.faults.take(resource, &query)
    };
    match fault {
        Some(Fault::Refuse(code)) => return status::refusal(code),
        Some(Fault::Silence) => std::future::pending().await,
        _ => {}
    }
    match (writes, query.verb()) {
        (Some(write), _) => write.answer(&mut shared.world().events, &body),
        (None, Verb::Watch) => watch::answer(&shared, resource, &query, fault),
        (None, _) => list::answer(&shared, resource, &query, fault),
    }
}

fn is_known(shared: &Shared, headers: &HeaderMap) -> bool {
    let Some(token) = &shared.world().token else { return true };
    headers.get(header::AUTHORIZATION).is_some_and(|value| value.as_bytes() == format!("Bearer {token}").as_bytes())
}
