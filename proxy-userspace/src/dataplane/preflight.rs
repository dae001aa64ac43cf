//! Whether this node can run Sluice at all: each thing that is missing is an error of its own, with advice.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use caps::{CapSet, Capability};
use rustix::mount::MountFlags;

use super::{error::OpenError, options::Options, options::SocketLb};

pub(super) const BTF: &str = "/sys/kernel/btf/vmlinux";
/// Where the kernel makes a directory for a BPF file system.
const BPF_FS: &str = "/sys/fs/bpf";
const BPF_FS_MAGIC: i64 = 0xcafe_4a11;
const CGROUP2_SUPER_MAGIC: i64 = 0x6367_7270;

/// Checks everything, mounts the BPF file system where it is missing, and returns the cgroup to attach to; none when no
/// sockets are balanced.
pub(super) fn check(options: &Options) -> Result<Option<PathBuf>, OpenError> {
    kernel(&release())?;
    capabilities()?;
    if !Path::new(BTF).exists() {
        return Err(OpenError::NoBtf { path: BTF.into() });
    }
    bpf_file_system(&options.pin_path)?;
    match options.socket_lb {
        SocketLb::Off => Ok(None),
        SocketLb::Host | SocketLb::All => cgroup(options.cgroup.as_deref()).map(Some),
    }
}

/// Whether the running kernel is at least this one.
pub(super) fn kernel_is_at_least(version: (u32, u32)) -> bool {
    parse_release(&release()).is_some_and(|running| running >= version)
}

/// What the running kernel calls itself.
pub(super) fn release() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

/// Whether it is recent enough.
pub(super) fn kernel(release: &str) -> Result<(), OpenError> {
    match parse_release(release) {
        Some(version) if version >= (6, 1) => Ok(()),
        _ => Err(OpenError::Kernel { release: release.into() }),
    }
}

/// Major and minor version of `6.1.0-13-amd64`, `7.2-rc1`.
fn parse_release(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// What the kernel asks of whoever loads and attaches the programs.
pub(crate) const CAPABILITIES: [Capability; 3] = [
    Capability::CAP_BPF,
    Capability::CAP_NET_ADMIN,
    // Without it the verifier refuses arithmetic on packet pointers, in words that name everything but the reason.
    Capability::CAP_PERFMON,
];

/// Whether the process may load programs and read maps.
pub(super) fn capabilities() -> Result<(), OpenError> {
    match CAPABILITIES.into_iter().find(|capability| !has(*capability)) {
        Some(capability) => Err(OpenError::NoCapability { capability }),
        None => Ok(()),
    }
}

/// Whether the kernel lets this process do what the capability is for. It takes `SYS_ADMIN` for BPF and PERFMON, as it did before there
/// were such capabilities.
pub(super) fn has(capability: Capability) -> bool {
    let has = |capability| caps::has_cap(None, CapSet::Effective, capability).unwrap_or(false);
    has(capability) || capability != Capability::CAP_NET_ADMIN && has(Capability::CAP_SYS_ADMIN)
}

fn is_on(path: &Path, magic: i64) -> io::Result<bool> {
    Ok(rustix::fs::statfs(path)?.f_type == magic)
}

/// Sees to it that the pin path's nearest existing ancestor is on a BPF file system. Mounts one at its usual place only,
/// and only while that is empty: a mistyped path must not cover somebody's directory.
pub(super) fn bpf_file_system(pin_path: &Path) -> Result<(), OpenError> {
    let error = |reason: String| OpenError::NoBpfFileSystem { path: pin_path.into(), reason };
    let Some(place) = find_bpf_file_system(pin_path)? else { return Ok(()) };
    // For its owner alone: the kernel's default is that everybody may make directories in it.
    rustix::mount::mount("bpf", &place, "bpf", MountFlags::empty(), Some(c"mode=0700"))
        .map_err(|source| error(format!("mounting one on {} failed: {source}", place.display())))?;
    tracing::info!(path = %place.display(), "mounted a BPF file system");
    Ok(())
}

/// Mounts a BPF file system for the pin path, if that is for us to do and possible. What is wrong if not is told when the dataplane is opened.
pub fn mount_bpf_file_system(pin_path: &Path) {
    let _ = bpf_file_system(pin_path);
}

/// The BPF file system that the pin path is on: its topmost directory above the path. The path itself, where there is none.
pub fn pin_root(pin_path: &Path) -> PathBuf {
    let existing = pin_path.ancestors().skip_while(|path| !path.is_dir());
    let on_it = existing.take_while(|path| is_on(path, BPF_FS_MAGIC).unwrap_or(false));
    on_it.last().unwrap_or(pin_path).into()
}

/// Where a BPF file system is to be mounted for the pin path; none if it is on one.
pub(super) fn find_bpf_file_system(pin_path: &Path) -> Result<Option<PathBuf>, OpenError> {
    let error = |reason: String| OpenError::NoBpfFileSystem { path: pin_path.into(), reason };
    let ancestor =
        pin_path.ancestors().find(|path| path.is_dir()).ok_or_else(|| error("no directory above it exists".into()))?;
    if is_on(ancestor, BPF_FS_MAGIC).map_err(|source| error(source.to_string()))? {
        return Ok(None);
    }
    let is_empty = fs::read_dir(ancestor).is_ok_and(|mut entries| entries.next().is_none());
    if ancestor != Path::new(BPF_FS) || !is_empty {
        return Err(error(format!("{} is an ordinary directory", ancestor.display())));
    }
    Ok(Some(ancestor.into()))
}

/// The cgroup whose sockets are balanced.
pub(super) fn cgroup(given: Option<&Path>) -> Result<PathBuf, OpenError> {
    let Some(path) = given else {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        return find_cgroup2(&mounts).ok_or(OpenError::NoCgroup);
    };
    let error = |reason: String| OpenError::NotCgroup { path: path.into(), reason };
    if !is_on(path, CGROUP2_SUPER_MAGIC).map_err(|source| error(source.to_string()))? {
        return Err(error("it is on another file system".into()));
    }
    if !path.is_dir() {
        return Err(error("it is a file".into()));
    }
    Ok(path.into())
}

/// Where the root of the cgroup v2 hierarchy is mounted, by the text of `/proc/self/mountinfo` (proc(5)).
fn find_cgroup2(mounts: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        let mut fields = before.split(' ').skip(3);
        let (root, mount_point) = (fields.next()?, fields.next()?);
        (after.split(' ').next() == Some("cgroup2") && root == "/").then(|| unescape(mount_point).into())
    })
}

/// The kernel writes blanks and backslashes in paths as three octal digits.
fn unescape(text: &str) -> String {
    let mut parts = text.split('\\');
    let mut path = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        match part.get(..3).and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(octet) => {
                path.push(octet.into());
                path.push_str(&part[3..]);
            }
            None => path.push_str(part),
        }
    }
    path
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use super::{bpf_file_system, find_cgroup2, kernel, parse_release};

    #[test]
    fn releases_are_read_as_distributions_write_them() {
        for (release, version) in [
            ("6.1.0-13-amd64", Some((6, 1))),
            ("6.18.44-fc-v595", Some((6, 18))),
            ("7.2-rc1", Some((7, 2))),
            ("6.12+", Some((6, 12))),
            ("", None),
            ("linux", None),
        ] {
            assert_eq!(parse_release(release), version, "{release}");
        }
    }

    #[test]
    fn a_kernel_before_6_1_is_refused_by_name() {
        let error = kernel("5.15.0-91-generic").unwrap_err();
        assert!(error.to_string().contains("5.15.0-91-generic"), "{error}");
        assert_eq!(error.exit_code(), 78);
        assert!(kernel("6.1.0").is_ok());
    }

    #[test]
    fn the_cgroup2_root_is_found_among_other_mounts() {
        let mounts = "24 1 0:22 / /proc rw - proc proc rw\n\
            30 24 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
            33 30 0:29 /kubepods /run/one rw shared:4 - cgroup2 cgroup2 rw\n\
            31 30 0:27 / /sys/fs/cgroup/a\\040b rw,relatime shared:3 - cgroup2 cgroup2 rw\n";
        assert_eq!(find_cgroup2(mounts), Some(PathBuf::from("/sys/fs/cgroup/a b")));
        assert_eq!(find_cgroup2("30 24 0:26 / /sys/fs/cgroup rw - cgroup cgroup rw"), None);
    }

    #[test]
    fn nothing_is_mounted_over_a_directory_that_holds_something_or_is_not_meant_for_it() {
        let empty = tempfile::tempdir().unwrap();
        for place in [Path::new("/etc"), empty.path()] {
            let error = bpf_file_system(&place.join("pins")).unwrap_err().to_string();
            assert!(error.contains(&format!("{} is an ordinary directory", place.display())), "{error}");
        }
    }
}
