//! Every entry of every pinned map, as bytes: for tests that want to see nothing changed. In: the directory of the pins. Out:
//! maps by name, of values by key.

use std::{
    collections::BTreeMap,
    fs, io,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd},
    path::Path,
};

use anyhow::{Context as _, Result};
use aya::{
    maps::{MapData, MapInfo, MapType},
    util::nr_cpus,
};

/// The entries of a map.
pub type Entries = BTreeMap<Vec<u8>, Vec<u8>>;

const BPF_MAP_LOOKUP_ELEM: libc::c_int = 1;
const BPF_MAP_GET_NEXT_KEY: libc::c_int = 4;

/// Reads them all.
pub fn pinned(directory: &Path) -> Result<BTreeMap<String, Entries>> {
    let mut maps = BTreeMap::new();
    for entry in fs::read_dir(directory).with_context(|| format!("no pins at {}", directory.display()))? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        maps.insert(name.clone(), read(&entry.path()).with_context(|| format!("cannot read {name}"))?);
    }
    Ok(maps)
}

fn read(path: &Path) -> Result<Entries> {
    let info = MapInfo::from_pin(path)?;
    // A ring has no entries to look up: whoever reads it takes them out.
    if info.map_type()? == MapType::RingBuf {
        return Ok(Entries::new());
    }
    let map = MapData::from_pin(path)?;
    let descriptor = map.fd().as_fd();
    let (key_size, mut value_size) = (info.key_size() as usize, info.value_size() as usize);
    if info.map_type()? == MapType::PerCpuArray {
        let cpus = nr_cpus().map_err(|(_, error)| error)?;
        value_size = value_size.next_multiple_of(8) * cpus;
    }
    let mut entries = Entries::new();
    let mut last: Option<Vec<u8>> = None;
    loop {
        let mut key = vec![0; key_size];
        match bpf(BPF_MAP_GET_NEXT_KEY, descriptor, last.as_deref(), &mut key) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(entries),
            result => result?,
        }
        let mut value = vec![0; value_size];
        bpf(BPF_MAP_LOOKUP_ELEM, descriptor, Some(&key), &mut value)?;
        entries.insert(key.clone(), value);
        last = Some(key);
    }
}

/// The part of `union bpf_attr` that both commands read.
#[repr(C)]
struct Attributes {
    map: u32,
    pad: u32,
    key: u64,
    out: u64,
    flags: u64,
}

fn bpf(command: libc::c_int, map: BorrowedFd<'_>, key: Option<&[u8]>, out: &mut [u8]) -> io::Result<()> {
    let attributes = Attributes {
        map: map.as_raw_fd().cast_unsigned(),
        pad: 0,
        key: key.map_or(0, |key| key.as_ptr() as u64),
        out: out.as_mut_ptr() as u64,
        flags: 0,
    };
    // SAFETY: the kernel reads the attributes and a key, and writes a key or a value, of the sizes that the map says it has.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(&attributes), size_of::<Attributes>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
