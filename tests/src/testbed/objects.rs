//! Objects that have been verified already. That takes longer than most of what is done with one, so that an object goes from a
//! test bed to the next one of the process, with its maps as they were in the beginning.

use std::{
    collections::HashMap,
    io, mem,
    ops::{Deref, DerefMut},
    os::fd::{AsFd as _, AsRawFd as _, RawFd},
    sync::{Mutex, PoisonError},
};

use anyhow::{Context as _, Result};
use aya::{
    Ebpf, EbpfLoader,
    maps::{Map, MapData, RingBuf},
    util::nr_cpus,
};

/// By the sizes of their maps.
static IDLE: Mutex<Option<HashMap<Entries, Vec<Ebpf>>>> = Mutex::new(None);

/// Sizes of maps that are not the usual ones.
pub(super) type Entries = Vec<(String, u32)>;

/// An object that is lent to a test bed.
pub(super) struct Lent {
    /// Always there until it is given back.
    object: mem::ManuallyDrop<Ebpf>,
    entries: Entries,
}

impl Lent {
    /// One that is idle, or a new one.
    pub(super) fn new(entries: Entries) -> Result<Self> {
        let idle = with_idle(|idle| idle.get_mut(&entries).and_then(Vec::pop));
        let object = match idle {
            Some(object) => object,
            None => load(&entries)?,
        };
        Ok(Self { object: mem::ManuallyDrop::new(object), entries })
    }
}

impl Deref for Lent {
    type Target = Ebpf;

    fn deref(&self) -> &Ebpf {
        &self.object
    }
}

impl DerefMut for Lent {
    fn deref_mut(&mut self) -> &mut Ebpf {
        &mut self.object
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        // SAFETY: it is taken once, and not looked at after it.
        let mut object = unsafe { mem::ManuallyDrop::take(&mut self.object) };
        // One whose maps cannot be emptied is no use to anybody.
        if clear(&mut object).is_ok() {
            with_idle(|idle| idle.entry(mem::take(&mut self.entries)).or_default().push(object));
        }
    }
}

fn with_idle<T>(act: impl FnOnce(&mut HashMap<Entries, Vec<Ebpf>>) -> T) -> T {
    act(IDLE.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_default())
}

/// Small maps are made sooner, and emptied sooner.
fn load(entries: &Entries) -> Result<Ebpf> {
    const SMALL: [&str; 21] = [
        "FLOWS_V4",
        "FLOWS_V6",
        "EMBRYOS_V4",
        "EMBRYOS_V6",
        "SOCKETS_V4",
        "SOCKETS_V6",
        "SLOTS",
        "AFFINITY_V4",
        "AFFINITY_V6",
        "BACKENDS_V4",
        "BACKENDS_V6",
        "SERVICE_STATS_4",
        "SERVICE_STATS_6",
        "BACKEND_STATS_4",
        "BACKEND_STATS_6",
        "ACTIVE_V4",
        "ACTIVE_V6",
        "TURNS_V4",
        "TURNS_V6",
        "FRAGMENTS_V4",
        "FRAGMENTS_V6",
    ];
    let mut loader = EbpfLoader::new();
    for map in SMALL {
        loader.map_max_entries(map, 4_096);
    }
    for (map, count) in entries {
        loader.map_max_entries(map, *count);
    }
    Ok(loader.load(&super::programs()?)?)
}

/// Makes every map what it was in the beginning.
fn clear(object: &mut Ebpf) -> Result<()> {
    for (name, map) in object.maps_mut() {
        match map {
            Map::RingBuf(_) => drain(map)?,
            // Constants, which the kernel keeps from being written, and what the compiler put beside them.
            Map::Array(_) if name.starts_with('.') => {}
            Map::Array(data) => zero(data, 1)?,
            Map::PerCpuArray(data) => zero(data, nr_cpus().map_err(|(_, error)| error)?)?,
            Map::HashMap(data) | Map::LruHashMap(data) | Map::LpmTrie(data) => empty(data)?,
            // What is kept with a socket ends with it.
            Map::SkStorage(_) => {}
            _ => anyhow::bail!("{name} is of a kind that nobody knows how to empty"),
        }
    }
    Ok(())
}

/// Takes every record out of a ring buffer.
fn drain(map: &mut Map) -> Result<()> {
    let mut records = RingBuf::try_from(map)?;
    while records.next().is_some() {}
    Ok(())
}

const BPF_MAP_DELETE_ELEM: libc::c_int = 3;
const BPF_MAP_GET_NEXT_KEY: libc::c_int = 4;
const BPF_MAP_UPDATE_BATCH: libc::c_int = 26;

/// `union bpf_attr` for one element.
#[repr(C)]
struct Element {
    map: u32,
    pad: u32,
    key: u64,
    next_key: u64,
    flags: u64,
}

/// `union bpf_attr` for many.
#[repr(C)]
struct Batch {
    first: u64,
    last: u64,
    keys: u64,
    values: u64,
    count: u32,
    map: u32,
    element_flags: u64,
    flags: u64,
}

fn descriptor(data: &MapData) -> RawFd {
    data.fd().as_fd().as_raw_fd()
}

fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<()> {
    // SAFETY: the kernel reads and writes `size_of::<T>()` bytes and what their addresses lead to, which outlive the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attributes), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Takes every element out of a map.
fn empty(data: &MapData) -> Result<()> {
    let size = data.info()?.key_size() as usize;
    let mut key = vec![0_u8; size];
    let map = descriptor(data).try_into()?;
    loop {
        let first = Element { map, pad: 0, key: 0, next_key: key.as_mut_ptr().expose_provenance() as u64, flags: 0 };
        match bpf(BPF_MAP_GET_NEXT_KEY, &first) {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(()),
            Err(error) => return Err(error).context("the next key"),
        }
        let this = Element { map, pad: 0, key: key.as_mut_ptr().expose_provenance() as u64, next_key: 0, flags: 0 };
        match bpf(BPF_MAP_DELETE_ELEM, &this) {
            Err(error) if error.raw_os_error() != Some(libc::ENOENT) => return Err(error).context("an element"),
            _ => {}
        }
    }
}

/// Writes zeros into all of an array.
fn zero(data: &MapData, copies: usize) -> Result<()> {
    let info = data.info()?;
    let count = info.max_entries();
    let size = info.value_size() as usize;
    let values = vec![0_u8; count as usize * if copies == 1 { size } else { size.next_multiple_of(8) * copies }];
    let keys: Vec<u32> = (0..count).collect();
    let batch = Batch {
        first: 0,
        last: 0,
        keys: keys.as_ptr().expose_provenance() as u64,
        values: values.as_ptr().expose_provenance() as u64,
        count,
        map: descriptor(data).try_into()?,
        element_flags: 0,
        flags: 0,
    };
    bpf(BPF_MAP_UPDATE_BATCH, &batch).context("an array")
}
