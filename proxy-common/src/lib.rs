//! The kernel contract: every type that lives in a BPF map, shared by the programs and the agent.
//!
//! Rules: `repr(C)`, no padding (checked at compile time), addresses and ports in network order, no `Option`, nothing
//! that `bpftool map dump` could not print by field name. A change of any of these types is a change of
//! [`node::LAYOUT`], and a field that changes its meaning changes its name: versions take entries over from each other by them.
//!
//! The feature `other-layout` is for tests alone: the same types in another layout, as a next version could have it.
#![cfg_attr(not(any(test, feature = "user")), no_std)]

pub mod addr;
pub mod backend;
pub mod description;
pub mod event;
pub mod filter;
pub mod flow;
pub mod fragment;
pub mod lifetime;
pub mod names;
pub mod node;
pub mod outcome;
pub mod rehearsal;
pub mod service;
pub mod socket;
pub mod stats;
pub mod tuple;

/// Fails to compile when a map type has padding: the sizes of its fields must add up to its own.
macro_rules! no_padding {
    ($type:ty: $($field:ty),+ $(,)?) => {
        const _: () = assert!(
            size_of::<$type>() == 0 $(+ size_of::<$field>())+,
            concat!("padding in ", stringify!($type)),
        );
    };
}
pub(crate) use no_padding;

/// Lets the agent read and write a type as the bytes of a map entry.
macro_rules! map_type {
    ($($type:ty),+ $(,)?) => {$(
        // SAFETY: the type is `repr(C)`, `Copy` and, by `no_padding!`, every one of its bytes is initialised. Entries are
        // only ever written by our own programs and agent, of the same `node::LAYOUT`.
        #[cfg(feature = "user")]
        unsafe impl aya::Pod for $type {}
    )+};
}
pub(crate) use map_type;
