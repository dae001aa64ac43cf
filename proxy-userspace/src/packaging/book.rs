//! `docs/`: its reference pages are what the code says of itself, and what the others name exists. `cargo xtask docs` writes the
//! reference anew, by these tests with [`WRITE`] set.

mod flags;
mod names;
mod numbers;

use std::{env, fs};

/// Set where pages are to be written, and not to be compared.
const WRITE: &str = "SLUICE_WRITE_DOCS";
const SOURCES: &str = "docs/src";

/// Compares a page that is made from code with what is committed.
fn assert_is_current(page: &str, text: &str) {
    let file = format!("{SOURCES}/{page}");
    if env::var_os(WRITE).is_some() {
        return fs::write(super::path(&file), text).unwrap();
    }
    assert!(super::read(&file) == text, "{file} is not what the code says: `cargo xtask docs` writes it");
}

/// A cell of a table: bars would end it.
fn cell(text: &str) -> String {
    text.trim().replace('|', "\\|").replace('\n', " ")
}

/// Every page, by its path below the sources.
fn pages() -> Vec<(String, String)> {
    let mut pages = Vec::new();
    for directory in ["", "reference/"] {
        for entry in fs::read_dir(super::path(&format!("{SOURCES}/{directory}"))).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|extension| extension == "md") {
                let name = path.file_name().unwrap().to_str().unwrap();
                let page = format!("{directory}{name}");
                let text = super::read(&format!("{SOURCES}/{page}"));
                pages.push((page, text));
            }
        }
    }
    pages
}
