//! The metrics there are, as their text tells of them.

use std::collections::{BTreeMap, BTreeSet};

use crate::metrics;

/// A metric.
#[derive(Debug, Default)]
pub(super) struct Metric {
    /// `counter`, `gauge`, `histogram`.
    pub(super) kind: String,
    pub(super) help: String,
    pub(super) labels: BTreeSet<String>,
    /// Names of its series, which have suffixes that it has not.
    pub(super) series: BTreeSet<String>,
}

/// All of them by their names.
pub(super) fn all() -> BTreeMap<String, Metric> {
    let mut found: BTreeMap<String, Metric> = BTreeMap::new();
    let mut name = String::new();
    for line in metrics::everything().lines() {
        if let Some((of, help)) = line.strip_prefix("# HELP ").and_then(|rest| rest.split_once(' ')) {
            of.clone_into(&mut name);
            help.trim_end_matches('.').clone_into(&mut found.entry(name.clone()).or_default().help);
        } else if let Some((of, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' ')) {
            assert_eq!(of, name, "a metric that nothing is said of");
            kind.clone_into(&mut found.entry(name.clone()).or_default().kind);
        } else if !line.starts_with('#') {
            let metric = found.entry(name.clone()).or_default();
            let (series, labels) = parse(line);
            metric.series.insert(series.to_owned());
            metric.labels.extend(labels);
        }
    }
    found
}

/// `name{label="value",…} number`
fn parse(line: &str) -> (&str, Vec<String>) {
    let end = line.find(['{', ' ']).unwrap();
    let labels = line.split_once('{').and_then(|(_, rest)| rest.rsplit_once('}'));
    let labels = labels.map_or("", |(labels, _)| labels).split("\",").filter_map(|label| label.split_once('='));
    (&line[..end], labels.map(|(name, _)| name.to_owned()).collect())
}
