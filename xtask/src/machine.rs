//! What is asked of the machine this runs on.

use std::{fs, os::unix::fs::MetadataExt as _, path::PathBuf};

use anyhow::{Context as _, Result};
use xshell::{Shell, cmd};

/// Whether this process may mount, install packages and load BPF programs.
pub(crate) fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0)
}

/// Where a program is, by the PATH.
pub(crate) fn in_path(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|directory| directory.join(program)).find(|file| file.is_file())
}

/// Pinned maps and links need the BPF file system; containers often come without it.
pub(crate) fn mount_bpf(shell: &Shell) -> Result<()> {
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    if mounts.lines().any(|mount| mount.split(' ').nth(1) == Some("/sys/fs/bpf")) {
        return Ok(());
    }
    cmd!(shell, "mount -t bpf bpf /sys/fs/bpf").run().context("there is no BPF file system at /sys/fs/bpf")
}
