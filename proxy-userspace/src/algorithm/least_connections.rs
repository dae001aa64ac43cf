//! Each connection goes to the less loaded of two endpoints drawn at random: nearly as even as asking all of them, and it
//! costs the same however many there are (Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", 2001).

use proxy_common::service::Pick;

use super::{Algorithm, Candidate, turns};

/// The better of two.
#[derive(Clone, Copy, Debug, Default)]
pub struct LeastConnections;

impl Algorithm for LeastConnections {
    /// A heavy endpoint is drawn more often.
    fn fill(&self, candidates: &[Candidate]) -> Vec<usize> {
        turns::list(candidates)
    }

    fn pick(&self) -> Pick {
        Pick::LeastConnections
    }
}
