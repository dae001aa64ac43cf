//! What is shipped around the agent is held to what the agent is. In: files of the repository. There are only tests here.

mod book;
mod chart;
mod dashboard;
mod manifest;
mod requests;
mod series;

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde_json::Value;

/// A path of the repository.
fn path(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path)
}

/// A file of the repository.
fn read(file: &str) -> String {
    fs::read_to_string(path(file)).unwrap_or_else(|error| panic!("{file}: {error}"))
}

/// The documents of a YAML file.
fn yaml(file: &str) -> Vec<Value> {
    serde_saphyr::from_multiple(&read(file)).unwrap_or_else(|error| panic!("{file}: {error}"))
}
