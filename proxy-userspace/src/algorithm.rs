//! How a Service spreads its connections: what fills its range of slots, and how the kernel picks from it.
//!
//! A new algorithm is a type with the trait [`Algorithm`] and a variant of [`AlgorithmName`]. The datapath need not
//! change as long as one of its picks makes the index:
//!
//! ```
//! use proxy_common::service::Pick;
//! use proxy_userspace::algorithm::{Algorithm, Candidate};
//!
//! /// Everything to the heaviest endpoint; the others wait in case it goes.
//! struct Primary;
//!
//! impl Algorithm for Primary {
//!     fn fill(&self, candidates: &[Candidate]) -> Vec<usize> {
//!         let heaviest = (0..candidates.len()).rev().max_by_key(|&index| candidates[index].weight);
//!         heaviest.into_iter().collect()
//!     }
//!
//!     fn pick(&self) -> Pick {
//!         Pick::Random
//!     }
//! }
//!
//! let candidate = |text: &str, weight| Candidate { address: text.parse().unwrap(), weight };
//! let candidates = [candidate("10.0.0.1:80", 1), candidate("10.0.0.2:80", 3), candidate("10.0.0.3:80", 3)];
//! assert_eq!(Primary.fill(&candidates), [1]);
//! ```

mod least_connections;
mod maglev;
mod name;
mod random;
mod round_robin;
mod source_hash;
mod turns;

use std::net::SocketAddr;

use proxy_common::service::Pick;

pub use self::{
    least_connections::LeastConnections,
    maglev::Maglev,
    name::{AlgorithmName, AlgorithmNameError},
    random::Random,
    round_robin::RoundRobin,
    source_hash::SourceHash,
};

/// An endpoint that connections may go to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Its address: all that is known of it, and the same on every node.
    pub address: SocketAddr,
    /// Its share of the connections, against those of the others; at least 1.
    pub weight: u32,
}

/// A way to spread connections.
///
/// Implementations are pure: equal candidates give equal ranges, on every node and after every restart. Ranges with equal
/// content are one range in the kernel, and a range that changes is written anew, so a small change of the candidates
/// should change few slots only if that is the point of the algorithm.
pub trait Algorithm {
    /// What the range holds, in slot order: indexes into the candidates, which come in the order of their addresses, each
    /// once. One that has no slot gets no new connections.
    fn fill(&self, candidates: &[Candidate]) -> Vec<usize>;

    /// How the kernel makes an index into the range.
    fn pick(&self) -> Pick;
}
