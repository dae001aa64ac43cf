//! Tables of what was found, and a file with every number.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::Result;
use comfy_table::{CellAlignment, Table, presets::UTF8_BORDERS_ONLY};
use serde_json::{Value, json};
use tests::bench::{
    course::Contestant,
    goals::Goal,
    rounds::{Effort, Figures},
};

/// What was found.
pub(crate) struct Report<'a> {
    figures: &'a [Figures],
    goals: Vec<Goal>,
    effort: Effort,
    machine: Machine,
}

/// Where and when.
struct Machine {
    date: String,
    kernel: String,
    processor: String,
}

impl Machine {
    fn here() -> Result<Self> {
        let processors = fs::read_to_string("/proc/cpuinfo")?;
        let model = processors.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        Ok(Self {
            date: jiff::Timestamp::now().strftime("%Y-%m-%d %H:%M UTC").to_string(),
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned(),
            processor: model.map_or("unknown", |(_, name)| name).to_owned(),
        })
    }
}

impl<'a> Report<'a> {
    /// Of figures.
    pub(crate) fn new(figures: &'a [Figures], goals: Vec<Goal>, effort: Effort) -> Result<Self> {
        Ok(Self { figures, goals, effort, machine: Machine::here()? })
    }

    /// Whether every goal was met, of which at least one was measured.
    pub(crate) fn is_good(&self) -> bool {
        let mut measured = self.goals.iter().filter(|goal| goal.found.is_some()).peekable();
        measured.peek().is_some() && measured.all(Goal::is_met)
    }

    /// Writes all of it; returns where.
    pub(crate) fn write(&self, directory: &Path) -> Result<PathBuf> {
        fs::create_dir_all(directory)?;
        let file = directory.join("cost.json");
        fs::write(&file, serde_json::to_string_pretty(&self.value())?)?;
        Ok(file)
    }

    fn value(&self) -> Value {
        let cases: Vec<Value> = self.figures.iter().map(case).collect();
        let goals: Vec<Value> = self.goals.iter().map(goal).collect();
        json!({
            "date": self.machine.date, "kernel": self.machine.kernel, "processor": self.machine.processor,
            "rounds": self.effort.rounds, "turn_milliseconds": self.effort.turn.as_millis() as u64,
            "cases": cases, "goals": goals,
        })
    }

    /// Shows it.
    #[expect(clippy::print_stdout, reason = "the tables are the program's result")]
    pub(crate) fn print(&self, file: &Path) {
        let Machine { date, kernel, processor } = &self.machine;
        println!("{}", self.costs());
        println!("{}", self.judged());
        println!("{date}, Linux {kernel}, {processor}; medians of {} rounds; {}", self.effort.rounds, file.display());
    }

    fn costs(&self) -> Table {
        let mut table = Table::new();
        table.load_style(UTF8_BORDERS_ONLY);
        table.set_header(["ns per packet, without restoring it", "floor", "Sluice", "of the floor", "±", "restoring"]);
        for figures in self.figures {
            let null = tests::bench::rounds::median(figures.nanoseconds[Contestant::Null as usize].clone());
            table.add_row([
                figures.case.to_string(),
                format!("{:.1}", figures.net(Contestant::Floor)),
                format!("{:.1}", figures.net(Contestant::Sluice)),
                format!("{:.2}", figures.ratio()),
                format!("{:.2}", figures.spread() / 2.0),
                format!("{null:.1}"),
            ]);
        }
        for column in table.column_iter_mut().skip(1) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        table
    }

    fn judged(&self) -> Table {
        let mut table = Table::new();
        table.load_style(UTF8_BORDERS_ONLY).set_header(["goal", "found", "at most", ""]);
        for goal in &self.goals {
            let (found, verdict) = match goal.found {
                Some(found) => (format!("{found:.2}"), if goal.is_met() { "met" } else { "MISSED" }),
                None => (String::new(), "not measured"),
            };
            table.add_row([goal.what.clone(), found, format!("{:.2}", goal.bound), verdict.to_owned()]);
        }
        table
    }
}

fn case(figures: &Figures) -> Value {
    let [nothing, floor, sluice] = &figures.nanoseconds;
    json!({
        "case": figures.case.to_string(), "ratio": figures.ratio(), "spread": figures.spread(),
        "floor": figures.net(Contestant::Floor), "sluice": figures.net(Contestant::Sluice),
        "rounds": {"null": nothing, "floor": floor, "sluice": sluice},
    })
}

fn goal(goal: &Goal) -> Value {
    json!({"goal": goal.what, "found": goal.found, "bound": goal.bound, "met": goal.is_met()})
}
