//! (have, want) → an ordered plan, as data.

use proxy_common::{
    backend::{Backend, BackendId},
    service::{Frontend, Service},
};

/// One write to the kernel's maps of one family. Steps are carried out in order; any of them may be repeated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step<A> {
    /// Write an entry of `BACKENDS_*`.
    PutBackend(BackendId, Backend<A>),
    /// Write consecutive entries of `SLOTS`, beginning at the index.
    PutSlots(u32, Vec<BackendId>),
    /// Write an entry of `LOCAL_ADDRS_*`.
    PutLocalAddr(A, u32),
    /// Remove an entry of `LOCAL_ADDRS_*`.
    RemoveLocalAddr(A),
    /// Write an entry of `SERVICES_*`.
    PutService(Frontend<A>, Service),
    /// Remove an entry of `SERVICES_*`.
    RemoveService(Frontend<A>),
}
