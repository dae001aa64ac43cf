//! Takes everything out of the kernel that agents have put there under one pin path, and nothing else.

use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
};

use aya::programs::TcAttachType;

use super::{
    clsact,
    error::{Error, OpenError},
    links::{links_directory, pins},
    load::{maps_directory, pinned_maps},
    migration::second_directory,
    netlink,
    program::ProgramName,
    reserved_ports,
};

/// Something that was removed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Removed {
    /// A program was detached.
    Link {
        /// Which.
        program: ProgramName,
        /// Name of the device, or `cgroup`.
        target: String,
    },
    /// A filter of a device's clsact qdisc.
    Filter {
        /// The device.
        device: String,
        /// `ingress` or `egress`.
        side: &'static str,
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
    /// An empty directory.
    Directory {
        /// Which.
        path: PathBuf,
    },
}

impl fmt::Display for Removed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Link { program, target } => write!(f, "program {program} on {target}"),
            Self::Filter { device, side } => write!(f, "filter at {side} of {device}"),
            Self::Map { path } => write!(f, "map {}", path.display()),
            Self::ReservedPorts { ports } => write!(f, "{ports} from the reserved ports"),
            Self::Tunnel { device } => write!(f, "device {device}"),
            Self::Directory { path } => write!(f, "directory {}", path.display()),
        }
    }
}

/// Removes every link, filter and map of ours, and the directories if nothing else is in them. Filters are removed from
/// the devices of the calling thread's network namespace; the clsact qdisc stays, because others may use it. Refused
/// while an agent uses the pins.
pub fn cleanup(pin_path: &Path) -> Result<Vec<Removed>, OpenError> {
    let _lock = pin_path.exists().then(|| super::lock(pin_path)).transpose()?;
    let mut removed = Vec::new();
    remove_links(pin_path, &mut removed)?;
    remove_filters(&mut removed)?;
    for path in pinned_maps(pin_path)? {
        fs::remove_file(&path).map_err(|source| OpenError::PinPath { path: path.clone(), source })?;
        removed.push(Removed::Map { path });
    }
    let released = reserved_ports::release(pin_path);
    let released = released.map_err(|source| Error::Kernel { what: "the reserved ports", source })?;
    removed.extend(released.map(|ports| Removed::ReservedPorts { ports }));
    let tunnels = netlink::tunnels::remove();
    let tunnels = tunnels.map_err(|source| Error::Kernel { what: "the devices of tunnels", source })?;
    removed.extend(tunnels.into_iter().map(|device| Removed::Tunnel { device }));
    for path in [links_directory(pin_path), maps_directory(pin_path), second_directory(pin_path), pin_path.into()] {
        match fs::remove_dir(&path) {
            Ok(()) => removed.push(Removed::Directory { path }),
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::DirectoryNotEmpty) => {}
            Err(source) => return Err(OpenError::PinPath { path, source }),
        }
    }
    Ok(removed)
}

fn remove_links(pin_path: &Path, removed: &mut Vec<Removed>) -> Result<(), OpenError> {
    let directory = links_directory(pin_path);
    if !directory.exists() {
        return Ok(());
    }
    for (program, target, path) in pins(&directory)? {
        fs::remove_file(&path).map_err(|source| OpenError::PinPath { path, source })?;
        removed.push(Removed::Link { program, target });
    }
    Ok(())
}

fn remove_filters(removed: &mut Vec<Removed>) -> Result<(), OpenError> {
    let devices =
        clsact::device_names().map_err(|source| Error::Kernel { what: "the names of its devices", source })?;
    for device in devices {
        for (at, side) in [(TcAttachType::Ingress, "ingress"), (TcAttachType::Egress, "egress")] {
            if clsact::remove(&device, at) {
                removed.push(Removed::Filter { device: device.clone(), side });
            }
        }
    }
    Ok(())
}
