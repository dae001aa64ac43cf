//! Sluice's datapath. All logic is in this library, so that what is pure can be tested on the host; the binary holds the
//! entry points only.
#![cfg_attr(target_arch = "bpf", no_std)]

pub mod kernel;
mod maps;
