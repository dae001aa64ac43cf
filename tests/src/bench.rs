//! What the programs cost, beside a program that does nothing and one that does the least a balancer must; and what a node does
//! with them, beside what it does with rules.

pub mod bounded;
pub mod case;
pub mod chart;
pub mod cluster;
pub mod connect;
pub mod conntrack;
pub mod course;
pub mod findings;
pub mod goals;
pub mod live;
pub mod machine;
pub mod progress;
pub mod restored;
pub mod road;
pub mod rounds;
pub mod rules;
pub mod softirq;
pub mod yardstick;

/// The programs of `bench-ebpf`.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/bench.bpf.o"));
