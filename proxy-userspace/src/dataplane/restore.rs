//! What is pinned stays pinned: who wipes the BPF file system takes away names, and not what they are of, as long as an agent
//! holds that. In: the maps, and where their names should be. Links are seen to where they are attached.

use std::{
    fs::{self, DirBuilder, File, TryLockError},
    io,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _},
    path::Path,
};

use aya::Ebpf;

use super::{error::Error, links::links_directory, load::maps_directory, preflight};

/// Makes the directories again that are gone, locks them, and pins the maps that have no pin any more. [`Error::Wiped`] is no reason
/// to do nothing else.
pub(super) fn restore(object: &Ebpf, pin_path: &Path, lock: &mut File) -> Result<(), Error> {
    let error = |reason: String| Error::Wiped { path: pin_path.into(), reason };
    let maps = maps_directory(pin_path);
    let missing: Vec<_> = object
        .maps()
        // Constants are not pinned.
        .filter(|(name, _)| !name.starts_with('.') && !maps.join(name).exists())
        .collect();
    if missing.is_empty() && links_directory(pin_path).is_dir() && is_locked(lock, pin_path).unwrap_or(false) {
        return Ok(());
    }
    preflight::bpf_file_system(pin_path).map_err(|source| error(source.to_string()))?;
    make_directories(pin_path).map_err(|source| error(source.to_string()))?;
    if !is_locked(lock, pin_path).map_err(|source| error(source.to_string()))? {
        let new = File::open(pin_path).map_err(|source| error(source.to_string()))?;
        new.try_lock().map_err(|source| match source {
            TryLockError::WouldBlock => Error::Taken { path: pin_path.into() },
            TryLockError::Error(source) => error(source.to_string()),
        })?;
        *lock = new;
    }
    for (name, map) in &missing {
        map.pin(maps.join(name)).map_err(|source| error(format!("map {name}: {source}")))?;
    }
    tracing::warn!(
        "what was pinned under {} was gone: {} maps are pinned again, and nothing is lost",
        pin_path.display(),
        missing.len()
    );
    Ok(())
}

/// Makes the directories of maps and links, where they are missing, for their owner alone: whoever may open the pin path may lock it.
pub(super) fn make_directories(pin_path: &Path) -> io::Result<()> {
    let mut builder = DirBuilder::new();
    builder.recursive(true).mode(0o700);
    builder.create(maps_directory(pin_path))?;
    builder.create(links_directory(pin_path))
}

/// Whether the directory that is locked is the one at the path.
fn is_locked(lock: &File, pin_path: &Path) -> io::Result<bool> {
    let (locked, found) = (lock.metadata()?, fs::metadata(pin_path)?);
    Ok((locked.dev(), locked.ino()) == (found.dev(), found.ino()))
}
