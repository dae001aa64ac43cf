//! Sluice's agent: `sources → model → desired → diff → dataplane`. Everything up to the plan is pure; only `dataplane`
//! talks to the kernel.

pub mod addresses;
pub mod agent;
pub mod algorithm;
pub mod cli;
pub mod config;
pub mod confine;
pub mod dataplane;
pub mod desired;
pub mod diff;
pub mod explain;
pub mod health;
pub mod health_check;
mod http;
pub mod inspect;
pub mod kube_proxy;
pub mod metrics;
pub mod model;
pub mod node_port_mode;
#[cfg(test)]
mod packaging;
pub mod progress;
pub mod reconcile;
pub mod recorder;
pub mod source;
mod supervise;
pub mod topology;
pub mod verify;
