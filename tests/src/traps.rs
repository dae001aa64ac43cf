//! Twenty-five traps that other proxies fell into, each of which a test guards: its doc comment says which, by number.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use crate::mutation::{self, Mutation};

const TRAPS: std::ops::RangeInclusive<u32> = 1..=25;

/// Where tests are: beside the code, and here.
const SOURCES: [&str; 5] = ["proxy-common/src", "proxy-ebpf/src", "proxy-userspace/src", "tests/src", "tests/tests"];

#[test]
fn each_of_the_traps_is_named_by_a_test() {
    let root = root();
    let mut named = BTreeSet::new();
    for directory in SOURCES {
        read(&root.join(directory), &mut named);
    }
    let missing: Vec<_> = TRAPS.filter(|trap| !named.contains(trap)).collect();
    assert!(missing.is_empty(), "no test names the traps {missing:?}");
}

/// What the entries promise is seen by `cargo xtask traps`; that they still fit the code, here.
#[test]
fn each_of_the_traps_has_a_handling_that_can_be_removed_and_a_test_that_names_it() {
    let mutations = Mutation::all(&root()).unwrap();
    let missing: Vec<_> = TRAPS.filter(|trap| mutations.iter().all(|mutation| mutation.trap != *trap)).collect();
    assert!(missing.is_empty(), "tests/traps.yaml has nothing for the traps {missing:?}");
    for mutation in &mutations {
        let changed = mutation.applied(&root()).unwrap();
        assert_ne!(changed, mutation::read(&root(), &mutation.file).unwrap(), "{} changes nothing", mutation.what);
        let Mutation { trap, source, test, .. } = mutation;
        let text = mutation::read(&root(), source).unwrap();
        let comment = comment_of(&text, test).unwrap_or_else(|| panic!("{source} has no {test}"));
        assert!(comment.iter().any(|line| traps(line).contains(trap)), "{test} does not name trap {trap}");
    }
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The lines of the comment before a function.
fn comment_of<'a>(source: &'a str, function: &str) -> Option<Vec<&'a str>> {
    let (before, _) = source.split_once(&format!("fn {function}("))?;
    let before = before.lines().rev().skip(1).take_while(|line| is_comment(line) || line.trim() == "#[test]");
    Some(before.collect())
}

fn read(path: &Path, named: &mut BTreeSet<u32>) {
    if path.is_dir() {
        for entry in fs::read_dir(path).unwrap() {
            read(&entry.unwrap().path(), named);
        }
    } else if path.extension().is_some_and(|extension| extension == "rs") {
        named.extend(fs::read_to_string(path).unwrap().lines().filter(|line| is_comment(line)).flat_map(traps));
    }
}

fn is_comment(line: &str) -> bool {
    line.trim_start().starts_with("//")
}

/// The numbers after the word, as in "Trap 8" and "Traps 8, 9 and 11".
fn traps(line: &str) -> Vec<u32> {
    let Some((_, rest)) = line.split_once("Trap ").or_else(|| line.split_once("Traps ")) else { return Vec::new() };
    let words = rest.split([' ', ',', '.', ':', ';', ')']).filter(|word| !["", "and"].contains(word));
    words.map_while(|word| word.parse().ok()).collect()
}

#[test]
fn a_comment_may_name_several_traps() {
    assert_eq!(traps("/// Trap 8: two Services, 3 backends"), [8]);
    assert_eq!(traps("    // Traps 8, 9 and 11: something"), [8, 9, 11]);
    assert!(traps("/// nothing of the kind").is_empty());
}
