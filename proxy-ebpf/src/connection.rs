//! Whom a socket is connected to. In: a socket that was given a backend by `connect`, one that has connected to somebody else,
//! one that is closed. Out: entries of `SOCKETS_*` that are there for as long as the connection, and its place among those
//! that its backend has.

use aya_ebpf::bindings::BPF_ANY;
use proxy_common::{
    addr::{Address as _, Port},
    socket::{SocketPeer, SocketTarget, SocketWay},
};

use crate::{active, family::Family};

/// Notes that a socket is now connected to a backend.
#[inline(always)]
pub(crate) fn note<F: Family>(cookie: u64, backend: &SocketTarget<F::Addr>) {
    let _ = F::sockets().insert(&key::<F>(cookie), backend, u64::from(BPF_ANY));
    active::raise::<F>(backend.backend);
}

/// Forgets whom a socket was connected to, if it was. The name of the one before must not stay with a UDP socket that
/// connects again, nor a connection be counted that ended without a packet.
#[inline(never)]
pub(crate) fn forget<F: Family>(cookie: u64) {
    let key = key::<F>(cookie);
    // SAFETY: an entry may be given to another socket after an eviction, not one looked up a moment ago.
    let Some(&backend) = (unsafe { F::sockets().get(&key) }) else { return };
    if F::sockets().remove(&key).is_err() {
        return;
    }
    let from_backend = SocketPeer::new(cookie, backend.addr, backend.port, SocketWay::ToFrontend);
    // SAFETY: as above.
    if let Some(frontend) = unsafe { F::sockets().get(&from_backend) } {
        let to_backend = SocketPeer::new(cookie, frontend.addr, frontend.port, SocketWay::ToBackend);
        let _ = F::sockets().remove(&to_backend);
    }
    let _ = F::sockets().remove(&from_backend);
    // The id may be another backend's by now.
    if F::backends().get(backend.backend).is_some_and(|known| known.generation == backend.backend_generation) {
        active::lower::<F>(backend.backend);
    }
}

#[inline(always)]
fn key<F: Family>(cookie: u64) -> SocketPeer<F::Addr> {
    SocketPeer::new(cookie, F::Addr::ANY, Port { octets: [0; 2] }, SocketWay::Connection)
}
