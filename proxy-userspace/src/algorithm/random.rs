//! Each connection goes to any endpoint, whatever the one before did.

use proxy_common::service::Pick;

use super::{Algorithm, Candidate, turns};

/// Each connection by a throw of the dice.
#[derive(Clone, Copy, Debug, Default)]
pub struct Random;

impl Algorithm for Random {
    fn fill(&self, candidates: &[Candidate]) -> Vec<usize> {
        turns::list(candidates)
    }

    fn pick(&self) -> Pick {
        Pick::Random
    }
}
