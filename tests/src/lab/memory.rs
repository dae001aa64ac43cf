//! A limit to what processes have of memory, by whichever version of cgroups this machine has for it. It goes away with its handle,
//! and what is in it then.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result};

use super::{cgroup, leftover};
use crate::patience::wait_until;

/// What the files of a version are called.
#[derive(Clone, Copy, Debug)]
struct Files {
    limit: &'static str,
    usage: &'static str,
    events: &'static str,
}

const V1: Files =
    Files { limit: "memory.limit_in_bytes", usage: "memory.usage_in_bytes", events: "memory.oom_control" };
const V2: Files = Files { limit: "memory.max", usage: "memory.current", events: "memory.events" };

/// A cgroup whose memory has a limit.
#[derive(Debug)]
pub struct MemoryCgroup {
    path: PathBuf,
    files: Files,
}

impl MemoryCgroup {
    /// An empty one without a limit, or the reason why this machine makes none. Removes what processes that were killed have left.
    pub fn new(number: u32) -> Result<Self> {
        let (mount, files) = hierarchy()?;
        for leftover in leftover::find(&mount)? {
            // One that is no leaf is another fixture's to remove.
            let _ = fs::remove_dir(leftover);
        }
        let path = mount.join(format!("{}-memory", leftover::name(number)));
        fs::create_dir(&path).with_context(|| format!("cannot make cgroup {}", path.display()))?;
        let limit = path.join(files.limit);
        let made = Self { path, files };
        anyhow::ensure!(limit.exists(), "{} does not exist: no memory controller", limit.display());
        Ok(made)
    }

    /// Takes in a process that runs. What it has already stays where it was counted.
    pub fn take(&self, process: u32) -> Result<()> {
        fs::write(self.path.join("cgroup.procs"), process.to_string())
            .with_context(|| format!("cannot take in process {process}"))
    }

    /// Has a command begin in it, so that all it makes is counted here.
    pub fn enter_on_exec(&self, command: &mut Command) -> Result<()> {
        cgroup::enter_on_exec(command, &self.path)
    }

    /// Lets a process go, to the cgroup above. What it has made stays here.
    pub fn release(&self, process: u32) -> Result<()> {
        let above = self.path.parent().context("there is no cgroup above")?;
        fs::write(above.join("cgroup.procs"), process.to_string())
            .with_context(|| format!("cannot let process {process} go"))
    }

    /// Sets the limit to what is in use, after the kernel has taken back what it can.
    pub fn shrink(&self) -> Result<()> {
        let _ = fs::write(self.path.join("memory.force_empty"), "0");
        // Version 1 refuses a limit that cannot be kept.
        let fits = || self.usage().and_then(|usage| self.limit(usage.next_multiple_of(4 << 10))).ok();
        wait_until("a limit that can be kept", Duration::from_secs(5), fits)
    }

    /// Sets the limit, in bytes.
    pub fn limit(&self, bytes: u64) -> Result<()> {
        fs::write(self.path.join(self.files.limit), bytes.to_string())
            .with_context(|| format!("cannot limit {} to {bytes} bytes", self.path.display()))
    }

    /// What is in use, in bytes.
    pub fn usage(&self) -> Result<u64> {
        let path = self.path.join(self.files.usage);
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(text.trim().parse()?)
    }

    /// How many processes the kernel has killed here for want of memory.
    pub fn killed(&self) -> Result<u64> {
        let text = fs::read_to_string(self.path.join(self.files.events))?;
        let killed = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
        Ok(killed.with_context(|| format!("no oom_kill in\n{text}"))?.trim().parse()?)
    }
}

impl Drop for MemoryCgroup {
    fn drop(&mut self) {
        // Whoever has been in it may take a moment to go.
        let removed = wait_until("the cgroup to be empty", Duration::from_secs(5), || fs::remove_dir(&self.path).ok());
        if let Err(error) = removed {
            eprintln!("cgroup {} stays behind: {error:#}", self.path.display());
        }
    }
}

/// Where the memory controller is, and what its files are called.
fn hierarchy() -> Result<(PathBuf, Files)> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("cannot read the mounts")?;
    if let Some(mount) = find_v1(&mounts) {
        return Ok((mount, V1));
    }
    let mount = cgroup::mount_point()?;
    // Enabled already where systemd runs.
    fs::write(mount.join("cgroup.subtree_control"), "+memory").context("cgroup v2 gives no memory controller")?;
    Ok((mount, V2))
}

/// The mount of version 1's memory controller in the text of `/proc/self/mountinfo`.
fn find_v1(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (mount, file_system) = line.split_once(" - ")?;
        let mut words = file_system.split(' ');
        let is_v1 = words.next() == Some("cgroup") && words.next_back()?.split(',').any(|option| option == "memory");
        is_v1.then(|| mount.split(' ').nth(4).map(|path| Path::new(path).to_owned()))?
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::find_v1;

    #[test]
    fn the_memory_controller_of_version_1_is_found_by_its_option() {
        let mounts = "31 30 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
                      32 30 0:28 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n\
                      43 30 0:39 / /sys/fs/cgroup/unified rw,relatime shared:7 - cgroup2 cgroup2 rw\n";
        assert_eq!(find_v1(mounts).as_deref(), Some(Path::new("/sys/fs/cgroup/memory")));
        assert_eq!(find_v1("43 30 0:39 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,memory_recursiveprot\n"), None);
    }
}
