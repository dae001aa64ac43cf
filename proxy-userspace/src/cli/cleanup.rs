//! `sluice cleanup`.

use std::path::{Path, PathBuf};

use clap::Args;

use super::Failure;
use crate::dataplane;

/// What to take out.
#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// Directory the agent pinned its maps and links under.
    #[arg(long, value_name = "DIR", default_value = "/sys/fs/bpf/sluice")]
    pin_path: PathBuf,
    /// Accepted for symmetry with `run`: what is attached to a cgroup is found by its pins.
    #[arg(long, value_name = "DIR")]
    cgroup: Option<PathBuf>,
}

pub(super) fn execute(arguments: &Arguments) -> Result<(), Failure> {
    at(&arguments.pin_path)
}

/// Takes out what is pinned there.
#[expect(clippy::print_stdout, reason = "what was removed is the command's result")]
pub(super) fn at(pin_path: &Path) -> Result<(), Failure> {
    let removed = dataplane::cleanup(pin_path).map_err(|error| {
        let code = error.exit_code();
        Failure::new(error, code)
    })?;
    for thing in &removed {
        println!("removed {thing}");
    }
    if removed.is_empty() {
        println!("there was nothing under {}", pin_path.display());
    }
    Ok(())
}
