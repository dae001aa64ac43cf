//! What can go wrong: [`OpenError`] ends the agent with advice, [`Error`] is counted and retried.

use std::{io, path::PathBuf};

use proxy_common::node::LAYOUT;

/// Why the dataplane could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Too old.
    #[error("kernel {release} is too old: Sluice needs Linux 6.1 or later")]
    Kernel {
        /// As uname(2) has it.
        release: String,
    },
    /// No type information of the kernel.
    #[error("the kernel has no BTF ({path} is missing): boot a kernel built with CONFIG_DEBUG_INFO_BTF=y", path = .path.display())]
    NoBtf {
        /// Where it should be.
        path: PathBuf,
    },
    /// Not allowed to.
    #[error("{capability} is missing: run as root, or give the container the capabilities BPF, NET_ADMIN and PERFMON")]
    NoCapability {
        /// The first one that is missing.
        capability: caps::Capability,
    },
    /// The pin path is not on a BPF file system, and mounting one would hide something or failed.
    #[error("{path} is not on a BPF file system ({reason}): run `mount -t bpf -o mode=0700 bpf /sys/fs/bpf`, or choose another --pin-path", path = .path.display())]
    NoBpfFileSystem {
        /// The pin path.
        path: PathBuf,
        /// Why none was mounted.
        reason: String,
    },
    /// There is no cgroup v2.
    #[error(
        "no cgroup v2 hierarchy is mounted: run `mount -t cgroup2 none /sys/fs/cgroup`, name a directory of one with --cgroup, or use --socket-lb=off"
    )]
    NoCgroup,
    /// The given cgroup is none.
    #[error("{path} is not a directory of a cgroup v2 hierarchy ({reason}): correct --cgroup, or leave it away to use the root", path = .path.display())]
    NotCgroup {
        /// As given.
        path: PathBuf,
        /// What it is instead.
        reason: String,
    },
    /// Another agent.
    #[error("an agent uses {path}: stop it first, or choose another --pin-path", path = .path.display())]
    InUse {
        /// The pin path.
        path: PathBuf,
    },
    /// A pinned map is not what this version would make.
    #[error("the map pinned at {path} is not compatible with this version ({difference}); it was left alone: go back to the version that made it, or run `sluice cleanup`, which ends established connections, and start again", path = .path.display())]
    IncompatiblePin {
        /// Where it is pinned.
        path: PathBuf,
        /// What differs.
        difference: String,
    },
    /// Pinned maps that only later versions understand.
    #[error("the maps in {path} have layout {found}, which only versions with layout {needed} or later understand, and this one has {LAYOUT}; they were left alone and translate on: install a later version, or run `sluice cleanup`, which ends established connections, and start again", path = .path.display())]
    NewerLayout {
        /// Where they are pinned.
        path: PathBuf,
        /// Their layout.
        found: u32,
        /// The oldest layout whose versions understand it.
        needed: u32,
    },
    /// The type information in this binary's BPF object.
    #[error("the BPF object does not say what its maps are made of ({reason}): the build is broken")]
    Types {
        /// What is wrong with it.
        reason: String,
    },
    /// There is no such pin.
    #[error("no map is pinned at {path}: start an agent of this version, or name the --pin-path of the one that runs", path = .path.display())]
    NotPinned {
        /// Where it should be.
        path: PathBuf,
    },
    /// A size for a map that does not exist.
    #[error("there is no map `{map}` whose size could be set")]
    UnknownMap {
        /// As given.
        map: String,
    },
    /// Pins and directories under the pin path.
    #[error("cannot make or remove {path}: {source}; run as root, with a BPF file system that can be written to", path = .path.display())]
    PinPath {
        /// The directory.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The BPF object in this binary.
    #[error("the BPF object could not be loaded: {0}")]
    Object(#[from] aya::EbpfError),
    /// The verifier's word on a program.
    #[error("the kernel did not take program {program}: {source}")]
    Program {
        /// Its name.
        program: &'static str,
        /// What the verifier said.
        source: aya::programs::ProgramError,
    },
    /// A program that was to be tried.
    #[error("program {program} could not be run over a packet: {source}")]
    Run {
        /// Its name.
        program: &'static str,
        /// What the kernel said.
        source: aya::programs::ProgramError,
    },
    /// Not in the object.
    #[error("the BPF object has no {what} {name}: the build is broken")]
    Missing {
        /// `map` or `program`.
        what: &'static str,
        /// Its name.
        name: &'static str,
    },
    /// A first read or write.
    #[error(transparent)]
    Access(#[from] Error),
}

impl OpenError {
    /// The exit code of a process that ends with this error: 78 (`EX_CONFIG`) when this node or the configuration must
    /// change, 1 when trying again may help.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::InUse { .. } | Self::Object(_) | Self::Program { .. } | Self::Run { .. } | Self::Access(_) => 1,
            _ => 78,
        }
    }
}

/// Why the kernel could not be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A map.
    #[error("cannot {operation} map {map}: {source}")]
    Map {
        /// What was tried.
        operation: &'static str,
        /// The map's name.
        map: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// No room.
    #[error("map {map} is full: it holds {capacity} entries")]
    MapFull {
        /// The map's name.
        map: &'static str,
        /// How many fit.
        capacity: u32,
    },
    /// Keys or values of another size.
    #[error("map {map} has entries of another size than this version's")]
    MapShape {
        /// The map's name.
        map: &'static str,
    },
    /// The directory of links.
    #[error("cannot read {path}: {source}", path = .path.display())]
    Links {
        /// The directory.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Somebody has wiped the BPF file system.
    #[error("what was pinned under {path} is gone and cannot be pinned again ({reason}): it goes on for as long as this agent runs", path = .path.display())]
    Wiped {
        /// The pin path.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// Somebody has wiped the BPF file system, and another agent has come.
    #[error("what was pinned under {path} is gone, and another agent keeps that path now: stop one of the two", path = .path.display())]
    Taken {
        /// The pin path.
        path: PathBuf,
    },
    /// Ports that were kept from the node's own sockets.
    #[error(
        "they cannot be taken out of the reserved ports ({source}): run `sysctl -w net.ipv4.ip_local_reserved_ports={others}` on the \
         node, and try again"
    )]
    ReservedPorts {
        /// Those that are to stay there, as the kernel writes them.
        others: String,
        /// What it said.
        source: io::Error,
    },
    /// The clock, or a socket.
    #[error("cannot ask the kernel for {what}: {source}")]
    Kernel {
        /// What was asked.
        what: &'static str,
        /// What it said.
        source: io::Error,
    },
}
