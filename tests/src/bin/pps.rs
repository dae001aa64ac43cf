//! Measures packets per second of a processor, through a veth into another namespace: the agent's program, the smallest honest balancer, the
//! kernel, and rules of the shape that kube-proxy writes. Exit status 0 means that every goal was met.

use std::{path::PathBuf, process, time::Duration};

use anyhow::Result;
use clap::Parser;
use comfy_table::{CellAlignment, Table, presets::UTF8_BORDERS_ONLY};
use serde_json::{Value, json};
use tests::{
    bench::{
        course::ENTRIES,
        goals::{self, Goal},
        live::{Found, Heat, Stadium, judge},
        machine::{Machine, stay_on_one_processor},
        progress::tell,
        rounds::Effort,
    },
    testbed::Testbed,
};

/// Packets per second.
#[derive(Debug, Parser)]
struct Cli {
    /// A minute, and no rules of 10,000 Services: to see that it works
    #[arg(long)]
    quick: bool,
    /// How often everybody has a turn
    #[arg(long)]
    rounds: Option<u32>,
    /// Milliseconds of a turn
    #[arg(long)]
    turn: Option<u64>,
    /// Only those whose name has this in it
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

    fn heats(&self) -> Vec<Heat> {
        let services: &[u32] = if self.quick { &[1, 1_000] } else { &[1, 1_000, 10_000] };
        let named = |heat: &Heat| self.only.as_ref().is_none_or(|part| heat.to_string().contains(part));
        Heat::all(services).into_iter().filter(named).collect()
    }
}

fn main() {
    // Without cleaning up: the namespaces and maps go with the process.
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
    let (heats, effort) = (cli.heats(), cli.effort());
    let bed = Box::leak(Box::new(Testbed::with_entries(&ENTRIES)?));
    let found = bed.inside(|bed| {
        let stadium = Box::leak(Box::new(Stadium::new(bed, &heats, &mut tell)?));
        stadium.measure(&heats, effort, tell)
    })?;
    tell("");
    let (goals, machine) = (judge(&found), Machine::here()?);
    let file = machine.write(&cli.into, "pps", figures(&found, &goals, effort))?;
    print(&found, &goals, &format!("{}; medians of {} rounds; {}", machine.line(), effort.rounds, file.display()));
    Ok(goals::are_met(&goals))
}

fn figures(found: &[Found], goals: &[Goal], effort: Effort) -> Value {
    let case = |found: &Found| json!({"case": found.heat.to_string(), "rate": found.rate(), "lost_of_thousand": found.lost(), "rounds": found.rates()});
    json!({
        "rounds": effort.rounds, "turn_milliseconds": effort.turn.as_millis() as u64,
        "cases": found.iter().map(case).collect::<Vec<_>>(), "goals": goals.iter().map(Goal::value).collect::<Vec<_>>(),
    })
}

#[expect(clippy::print_stdout, reason = "the tables are the program's result")]
fn print(found: &[Found], goals: &[Goal], line: &str) {
    let mut table = Table::new();
    table.load_style(UTF8_BORDERS_ONLY);
    table.set_header(["packets that arrive per second of one processor", "thousands", "lost, of a thousand"]);
    for found in found {
        table.add_row([found.heat.to_string(), format!("{:.0}", found.rate() / 1e3), format!("{:.1}", found.lost())]);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    println!("{table}");
    println!("{}", goals::table(goals));
    println!("{line}");
}
