//! Tables of what was found, and a file with every number.

use std::path::{Path, PathBuf};

use anyhow::Result;
use comfy_table::{CellAlignment, Table, presets::UTF8_BORDERS_ONLY};
use serde_json::{Value, json};
use tests::bench::{
    course::Contestant,
    goals::{self, Goal},
    machine::Machine,
    rounds::{Effort, Figures},
};

/// What was found.
pub(crate) struct Report<'a> {
    figures: &'a [Figures],
    goals: Vec<Goal>,
    effort: Effort,
    machine: Machine,
}

impl<'a> Report<'a> {
    /// Of figures.
    pub(crate) fn new(figures: &'a [Figures], goals: Vec<Goal>, effort: Effort) -> Result<Self> {
        Ok(Self { figures, goals, effort, machine: Machine::here()? })
    }

    /// Whether every goal was met, of which at least one was measured.
    pub(crate) fn is_good(&self) -> bool {
        goals::are_met(&self.goals)
    }

    /// Writes all of it; returns where.
    pub(crate) fn write(&self, directory: &Path) -> Result<PathBuf> {
        let cases: Vec<Value> = self.figures.iter().map(case).collect();
        let goals: Vec<Value> = self.goals.iter().map(Goal::value).collect();
        let (rounds, turn) = (self.effort.rounds, self.effort.turn.as_millis() as u64);
        let figures = json!({"rounds": rounds, "turn_milliseconds": turn, "cases": cases, "goals": goals});
        self.machine.write(directory, "cost", figures)
    }

    /// Shows it.
    #[expect(clippy::print_stdout, reason = "the tables are the program's result")]
    pub(crate) fn print(&self, file: &Path) {
        println!("{}", self.costs());
        println!("{}", goals::table(&self.goals));
        println!("{}; medians of {} rounds; {}", self.machine.line(), self.effort.rounds, file.display());
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
}

fn case(figures: &Figures) -> Value {
    let [nothing, floor, sluice] = &figures.nanoseconds;
    json!({
        "case": figures.case.to_string(), "ratio": figures.ratio(), "spread": figures.spread(),
        "floor": figures.net(Contestant::Floor), "sluice": figures.net(Contestant::Sluice),
        "rounds": {"null": nothing, "floor": floor, "sluice": sluice},
    })
}
