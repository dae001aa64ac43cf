//! Links of programs, as those see them who did not make them.

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

use anyhow::{Context as _, Result};
use aya::programs::loaded_links;

const BPF_OBJ_GET: libc::c_int = 7;
const BPF_LINK_DETACH: libc::c_int = 34;

/// What `BPF_OBJ_GET` reads.
#[repr(C)]
struct ObjectGet {
    path: u64,
    fd: u32,
    flags: u32,
}

/// Detaches what a pinned link has attached, as `bpftool link detach pinned` does. The link and its pin stay.
pub fn detach(pin: &Path) -> Result<()> {
    let link = open(pin).with_context(|| format!("no link at {}", pin.display()))?;
    let link = link.as_raw_fd();
    // SAFETY: the kernel reads four bytes, which are the link's descriptor.
    let result = unsafe { libc::syscall(libc::SYS_bpf, BPF_LINK_DETACH, &raw const link, size_of_val(&link)) };
    if result < 0 {
        return Err(io::Error::last_os_error()).with_context(|| format!("cannot detach {}", pin.display()));
    }
    Ok(())
}

/// Whether the kernel has a link of this number.
pub fn exists(id: u32) -> bool {
    loaded_links().flatten().any(|link| link.id() == id)
}

fn open(pin: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(pin.as_os_str().as_bytes())?;
    let attributes = ObjectGet { path: path.as_ptr() as u64, fd: 0, flags: 0 };
    // SAFETY: the kernel reads as many bytes as said, and the path behind them; both outlive the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, BPF_OBJ_GET, &raw const attributes, size_of_val(&attributes)) };
    let descriptor = RawFd::try_from(result).map_err(io::Error::other)?;
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made the descriptor, with close-on-exec, and nothing else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}
