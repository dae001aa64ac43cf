//! A directory on bpffs; what is pinned in it goes away with the handle.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use nix::{
    fcntl::{Flock, FlockArg},
    mount::{MsFlags, mount},
    sys::statfs::{BPF_FS_MAGIC, statfs},
};

use super::leftover;

const MOUNT_POINT: &str = "/sys/fs/bpf";

/// A directory for one agent's pins.
#[derive(Debug)]
pub struct PinDirectory {
    path: PathBuf,
}

impl PinDirectory {
    /// An empty one, named after this process, a number and the node. Removes what processes that were killed have left.
    pub fn new(number: u32, node: &str) -> Result<Self> {
        mount_once()?;
        for leftover in leftover::find(Path::new(MOUNT_POINT))? {
            // Another run may be removing the same one.
            let _ = fs::remove_dir_all(leftover);
        }
        let path = Path::new(MOUNT_POINT).join(format!("{}-{node}", leftover::name(number)));
        fs::create_dir(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Self { path })
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for PinDirectory {
    fn drop(&mut self) {
        // The agent's own cleanup may have been there before.
        if let Err(error) = fs::remove_dir_all(&self.path)
            && self.path.exists()
        {
            eprintln!("{} stays behind: {error}", self.path.display());
        }
    }
}

/// Mounts bpffs where init has not. Of several processes only one may: a second mount would hide the first one's pins.
fn mount_once() -> Result<()> {
    let directory = File::open(MOUNT_POINT).with_context(|| format!("no {MOUNT_POINT}: has this kernel BPF?"))?;
    let lock = Flock::lock(directory, FlockArg::LockExclusive);
    let _lock = lock.map_err(|(_, error)| error).with_context(|| format!("cannot lock {MOUNT_POINT}"))?;
    if statfs(MOUNT_POINT)?.filesystem_type() == BPF_FS_MAGIC {
        return Ok(());
    }
    mount(Some("bpf"), MOUNT_POINT, Some("bpf"), MsFlags::empty(), None::<&str>)
        .with_context(|| format!("cannot mount bpffs on {MOUNT_POINT}"))
}
