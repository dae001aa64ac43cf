//! A table of what was measured, with goals.

use comfy_table::{Table, presets::UTF8_BORDERS_ONLY};

/// What was measured so far.
pub(crate) struct Report {
    table: Table,
    is_good: bool,
}

impl Report {
    /// Nothing yet.
    pub(crate) fn new(title: &str) -> Self {
        let mut table = Table::new();
        table.load_style(UTF8_BORDERS_ONLY).set_header([title, "found", "goal", ""]);
        Self { table, is_good: true }
    }

    /// A number without a goal.
    pub(crate) fn note(&mut self, what: &str, found: &str) {
        self.table.add_row([what, found, "", ""]);
    }

    /// A number that should be below another.
    pub(crate) fn judge<T: PartialOrd>(&mut self, what: &str, found: T, goal: T, show: impl Fn(T) -> String) {
        let is_met = found < goal;
        self.is_good &= is_met;
        let goal = format!("< {}", show(goal));
        self.table.add_row([what, &show(found), &goal, if is_met { "met" } else { "MISSED" }]);
    }

    /// Shows it; says whether every goal was met.
    #[expect(clippy::print_stdout, reason = "the table is the program's result")]
    pub(crate) fn print(&self) -> bool {
        println!("{}", self.table);
        self.is_good
    }
}
