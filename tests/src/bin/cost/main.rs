//! Measures what the programs cost per packet, beside a program that does nothing and the smallest honest balancer. Exit status 0
//! means that every goal was met.

mod report;

use std::{
    io::{IsTerminal as _, Write as _},
    path::PathBuf,
    process,
    time::Duration,
};

use anyhow::{Context as _, Result};
use clap::Parser;
use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    unistd::Pid,
};
use tests::{
    bench::{
        case::Case,
        course::{Course, ENTRIES},
        goals,
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
    let file = report.write(&cli.into).with_context(|| format!("cannot write into {}", cli.into.display()))?;
    report.print(&file);
    Ok(report.is_good())
}

/// Tables keep free entries for each processor, and caches are a processor's own. Threads made later stay there, too.
fn stay_on_one_processor() -> Result<()> {
    let this = Pid::from_raw(0);
    let allowed = sched_getaffinity(this)?;
    let last = (0..CpuSet::count()).rev().find(|cpu| allowed.is_set(*cpu).unwrap_or(false));
    let mut one = CpuSet::new();
    one.set(last.context("no processor to run on")?)?;
    Ok(sched_setaffinity(this, &one)?)
}

/// What is being done, in one line that the next one takes the place of.
fn tell(what: &str) {
    let mut terminal = std::io::stderr();
    let _ = if terminal.is_terminal() {
        write!(terminal, "\r\x1b[K{what}").and_then(|()| terminal.flush())
    } else if what.is_empty() {
        Ok(())
    } else {
        writeln!(terminal, "{what}")
    };
}
