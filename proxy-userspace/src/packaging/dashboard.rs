//! `charts/sluice/dashboards/sluice.json`, and the alerts of `charts/sluice/templates/rules.yaml`: every query asks for series that the
//! agent has, by labels that they have.

use std::collections::BTreeSet;

use serde_json::Value;

use super::series;

const DASHBOARD: &str = "charts/sluice/dashboards/sluice.json";
const RULES: &str = "charts/sluice/templates/rules.yaml";
/// Whether a target answers, which Prometheus says itself.
const UP: &str = "up";
/// What a scrape adds.
const OF_THE_SCRAPE: [&str; 2] = ["instance", "job"];
/// The words of `PromQL` that are used, and Grafana's own.
const LANGUAGE: [&str; 14] = [
    "bool",
    "by",
    "count",
    "histogram_quantile",
    "increase",
    "max",
    "max_over_time",
    "rate",
    "sum",
    "time",
    "timestamp",
    "topk",
    "label_values",
    "__rate_interval",
];

/// Every text under a name, wherever it is.
fn texts<'a>(value: &'a Value, name: &str, found: &mut Vec<&'a str>) {
    match value {
        Value::Object(fields) => {
            for (field, value) in fields {
                match value {
                    Value::String(text) if field == name => found.push(text),
                    _ => texts(value, name, found),
                }
            }
        }
        Value::Array(values) => values.iter().for_each(|value| texts(value, name, found)),
        _ => {}
    }
}

/// Words of a query, without what stands in quotation marks and without numbers.
fn words(query: &str) -> impl Iterator<Item = &str> {
    let unquoted = query.split('"').step_by(2);
    let words = unquoted.flat_map(|text| text.split(|letter: char| !letter.is_ascii_alphanumeric() && letter != '_'));
    words.filter(|word| word.starts_with(|first: char| first.is_ascii_alphabetic() || first == '_'))
}

/// What a query asks for that is not there.
fn unknown(query: &str) -> Vec<String> {
    let metrics = series::all();
    let asked: Vec<_> =
        words(query).filter_map(|word| metrics.values().find(|metric| metric.series.contains(word))).collect();
    if asked.is_empty() {
        return vec![format!("no series in {query}")];
    }
    let labels: BTreeSet<&str> =
        asked.iter().flat_map(|metric| metric.labels.iter().map(String::as_str)).chain(OF_THE_SCRAPE).collect();
    let is_known = |word: &str| {
        labels.contains(word) || LANGUAGE.contains(&word) || asked.iter().any(|metric| metric.series.contains(word))
    };
    words(query).filter(|word| !is_known(word)).map(str::to_owned).collect()
}

#[test]
fn every_query_of_the_dashboard_names_series_and_labels_that_exist() {
    let dashboard: Value = serde_json::from_str(&super::read(DASHBOARD)).unwrap();
    let mut queries = Vec::new();
    for name in ["expr", "query", "definition"] {
        texts(&dashboard, name, &mut queries);
    }
    queries.retain(|query| *query != "prometheus");
    assert!(queries.len() > 20, "{queries:?}");
    for query in queries {
        assert_eq!(unknown(query), Vec::<String>::new(), "{query}");
    }
}

#[test]
fn every_legend_names_labels_by_which_its_query_tells_series_apart() {
    let dashboard: Value = serde_json::from_str(&super::read(DASHBOARD)).unwrap();
    let targets = dashboard["panels"].as_array().unwrap().iter().filter_map(|panel| panel["targets"].as_array());
    for target in targets.flatten() {
        let (query, legend) = (target["expr"].as_str().unwrap(), target["legendFormat"].as_str().unwrap());
        let grouped = query.split_once("by (").and_then(|(_, rest)| rest.split_once(')')).map_or("", |(by, _)| by);
        let grouped: BTreeSet<&str> = grouped.split(", ").filter(|label| !["", "le"].contains(label)).collect();
        let named: BTreeSet<&str> =
            legend.split("{{").skip(1).filter_map(|rest| rest.split_once("}}")).map(|(label, _)| label).collect();
        assert_eq!(named, grouped, "{query}");
    }
}

#[test]
fn every_query_is_of_the_agents_alone() {
    let dashboard: Value = serde_json::from_str(&super::read(DASHBOARD)).unwrap();
    let mut queries = Vec::new();
    texts(&dashboard["panels"], "expr", &mut queries);
    for query in queries {
        let selected = query.matches("{job=~\"$job\", instance=~\"$instance\"").count();
        let asked = words(query).filter(|word| series::all().values().any(|metric| metric.series.contains(*word)));
        assert_eq!(asked.count(), selected, "{query}: others' processes have such series, too");
    }
}

#[test]
fn every_alert_names_series_and_labels_that_exist_and_is_of_the_agents_alone() {
    let template = super::read(RULES);
    let queries: Vec<&str> = template.lines().filter_map(|line| line.trim().strip_prefix("expr: ")).collect();
    assert!(queries.len() > 5, "{queries:?}");
    let metrics = series::all();
    for query in queries {
        let is_up = words(query).any(|word| word == UP);
        assert!(is_up || unknown(query).is_empty(), "{query}: {:?}", unknown(query));
        let is_series = |word: &str| word == UP || metrics.values().any(|metric| metric.series.contains(word));
        let selected = query.matches("{job=\"{{ $job }}\"").count();
        assert_eq!(words(query).filter(|word| is_series(word)).count(), selected, "{query}");
    }
}

#[test]
fn what_does_not_exist_is_found_out() {
    assert_eq!(unknown("sum(rate(sluice_drops_total{hook=\"x\"}[5m]))"), Vec::<String>::new());
    assert_eq!(unknown("sum by (why) (sluice_drops_total)"), ["why"]);
    assert_eq!(unknown("sluice_map_entries / sluice_map_size"), ["sluice_map_size"]);
    assert_eq!(unknown("sluice_drops"), ["no series in sluice_drops"]);
}
