//! Programs that try the set-associative flow table as the kernel runs it: one that does everything at once to a few buckets, from
//! as many CPUs as call it, and some that look keys up, there and in the kernel's LRU maps, to be measured.
//!
//! Compiled with the flags of the shipped object, loaded by tests alone.
#![cfg_attr(target_arch = "bpf", no_std)]
#![deny(clippy::indexing_slicing, clippy::panic, clippy::unwrap_used, clippy::expect_used)]
#![allow(clippy::inline_always, reason = "a call costs more than most of these functions")]
#![allow(
    clippy::needless_borrows_for_generic_args,
    reason = "by value, keys and values would be copied to the stack once more"
)]

pub mod contract;
mod maps;
pub mod measure;
pub mod stir;
