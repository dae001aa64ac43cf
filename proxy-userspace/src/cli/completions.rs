//! `sluice completions`.

use clap::{Args, CommandFactory as _};
use clap_complete::Shell;

use super::{Cli, Failure, output::print};

/// For whom.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  sluice completions bash > /usr/share/bash-completion/completions/sluice")]
pub(super) struct Arguments {
    /// The shell.
    shell: Shell,
}

pub(super) fn execute(arguments: &Arguments) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(arguments.shell, &mut Cli::command(), "sluice", &mut script);
    print(&String::from_utf8_lossy(&script))
}
