//! Prints every goal of the parts of the bench that are named, from their files. Exit status 0 means that all were met.

use std::{path::PathBuf, process::ExitCode};

use anyhow::Result;
use clap::Parser;
use tests::bench::findings::Findings;

/// The goals of the bench.
#[derive(Debug, Parser)]
struct Cli {
    /// Where the figures are
    #[arg(long, default_value = "target/bench")]
    from: PathBuf,
    /// Of which parts
    #[arg(required = true)]
    parts: Vec<String>,
}

#[expect(clippy::print_stdout, reason = "the table is the program's result")]
fn main() -> Result<ExitCode> {
    let cli = Cli::parse();
    let findings = Findings::read(&cli.from, &cli.parts)?;
    println!("{}", findings.table());
    Ok(if findings.are_good() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
