//! What Sluice's datapath is measured against: a program that does nothing, and the *floor*, the smallest stateful balancer
//! that would be honest. And what measures them: a program that restores the packet and calls the one under test.
//!
//! Compiled with the flags of the shipped object, loaded by the bench and its tests alone.
#![cfg_attr(target_arch = "bpf", no_std)]
#![deny(clippy::indexing_slicing, clippy::panic, clippy::unwrap_used, clippy::expect_used)]
#![allow(clippy::inline_always, reason = "a call costs more than most of these functions")]
#![allow(
    clippy::needless_borrows_for_generic_args,
    reason = "by value, keys and values would be copied to the stack once more"
)]

pub mod contract;
#[cfg(target_arch = "bpf")]
mod family;
#[cfg(target_arch = "bpf")]
pub mod floor;
#[cfg(target_arch = "bpf")]
mod maps;
#[cfg(target_arch = "bpf")]
pub mod packet;
#[cfg(target_arch = "bpf")]
pub mod restore;
#[cfg(target_arch = "bpf")]
pub mod sink;
#[cfg(target_arch = "bpf")]
mod wire;
