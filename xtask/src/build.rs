//! `build`: the agent, and through its build script the BPF object inside it.

use anyhow::Result;
use clap::Args;

use crate::{setup, workspace::Workspace};

/// Build the agent `sluice` with the BPF object inside it.
#[derive(Args)]
pub(crate) struct Arguments {
    /// Optimised, as it is shipped.
    #[arg(long)]
    release: bool,
}

pub(crate) fn run(workspace: &Workspace, arguments: &Arguments) -> Result<()> {
    setup::ensure(workspace, &[setup::BPF])?;
    let profile = if arguments.release { "release" } else { "dev" };
    let built =
        workspace.executables(&["build", "--package", "proxy-userspace", "--bin", "sluice", "--profile", profile])?;
    for executable in built {
        println!("{}", executable.path.display());
    }
    Ok(())
}
