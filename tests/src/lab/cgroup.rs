//! A subtree of cgroup v2 that goes away with its handle, processes included.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result};

use super::leftover;
use crate::patience::wait_until;

/// Where cgroup v2 is mounted: not always `/sys/fs/cgroup`.
pub fn mount_point() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("cannot read the mounts")?;
    find_mount(&mounts).context("cgroup v2 is not mounted: mount -t cgroup2 none /sys/fs/cgroup")
}

/// The first cgroup2 mount in the text of `/proc/self/mountinfo` (see proc(5)).
fn find_mount(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (mount, file_system) = line.split_once(" - ")?;
        let is_cgroup2 = file_system.split(' ').next() == Some("cgroup2");
        is_cgroup2.then(|| mount.split(' ').nth(4).map(PathBuf::from))?
    })
}

/// The root of a subtree of our own.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// An empty cgroup below the mount point, named after this process and `number`. Removes what processes that were
    /// killed have left.
    pub fn new(number: u32) -> Result<Self> {
        let mount = mount_point()?;
        for leftover in leftover::find(&mount)? {
            // Another run may be removing the same one: what is left over is for the next run.
            let _ = remove(&leftover);
        }
        let path = mount.join(leftover::name(number));
        fs::create_dir(&path).with_context(|| format!("cannot make cgroup {}", path.display()))?;
        Ok(Self { path })
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The directory of a cgroup below, made if need be.
    pub fn child(&self, name: &str) -> Result<PathBuf> {
        let path = self.path.join(name);
        fs::create_dir_all(&path).with_context(|| format!("cannot make cgroup {}", path.display()))?;
        Ok(path)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.path) {
            eprintln!("cgroup {} stays behind: {error:#}", self.path.display());
        }
    }
}

/// Makes a command start inside the cgroup.
pub fn enter_on_exec(command: &mut Command, cgroup: &Path) -> Result<()> {
    let path = cgroup.join("cgroup.procs");
    let mut processes =
        OpenOptions::new().write(true).open(&path).with_context(|| format!("cannot open {}", path.display()))?;
    let enter = move || join(&mut processes);
    // SAFETY: between fork and exec the closure makes one system call on a descriptor that was opened before.
    unsafe { command.pre_exec(enter) };
    Ok(())
}

/// Zero stands for the process that writes.
fn join(processes: &mut File) -> io::Result<()> {
    processes.write_all(b"0")
}

fn remove(path: &Path) -> Result<()> {
    // Absent before Linux 5.14 only.
    fs::write(path.join("cgroup.kill"), "1").context("cannot kill its processes")?;
    wait_until("its processes to end", Duration::from_secs(5), || is_empty(path).then_some(()))?;
    Ok(remove_tree(path)?)
}

fn is_empty(path: &Path) -> bool {
    fs::read_to_string(path.join("cgroup.events")).is_ok_and(|events| events.contains("populated 0"))
}

/// The files of a cgroup cannot be removed and need not be: only directories are.
fn remove_tree(path: &Path) -> io::Result<()> {
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    fs::remove_dir(path)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::find_mount;

    #[test]
    fn the_mount_is_found_in_a_hybrid_layout() {
        let mounts = "30 20 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
                      31 30 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
                      43 30 0:39 / /sys/fs/cgroup/unified rw,relatime shared:7 - cgroup2 cgroup2 rw\n";
        assert_eq!(find_mount(mounts).as_deref(), Some(Path::new("/sys/fs/cgroup/unified")));
    }

    #[test]
    fn a_machine_without_cgroup_v2_has_no_mount() {
        assert_eq!(find_mount("30 20 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n"), None);
    }
}
