//! Nodes that lack something: what a thread spoils before it starts an agent, which inherits it. Nobody else notices.

use std::{fs, thread};

use anyhow::{Context as _, Result};
use caps::{CapSet, Capability};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
};

use crate::sandbox::Agent;

/// Starts an agent from a thread of its own, which first spoils what the agent inherits.
pub fn start_where(
    spoil: impl FnOnce() -> Result<()> + Send,
    start: impl FnOnce() -> Result<Agent> + Send,
) -> Result<Agent> {
    let spoiled = || spoil().and_then(|()| start());
    thread::scope(|scope| scope.spawn(spoiled).join()).unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// Takes away what root has when it executes a program.
pub fn lose(capabilities: &[Capability]) -> Result<()> {
    capabilities.iter().try_for_each(|one| Ok(caps::drop(None, CapSet::Bounding, *one)?))
}

/// Leaves root these when it executes a program, and nothing else.
pub fn only(kept: &[Capability]) -> Result<()> {
    let others = caps::all().into_iter().filter(|one| !kept.contains(one));
    // Unknown to an older kernel is as good as lost.
    let known: Vec<_> = others.filter(|one| caps::has_cap(None, CapSet::Bounding, *one).is_ok()).collect();
    lose(&known)
}

/// Mounts of the calling thread's own from now on.
fn own_mounts() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    let nothing = None::<&str>;
    Ok(mount(nothing, "/", nothing, MsFlags::MS_REC | MsFlags::MS_PRIVATE, nothing)?)
}

/// Hides what is in a directory.
pub fn hide(directory: &str) -> Result<()> {
    own_mounts()?;
    mount(Some("none"), directory, Some("tmpfs"), MsFlags::empty(), None::<&str>)
        .with_context(|| format!("cannot hide {directory}"))
}

/// Unmounts every hierarchy of cgroup v2.
pub fn unmount_cgroup2() -> Result<()> {
    own_mounts()?;
    let mounts = fs::read_to_string("/proc/thread-self/mounts")?;
    let mounts = mounts.lines().filter(|line| line.split(' ').nth(2) == Some("cgroup2"));
    for path in mounts.filter_map(|line| line.split(' ').nth(1)) {
        umount2(path, MntFlags::MNT_DETACH).with_context(|| format!("cannot unmount {path}"))?;
    }
    Ok(())
}
