//! The programs, and on the host nothing: what tests link must not have `aya-ebpf` in it, whose `memcpy` and `memset`, made for BPF,
//! would take the place of the C library's.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(target_arch = "bpf")]
mod programs;

#[cfg(not(target_arch = "bpf"))]
fn main() {}
