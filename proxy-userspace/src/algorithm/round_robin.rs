//! Endpoints take turns, those of all CPUs in one order.

use proxy_common::service::Pick;

use super::{Algorithm, Candidate, turns};

/// One after the other.
#[derive(Clone, Copy, Debug, Default)]
pub struct RoundRobin;

impl Algorithm for RoundRobin {
    /// A heavy endpoint's turns are spread over the round.
    fn fill(&self, candidates: &[Candidate]) -> Vec<usize> {
        turns::list(candidates)
    }

    fn pick(&self) -> Pick {
        Pick::RoundRobin
    }
}
