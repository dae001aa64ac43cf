//! `sluice counters`: what the programs have counted, by hook and outcome, since the maps were made.

use clap::Args;
use serde::Serialize;

use super::{
    Failure,
    output::{Target, columns},
};
use crate::inspect::{
    Inspector,
    meaning::{hook_name, meaning, outcome_name},
};

/// What to show.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  sluice counters\n  sluice counters --all -o json")]
pub(super) struct Arguments {
    /// Also what has never happened.
    #[arg(short, long)]
    all: bool,
    #[command(flatten)]
    target: Target,
}

/// How often something has happened somewhere.
#[derive(Debug, Serialize)]
pub(super) struct Counter {
    hook: String,
    outcome: String,
    count: u64,
    meaning: &'static str,
}

pub(super) fn execute(arguments: &Arguments) -> Result<(), Failure> {
    let counters = counted(&arguments.target.inspector()?, arguments.all);
    arguments.target.show(&counters, |counters| list(counters))
}

/// What has happened, or, with `all`, also what has never.
pub(super) fn counted(inspector: &Inspector, all: bool) -> Vec<Counter> {
    let counted = inspector.observer().counters();
    let counted = counted.into_iter().filter(|(_, _, count)| all || *count > 0);
    let told = |(hook, outcome, count)| Counter {
        hook: hook_name(hook),
        outcome: outcome_name(outcome),
        count,
        meaning: meaning(outcome),
    };
    counted.map(told).collect()
}

fn list(counters: &[Counter]) -> String {
    let row = |Counter { hook, outcome, count, meaning }: &Counter| {
        [hook.clone(), outcome.clone(), count.to_string(), (*meaning).to_owned()]
    };
    columns(&["HOOK", "OUTCOME", "COUNT", "MEANING"], counters.iter().map(row), "Nothing has been counted.")
}
