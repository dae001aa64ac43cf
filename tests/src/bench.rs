//! What the programs cost: the agent's beside a program that does nothing and one that does the least a balancer must.

pub mod case;
pub mod course;
pub mod goals;
pub mod restored;
pub mod rounds;
pub mod yardstick;

/// The programs of `bench-ebpf`.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/bench.bpf.o"));
