//! What pages name: other pages, tests, flags, metrics and files.

use std::{collections::BTreeSet, fs, path::Path};

use super::{SOURCES, flags, pages};
use crate::packaging::{path, read, series};

/// What stands between backticks, outside of blocks of code.
fn code(page: &str) -> Vec<&str> {
    let outside = page.split("\n```").step_by(2);
    outside.flat_map(|text| text.split('`').skip(1).step_by(2)).collect()
}

/// Targets of links, without those that lead out of the book.
fn links(page: &str) -> impl Iterator<Item = &str> {
    let targets = page.split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(target, _)| target);
    targets.filter(|target| !target.starts_with("https://"))
}

/// As mdBook makes an anchor of a heading.
fn anchor(heading: &str) -> String {
    let letters = heading.trim().to_lowercase().replace(' ', "-");
    letters.chars().filter(|letter| letter.is_alphanumeric() || "-_".contains(*letter)).collect()
}

/// Every file below a directory that has this ending.
fn files(directory: &Path, ending: &str, found: &mut Vec<String>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files(&path, ending, found);
        } else if path.to_string_lossy().ends_with(ending) {
            found.push(fs::read_to_string(path).unwrap());
        }
    }
}

#[test]
fn every_page_is_in_the_summary_and_every_link_leads_somewhere() {
    let pages = pages();
    let summary: BTreeSet<&str> = links(&pages.iter().find(|(name, _)| name == "SUMMARY.md").unwrap().1).collect();
    let named: BTreeSet<&str> =
        pages.iter().map(|(name, _)| name.as_str()).filter(|name| *name != "SUMMARY.md").collect();
    assert_eq!(summary, named);
    for (name, text) in &pages {
        for link in links(text) {
            let (file, place) = link.split_once('#').unwrap_or((link, ""));
            let directory = Path::new(name).parent().unwrap();
            let target = if file.is_empty() { name.into() } else { directory.join(file) };
            let target = fs::read_to_string(path(SOURCES).join(&target));
            let target = target.unwrap_or_else(|error| panic!("{name} leads to {link}: {error}"));
            let is_there = place.is_empty()
                || target
                    .lines()
                    .filter_map(|line| line.strip_prefix('#'))
                    .any(|line| anchor(line.trim_start_matches('#')) == place);
            assert!(is_there, "{name} leads to {link}, where no heading is");
        }
    }
}

/// A name of many words in code style is a test's.
#[test]
fn every_test_that_a_page_names_is_there() {
    let mut sources = Vec::new();
    for directory in ["tests/tests", "proxy-userspace/src", "proxy-ebpf/src", "proxy-common/src"] {
        files(&path(directory), ".rs", &mut sources);
    }
    let sources = sources.concat();
    let mut named = 0;
    for (page, text) in pages().iter().filter(|(page, _)| !page.starts_with("reference/")) {
        for word in code(text) {
            let is_name =
                word.bytes().all(|letter| letter.is_ascii_lowercase() || letter.is_ascii_digit() || letter == b'_');
            if is_name
                && word.matches('_').count() >= 2
                && !word.starts_with("kubeproxy_")
                && !word.starts_with("sluice_")
            {
                assert!(sources.contains(&format!("fn {word}(")), "{page} names a test {word}");
                named += 1;
            }
        }
    }
    assert!(named > 50, "{named}");
}

#[test]
fn every_flag_and_every_metric_that_a_page_names_is_there() {
    let flags = flags::all();
    let metrics: BTreeSet<String> = series::all().into_values().flat_map(|metric| metric.series).collect();
    let mut named = 0;
    let chart = ("charts/sluice/README.md".to_owned(), read("charts/sluice/README.md"));
    for (page, text) in pages().into_iter().chain([chart]) {
        for word in code(&text).into_iter().filter_map(|span| span.split(['=', ' ', '{', '[']).next()) {
            if word.starts_with("--") {
                assert!(flags.iter().any(|flag| flag == word), "{page} names a flag {word}");
                named += 1;
            } else if (word.starts_with("sluice_") || word.starts_with("kubeproxy_")) && !word.ends_with('_') {
                // Devices and programs of ours bear the name, too.
                let is_device = ["sluice_ipip", "sluice_ip6tnl"].contains(&word);
                // Histograms are named without the suffixes that their series have.
                let is_series = metrics.contains(word) || metrics.contains(&format!("{word}_bucket"));
                assert!(is_series || is_device, "{page} names a metric {word}");
                named += 1;
            }
        }
    }
    assert!(named > 60, "{named}");
}
