//! Loads the BPF object into the kernel over the maps that are already pinned, after checking that they are what this
//! version would make. aya opens any pin of the right name: one with larger values would have it read past its buffers.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    os::fd::{AsFd as _, AsRawFd as _},
    panic::resume_unwind,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    thread,
};

use aya::{
    Ebpf, EbpfLoader,
    maps::{MapData, MapInfo},
    programs::Program,
};
use aya_obj::EbpfSectionKind;
use proxy_common::{
    flow::Tier,
    node::{LAYOUT, Node},
};

use super::{
    error::OpenError,
    flow_table::{self, FlowTableSize},
    layout::Layout,
    links::LoadedProgram,
    migration::second_directory,
    netlink,
    options::{Options, SocketLb},
    program::ProgramName,
    select::select,
    syscall,
    table::Table,
};

/// The BPF object.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/sluice.bpf.o"));

/// Directory of the pinned maps.
pub fn maps_directory(pin_path: &Path) -> PathBuf {
    pin_path.join("maps")
}

/// What a map of the object looks like once it is created.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    pub(super) kind: u32,
    pub(super) key_size: u32,
    pub(super) value_size: u32,
    pub(super) max_entries: u32,
    flags: u32,
}

impl Shape {
    /// What a pin has instead; none when it has the same.
    fn difference(self, pinned: Self) -> Option<String> {
        [
            ("type", self.kind, pinned.kind),
            ("key size", self.key_size, pinned.key_size),
            ("value size", self.value_size, pinned.value_size),
            ("number of entries", self.max_entries, pinned.max_entries),
            ("flags", self.flags, pinned.flags),
        ]
        .into_iter()
        .find(|(_, wanted, found)| wanted != found)
        .map(|(what, wanted, found)| format!("its {what} is {found}, not {wanted}"))
    }
}

/// Loads programs over the maps in a directory, or maps made there; the programs are attached nowhere yet.
pub(super) fn load(options: &Options, directory: &Path) -> Result<Ebpf, OpenError> {
    let mut shapes = shapes(options)?;
    adopt_sizes(options, directory, &mut shapes);
    check_pins(directory, &shapes)?;
    check_layout(&directory.join("NODE"))?;
    load_over(options, directory, &shapes)
}

/// Loads programs over maps made in an empty directory, whose flow tables are as large as those in another.
pub(super) fn load_beside(options: &Options, old: &Path, new: &Path) -> Result<Ebpf, OpenError> {
    let mut shapes = shapes(options)?;
    adopt_sizes(options, old, &mut shapes);
    load_over(options, new, &shapes)
}

/// Without the kernel's types, which aya has read by then: they take tens of megabytes, and no program here asks for a field of theirs.
pub(super) fn loader<'a>() -> EbpfLoader<'a> {
    let mut loader = EbpfLoader::new();
    loader.btf(None);
    loader
}

fn load_over(options: &Options, directory: &Path, shapes: &BTreeMap<String, Shape>) -> Result<Ebpf, OpenError> {
    let socket_lb = constant(options.socket_lb);
    let cookie = syscall::network_namespace_cookie()
        .map_err(|source| super::Error::Kernel { what: "the cookie of the network namespace", source })?;
    let mut loader = loader();
    let stats = u8::from(options.counts_traffic);
    loader.override_global("SOCKET_LB", &socket_lb, true).override_global("HOST_NETNS_COOKIE", &cookie, true);
    loader.override_global("STATS", &stats, true);
    for (name, shape) in shapes {
        loader.map_pin_path(name, directory.join(name)).map_max_entries(name, shape.max_entries);
    }
    let mut object = loader.load(OBJECT)?;
    load_programs(&mut object, &needed(options))?;
    Ok(object)
}

/// Whether the kernel takes the programs: they are loaded over maps of their own, and gone with them. Returns how many there are.
pub(super) fn rehearse(options: &Options) -> Result<usize, OpenError> {
    let mut loader = loader();
    for (name, _) in &flow_table::MAPS {
        loader.map_max_entries(name, 1_024);
    }
    let mut object = loader.load(OBJECT)?;
    let programs: Vec<_> = options.programs().collect();
    load_programs(&mut object, &programs)?;
    Ok(programs.len())
}

/// The value of the object's constant `SOCKET_LB`.
fn constant(socket_lb: SocketLb) -> u8 {
    match socket_lb {
        SocketLb::Off => 0,
        SocketLb::Host => 1,
        SocketLb::All => 2,
    }
}

/// The maps to pin, with the sizes the operator wants.
fn shapes(options: &Options) -> Result<BTreeMap<String, Shape>, OpenError> {
    let object = aya_obj::Object::parse(OBJECT).map_err(aya::EbpfError::from)?;
    let mut shapes: BTreeMap<String, Shape> = object
        .maps
        .into_iter()
        // Constants belong to one load of the programs, not to what outlives it.
        .filter(|(_, map)| matches!(map.section_kind(), EbpfSectionKind::Maps | EbpfSectionKind::BtfMaps))
        .map(|(name, map)| {
            let shape = Shape {
                kind: map.map_type(),
                key_size: map.key_size(),
                value_size: map.value_size(),
                max_entries: map.max_entries(),
                flags: map.map_flags(),
            };
            (name, shape)
        })
        .collect();
    let [embryos, flows] = options.flow_table.entries(flow_table::memory());
    for (name, tier) in flow_table::MAPS {
        if let Some(shape) = shapes.get_mut(name) {
            shape.max_entries = if tier == Tier::Embryos { embryos } else { flows };
        }
    }
    for (name, &entries) in &options.sizes {
        let shape = shapes.get_mut(name).ok_or_else(|| OpenError::UnknownMap { map: name.clone() })?;
        shape.max_entries = entries;
    }
    Ok(shapes)
}

/// A flow table that is there keeps its size: its connections cannot be moved to another under traffic.
fn adopt_sizes(options: &Options, directory: &Path, shapes: &mut BTreeMap<String, Shape>) {
    for (name, _) in flow_table::MAPS.iter().filter(|(name, _)| !options.sizes.contains_key(*name)) {
        let path = directory.join(name);
        let (Some(shape), true) = (shapes.get_mut(*name), path.exists()) else { continue };
        // One that cannot be examined is reported with the others.
        let Ok(pinned) = pinned_shape(&path) else { continue };
        if options.flow_table != FlowTableSize::Auto && pinned.max_entries != shape.max_entries {
            let (found, wanted) = (pinned.max_entries, shape.max_entries);
            tracing::warn!(
                "{name} stays at {found} entries instead of {wanted}: its size changes after a reboot or `sluice cleanup`"
            );
        }
        shape.max_entries = pinned.max_entries;
    }
}

/// Whether every map that is pinned already is what would be made in its place.
fn check_pins(directory: &Path, shapes: &BTreeMap<String, Shape>) -> Result<(), OpenError> {
    for (name, shape) in shapes {
        let path = directory.join(name);
        if !path.exists() {
            continue;
        }
        let difference = match pinned_shape(&path) {
            Ok(pinned) => shape.difference(pinned),
            Err(reason) => Some(reason),
        };
        if let Some(difference) = difference {
            return Err(OpenError::IncompatiblePin { path, difference });
        }
    }
    Ok(())
}

/// What is pinned at a path, if it is a map; else why not.
pub(super) fn pinned_shape(path: &Path) -> Result<Shape, String> {
    let object = syscall::object(path).map_err(|error| format!("it cannot be opened: {error}"))?;
    let object = PathBuf::from(format!("/proc/self/fd/{}", object.as_raw_fd()));
    if !object.read_link().is_ok_and(|kind| kind.to_string_lossy().contains("bpf-map")) {
        return Err("it is not a map".into());
    }
    let info = MapInfo::from_pin(path).map_err(|error| format!("it cannot be examined: {error}"))?;
    let kind = info.map_type().map_err(|error| error.to_string())?;
    Ok(Shape {
        kind: kind as u32,
        key_size: info.key_size(),
        value_size: info.value_size(),
        max_entries: info.max_entries(),
        flags: info.map_flags(),
    })
}

/// Whether the entries were written by a version with the same map types. Zero: by none yet.
fn check_layout(path: &Path) -> Result<(), OpenError> {
    if !path.exists() {
        return Ok(());
    }
    let difference = |difference: String| OpenError::IncompatiblePin { path: path.into(), difference };
    match layout(path) {
        Ok(0 | LAYOUT) => Ok(()),
        Ok(other) => Err(difference(format!("its layout is {other}, not {LAYOUT}"))),
        Err(error) => Err(difference(error.to_string())),
    }
}

fn layout(path: &Path) -> Result<u32, super::Error> {
    let error = |source| super::Error::Map { operation: "open", map: "NODE", source: std::io::Error::other(source) };
    let node: Node = Table::new("NODE", &MapData::from_pin(path).map_err(error)?)?.read(&0_u32)?;
    Ok(node.layout)
}

/// The layout of the maps that are pinned under a path; 0 if nobody has written to them yet.
pub fn pinned_layout(pin_path: &Path) -> Result<u32, super::Error> {
    let directory = maps_directory(pin_path);
    match Layout::pinned(&directory) {
        // The types of such maps may be others.
        Ok(Some(theirs)) if theirs.number != LAYOUT => Ok(theirs.number),
        _ => layout(&directory.join("NODE")),
    }
}

/// How many programs the kernel looks at at once, at most: it takes memory for each while it does, which counts as the agent's.
const AT_ONCE: usize = 2;

/// The programs of the devices that are there. Those of others are loaded when these come.
fn needed(options: &Options) -> Vec<ProgramName> {
    let network = netlink::snapshot_blocking();
    network.map_or_else(|_| options.programs().collect(), |network| select(options, &network).programs(options))
}

/// Has the kernel verify programs, which is most of an agent's start.
fn load_programs(object: &mut Ebpf, wanted: &[ProgramName]) -> Result<(), OpenError> {
    let wanted: Vec<&'static str> = wanted.iter().map(|program| program.as_str()).collect();
    if let Some(name) = wanted.iter().find(|name| object.program(name).is_none()) {
        return Err(OpenError::Missing { what: "program", name });
    }
    let programs = object.programs_mut().filter_map(|(name, program)| {
        // In the order that is asked for, so that none that takes long is the last.
        wanted.iter().position(|wanted| *wanted == name).map(|place| (place, wanted[place], program))
    });
    let mut programs: Vec<_> = programs.collect();
    programs.sort_by_key(|(place, ..)| Reverse(*place));
    let queue = Mutex::new(programs);
    let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).pop();
    let work = || {
        while let Some((_, name, program)) = next() {
            verify(name, program)?;
        }
        Ok(())
    };
    let others = thread::available_parallelism().map_or(0, |processors| processors.get().min(AT_ONCE) - 1);
    thread::scope(|scope| {
        let others: Vec<_> = (0..others).map(|_| scope.spawn(work)).collect();
        let own = work();
        let others = others.into_iter().map(|other| other.join().unwrap_or_else(|panic| resume_unwind(panic)));
        others.fold(own, Result::and)
    })
}

/// A program as the kernel has it, which is given it now if it was not before.
pub(super) fn loaded(object: &mut Ebpf, program: ProgramName) -> Result<LoadedProgram, OpenError> {
    let name = program.as_str();
    let error = |source| OpenError::Program { program: name, source };
    let found = object.program_mut(name).ok_or(OpenError::Missing { what: "program", name })?;
    if found.fd().is_err() {
        verify(name, found)?;
    }
    let fd = found.fd().map_err(error)?.as_fd().try_clone_to_owned().map_err(|source| error(source.into()))?;
    Ok(LoadedProgram { fd, id: found.info().map_err(error)?.id() })
}

/// Has the kernel verify one program.
pub(super) fn load_program(object: &mut Ebpf, program: ProgramName) -> Result<(), OpenError> {
    let name = program.as_str();
    verify(name, object.program_mut(name).ok_or(OpenError::Missing { what: "program", name })?)
}

fn verify(name: &'static str, program: &mut Program) -> Result<(), OpenError> {
    match program {
        Program::Xdp(program) => program.load(),
        Program::SchedClassifier(program) => program.load(),
        Program::CgroupSockAddr(program) => program.load(),
        Program::CgroupSock(program) => program.load(),
        _ => return Err(OpenError::Missing { what: "program of the right type called", name }),
    }
    .map_err(|source| OpenError::Program { program: name, source })
}

/// How many jiffies make a second. The resolution of the coarse clocks is one jiffy
/// (`posix_get_coarse_res` in kernel/time/posix-timers.c).
pub(super) fn jiffies_per_second() -> u32 {
    let jiffy = rustix::time::clock_getres(rustix::time::ClockId::MonotonicCoarse).tv_nsec.max(1);
    u32::try_from((1_000_000_000 + jiffy / 2) / jiffy).unwrap_or(u32::MAX)
}

/// How many entries each pinned map has room for, if all that this version has are there and are of its shapes.
pub(super) fn pinned_sizes(pin_path: &Path) -> Result<BTreeMap<String, u32>, OpenError> {
    let directory = maps_directory(pin_path);
    let mut shapes = shapes(&Options::new(pin_path))?;
    for (name, shape) in &mut shapes {
        let path = directory.join(name);
        if !path.exists() {
            return Err(OpenError::NotPinned { path });
        }
        // One that cannot be examined is told of with the others.
        shape.max_entries = pinned_shape(&path).map_or(shape.max_entries, |pinned| pinned.max_entries);
    }
    check_pins(&directory, &shapes)?;
    check_layout(&directory.join("NODE"))?;
    Ok(shapes.into_iter().map(|(name, shape)| (name, shape.max_entries)).collect())
}

/// The names of the object's maps.
#[cfg(test)]
pub(super) fn map_names(options: &Options) -> Result<BTreeSet<String>, OpenError> {
    Ok(shapes(options)?.into_keys().collect())
}

/// The pins that exist of this version's maps, and of those of the version that made them.
pub(super) fn pinned_maps(pin_path: &Path) -> Result<Vec<PathBuf>, OpenError> {
    let own: BTreeSet<String> = shapes(&Options::new(pin_path))?.into_keys().collect();
    let mut pins = Vec::new();
    for directory in [maps_directory(pin_path), second_directory(pin_path)] {
        let theirs = Layout::pinned(&directory).ok().flatten().map(|theirs| theirs.maps).unwrap_or_default();
        let names = own.iter().chain(theirs.keys().filter(|name| !own.contains(*name)));
        pins.extend(names.map(|name| directory.join(name)).filter(|path| path.exists()));
    }
    Ok(pins)
}

#[cfg(test)]
mod tests {
    use super::{Options, Shape, jiffies_per_second, shapes};

    #[test]
    fn a_pin_that_differs_is_told_by_what_differs() {
        let wanted = Shape { kind: 1, key_size: 12, value_size: 24, max_entries: 65_536, flags: 1 };
        assert_eq!(wanted.difference(wanted), None);
        let larger = Shape { value_size: 32, ..wanted };
        assert_eq!(wanted.difference(larger).as_deref(), Some("its value size is 32, not 24"));
        let fewer = Shape { max_entries: 1_024, ..wanted };
        assert_eq!(wanted.difference(fewer).as_deref(), Some("its number of entries is 1024, not 65536"));
    }

    #[test]
    fn a_jiffy_is_as_long_as_kernels_are_built_for() {
        assert!([100, 250, 300, 1_000].contains(&jiffies_per_second()), "{}", jiffies_per_second());
    }

    #[test]
    fn a_size_for_a_map_that_does_not_exist_is_refused() {
        let mut options = Options::new("/sys/fs/bpf/sluice");
        options.sizes.insert("SERVICES".into(), 1);
        let error = shapes(&options).unwrap_err();
        assert!(error.to_string().contains("`SERVICES`"), "{error}");
    }

    #[test]
    fn every_map_of_the_object_is_pinned_and_no_constants_are() {
        let shapes = shapes(&Options::new("/sys/fs/bpf/sluice")).unwrap();
        assert!(shapes.contains_key("SERVICES_V4") && shapes.contains_key("FLOWS_V6"));
        assert!(shapes.keys().all(|name| !name.starts_with('.') && name.len() <= 15), "{:?}", shapes.keys());
    }
}
