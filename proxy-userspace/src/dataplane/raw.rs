//! A pinned map as a table of bytes: what its entries mean is for whoever knows its layout.

use std::{
    io,
    os::fd::{AsFd as _, OwnedFd},
    path::Path,
};

use aya_obj::generated::bpf_map_type;

use super::{
    error::{Error, OpenError},
    load::{Shape, pinned_shape},
    syscall::{
        self,
        bytes::{self, Sizes, Write},
    },
};

/// Entries read or written at once.
const CHUNK: usize = 4_096;

/// A map.
#[derive(Debug)]
pub(super) struct RawMap {
    name: &'static str,
    fd: OwnedFd,
    shape: Shape,
    sizes: Sizes,
}

impl RawMap {
    /// The one that is pinned at a path.
    pub(super) fn open(path: &Path, name: &'static str) -> Result<Self, OpenError> {
        let shape =
            pinned_shape(path).map_err(|difference| OpenError::IncompatiblePin { path: path.into(), difference })?;
        let fd = syscall::object(path).map_err(|source| Error::Map { operation: "open", map: name, source })?;
        let value = shape.value_size as usize;
        let value = if is_per_cpu(&shape) { value.next_multiple_of(8) * cpus()? } else { value };
        let sizes = Sizes { key: shape.key_size as usize, value };
        Ok(Self { name, fd, shape, sizes })
    }

    /// Bytes of a key, and of a value on one CPU.
    pub(super) fn entry_sizes(&self) -> (usize, usize) {
        (self.shape.key_size as usize, self.shape.value_size as usize)
    }

    /// Whether it has a value for each CPU.
    pub(super) fn is_per_cpu(&self) -> bool {
        is_per_cpu(&self.shape)
    }

    /// Whether entries are found by a number, and all of them are always there.
    pub(super) fn is_array(&self) -> bool {
        [bpf_map_type::BPF_MAP_TYPE_ARRAY, bpf_map_type::BPF_MAP_TYPE_PERCPU_ARRAY].contains(&kind(&self.shape))
    }

    fn error(&self, operation: &'static str, source: io::Error) -> Error {
        match source.raw_os_error() {
            Some(libc::E2BIG | libc::ENOSPC) => Error::MapFull { map: self.name, capacity: self.shape.max_entries },
            _ => Error::Map { operation, map: self.name, source },
        }
    }

    /// Reads an entry.
    pub(super) fn read(&self, key: &[u8]) -> Result<Vec<u8>, Error> {
        bytes::lookup(self.fd.as_fd(), self.sizes, key).map_err(|source| self.error("read", source))
    }

    /// The value under a key, if there is one.
    pub(super) fn find(&self, key: &[u8]) -> Result<Option<Vec<u8>>, Error> {
        match bytes::lookup(self.fd.as_fd(), self.sizes, key) {
            Ok(value) => Ok(Some(value)),
            Err(source) if source.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(source) => Err(self.error("read", source)),
        }
    }

    /// Writes an entry.
    pub(super) fn put(&self, key: &[u8], value: &[u8]) -> Result<(), Error> {
        bytes::update(self.fd.as_fd(), self.sizes, key, value, Write::Any)
            .map_err(|source| self.error("write to", source))
    }

    /// Writes an entry if there is none under its key; says whether it did. A full LRU map gives up another entry for it, and also
    /// for one that it turns out to have: so it is asked first.
    pub(super) fn put_new(&self, key: &[u8], value: &[u8]) -> Result<bool, Error> {
        if self.find(key)?.is_some() {
            return Ok(false);
        }
        match bytes::update(self.fd.as_fd(), self.sizes, key, value, Write::New) {
            Ok(()) => Ok(true),
            Err(source) if source.raw_os_error() == Some(libc::EEXIST) => Ok(false),
            Err(source) => Err(self.error("write to", source)),
        }
    }

    /// Writes entries in order, as many at once as the kernel does.
    pub(super) fn put_all(&self, keys: &[u8], values: &[u8]) -> Result<(), Error> {
        let Sizes { key, value } = self.sizes;
        let mut done = 0;
        while done * key < keys.len() {
            let Err((count, _)) =
                bytes::update_batch(self.fd.as_fd(), self.sizes, &keys[done * key..], &values[done * value..])
            else {
                return Ok(());
            };
            done += count;
            // That tells a batch the kernel cannot do from an entry it will not take.
            self.put(&keys[done * key..][..key], &values[done * value..][..value])?;
            done += 1;
        }
        Ok(())
    }

    /// Shows every entry to `each`, until that returns false.
    pub(super) fn visit(&self, mut each: impl FnMut(&[u8], &[u8]) -> Result<bool, Error>) -> Result<(), Error> {
        if self.is_per_cpu() {
            for key in (0..self.shape.max_entries).map(u32::to_ne_bytes) {
                if !each(&key, &self.read(&key)?)? {
                    break;
                }
            }
            return Ok(());
        }
        let chunk = CHUNK.min(self.shape.max_entries as usize);
        let dumped = bytes::dump(self.fd.as_fd(), self.sizes, chunk, |key, value| Ok(each(key, value)?));
        dumped.map_err(|stop| match stop {
            Stop::Kernel(source) => self.error("read", source),
            Stop::Told(error) => error,
        })
    }
}

/// Why a dump did not come to its end.
enum Stop {
    Kernel(io::Error),
    Told(Error),
}

impl From<io::Error> for Stop {
    fn from(source: io::Error) -> Self {
        Self::Kernel(source)
    }
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Self::Told(error)
    }
}

fn kind(shape: &Shape) -> bpf_map_type {
    bpf_map_type::try_from(shape.kind).unwrap_or(bpf_map_type::BPF_MAP_TYPE_UNSPEC)
}

fn is_per_cpu(shape: &Shape) -> bool {
    kind(shape) == bpf_map_type::BPF_MAP_TYPE_PERCPU_ARRAY
}

fn cpus() -> Result<usize, Error> {
    aya::util::nr_cpus().map_err(|(_, source)| Error::Kernel { what: "the number of CPUs", source })
}
