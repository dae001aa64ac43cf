//! The `sluice` binary.

use std::process::ExitCode;

use clap::Parser as _;
use proxy_userspace::cli::Cli;

fn main() -> ExitCode {
    Cli::parse().execute()
}
