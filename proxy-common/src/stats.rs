//! Counts per Service port and per backend: values of the arrays `SERVICE_STATS_4` and `_6`, by
//! [`crate::service::Service::index`], and `BACKEND_STATS_4` and `_6`, by [`crate::backend::BackendId`]. They only grow; who
//! wants rates reads twice. Numbers are given to others after a while, so a reader remembers where its owner began.

/// What went through. Flows add what they have seen about once a second, when they are confirmed, and when they close.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Stats {
    /// Connections and flows given a backend, those of sockets included.
    pub opened: u64,
    /// Packets from clients. Those of translated sockets are not seen.
    pub packets: u64,
    /// Bytes of these packets, from the IP header on.
    pub bytes: u64,
    /// Packets from backends.
    pub reply_packets: u64,
    /// Bytes of these packets, from the IP header on.
    pub reply_bytes: u64,
}

crate::no_padding!(Stats: u64, u64, u64, u64, u64);
crate::map_type!(Stats);
