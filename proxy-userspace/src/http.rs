//! Small HTTP servers that others' slowness cannot hurt: each request has a connection of its own, a connection has a
//! deadline, and when there are too many the oldest goes. Nothing here waits for the agent's loop, nor the loop for it.

use std::{collections::VecDeque, io, net::SocketAddr, sync::Arc, time::Duration};

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::{
    net::{TcpListener, TcpStream},
    task::AbortHandle,
    time::{sleep, timeout},
};
use tracing::{info, warn};

/// Connections of one server at a time. With one more, the oldest is closed: an honest one has long been answered.
const CONNECTIONS: usize = 64;
/// For a request's head.
const HEAD: Duration = Duration::from_secs(5);
/// For a connection as a whole.
const WHOLE: Duration = Duration::from_secs(30);
/// Between attempts to listen.
const RETRY: Duration = Duration::from_secs(1);
/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;

/// Serves for ever at an address. One that cannot be listened at is tried again and again, and told once.
pub(crate) async fn serve_at(address: SocketAddr, what: &'static str, router: Router) {
    let mut told = None;
    loop {
        match listen(address, Families::Both) {
            Ok(listener) => {
                info!("serving {what} at {address}");
                return serve(Arc::new(listener), router).await;
            }
            Err(error) if told == Some(error.kind()) => {}
            Err(error) => {
                warn!("cannot serve {what} at {address}: {error}; trying again");
                told = Some(error.kind());
            }
        }
        sleep(RETRY).await;
    }
}

/// Whose clients a socket of the unspecified IPv6 address takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Families {
    /// Also those of IPv4.
    Both,
    /// Those of IPv6: IPv4 has a socket of its own.
    Own,
}

/// A listening socket.
pub(crate) fn listen(address: SocketAddr, families: Families) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    if address.is_ipv6() {
        socket.set_only_v6(families == Families::Own)?;
    }
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

/// Serves for as long as it is polled. Connections that are open when it is dropped are answered to their end.
pub(crate) async fn serve(listener: Arc<TcpListener>, router: Router) {
    let mut connections: VecDeque<AbortHandle> = VecDeque::new();
    loop {
        // Out of descriptors, most likely: others must close theirs first.
        let Ok((stream, _)) = listener.accept().await else {
            sleep(RETRY).await;
            continue;
        };
        connections.retain(|connection| !connection.is_finished());
        if connections.len() >= CONNECTIONS
            && let Some(oldest) = connections.pop_front()
        {
            oldest.abort();
        }
        connections.push_back(tokio::spawn(answer(stream, router.clone())).abort_handle());
    }
}

async fn answer(stream: TcpStream, router: Router) {
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    // A client that is slow or goes away is nobody's concern.
    let _ = timeout(WHOLE, connection).await;
}
