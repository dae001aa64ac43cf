//! The mounts of a container: what every runtime makes, and the manifest's volumes. All of it in a mount namespace of the calling
//! thread.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::{
        stat::{Mode, SFlag, makedev, mknod},
        statvfs::{FsFlags, statvfs},
    },
    unistd::{chdir, fchdir, pivot_root},
};

use super::{manifest::Propagation, root::Root};

/// What every container has: where, of which file system, with which options. As of the runtime specification of the OCI,
/// and containerd's defaults.
pub const RUNTIME_MOUNTS: [(&str, &str, &str); 4] = [
    ("/proc", "proc", "rw,nosuid,nodev,noexec"),
    ("/dev", "tmpfs", "rw,nosuid"),
    ("/dev/shm", "tmpfs", "rw,nosuid,nodev,noexec"),
    ("/sys", "sysfs", "ro,nosuid,nodev,noexec"),
];
/// Of these nothing can be seen, as far as the kernel has them.
const MASKED: [&str; 11] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
];
/// To these nothing can be written.
const READ_ONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];
/// Character devices: name, major, minor.
const DEVICES: [(&str, u64, u64); 6] =
    [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];

/// A directory of the node that is mounted into the container.
#[derive(Clone, Debug)]
pub(super) struct Bind {
    pub(super) from: PathBuf,
    /// In the container.
    pub(super) to: PathBuf,
    pub(super) read_only: bool,
    pub(super) propagation: Propagation,
}

/// Makes the root the calling thread's, which is in a mount namespace of its own, with everything mounted in it.
pub(super) fn enter(root: &Root, binds: &[Bind]) -> Result<()> {
    // Nothing that is mounted here is seen outside; what is mounted outside may be seen here.
    set(Path::new("/"), MsFlags::MS_SLAVE | MsFlags::MS_REC)?;
    bind(root.path(), root.path())?;
    for (path, kind, options) in RUNTIME_MOUNTS {
        let at = root.join(Path::new(path));
        fs::create_dir_all(&at)?;
        let data = (path == "/dev").then_some("mode=755");
        mount(Some(kind), &at, Some(kind), flags(options), data).with_context(|| format!("cannot mount {path}"))?;
    }
    make_devices(&root.join(Path::new("/dev")))?;
    for volume in binds {
        mount_volume(root, volume).with_context(|| format!("cannot mount {}", volume.to.display()))?;
    }
    for path in READ_ONLY.map(|path| root.join(Path::new(path))).iter().filter(|path| path.exists()) {
        bind(path, path)?;
        remount_read_only(path)?;
    }
    for path in MASKED.map(|path| root.join(Path::new(path))).iter().filter(|path| path.exists()) {
        mask(path).with_context(|| format!("cannot mask {}", path.display()))?;
    }
    change_root(root.path()).context("cannot change the root")?;
    remount_read_only(Path::new("/"))
}

fn flags(options: &str) -> MsFlags {
    let named = |option: &str| match option {
        "ro" => MsFlags::MS_RDONLY,
        "nosuid" => MsFlags::MS_NOSUID,
        "nodev" => MsFlags::MS_NODEV,
        "noexec" => MsFlags::MS_NOEXEC,
        _ => MsFlags::empty(),
    };
    options.split(',').map(named).collect()
}

fn mount_volume(root: &Root, volume: &Bind) -> Result<()> {
    let at = root.join(&volume.to);
    // On what is mounted already, as /sys is, there must be a directory.
    if !at.is_dir() {
        fs::create_dir_all(&at)?;
    }
    bind(&volume.from, &at)?;
    if volume.read_only {
        remount_read_only(&at)?;
    }
    let propagation = match volume.propagation {
        Propagation::None => MsFlags::MS_PRIVATE,
        Propagation::HostToContainer => MsFlags::MS_SLAVE,
    };
    set(&at, propagation | MsFlags::MS_REC)
}

fn make_devices(directory: &Path) -> Result<()> {
    for (name, major, minor) in DEVICES {
        let path = directory.join(name);
        mknod(&path, SFlag::S_IFCHR, Mode::empty(), makedev(major, minor))?;
        // Whatever the umask says.
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o666))?;
    }
    for (name, leads_to) in [("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")] {
        std::os::unix::fs::symlink(format!("/proc/self/fd{leads_to}"), directory.join(name))?;
    }
    Ok(())
}

fn mask(path: &Path) -> Result<()> {
    if path.is_dir() {
        return Ok(mount(Some("tmpfs"), path, Some("tmpfs"), MsFlags::MS_RDONLY, None::<&str>)?);
    }
    bind(Path::new("/dev/null"), path)
}

fn bind(from: &Path, to: &Path) -> Result<()> {
    mount(Some(from), to, None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>)
        .with_context(|| format!("cannot bind {} to {}", from.display(), to.display()))
}

/// Keeps the other options.
fn remount_read_only(path: &Path) -> Result<()> {
    let kept = [
        (FsFlags::ST_NOSUID, MsFlags::MS_NOSUID),
        (FsFlags::ST_NODEV, MsFlags::MS_NODEV),
        (FsFlags::ST_NOEXEC, MsFlags::MS_NOEXEC),
    ];
    let now = statvfs(path)?.flags();
    let kept: MsFlags = kept.into_iter().filter(|(flag, _)| now.contains(*flag)).map(|(_, flag)| flag).collect();
    set(path, MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY | kept)
}

fn set(path: &Path, flags: MsFlags) -> Result<()> {
    mount(None::<&str>, path, None::<&str>, flags, None::<&str>)
        .with_context(|| format!("cannot change the mount {}", path.display()))
}

/// As `pivot_root(2)` describes it: the old root lies on the new one for a moment.
fn change_root(root: &Path) -> Result<()> {
    let (old, new) = (File::open("/")?, File::open(root)?);
    fchdir(&new)?;
    pivot_root(".", ".")?;
    fchdir(&old)?;
    umount2(".", MntFlags::MNT_DETACH)?;
    Ok(chdir("/")?)
}
