//! What the parts of the bench have found, read from their files: every goal, met or not.

use std::{fs, path::Path};

use anyhow::{Context as _, Result};
use comfy_table::{Table, presets::UTF8_BORDERS_ONLY};
use serde_json::Value;

/// Goals of some parts.
#[derive(Clone, Debug)]
pub struct Findings {
    /// Part, goal, found, bound, verdict.
    rows: Vec<[String; 5]>,
}

impl Findings {
    /// Of the parts that are named.
    pub fn read(directory: &Path, parts: &[String]) -> Result<Self> {
        let mut rows = Vec::new();
        for part in parts {
            let file = directory.join(format!("{part}.json"));
            let text = fs::read_to_string(&file).with_context(|| format!("no figures in {}", file.display()))?;
            let figures: Value = serde_json::from_str(&text)?;
            let goals = figures["goals"].as_array().with_context(|| format!("no goals in {}", file.display()))?;
            rows.extend(goals.iter().map(|goal| row(part, goal)));
        }
        Ok(Self { rows })
    }

    /// Whether every goal was met.
    pub fn are_good(&self) -> bool {
        !self.rows.is_empty() && self.rows.iter().all(|[.., verdict]| verdict == "met")
    }

    /// For people.
    pub fn table(&self) -> Table {
        let mut table = Table::new();
        table.load_style(UTF8_BORDERS_ONLY).set_header(["part", "goal", "found", "bound", ""]);
        table.add_rows(&self.rows);
        table
    }
}

fn row(part: &str, goal: &Value) -> [String; 5] {
    let text = |key: &str| goal[key].as_str().unwrap_or_default().to_owned();
    let found = goal["found"].as_f64().map_or_else(String::new, |found| format!("{found:.2}"));
    [part.to_owned(), text("goal"), found, text("bound"), text("verdict")]
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::bench::goals::{Bound, Goal};

    #[test]
    fn goals_are_read_as_they_were_written_and_one_that_is_missed_spoils_all() {
        let directory = tempfile::tempdir().unwrap();
        let goal = |what: &str, found| Goal { what: what.to_owned(), bound: Bound::AtMost(0.5), found };
        let write = |part: &str, goals: &[Goal]| {
            let goals: Vec<Value> = goals.iter().map(Goal::value).collect();
            fs::write(directory.path().join(format!("{part}.json")), json!({"goals": goals}).to_string()).unwrap();
        };
        write("cost", &[goal("one", Some(0.25)), goal("two", Some(0.5))]);
        write("pps", &[goal("three", Some(0.75))]);
        let read = |parts: &[&str]| {
            let parts: Vec<String> = parts.iter().map(ToString::to_string).collect();
            Findings::read(directory.path(), &parts)
        };
        let findings = read(&["cost"]).unwrap();
        assert_eq!(findings.rows[0], ["cost", "one", "0.25", "≤ 0.50", "met"]);
        assert!(findings.are_good());
        let all = read(&["cost", "pps"]).unwrap();
        assert!(!all.are_good() && all.table().to_string().contains("MISSED"));
        assert!(read(&["connect"]).is_err(), "what was not measured is not met");
    }
}
