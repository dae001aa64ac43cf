//! The entries of maps of one layout, written into those of another: all of them, then those that have changed since, then those that
//! came at the last moment.

use std::{
    collections::HashSet,
    hash::{BuildHasher as _, RandomState},
    path::Path,
};

use crate::dataplane::{
    error::{Error, OpenError},
    layout::{Conversion, Layout},
    raw::RawMap,
    rehearsal,
};

/// What means nothing between two packets, and what says how the others are made.
const LEFT_OUT: [&str; 4] = ["DRAFTS_V4", "DRAFTS_V6", "EVENTS", "DESCRIPTION"];

/// Entries written at once.
const RUN: usize = 4_096;

/// All maps that hold more than what one packet needs.
pub(super) struct Copies {
    maps: Vec<Copied>,
}

impl Copies {
    /// Of the maps in a directory with one layout to those in another with another.
    pub(super) fn open(old: &Path, theirs: &Layout, new: &Path, own: &Layout) -> Result<Self, OpenError> {
        let mut maps = Vec::new();
        for (name, is_written) in rehearsal::maps().filter(|(name, _)| !LEFT_OUT.contains(name)) {
            let (Some(from), Some(to)) = (theirs.maps.get(name), own.maps.get(name)) else { continue };
            if !old.join(name).exists() {
                continue;
            }
            let (old, new) = (RawMap::open(&old.join(name), name)?, RawMap::open(&new.join(name), name)?);
            let sizes = [from, to].map(|fields| (fields.key.size(), fields.value.size()));
            if sizes != [old.entry_sizes(), new.entry_sizes()] {
                return Err(Error::MapShape { map: name }.into());
            }
            let noted = ["last_seen", "last_used"].into_iter().find_map(|name| to.value.get(name));
            maps.push(Copied {
                noted: noted.map(|field| field.offset),
                conversion: Conversion::new(name, from, to),
                is_written,
                known: HashSet::new(),
                hasher: RandomState::new(),
                end: 0,
                written: 0,
                old,
                new,
            });
        }
        Ok(Self { maps })
    }

    /// Copies everything.
    pub(super) fn begin(&mut self) -> Result<(), Error> {
        self.maps.iter_mut().try_for_each(Copied::begin)
    }

    /// Copies what programs have changed since.
    pub(super) fn catch_up(&mut self) -> Result<(), Error> {
        self.maps.iter_mut().filter(|map| map.is_written).try_for_each(Copied::catch_up)
    }

    /// Adds what old programs have written even later and new ones do not know; returns how much that was.
    pub(super) fn add_missing(&mut self) -> Result<usize, Error> {
        let tables = self.maps.iter_mut().filter(|map| map.is_written && !map.old.is_array());
        tables.map(Copied::add_missing).sum()
    }

    /// Adds what the new maps do not have, or have as it was before; returns how much that was.
    pub(super) fn merge(&mut self) -> Result<usize, Error> {
        self.maps.iter().filter(|map| map.is_written && !map.old.is_array()).map(Copied::merge).sum()
    }

    /// How many entries were written.
    pub(super) fn written(&self) -> usize {
        self.maps.iter().map(|map| map.written).sum()
    }
}

/// One map.
struct Copied {
    old: RawMap,
    new: RawMap,
    conversion: Conversion,
    /// Bytes before what says, in a value of the new map, when it was of use last.
    noted: Option<usize>,
    /// Programs write it.
    is_written: bool,
    /// Hashes of the entries that the new map has.
    known: HashSet<u64>,
    hasher: RandomState,
    /// Of an array: behind the last element that is in use.
    end: u32,
    written: usize,
}

impl Copied {
    fn begin(&mut self) -> Result<(), Error> {
        self.copy(u32::MAX)
    }

    /// Nobody gives out elements of an array meanwhile.
    fn catch_up(&mut self) -> Result<(), Error> {
        self.copy(self.end)
    }

    /// Copies the entries that are not known; of an array those before `end`.
    fn copy(&mut self, end: u32) -> Result<(), Error> {
        let Self { old, new, conversion, known, hasher, is_written, .. } = self;
        let mut run = Run::default();
        let (mut used, mut written) = (0, 0);
        old.visit(|key, value| {
            if old.is_array() {
                let index = u32::from_ne_bytes(key.try_into().unwrap_or_default());
                if index >= end {
                    return Ok(false);
                }
                // So it is in the new map, unless it has just become so: only `ACTIVE_*` do, which the agent counts anew.
                if value.iter().all(|byte| *byte == 0) {
                    return Ok(true);
                }
                used = index + 1;
            }
            if *is_written && !known.insert(hasher.hash_one((key, value))) {
                return Ok(true);
            }
            run.add(conversion, key, value, old);
            written += 1;
            if run.count == RUN {
                run.write(new)?;
            }
            Ok(true)
        })?;
        run.write(new)?;
        self.end = self.end.max(used);
        self.written += written;
        Ok(())
    }

    fn add_missing(&mut self) -> Result<usize, Error> {
        let Self { old, new, conversion, known, hasher, .. } = self;
        let mut added = 0;
        old.visit(|key, value| {
            if !known.contains(&hasher.hash_one((key, value))) {
                let mut run = Run::default();
                run.add(conversion, key, value, old);
                added += usize::from(new.put_new(&run.keys, &run.values)?);
            }
            Ok(true)
        })?;
        self.written += added;
        Ok(added)
    }
}

impl Copied {
    fn merge(&self) -> Result<usize, Error> {
        let Self { old, new, conversion, noted, .. } = self;
        let mut merged = 0;
        old.visit(|key, value| {
            let mut run = Run::default();
            run.add(conversion, key, value, old);
            let is_later = |known: Vec<u8>| noted.is_some_and(|place| is_later(&run.values, &known, place));
            if new.find(&run.keys)?.is_none_or(is_later) {
                new.put(&run.keys, &run.values)?;
                merged += 1;
            }
            Ok(true)
        })?;
        Ok(merged)
    }
}

/// Whether the low 32 bits of jiffies at a place of a value are later than in another.
fn is_later(one: &[u8], other: &[u8], place: usize) -> bool {
    let jiffies = |value: &[u8]| {
        let mut bytes = [0; 4];
        bytes.copy_from_slice(value.get(place..place + 4)?);
        Some(u32::from_ne_bytes(bytes))
    };
    jiffies(one).zip(jiffies(other)).is_some_and(|(one, other)| one.wrapping_sub(other) as i32 > 0)
}

/// Entries of the new layout that are to be written together.
#[derive(Default)]
struct Run {
    keys: Vec<u8>,
    values: Vec<u8>,
    count: usize,
}

impl Run {
    /// A map with a value for each CPU has them one behind the other, each in as many double words as it takes.
    fn add(&mut self, conversion: &Conversion, key: &[u8], value: &[u8], map: &RawMap) {
        conversion.add_key(key, &mut self.keys);
        if map.is_per_cpu() {
            let (_, size) = map.entry_sizes();
            for value in value.chunks_exact(size.next_multiple_of(8)) {
                conversion.add_value(&value[..size], &mut self.values);
                self.values.resize(self.values.len().next_multiple_of(8), 0);
            }
        } else {
            conversion.add_value(value, &mut self.values);
        }
        self.count += 1;
    }

    fn write(&mut self, map: &RawMap) -> Result<(), Error> {
        map.put_all(&self.keys, &self.values)?;
        *self = Self::default();
        Ok(())
    }
}
