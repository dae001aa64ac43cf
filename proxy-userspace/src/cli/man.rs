//! `sluice man`.

use std::path::PathBuf;

use anyhow::anyhow;
use clap::{Args, CommandFactory as _};

use super::{Cli, Failure, output::print};

/// Where to.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  sluice man /usr/local/share/man/man1")]
pub(super) struct Arguments {
    /// A directory that exists.
    #[arg(value_name = "DIR")]
    directory: PathBuf,
}

pub(super) fn execute(arguments: &Arguments) -> Result<(), Failure> {
    let directory = &arguments.directory;
    let written = clap_mangen::generate_to(Cli::command(), directory);
    let failed = |error| {
        anyhow!("cannot write manual pages into {}: {error}; name a directory that exists", directory.display())
    };
    written.map_err(|error| Failure::new(failed(error), 1))?;
    print(&format!("manual pages are in {}", directory.display()))
}
