//! Measures TCP connections per second between pods and how long each takes: direct, by the agent, by rules of the shape that
//! kube-proxy writes. Exit status 0 means that every goal was met.

use std::{path::PathBuf, process::ExitCode, time::Duration};

use anyhow::Result;
use clap::Parser;
use comfy_table::{CellAlignment, Table, presets::UTF8_BORDERS_ONLY};
use serde_json::{Value, json};
use tests::bench::{
    connect::{Found, SERVICES, Way, judge, measure},
    goals::{self, Goal},
    machine::{Machine, stay_on_one_processor},
    progress::tell,
    rounds::{Effort, median},
};

/// Connections per second.
#[derive(Debug, Parser)]
struct Cli {
    /// A few seconds: to see that it works
    #[arg(long)]
    quick: bool,
    /// How often everybody has a turn
    #[arg(long)]
    rounds: Option<u32>,
    /// Milliseconds of a turn
    #[arg(long)]
    turn: Option<u64>,
    /// Where the figures go
    #[arg(long, default_value = "target/bench")]
    into: PathBuf,
}

impl Cli {
    fn effort(&self) -> Effort {
        let (rounds, turn) = if self.quick { (3, 100) } else { (15, 500) };
        Effort { rounds: self.rounds.unwrap_or(rounds), turn: Duration::from_millis(self.turn.unwrap_or(turn)) }
    }
}

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<bool> {
    // Client, server and all between them, so that who waits for whom is the same every time.
    stay_on_one_processor()?;
    let effort = cli.effort();
    let found = measure(&Way::ALL, effort, tell)?;
    tell("");
    let (goals, machine) = (judge(&found), Machine::here()?);
    let file = machine.write(&cli.into, "connect", figures(&found, &goals, effort))?;
    print(&found, &goals, &format!("{}; medians of {} rounds; {}", machine.line(), effort.rounds, file.display()));
    Ok(goals::are_met(&goals))
}

fn figures(found: &[Found], goals: &[Goal], effort: Effort) -> Value {
    let case = |found: &Found| {
        json!({
            "case": found.way.to_string(), "rate": found.rate(), "rate_on_the_wall": median(found.on_the_wall.clone()), "connections": found.latencies.len(),
            "p50_microseconds": found.latency(50), "p99_microseconds": found.latency(99), "rounds": found.rates,
            "rounds_on_the_wall": found.on_the_wall,
        })
    };
    json!({
        "rounds": effort.rounds, "turn_milliseconds": effort.turn.as_millis() as u64, "services": SERVICES,
        "cases": found.iter().map(case).collect::<Vec<_>>(), "goals": goals.iter().map(Goal::value).collect::<Vec<_>>(),
    })
}

#[expect(clippy::print_stdout, reason = "the tables are the program's result")]
fn print(found: &[Found], goals: &[Goal], line: &str) {
    let mut table = Table::new();
    table.load_style(UTF8_BORDERS_ONLY);
    let title = format!("TCP connections, one of {SERVICES} Services");
    table.set_header([&title, "per second", "of a processor's", "of direct", "half in, µs", "99 % in, µs"]);
    let direct = found.iter().find(|found| found.way == Way::Direct);
    for found in found {
        table.add_row([
            found.way.to_string(),
            format!("{:.0}", median(found.on_the_wall.clone())),
            format!("{:.0}", found.rate()),
            direct.map_or_else(String::new, |direct| format!("{:.2}", found.ratio_to(direct))),
            format!("{:.1}", found.latency(50)),
            format!("{:.1}", found.latency(99)),
        ]);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    println!("{table}");
    println!("{}", goals::table(goals));
    println!("{line}");
}
