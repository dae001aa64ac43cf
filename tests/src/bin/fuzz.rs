//! Fuzzes the programs against the model: `fuzz --minutes N [--seed S]`. `cargo xtask fuzz` builds and runs it.
#![expect(clippy::print_stdout, reason = "a command line speaks on its standard output")]

use std::{
    process::ExitCode,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::Result;
use clap::Parser;
use tests::fuzz::{self, Until};

/// Packets at random through the programs and through the model of the rules.
#[derive(Parser)]
struct Cli {
    /// For how long.
    #[arg(long, default_value_t = 5.0)]
    minutes: f64,
    /// Instead: for how many packets.
    #[arg(long)]
    packets: Option<u64>,
    /// Seed of the first episode; that of a difference shows it again at once.
    #[arg(long)]
    seed: Option<u64>,
}

fn main() -> Result<ExitCode> {
    let cli = Cli::parse();
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos() as u64);
    let seed = cli.seed.unwrap_or_else(now);
    println!("seed {seed}");
    let until = cli.packets.map_or_else(|| Until::Elapsed(Duration::from_secs_f64(cli.minutes * 60.0)), Until::Packets);
    let tell = |summary: &fuzz::summary::Summary| {
        println!("{:>5.0?}: {} packets, {} each second", summary.elapsed, summary.packets(), summary.pace());
    };
    let (summary, finding) = fuzz::run(seed, until, tell)?;
    print!("{summary}");
    let Some(finding) = finding else {
        println!("differences: 0");
        return Ok(ExitCode::SUCCESS);
    };
    println!("{finding}\ndifferences: 1");
    Ok(ExitCode::FAILURE)
}
