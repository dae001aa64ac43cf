//! `charts/sluice` as far as it can be known without helm, which `cargo xtask check` asks where there is one.

use std::{collections::BTreeSet, fs};

use serde_json::Value;

const SCHEMA: &str = "charts/sluice/values.schema.json";

/// Where values are, as far as the chart itself knows what is in them: `image.tag`.
fn leaves(value: &Value, at: &str, schema: &Value, found: &mut BTreeSet<String>) {
    match (value, schema.pointer("/properties")) {
        (Value::Object(fields), Some(_)) => {
            for (name, field) in fields {
                let schema = schema.pointer(&format!("/properties/{name}"));
                let at = format!("{at}.{name}");
                leaves(field, &at, schema.unwrap_or_else(|| panic!("{SCHEMA} does not know {at}")), found);
            }
        }
        _ => drop(found.insert(at.to_owned())),
    }
}

/// The templates in one text.
fn templates() -> String {
    let files = fs::read_dir(super::path("charts/sluice/templates")).unwrap();
    files.map(|file| fs::read_to_string(file.unwrap().path()).unwrap()).collect()
}

#[test]
fn every_value_is_known_to_the_schema_described_and_used() {
    let [values] = &super::yaml("charts/sluice/values.yaml")[..] else { panic!("one document") };
    let schema: Value = serde_json::from_str(&super::read(SCHEMA)).unwrap();
    let mut found = BTreeSet::new();
    leaves(values, "", &schema, &mut found);
    let (templates, readme) = (templates(), super::read("charts/sluice/README.md"));
    for value in found {
        let path = value.trim_start_matches('.');
        let (first, last) = (path.split('.').next().unwrap(), path.rsplit('.').next().unwrap());
        let has = |text: String| templates.contains(&text);
        let is_whole = has(format!("toYaml .Values.{first}"));
        let is_part = has(format!("with .Values.{first}")) && has(format!(" .{last}"));
        assert!(is_whole || is_part || has(format!(".Values.{path}")), "no template uses {path}");
        let is_described = readme.contains(&format!("`{path}`")) || readme.contains(&format!("`.{last}`"));
        assert!(
            is_described || readme.contains(&format!("`{first}`")),
            "charts/sluice/README.md does not speak of {path}"
        );
    }
}

/// One that is given twice ends the agent with status 2.
#[test]
fn every_flag_that_the_chart_sets_is_refused_among_further_ones() {
    let template = super::read("charts/sluice/templates/daemonset.yaml");
    let refused = template.lines().find(|line| line.contains("has $flag")).unwrap();
    let set: Vec<&str> = template
        .lines()
        .filter_map(|line| line.trim().strip_prefix("- --")?.split_once('='))
        .map(|(flag, _)| flag)
        .collect();
    assert!(set.len() >= 7, "{set:?}");
    for flag in set {
        assert!(refused.contains(&format!("\"--{flag}\"")), "--{flag}");
    }
}

#[test]
fn the_chart_is_of_the_agents_version() {
    let chart = &super::yaml("charts/sluice/Chart.yaml")[0];
    let version = env!("CARGO_PKG_VERSION");
    assert_eq!((chart["version"].as_str(), chart["appVersion"].as_str()), (Some(version), Some(version)));
}

#[test]
fn kustomize_is_given_files_that_exist() {
    let kustomization = &super::yaml("deploy/kustomization.yaml")[0];
    let resources = kustomization["resources"].as_array().unwrap();
    assert!(resources.iter().any(|resource| resource == "sluice.yaml"));
    for resource in resources {
        super::read(&format!("deploy/{}", resource.as_str().unwrap()));
    }
}
