//! `sluice cleanup`.

mod kube_proxy;
mod state;

use std::{
    io,
    path::{Path, PathBuf},
};

use anyhow::anyhow;
use clap::Args;
use serde::Serialize;
use tokio::{
    runtime,
    signal::unix::{SignalKind, signal},
};

use super::{
    Failure,
    output::{Format, Target},
};
use crate::dataplane::{self, Cleaned, Kept, OpenError, Removed};

/// What to take out.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  sluice cleanup --dry-run                 # what of Sluice's is here\n  sluice cleanup                           # take all of that out\n  sluice cleanup --kube-proxy --dry-run    # what kube-proxy has left here\n  sluice cleanup --kube-proxy              # take that out, and nothing of Sluice's"
)]
#[expect(clippy::struct_excessive_bools, reason = "flags are independent of each other")]
pub(super) struct Arguments {
    /// Directory the agent pinned its maps and links under.
    #[arg(long, value_name = "DIR", default_value = state::USUAL_PINS)]
    pin_path: PathBuf,
    /// Directory that the agent had as its --state-dir: what it keeps there goes, too [default: /var/lib/sluice, which is the chart's,
    /// with the usual --pin-path; else none]
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Accepted for symmetry with `run`: what is attached to a cgroup is found by its pins.
    #[arg(long, value_name = "DIR")]
    cgroup: Option<PathBuf>,
    /// Take out what kube-proxy has left on this node, in any of its modes, instead of what is Sluice's. It is refused while a kube-proxy
    /// runs here, and while connections are open whose destination rules have translated.
    #[arg(long)]
    kube_proxy: bool,
    /// Say what would be taken out, and change nothing.
    #[arg(long)]
    dry_run: bool,
    /// When all is done, stay until a signal comes: a DaemonSet starts what ends anew, for ever.
    #[arg(long, conflicts_with = "dry_run")]
    stay: bool,
    /// With --kube-proxy: even if connections end with it.
    #[arg(long, requires = "kube_proxy")]
    force: bool,
    /// Form of the answer.
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

/// What was taken out, or would be.
#[derive(Debug, Serialize)]
struct Report {
    removed: Vec<Removed>,
    /// What could not be removed.
    kept: Vec<Kept>,
    /// What the removal would meet.
    notes: Vec<String>,
}

pub(super) fn execute(arguments: &Arguments) -> Result<(), Failure> {
    let target = Target { pin_path: arguments.pin_path.clone(), output: arguments.output };
    let state_dir = state::directory(arguments.state_dir.as_deref(), &arguments.pin_path);
    match (arguments.kube_proxy, arguments.dry_run) {
        (true, dry_run) => kube_proxy::execute(&target, dry_run, arguments.force)?,
        (false, true) => tell(&target, state_dir.as_deref())?,
        (false, false) => remove(&target, state_dir.as_deref())?,
    }
    if arguments.stay { stay().map_err(|error| Failure::new(error, 1)) } else { Ok(()) }
}

/// Waits for SIGTERM or SIGINT, which the first process of a container would not hear by itself.
fn stay() -> io::Result<()> {
    let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let (mut ended, mut interrupted) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        eprintln!("sluice: this is done; staying until SIGTERM comes");
        tokio::select! {
            _ = ended.recv() => {}
            _ = interrupted.recv() => {}
        }
        Ok(())
    })
}

/// Takes out what an agent has pinned there, with its state.
pub(super) fn at(pin_path: &Path, state_dir: Option<&Path>) -> Result<(), Failure> {
    let target = Target { pin_path: pin_path.into(), output: Format::Table };
    remove(&target, state::directory(state_dir, pin_path).as_deref())
}

fn remove(target: &Target, state_dir: Option<&Path>) -> Result<(), Failure> {
    let Cleaned { mut removed, mut kept } = dataplane::cleanup(&target.pin_path)?;
    let (found, note) = state_dir.map(state::find).unwrap_or_default();
    let state = state::remove(found);
    removed.extend(state.removed);
    kept.extend(state.kept);
    let report = Report { removed, kept, notes: note.into_iter().collect() };
    target.show(&report, |report| describe(report, "removed", &target.pin_path))?;
    let failures = report.kept.iter().map(|Kept { thing, reason }| format!("not removed: {thing}: {reason}"));
    match failures.collect::<Vec<_>>().as_slice() {
        [] => Ok(()),
        failures => Err(Failure::new(anyhow!("{}", failures.join("\nsluice: ")), 1)),
    }
}

fn tell(target: &Target, state_dir: Option<&Path>) -> Result<(), Failure> {
    let mut removed = dataplane::find(&target.pin_path)?;
    let (found, note) = state_dir.map(state::find).unwrap_or_default();
    removed.extend(found);
    let runs = "an agent runs: without --dry-run this is refused until it has ended".to_owned();
    let runs = dataplane::is_kept(&target.pin_path).then_some(runs);
    let report = Report { removed, kept: Vec::new(), notes: runs.into_iter().chain(note).collect() };
    target.show(&report, |report| describe(report, "would be removed:", &target.pin_path))
}

impl From<OpenError> for Failure {
    fn from(error: OpenError) -> Self {
        let code = error.exit_code();
        Self::new(error, code)
    }
}

fn describe(report: &Report, verb: &str, pin_path: &Path) -> String {
    if report.removed.is_empty() && report.kept.is_empty() {
        return format!("there was nothing under {}", pin_path.display());
    }
    let removed = report.removed.iter().map(|thing| format!("{verb} {thing}"));
    let notes = report.notes.iter().map(|note| format!("note: {note}"));
    removed.chain(notes).collect::<Vec<_>>().join("\n")
}
