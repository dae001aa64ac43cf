//! Map entries as bytes, for maps whose types this version does not have; and what taking them over needs of the kernel besides.

use std::{io, os::fd::BorrowedFd};

use super::{
    BatchAttributes, CURSOR, ElementAttributes, MAP_LOOKUP_BATCH, MAP_LOOKUP_ELEM, MAP_UPDATE_BATCH, MAP_UPDATE_ELEM,
    batch, bpf,
};

/// How an entry is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub(in crate::dataplane) enum Write {
    /// Whether there is one or not.
    Any = 0,
    /// Only if there is none: EEXIST otherwise.
    New = 1,
}

/// How long keys and values are, in bytes; of a map with a value for each CPU all of them together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::dataplane) struct Sizes {
    /// Of a key.
    pub(in crate::dataplane) key: usize,
    /// Of a value.
    pub(in crate::dataplane) value: usize,
}

/// Reads an entry of a map of these sizes.
pub(in crate::dataplane) fn lookup(map: BorrowedFd<'_>, sizes: Sizes, key: &[u8]) -> io::Result<Vec<u8>> {
    assert_eq!(key.len(), sizes.key, "a key of the map's size");
    let mut value = vec![0_u8; sizes.value];
    let mut attributes = ElementAttributes::new(map, key);
    attributes.value = value.as_mut_ptr() as u64;
    // SAFETY: the kernel reads a key and writes a value, of the sizes that the caller has asked the kernel for.
    unsafe { bpf(MAP_LOOKUP_ELEM, &mut attributes) }?;
    Ok(value)
}

/// Writes an entry of a map of these sizes.
pub(in crate::dataplane) fn update(
    map: BorrowedFd<'_>,
    sizes: Sizes,
    key: &[u8],
    value: &[u8],
    write: Write,
) -> io::Result<()> {
    assert_eq!((key.len(), value.len()), (sizes.key, sizes.value), "an entry of the map's sizes");
    let mut attributes = ElementAttributes::new(map, key);
    attributes.value = super::address(value);
    attributes.flags = write as u64;
    // SAFETY: the kernel reads a key and a value, of the sizes that the caller has asked the kernel for.
    unsafe { bpf(MAP_UPDATE_ELEM, &mut attributes) }.map(drop)
}

/// Writes entries of a map of these sizes, in order; returns how many were written before one that was not.
pub(in crate::dataplane) fn update_batch(
    map: BorrowedFd<'_>,
    sizes: Sizes,
    keys: &[u8],
    values: &[u8],
) -> Result<(), (usize, io::Error)> {
    let count = keys.len() / sizes.key;
    assert_eq!((keys.len(), values.len()), (count * sizes.key, count * sizes.value), "whole entries");
    let mut attributes = BatchAttributes::new(map, keys);
    attributes.values = super::address(values);
    attributes.count = count as u32;
    batch(MAP_UPDATE_BATCH, &mut attributes)
}

/// Reads every entry of a map of these sizes, in the kernel's order, `chunk` at a time, until `each` returns false.
pub(in crate::dataplane) fn dump<E: From<io::Error>>(
    map: BorrowedFd<'_>,
    sizes: Sizes,
    mut chunk: usize,
    mut each: impl FnMut(&[u8], &[u8]) -> Result<bool, E>,
) -> Result<(), E> {
    let room = CURSOR.max(sizes.key);
    let (mut cursor, mut next, mut started) = (vec![0_u8; room], vec![0_u8; room], false);
    loop {
        let (mut keys, mut values) = (vec![0_u8; chunk * sizes.key], vec![0_u8; chunk * sizes.value]);
        let mut attributes = BatchAttributes {
            in_batch: if started { super::address(cursor.as_slice()) } else { 0 },
            out_batch: next.as_mut_ptr() as u64,
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            count: chunk as u32,
            ..BatchAttributes::new::<u8>(map, &[])
        };
        // SAFETY: there is room for `count` keys and values, of the sizes that the caller has asked the kernel for, and for a cursor.
        let result = unsafe { bpf(MAP_LOOKUP_BATCH, &mut attributes) };
        let is_last = match result.map_err(|error| (error.raw_os_error(), error)) {
            Ok(_) => false,
            Err((Some(libc::ENOENT), _)) => true,
            // One bucket of a hash table has more entries than there is room for.
            Err((Some(libc::ENOSPC), _)) => {
                chunk *= 2;
                continue;
            }
            Err((_, error)) => return Err(error.into()),
        };
        let count = (attributes.count as usize).min(chunk);
        let entries = keys.chunks_exact(sizes.key).zip(values.chunks_exact(sizes.value)).take(count);
        for (key, value) in entries {
            if !each(key, value)? {
                return Ok(());
            }
        }
        if is_last {
            return Ok(());
        }
        std::mem::swap(&mut cursor, &mut next);
        started = true;
    }
}

/// Waits until every program has ended that was running when this was called: what was written to maps before is what all of them see
/// from then on.
pub(in crate::dataplane) fn wait_for_programs() -> io::Result<()> {
    /// `MEMBARRIER_CMD_GLOBAL`: waits for a grace period of RCU, under which programs run.
    const GLOBAL: libc::c_int = 1;
    // SAFETY: no pointers.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, GLOBAL, 0, 0) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
