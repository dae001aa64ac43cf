//! Takes everything out of the kernel that agents have put there under one pin path, and nothing else. What that is, is found
//! first, and can be told without being done.

use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
};

use serde::Serialize;

use super::{
    clsact::{self, Side},
    error::{Error, OpenError},
    links::{detach, links_directory, pins},
    load::{maps_directory, pinned_maps},
    migration::second_directory,
    netlink,
    program::ProgramName,
    reserved_ports,
};

/// Something that is removed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Removed {
    /// A program is detached.
    Link {
        /// Which.
        program: ProgramName,
        /// Name of the device, or `cgroup`.
        target: String,
        /// Where the link was pinned.
        path: PathBuf,
    },
    /// A filter of a device's clsact qdisc.
    Filter {
        /// The device.
        device: String,
        /// Which way packets go that meet it.
        side: Side,
    },
    /// A map, with what it held.
    Map {
        /// Where it was pinned.
        path: PathBuf,
    },
    /// Ports that were kept from the node's own sockets.
    ReservedPorts {
        /// As the kernel writes them.
        ports: String,
    },
    /// A device by which other nodes' packets came.
    Tunnel {
        /// Its name.
        device: &'static str,
    },
    /// A file that agents keep for each other.
    File {
        /// Where it is.
        path: PathBuf,
    },
    /// An empty directory.
    Directory {
        /// Which.
        path: PathBuf,
    },
}

/// What could not be removed, and why not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Kept {
    /// What.
    #[serde(flatten)]
    pub thing: Removed,
    /// Why, and what to do about it.
    pub reason: String,
}

/// What became of everything that was found. A directory that is not empty because of something kept is in neither.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Cleaned {
    /// This is gone.
    pub removed: Vec<Removed>,
    /// This is not.
    pub kept: Vec<Kept>,
}

impl fmt::Display for Removed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Link { program, target, .. } => write!(f, "program {program} on {target}"),
            Self::Filter { device, side } => write!(f, "filter at {} of {device}", side.name()),
            Self::Map { path } => write!(f, "map {}", path.display()),
            Self::ReservedPorts { ports } => write!(f, "{ports} from the reserved ports"),
            Self::Tunnel { device } => write!(f, "device {device}"),
            Self::File { path } => write!(f, "file {}", path.display()),
            Self::Directory { path } => write!(f, "directory {}", path.display()),
        }
    }
}

/// Removes every link, filter and map of ours, and the directories if nothing else is in them. Filters are removed from
/// the devices of the calling thread's network namespace; the clsact qdisc stays, because others may use it. What cannot be
/// removed keeps nothing else from it. Refused while an agent uses the pins. Must not be called in a tokio runtime.
pub fn cleanup(pin_path: &Path) -> Result<Cleaned, OpenError> {
    let _lock = pin_path.exists().then(|| super::lock(pin_path)).transpose()?;
    let mut cleaned = Cleaned::default();
    for thing in find(pin_path)? {
        match thing.remove(pin_path) {
            Ok(()) => cleaned.removed.push(thing),
            Err(OpenError::PinPath { source, .. })
                if source.kind() == io::ErrorKind::DirectoryNotEmpty && !cleaned.kept.is_empty() => {}
            Err(error) => cleaned.kept.push(Kept { thing, reason: error.to_string() }),
        }
    }
    Ok(cleaned)
}

/// What [`cleanup`] would remove now. Changes nothing, and may be asked while an agent runs. Must not be called in a tokio runtime.
pub fn find(pin_path: &Path) -> Result<Vec<Removed>, OpenError> {
    let links = links_directory(pin_path);
    let mut pinned = if links.exists() { pins(&links)? } else { Vec::new() };
    pinned.sort();
    let mut found: Vec<Removed> =
        pinned.into_iter().map(|(program, target, path)| Removed::Link { program, target, path }).collect();
    let filters = clsact::present().map_err(|source| Error::Kernel { what: "the filters of its devices", source })?;
    found.extend(filters.into_iter().map(|(device, side)| Removed::Filter { device, side }));
    found.extend(pinned_maps(pin_path)?.into_iter().map(|path| Removed::Map { path }));
    found.extend(reserved_ports::held(pin_path).map(|ports| Removed::ReservedPorts { ports }));
    let tunnels = netlink::tunnels::present().map_err(|source| Error::Kernel { what: TUNNELS, source })?;
    found.extend(tunnels.into_iter().map(|device| Removed::Tunnel { device }));
    let mut gone: Vec<PathBuf> = found.iter().filter_map(|thing| thing.path().map(Path::to_owned)).collect();
    gone.push(reserved_ports::place(pin_path));
    for path in [links, maps_directory(pin_path), second_directory(pin_path), pin_path.into()] {
        if holds_nothing_but(&path, &gone).map_err(|source| OpenError::PinPath { path: path.clone(), source })? {
            gone.push(path.clone());
            found.push(Removed::Directory { path });
        }
    }
    Ok(found)
}

/// Of the calling thread's network namespace.
const TUNNELS: &str = "the devices of tunnels";

/// Whether there is such a directory, and all that is in it goes.
fn holds_nothing_but(directory: &Path, gone: &[PathBuf]) -> io::Result<bool> {
    match fs::read_dir(directory) {
        Ok(entries) => {
            for entry in entries {
                if !gone.contains(&entry?.path()) {
                    return Ok(false);
                }
            }
            Ok(true)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

impl Removed {
    /// Where it stands in a file system.
    fn path(&self) -> Option<&Path> {
        match self {
            Self::Link { path, .. } | Self::Map { path } | Self::File { path } | Self::Directory { path } => Some(path),
            Self::Filter { .. } | Self::ReservedPorts { .. } | Self::Tunnel { .. } => None,
        }
    }

    fn remove(&self, pin_path: &Path) -> Result<(), OpenError> {
        let kernel = |what| move |source| OpenError::from(Error::Kernel { what, source });
        match self {
            Self::Link { path, .. } => detach(path).map_err(|source| OpenError::PinPath { path: path.clone(), source }),
            Self::Map { path } | Self::File { path } => {
                fs::remove_file(path).map_err(|source| OpenError::PinPath { path: path.clone(), source })
            }
            Self::Directory { path } => {
                fs::remove_dir(path).map_err(|source| OpenError::PinPath { path: path.clone(), source })
            }
            // One that is gone with its device needs nobody to remove it.
            Self::Filter { device, side } => {
                clsact::remove(device, *side);
                Ok(())
            }
            Self::ReservedPorts { .. } => Ok(reserved_ports::release(pin_path)?),
            Self::Tunnel { device } => netlink::tunnels::remove(device).map_err(kernel(TUNNELS)),
        }
    }
}
