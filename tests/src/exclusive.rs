//! A program of somebody else's that has a hook of a cgroup to itself.

use std::{
    fs::File,
    io,
    os::fd::{AsFd as _, AsRawFd as _, RawFd},
    path::Path,
};

use anyhow::{Context as _, Result, bail, ensure};
use aya::{Ebpf, EbpfLoader, programs::Program};
use proxy_userspace::dataplane::OBJECT;

const PROG_ATTACH: libc::c_int = 8;
const PROG_DETACH: libc::c_int = 9;
/// `BPF_CGROUP_INET4_CONNECT`
const CONNECT4: u32 = 10;

#[repr(C)]
struct Attributes {
    target: RawFd,
    program: RawFd,
    attach_type: u32,
    /// None: no other program may be attached beside it.
    flags: u32,
}

/// It is attached until this is dropped.
#[derive(Debug)]
pub struct Exclusive {
    cgroup: File,
    object: Ebpf,
}

impl Exclusive {
    /// Attaches it to connect(2) of a cgroup.
    pub fn at_connect4(cgroup: &Path) -> Result<Self> {
        let mut loader = EbpfLoader::new();
        for map in ["FLOWS_V4", "FLOWS_V6", "EMBRYOS_V4", "EMBRYOS_V6", "SOCKETS_V4", "SOCKETS_V6"] {
            loader.map_max_entries(map, 1_024);
        }
        let mut object = loader.load(OBJECT)?;
        let Some(Program::CgroupSockAddr(program)) = object.program_mut("connect4") else { bail!("no connect4") };
        program.load()?;
        let exclusive = Self { cgroup: File::open(cgroup)?, object };
        exclusive.call(PROG_ATTACH).context("cannot attach")?;
        Ok(exclusive)
    }

    fn call(&self, command: libc::c_int) -> Result<()> {
        let program = self.object.program("connect4").context("no connect4")?.fd()?;
        let (target, program) = (self.cgroup.as_raw_fd(), program.as_fd().as_raw_fd());
        let attributes = Attributes { target, program, attach_type: CONNECT4, flags: 0 };
        // SAFETY: the kernel reads as many bytes, which are those of the command.
        let result = unsafe { libc::syscall(libc::SYS_bpf, command, &raw const attributes, size_of_val(&attributes)) };
        ensure!(result == 0, "{}", io::Error::last_os_error());
        Ok(())
    }
}

impl Drop for Exclusive {
    fn drop(&mut self) {
        let _ = self.call(PROG_DETACH);
    }
}
