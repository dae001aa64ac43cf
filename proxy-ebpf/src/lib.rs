//! Sluice's datapath. All logic is in this library, so that what is pure can be tested on the host; the binary holds the
//! entry points only.
#![cfg_attr(target_arch = "bpf", no_std, feature(asm_experimental_arch))]
// A panic path is a verifier failure.
#![cfg_attr(not(test), deny(clippy::indexing_slicing, clippy::panic, clippy::unwrap_used, clippy::expect_used))]
// Everything on the fast path has to end up in one program; the compiler cannot know.
#![allow(clippy::inline_always, reason = "a call costs more than most of these functions")]
// Maps take keys and values by reference: by value they would be copied to the stack first.
#![allow(
    clippy::needless_borrows_for_generic_args,
    reason = "a copy on the stack is what it would save the borrow with"
)]

mod active;
mod admit;
mod affinity;
pub mod bind;
mod checksum;
mod choose;
mod claim;
mod clock;
mod connection;
pub mod counters;
pub mod cross;
pub mod datapath;
mod dispatch;
#[cfg(not(target_arch = "bpf"))]
pub mod dissect;
mod echo;
mod embryo;
pub mod event;
mod family;
mod filter;
mod flow;
mod fragment;
mod hash;
mod headers;
mod host;
mod icmp;
pub mod kernel;
mod maps;
mod nat;
mod newcomer;
mod once;
pub mod output;
pub mod packet;
mod parse;
mod peer;
mod pick;
mod rehearsal;
mod reject;
mod sctp;
mod service;
pub mod socket;
mod source;
mod stats;
mod table;
mod tunnel;
mod vlan;
mod way;
