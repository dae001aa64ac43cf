//! Kernel targets of Services: value of `BACKENDS_V4` and `BACKENDS_V6`, arrays by [`BackendId`].

use crate::addr::{Ipv4, Ipv6, Port};

/// Index into `BACKENDS_V4` or `BACKENDS_V6`; value of `SLOTS`. Id 0 is never given out.
pub type BackendId = u32;

/// What may be sent to a backend.
#[repr(u8)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum BackendState {
    /// The entry is not in use.
    #[default]
    Free = 0,
    /// The endpoint serves: flows of every protocol go to it.
    Serving = 1,
    /// The endpoint is in a slice but does not serve: TCP connections stay, UDP flows choose again.
    NotServing = 2,
    /// The endpoint has left every slice.
    Gone = 3,
}

/// A target.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Backend<A> {
    /// Address of the pod.
    pub addr: A,
    /// Address of the node it runs on, of the same family; unspecified when that is not known or does not matter.
    pub node: A,
    /// Port of the pod.
    pub port: Port,
    /// What may be sent to it.
    pub state: BackendState,
    /// 1 when the pod runs on this node.
    pub is_local: u8,
    /// Counts how often the id was given to another address and port, or to one that had been gone: a flow that remembers
    /// an older one is not for this backend.
    pub generation: u32,
}

crate::no_padding!(Backend<Ipv4>: Ipv4, Ipv4, Port, BackendState, u8, u32);
crate::no_padding!(Backend<Ipv6>: Ipv6, Ipv6, Port, BackendState, u8, u32);
crate::map_type!(Backend<Ipv4>, Backend<Ipv6>);
