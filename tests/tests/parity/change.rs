//! What happens to clients while Services change, one change after the other.

use anyhow::Result;

use crate::ground::Ground;

/// A story of its own, with Services of its own.
pub(crate) struct Change {
    /// Unique, as those of cases.
    pub(crate) name: &'static str,
    pub(crate) run: fn(&mut Ground) -> Result<()>,
}

pub(crate) fn changes() -> Vec<Change> {
    Vec::new()
}
