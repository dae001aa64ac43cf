//! Measures what the programs cost per packet, beside a program that does nothing and the smallest honest balancer. Exit status 0
//! means that every goal was met.

mod report;

use std::{path::PathBuf, process, time::Duration};

use anyhow::Result;
use clap::Parser;
use tests::{
    bench::{
        case::Case,
        course::{Course, ENTRIES},
        goals,
        machine::stay_on_one_processor,
        progress::tell,
        rounds::{Effort, measure},
    },
    testbed::Testbed,
};

use report::Report;

/// What the programs cost per packet.
#[derive(Debug, Parser)]
struct Cli {
    /// Half a minute instead of five: to see that it works
    #[arg(long)]
    quick: bool,
    /// How often everybody has a turn
    #[arg(long)]
    rounds: Option<u32>,
    /// Milliseconds of a turn. Once a second a flow has more to do than otherwise, so that turns should not be shorter
    #[arg(long)]
    turn: Option<u64>,
    /// Only cases whose name has this in it
    #[arg(long)]
    only: Option<String>,
    /// Where the figures go
    #[arg(long, default_value = "target/bench")]
    into: PathBuf,
}

impl Cli {
    fn effort(&self) -> Effort {
        let (rounds, turn) = if self.quick { (3, 50) } else { (7, 1_000) };
        Effort { rounds: self.rounds.unwrap_or(rounds), turn: Duration::from_millis(self.turn.unwrap_or(turn)) }
    }

    fn cases(&self) -> Vec<Case> {
        let named = |case: &Case| self.only.as_ref().is_none_or(|part| case.to_string().contains(part));
        Case::all().into_iter().filter(named).collect()
    }
}

fn main() {
    // Without cleaning up: nothing of it outlives the process, and emptying tables of a hundred thousand flows takes long.
    process::exit(match run(&Cli::parse()) {
        Ok(true) => 0,
        Ok(false) => 1,
        Err(error) => {
            eprintln!("error: {error:#}");
            1
        }
    })
}

fn run(cli: &Cli) -> Result<bool> {
    stay_on_one_processor()?;
    let (cases, effort) = (cli.cases(), cli.effort());
    let bed = Box::leak(Box::new(Testbed::with_entries(&ENTRIES)?));
    let figures = bed.inside(|bed| measure(Box::leak(Box::new(Course::new(bed)?)), &cases, effort, tell))?;
    tell("");
    let report = Report::new(&figures, goals::judge(&figures), effort)?;
    let file = report.write(&cli.into)?;
    report.print(&file);
    Ok(report.is_good())
}
