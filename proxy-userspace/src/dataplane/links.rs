//! Pinned links: `links/<program>-<device>` and `links/<program>-cgroup`. What is attached is read from the pins each
//! time, so it does not matter who attached it or what happened to the devices since. The agent holds each link besides, so that
//! one that has lost its pin goes on until it is pinned again.

use std::{
    collections::BTreeMap,
    fs, io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use super::{
    error::Error,
    program::{Hook, ProgramName},
    syscall::{self, LinkTarget},
};

/// `BPF_F_BEFORE` with no other program named: at the head of a TCX chain.
const FIRST: u32 = 8;

/// What stands for the cgroup in a pin's name. A device of this name has other programs.
const CGROUP: &str = "cgroup";

/// Directory of the pinned links.
pub(super) fn links_directory(pin_path: &Path) -> PathBuf {
    pin_path.join("links")
}

/// Something a program is attached to.
#[derive(Clone, Copy, Debug)]
pub(super) enum Target<'a> {
    /// A device: name and interface index.
    Device(&'a str, u32),
    /// The cgroup: its directory and id.
    Cgroup(BorrowedFd<'a>, u64),
}

impl Target<'_> {
    fn id(&self) -> u64 {
        match self {
            Self::Device(_, ifindex) => (*ifindex).into(),
            Self::Cgroup(_, id) => *id,
        }
    }

    fn link_target(&self) -> LinkTarget<'_> {
        match self {
            Self::Device(_, ifindex) => LinkTarget::Device(*ifindex),
            Self::Cgroup(directory, _) => LinkTarget::Cgroup(*directory),
        }
    }
}

/// A BPF file system takes no dots in names, and a device's name has no colons.
fn pin_name(program: ProgramName, target: &Target<'_>) -> String {
    let target = match target {
        Target::Device(name, _) => name,
        Target::Cgroup(..) => CGROUP,
    };
    format!("{program}-{}", target.replace('.', ":"))
}

/// Program and device, or `cgroup`, of a pin.
fn parse_pin_name(name: &str) -> Option<(ProgramName, String)> {
    let (program, target) = name.split_once('-')?;
    Some((ProgramName::from_name(program)?, target.replace(':', ".")))
}

/// A pinned link of ours.
#[derive(Debug)]
struct Pin {
    path: PathBuf,
    link: OwnedFd,
    program_id: u32,
}

/// A program in the kernel.
#[derive(Debug)]
pub(super) struct LoadedProgram {
    /// Its descriptor.
    pub(super) fd: OwnedFd,
    /// Its id.
    pub(super) id: u32,
}

/// What [`Links::ensure`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// Nothing: the link is there, with this program.
    None,
    /// The link has got this program.
    Updated,
    /// The link has got its pin back.
    Pinned,
    /// There is a new link.
    Created,
}

/// Links that are held whether or not they are pinned, by program and target.
#[derive(Debug, Default)]
pub(super) struct Held(BTreeMap<(ProgramName, u64), OwnedFd>);

/// The pinned links as found at one moment; those nobody asks for are removed at the end.
#[derive(Debug)]
pub(super) struct Links {
    directory: PathBuf,
    found: BTreeMap<(ProgramName, u64), Pin>,
    dead: Vec<PathBuf>,
    /// Without a directory nothing is pinned: links are held, and that is all.
    has_directory: bool,
    /// Since before.
    held: Held,
    /// From now on: those that were asked for.
    kept: Held,
}

impl Links {
    /// None.
    pub(super) fn empty() -> Self {
        Self {
            directory: PathBuf::new(),
            found: BTreeMap::new(),
            dead: Vec::new(),
            has_directory: true,
            held: Held::default(),
            kept: Held::default(),
        }
    }

    /// Reads the pins, and takes over what has been held since before, unless they cannot be read. Files that are not ours are left alone.
    pub(super) fn read(pin_path: &Path, held: &mut Held) -> Result<Self, Error> {
        let directory = links_directory(pin_path);
        let mut links = Self { has_directory: directory.is_dir(), directory, ..Self::empty() };
        if links.has_directory {
            for (program, _, path) in pins(&links.directory)? {
                links.add(program, path)?;
            }
        }
        links.held = std::mem::take(held);
        Ok(links)
    }

    fn add(&mut self, program: ProgramName, path: PathBuf) -> Result<(), Error> {
        let Some(link) = open(&path)? else {
            self.dead.push(path);
            return Ok(());
        };
        match syscall::link_info(link.as_fd()) {
            Ok(info) if info.target() != 0 => {
                let pin = Pin { path, link, program_id: info.program };
                if let Some(double) = self.found.insert((program, info.target()), pin) {
                    self.dead.push(double.path);
                }
            }
            _ => self.dead.push(path),
        }
        Ok(())
    }

    /// Makes the program run at the target.
    pub(super) fn ensure(
        &mut self,
        program: ProgramName,
        loaded: &LoadedProgram,
        target: Target<'_>,
        flags: u32,
    ) -> io::Result<Change> {
        let path = self.directory.join(pin_name(program, &target));
        let key = (program, target.id());
        let held = self.held.0.remove(&key);
        if let Some(pin) = self.found.remove(&key) {
            match adopt(&pin, loaded, &path) {
                Ok(None) => {}
                // Held whatever went wrong: it may have no pin any more.
                done => {
                    self.kept.0.insert(key, pin.link);
                    return done.map(|change| change.unwrap_or(Change::None));
                }
            }
        }
        // Whatever is pinned here belonged to a device of the same name that is gone.
        self.dead.retain(|dead| *dead != path);
        unpin(&path)?;
        if let Some(link) = held.filter(|link| syscall::link_info(link.as_fd()).is_ok_and(|info| info.target() != 0)) {
            self.keep(key, link, &path);
            return Ok(Change::Pinned);
        }
        let flags = match program.hook() {
            // At the end, unless it is said otherwise.
            Hook::Ingress | Hook::Egress if !program.crosses() => flags | FIRST,
            Hook::Ingress | Hook::Egress | Hook::Xdp | Hook::Socket(_) => flags,
        };
        let link = syscall::create_link(loaded.fd.as_fd(), target.link_target(), program.hook().attach_type(), flags)?;
        self.keep(key, link, &path);
        Ok(Change::Created)
    }

    /// Holds a link, and pins it where that can be: perhaps not before the next round.
    fn keep(&mut self, key: (ProgramName, u64), link: OwnedFd, path: &Path) {
        if self.has_directory
            && let Err(error) = syscall::pin(link.as_fd(), path)
        {
            tracing::warn!("link {} cannot be pinned: {error}; it is tried again", path.display());
        }
        self.kept.0.insert(key, link);
    }

    /// Detaches a program from a target, if it is attached there.
    pub(super) fn remove(&mut self, program: ProgramName, target: Target<'_>) -> io::Result<()> {
        let key = (program, target.id());
        self.held.0.remove(&key);
        self.found.remove(&key).map_or(Ok(()), |pin| detach(&pin.path))
    }

    /// Detaches everything that was not asked for, unless it is at a device that is there and was missed, and returns the names of those
    /// pins, and what is to be held from now on.
    pub(super) fn remove_others(mut self, is_missed: impl Fn(u64) -> bool) -> (Vec<(String, io::Result<()>)>, Held) {
        for (key, pin) in self.found.extract_if(.., |(program, target), _| !program.is_socket() && is_missed(*target)) {
            self.kept.0.insert(key, pin.link);
        }
        let name = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        // A second pin may be one of a link that stays.
        let dead = self.dead.into_iter().map(|path| (name(&path), unpin(&path)));
        let found = self.found.into_values().map(|pin| (name(&pin.path), detach(&pin.path)));
        (dead.chain(found).collect(), self.kept)
    }
}

/// Gives an existing link the program, and the pin its device's present name. None when the link is dead after all.
fn adopt(pin: &Pin, loaded: &LoadedProgram, path: &Path) -> io::Result<Option<Change>> {
    let change = if pin.program_id == loaded.id {
        Change::None
    } else {
        match syscall::update_link(pin.link.as_fd(), loaded.fd.as_fd()) {
            Ok(()) => Change::Updated,
            Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => {
                unpin(&pin.path)?;
                return Ok(None);
            }
            Err(error) => return Err(error),
        }
    };
    if pin.path != path {
        move_pin(pin, path)?;
    }
    Ok(Some(change))
}

/// Gives a link's pin another name. The link of the device that had the name until now may be pinned there, and what is pinned under the old
/// one may be that of a device that has got this name since: two may have swapped theirs.
fn move_pin(pin: &Pin, path: &Path) -> io::Result<()> {
    let id = |link: &OwnedFd| syscall::link_info(link.as_fd()).map(|info| info.id);
    let is_own = syscall::object(&pin.path).and_then(|found| Ok(id(&found)? == id(&pin.link)?)).unwrap_or(false);
    if is_own && !path.exists() {
        return fs::rename(&pin.path, path);
    }
    unpin(path)?;
    syscall::pin(pin.link.as_fd(), path)?;
    if is_own { unpin(&pin.path) } else { Ok(()) }
}

/// Detaches what is pinned there, and removes the pin. A link that has lost its last pin would be detached when the kernel finds the time
/// (`bpf_link_put` leaves it to a work queue): its program would go on for a moment.
pub(super) fn detach(path: &Path) -> io::Result<()> {
    if let Ok(link) = syscall::object(path)
        && let Err(error) = syscall::detach_link(link.as_fd())
    {
        tracing::debug!("link {} cannot be detached: {error}; it is when its pin is gone", path.display());
    }
    unpin(path)
}

fn unpin(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// What is pinned there; nothing, if it is gone or no object of BPF's. That there is no descriptor or no memory for it says nothing about it.
pub(super) fn open(path: &Path) -> Result<Option<OwnedFd>, Error> {
    match syscall::object(path) {
        Err(source) if [libc::EMFILE, libc::ENFILE, libc::ENOMEM].map(Some).contains(&source.raw_os_error()) => {
            Err(Error::Links { path: path.into(), source })
        }
        found => Ok(found.ok()),
    }
}

/// The pins of links of ours in a directory: program, device or `cgroup`, and path.
pub(super) fn pins(directory: &Path) -> Result<Vec<(ProgramName, String, PathBuf)>, Error> {
    let error = |source| Error::Links { path: directory.into(), source };
    let mut pins = Vec::new();
    for entry in fs::read_dir(directory).map_err(error)? {
        let entry = entry.map_err(error)?;
        if let Some((program, target)) = parse_pin_name(&entry.file_name().to_string_lossy()) {
            pins.push((program, target, entry.path()));
        }
    }
    Ok(pins)
}

/// A program that is attached, as the kernel has it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PinnedLink {
    /// Which.
    pub program: ProgramName,
    /// Name of the device, or `cgroup`.
    pub target: String,
    /// The device's index, or the cgroup's id; 0 if it is gone.
    pub target_id: u64,
    /// Id of the link.
    pub link: u32,
    /// Id of the program.
    pub program_id: u32,
    /// `xdp`, `tcx`, `cgroup`, or the number of another kind of link.
    pub mechanism: String,
}

/// What is attached by links that are pinned under a path, in order. Filters of a clsact qdisc have no pins.
pub fn pinned_links(pin_path: &Path) -> Result<Vec<PinnedLink>, Error> {
    let error = |path: &Path, source| Error::Links { path: path.into(), source };
    let mut links = Vec::new();
    for (program, target, path) in pins(&links_directory(pin_path))? {
        let link = match syscall::object(&path) {
            // With its device, since the directory was read.
            Err(gone) if gone.kind() == io::ErrorKind::NotFound => continue,
            found => found.map_err(|source| error(&path, source))?,
        };
        let info = syscall::link_info(link.as_fd()).map_err(|source| error(&path, source))?;
        let mechanism = info.mechanism();
        links.push(PinnedLink {
            program,
            target,
            target_id: info.target(),
            link: info.id,
            program_id: info.program,
            mechanism,
        });
    }
    links.sort();
    Ok(links)
}

#[cfg(test)]
mod tests {
    use super::{ProgramName, Target, parse_pin_name, pin_name};

    #[test]
    fn a_pin_is_named_so_that_program_and_device_can_be_told() {
        for device in ["eth0", "eth0.100", "veth-a.b-c", "cgroup"] {
            let name = pin_name(ProgramName::UplinkOut, &Target::Device(device, 7));
            assert!(!name.contains('.'), "{name}");
            assert_eq!(parse_pin_name(&name), Some((ProgramName::UplinkOut, device.into())));
        }
    }

    #[test]
    fn a_file_that_is_not_a_link_of_ours_is_none() {
        for name in ["readme", "other-eth0", "uplink_xdp", "-eth0"] {
            assert_eq!(parse_pin_name(name), None, "{name}");
        }
    }
}
