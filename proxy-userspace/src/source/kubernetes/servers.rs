//! The API servers there are, one of which is asked. A request that meets no answer leaves it to the next attempt to ask
//! the next server, over a connection made anew from files read anew: tokens expire and certificates are replaced
//! while the agent runs.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use futures::{FutureExt as _, future::BoxFuture};
use http::{Request, Response, StatusCode, Uri};
use hyper::body::Incoming;
use kube::client::Body;
use tokio::time::timeout;
use tower::{BoxError, Service, ServiceExt as _, util::BoxCloneService};
use tracing::info;

use super::connection;
use crate::config::ApiServer;

/// What carries requests to one server.
pub(super) type Connection = BoxCloneService<Request<Body>, Response<Incoming>, BoxError>;

/// The service below the client; clones share what they know.
#[derive(Clone)]
pub(super) struct Servers(Arc<Shared>);

struct Shared {
    settings: ApiServer,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// How often a connection was given up.
    given_up: usize,
    /// Which of the servers is asked, modulo their number.
    index: usize,
    /// None until it is needed.
    open: Option<Open>,
}

/// The way to the server that is asked.
#[derive(Clone)]
struct Open {
    connection: Connection,
    server: Uri,
    /// How many there are.
    servers: usize,
    /// [`State::given_up`] when it was opened.
    number: usize,
}

/// The server took the request, and no answer began.
#[derive(Debug, thiserror::Error)]
#[error("the API server {server} has not answered for {} s", .patience.as_secs_f32())]
struct Unanswered {
    server: Uri,
    patience: Duration,
}

/// What an answer says of the server, or of our credentials.
enum Verdict {
    Fine,
    /// The token may have expired.
    Stranger,
    /// Nobody there, or nobody who could answer.
    Dead,
}

impl Servers {
    pub(super) fn new(settings: ApiServer) -> Self {
        Self(Arc::new(Shared { settings, state: Mutex::default() }))
    }
}

impl Service<Request<Body>> for Servers {
    type Response = Response<Incoming>;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<Self::Response, BoxError>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let shared = Arc::clone(&self.0);
        async move { shared.ask(request).await }.boxed()
    }
}

impl Shared {
    async fn ask(&self, request: Request<Body>) -> Result<Response<Incoming>, BoxError> {
        let open = self.open().await?;
        let patience = self.settings.silence.saturating_mul(2);
        let answer = match timeout(patience, open.connection.clone().oneshot(request)).await {
            Ok(answer) => answer,
            Err(_) => Err(Unanswered { server: open.server.clone(), patience }.into()),
        };
        match verdict(&answer) {
            Verdict::Fine => {}
            Verdict::Stranger => self.give_up(&open, false),
            Verdict::Dead => self.give_up(&open, true),
        }
        answer
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The way that is open, or a new one by what the files say now.
    async fn open(&self) -> Result<Open, BoxError> {
        if let Some(open) = &self.state().open {
            return Ok(open.clone());
        }
        let config = connection::configuration(&self.settings).await?;
        let servers = connection::servers(&config, &self.settings)?;
        let mut state = self.state();
        let server = &servers[state.index % servers.len()];
        let connection = connection::build(&config, server, servers.len(), &self.settings)?;
        let open = Open { connection, server: server.url.clone(), servers: servers.len(), number: state.given_up };
        Ok(state.open.get_or_insert(open).clone())
    }

    /// Does nothing if another request has given the same way up.
    fn give_up(&self, open: &Open, goes_to_next: bool) {
        let mut state = self.state();
        if state.given_up != open.number {
            return;
        }
        state.given_up += 1;
        state.open = None;
        if goes_to_next && open.servers > 1 {
            state.index += 1;
            info!("the API server {} does not answer: the next one is asked", open.server);
        }
    }
}

fn verdict(answer: &Result<Response<Incoming>, BoxError>) -> Verdict {
    match answer.as_ref().map(Response::status) {
        Ok(StatusCode::UNAUTHORIZED) => Verdict::Stranger,
        // What stands in front of a server says that of it.
        Ok(StatusCode::BAD_GATEWAY | StatusCode::SERVICE_UNAVAILABLE | StatusCode::GATEWAY_TIMEOUT) | Err(_) => {
            Verdict::Dead
        }
        Ok(_) => Verdict::Fine,
    }
}
