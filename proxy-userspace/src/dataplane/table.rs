//! A pinned map as a typed table: whole-table reads and runs of writes in as few system calls as the kernel allows.

use std::{
    io,
    marker::PhantomData,
    os::fd::{AsFd as _, OwnedFd},
};

use aya::{Pod, maps::MapData};

use super::{error::Error, syscall};

/// Entries asked for at once in a dump.
const CHUNK: usize = 8_192;

/// A map with keys `K` and values `V`.
pub(super) struct Table<K, V> {
    name: &'static str,
    fd: OwnedFd,
    capacity: u32,
    entry: PhantomData<fn() -> (K, V)>,
}

impl<K: Pod, V: Pod> Table<K, V> {
    /// The table over a loaded map, if the map's keys and values have the sizes of `K` and `V`.
    pub(super) fn new(name: &'static str, map: &MapData) -> Result<Self, Error> {
        let error = |source| Error::Map { operation: "open", map: name, source };
        let info = map.info().map_err(|source| error(io::Error::other(source)))?;
        if (info.key_size() as usize, info.value_size() as usize) != (size_of::<K>(), size_of::<V>()) {
            return Err(Error::MapShape { map: name });
        }
        let fd = map.fd().as_fd().try_clone_to_owned().map_err(error)?;
        Ok(Self { name, fd, capacity: info.max_entries(), entry: PhantomData })
    }

    /// The map's name.
    pub(super) fn name(&self) -> &'static str {
        self.name
    }

    /// How many entries fit.
    pub(super) fn capacity(&self) -> u32 {
        self.capacity
    }

    fn error(&self, operation: &'static str, source: io::Error) -> Error {
        match source.raw_os_error() {
            // A trie says the latter.
            Some(libc::E2BIG | libc::ENOSPC) => Error::MapFull { map: self.name, capacity: self.capacity },
            _ => Error::Map { operation, map: self.name, source },
        }
    }

    /// Reads an entry.
    pub(super) fn read(&self, key: &K) -> Result<V, Error> {
        syscall::lookup(self.fd.as_fd(), key).map_err(|source| self.error("read", source))
    }

    /// Reads an entry; none if there is none.
    pub(super) fn find(&self, key: &K) -> Result<Option<V>, Error> {
        match syscall::lookup(self.fd.as_fd(), key) {
            Ok(value) => Ok(Some(value)),
            Err(source) if source.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(source) => Err(self.error("read", source)),
        }
    }

    /// Writes an entry.
    pub(super) fn put(&self, key: &K, value: &V) -> Result<(), Error> {
        syscall::update(self.fd.as_fd(), key, value).map_err(|source| self.error("write to", source))
    }

    /// Removes an entry; one that is not there counts as removed.
    pub(super) fn remove(&self, key: &K) -> Result<(), Error> {
        self.take(key).map(drop)
    }

    /// Removes an entry; says whether it was there.
    pub(super) fn take(&self, key: &K) -> Result<bool, Error> {
        match syscall::delete(self.fd.as_fd(), key) {
            Ok(()) => Ok(true),
            Err(source) if source.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(source) => Err(self.error("remove from", source)),
        }
    }

    /// Writes entries in order. Where a batch stops, the entry it stopped at is written alone: that tells a batch the
    /// kernel cannot do from an entry it will not take.
    pub(super) fn put_all(&self, keys: &[K], values: &[V]) -> Result<(), Error> {
        let mut done = 0;
        while keys.len() - done > 1 {
            let Err((count, _)) = syscall::update_batch(self.fd.as_fd(), &keys[done..], &values[done..]) else {
                return Ok(());
            };
            done += count;
            self.put(&keys[done], &values[done])?;
            done += 1;
        }
        keys[done..].iter().zip(&values[done..]).try_for_each(|(key, value)| self.put(key, value))
    }

    /// Removes entries; those that are not there count as removed.
    pub(super) fn remove_all(&self, keys: &[K]) -> Result<(), Error> {
        let mut done = 0;
        while keys.len() - done > 1 {
            let Err((count, _)) = syscall::delete_batch(self.fd.as_fd(), &keys[done..]) else {
                return Ok(());
            };
            done += count;
            self.remove(&keys[done])?;
            done += 1;
        }
        keys[done..].iter().try_for_each(|key| self.remove(key))
    }

    /// Every entry, in no order.
    pub(super) fn entries(&self) -> Result<Vec<(K, V)>, Error> {
        let mut entries = Vec::new();
        self.visit(|key, value| {
            entries.push((key, value));
            true
        })?;
        Ok(entries)
    }

    /// Shows every entry to `each`, until that returns false.
    pub(super) fn visit(&self, each: impl FnMut(K, V) -> bool) -> Result<(), Error> {
        let chunk = CHUNK.min(self.capacity as usize);
        syscall::dump(self.fd.as_fd(), chunk, each).map_err(|source| self.error("read", source))
    }
}

impl<V: Pod> Table<u32, V> {
    /// The first `count` values of an array.
    pub(super) fn values(&self, count: usize) -> Result<Vec<V>, Error> {
        let mut values = Vec::with_capacity(count.min(self.capacity as usize));
        if count > 0 {
            self.visit(|_, value| {
                values.push(value);
                values.len() < count
            })?;
        }
        Ok(values)
    }
}
