//! Sluice's agent: `sources → model → desired → diff → dataplane`. Everything up to the plan is pure; only `dataplane`
//! talks to the kernel.

pub mod dataplane;
pub mod desired;
pub mod diff;
