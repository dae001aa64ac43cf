//! The ways in which the handling of a trap can be removed, each with the test that notices: the entries of
//! `tests/traps.yaml`. For the test that looks after that file, and for `cargo xtask traps`; both include this one.

use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize;

/// Where the entries are, from the root of the repository.
const TABLE: &str = "tests/traps.yaml";

/// One way to remove the handling of a trap.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Mutation {
    /// Number of the trap.
    pub(crate) trap: u32,
    /// The handling that is removed, in one sentence.
    pub(crate) what: String,
    /// Where the handling is.
    pub(crate) file: String,
    /// What stands there, once.
    pub(crate) find: String,
    /// What stands there without the handling.
    pub(crate) replace: String,
    /// The file of the test that notices.
    pub(crate) source: String,
    /// The function whose comment names the trap.
    pub(crate) test: String,
}

impl Mutation {
    /// All of them.
    pub(crate) fn all(root: &Path) -> Result<Vec<Self>> {
        let text = read(root, TABLE)?;
        serde_saphyr::from_str(&text).with_context(|| format!("{TABLE} cannot be read"))
    }

    /// The file without the handling.
    pub(crate) fn applied(&self, root: &Path) -> Result<String> {
        let text = read(root, &self.file)?;
        let count = text.matches(&self.find).count();
        ensure!(count == 1, "trap {}, {}: `find` occurs {count} times in {}", self.trap, self.what, self.file);
        Ok(text.replace(&self.find, &self.replace))
    }
}

/// Reads a file of the repository.
pub(crate) fn read(root: &Path, file: &str) -> Result<String> {
    std::fs::read_to_string(root.join(file)).with_context(|| format!("{file} cannot be read"))
}
