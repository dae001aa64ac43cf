//! A table of what was measured, with goals, and a file of the same.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use ::tests::bench::{
    bounded::Taken,
    goals::{self, Bound, Goal},
    machine::Machine,
};
use anyhow::Result;
use comfy_table::{Table, presets::UTF8_BORDERS_ONLY};
use serde_json::{Value, json};

/// What was measured so far.
pub(crate) struct Report {
    title: String,
    notes: Vec<[String; 2]>,
    goals: Vec<Goal>,
    cases: Vec<Value>,
}

impl Report {
    /// Nothing yet.
    pub(crate) fn new(title: String) -> Self {
        Self { title, notes: vec![], goals: vec![], cases: vec![] }
    }

    /// A finding without a goal.
    pub(crate) fn note(&mut self, what: &str, found: String) {
        self.notes.push([what.to_owned(), found]);
    }

    /// A time, and the most it should be.
    pub(crate) fn time(&mut self, what: &str, found: Duration, most: Duration) {
        self.judge(format!("{what}, ms"), milliseconds(found), milliseconds(most));
    }

    /// Memory in KiB, and the most it should be.
    pub(crate) fn memory(&mut self, what: &str, found: u64, most: u64) {
        self.judge(format!("{what}, MiB"), mebibytes(found), mebibytes(most));
    }

    fn judge(&mut self, what: String, found: f64, most: f64) {
        self.goals.push(Goal { what, bound: Bound::AtMost(most), found: Some(found) });
    }

    /// How long somebody takes for everything, and for one change, if that was measured.
    pub(crate) fn case(&mut self, who: &str, cold: Duration, change: Option<Duration>) {
        self.cases.push(json!({"case": who, "cold": milliseconds(cold), "change": change.map(milliseconds)}));
    }

    /// Writes it, and shows it; says whether every goal was met.
    #[expect(clippy::print_stdout, reason = "the tables are the program's result")]
    pub(crate) fn publish(&self, directory: &Path, part: &str) -> Result<bool> {
        let machine = Machine::here()?;
        let file = self.write(&machine, directory, part)?;
        let mut table = Table::new();
        table.load_style(UTF8_BORDERS_ONLY).set_header([self.title.as_str(), "found"]).add_rows(&self.notes);
        println!("{table}\n{}\n{}; {}", goals::table(&self.goals), machine.line(), file.display());
        Ok(goals::are_met(&self.goals))
    }

    fn write(&self, machine: &Machine, directory: &Path, part: &str) -> Result<PathBuf> {
        let goals: Vec<Value> = self.goals.iter().map(Goal::value).collect();
        let figures = json!({"title": self.title, "notes": self.notes, "cases": self.cases, "goals": goals});
        machine.write(directory, part, figures)
    }
}

/// For people.
pub(crate) fn shown(duration: Duration) -> String {
    format!("{:.1} ms", milliseconds(duration))
}

/// The same of what may have been ended.
pub(crate) fn shown_taken(taken: Taken) -> String {
    match taken {
        Taken::All(taken) => shown(taken),
        Taken::MoreThan(limit) => format!("more than {}, ended then", shown(limit)),
    }
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

#[expect(clippy::cast_precision_loss, reason = "no machine has that much memory")]
fn mebibytes(kibibytes: u64) -> f64 {
    kibibytes as f64 / 1024.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_has_goals_in_their_units_and_is_drawn_where_there_is_something_beside_them() {
        let directory = tempfile::tempdir().unwrap();
        let mut report = Report::new("ten Services".to_owned());
        report.note("entries", "30".to_owned());
        report.time("all", Duration::from_micros(1_500), Duration::from_millis(2));
        report.memory("memory", 3_072, 2_048);
        report.case("Sluice", Duration::from_millis(1), Some(Duration::from_micros(100)));
        report.case("rules, ended then", Duration::from_secs(1), None);
        assert!(!report.publish(directory.path(), "programming").unwrap());
        let read = |file: &str| std::fs::read_to_string(directory.path().join(file)).unwrap();
        let figures: Value = serde_json::from_str(&read("programming.json")).unwrap();
        assert_eq!(figures["goals"][0]["found"], 1.5);
        assert_eq!(figures["goals"][0]["verdict"], "met");
        assert_eq!(figures["goals"][1]["bound"], "≤ 2.00");
        assert_eq!(figures["goals"][1]["verdict"], "MISSED");
        assert!(read("programming.svg").contains("Sluice"));
        assert_eq!((&figures["cases"][1]["cold"], &figures["cases"][1]["change"]), (&json!(1000.0), &Value::Null));
    }

    #[test]
    fn what_was_ended_is_not_shown_as_if_it_were_through() {
        assert_eq!(shown_taken(Taken::All(Duration::from_millis(3))), "3.0 ms");
        assert_eq!(shown_taken(Taken::MoreThan(Duration::from_secs(1))), "more than 1000.0 ms, ended then");
    }
}
