//! Maps that refuse what the agent writes.

use std::{
    io,
    os::fd::{AsFd as _, AsRawFd as _},
    path::Path,
};

use anyhow::{Context as _, Result, ensure};
use aya::maps::MapData;

const MAP_FREEZE: libc::c_int = 22;

/// From now on nobody may write to a map that is pinned under a path: EPERM, for ever.
pub fn freeze(pins: &Path, map: &str) -> Result<()> {
    let map = MapData::from_pin(pins.join("maps").join(map)).with_context(|| format!("no map {map}"))?;
    let attributes = map.fd().as_fd().as_raw_fd();
    // SAFETY: the kernel reads four bytes, which are the map's descriptor.
    let result = unsafe { libc::syscall(libc::SYS_bpf, MAP_FREEZE, &raw const attributes, size_of_val(&attributes)) };
    ensure!(result == 0, "cannot freeze the map: {}", io::Error::last_os_error());
    Ok(())
}
