//! A client's address decides, on every node alike and without any memory of clients: Maglev's table, read by the client.

use proxy_common::service::Pick;

use super::{Algorithm, Candidate, Maglev};

/// All connections of a client to one endpoint.
#[derive(Clone, Copy, Debug, Default)]
pub struct SourceHash;

impl Algorithm for SourceHash {
    fn fill(&self, candidates: &[Candidate]) -> Vec<usize> {
        Maglev.fill(candidates)
    }

    fn pick(&self) -> Pick {
        Pick::SourceHash
    }
}
