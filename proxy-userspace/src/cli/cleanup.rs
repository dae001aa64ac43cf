//! `sluice cleanup`.

mod kube_proxy;

use std::path::{Path, PathBuf};

use clap::Args;

use super::{
    Failure,
    output::{Format, Target},
};
use crate::dataplane;

/// What to take out.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  sluice cleanup                           # everything of Sluice's\n  sluice cleanup --kube-proxy --dry-run    # what kube-proxy has left here\n  sluice cleanup --kube-proxy              # take that out, and nothing of Sluice's"
)]
pub(super) struct Arguments {
    /// Directory the agent pinned its maps and links under.
    #[arg(long, value_name = "DIR", default_value = "/sys/fs/bpf/sluice")]
    pin_path: PathBuf,
    /// Accepted for symmetry with `run`: what is attached to a cgroup is found by its pins.
    #[arg(long, value_name = "DIR")]
    cgroup: Option<PathBuf>,
    /// Take out what kube-proxy has left on this node, in any of its modes, instead of what is Sluice's. It is refused while a kube-proxy
    /// runs here, and while connections are open whose destination rules have translated.
    #[arg(long)]
    kube_proxy: bool,
    /// Say what --kube-proxy would take out, and change nothing.
    #[arg(long, requires = "kube_proxy")]
    dry_run: bool,
    /// With --kube-proxy: even if connections end with it.
    #[arg(long, requires = "kube_proxy")]
    force: bool,
    /// Form of the answer to --kube-proxy.
    #[arg(short, long, value_enum, default_value_t, requires = "kube_proxy")]
    output: Format,
}

pub(super) fn execute(arguments: &Arguments) -> Result<(), Failure> {
    if arguments.kube_proxy {
        let target = Target { pin_path: arguments.pin_path.clone(), output: arguments.output };
        return kube_proxy::execute(&target, arguments.dry_run, arguments.force);
    }
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
