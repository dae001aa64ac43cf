//! Fixtures for the tests that need a kernel.

pub mod api;
pub mod bench;
pub mod between;
pub mod configuration;
pub mod dump;
pub mod exclusive;
pub mod fragments;
pub mod frame;
pub mod freeze;
pub mod fuzz;
pub mod http;
pub mod install;
pub mod interleaving;
pub mod lab;
pub mod links;
pub mod model;
pub mod netns;
pub mod patience;
pub mod picture;
pub mod probe;
pub mod sandbox;
pub mod scenario;
pub mod spoil;
pub mod testbed;
pub mod traffic;

#[cfg(test)]
mod linked;
#[cfg(test)]
mod mutation;
#[cfg(test)]
mod traps;
