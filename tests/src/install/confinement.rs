//! What a container's process may do: user, capabilities, no new privileges, system calls. Each is the calling thread's, and is
//! inherited by what it starts.

use anyhow::{Context as _, Result, ensure};
use caps::{CapSet, Capability, CapsHashSet};
use nix::sys::prctl;
use seccompiler::BpfProgram;

use super::{manifest::Manifest, seccomp};

#[derive(Debug)]
pub(super) struct Confinement {
    user: (u32, u32),
    capabilities: CapsHashSet,
    filters: [BpfProgram; 2],
}

impl Confinement {
    pub(super) fn of(manifest: &Manifest) -> Result<Self> {
        // Others have no effective capabilities after execve.
        ensure!(manifest.user.0 == 0, "the stand-in starts containers of user 0");
        Ok(Self {
            user: manifest.user,
            capabilities: manifest.capabilities.iter().copied().collect(),
            filters: seccomp::runtime_default(&manifest.capabilities)?,
        })
    }

    /// Confines the calling thread, for good.
    pub(super) fn enter(&self) -> Result<()> {
        for capability in caps::runtime::thread_all_supported().difference(&self.capabilities) {
            caps::drop(None, CapSet::Bounding, *capability)?;
        }
        self.become_user()?;
        caps::clear(None, CapSet::Ambient)?;
        caps::clear(None, CapSet::Inheritable)?;
        caps::set(None, CapSet::Effective, &self.capabilities)?;
        caps::set(None, CapSet::Permitted, &self.capabilities)?;
        prctl::set_no_new_privs()?;
        self.filters.iter().try_for_each(|filter| Ok(seccompiler::apply_filter(filter)?))
    }

    /// The C library would do it for all threads of the process.
    fn become_user(&self) -> Result<()> {
        let (user, group) = self.user;
        let call = |number: libc::c_long, arguments: [usize; 3]| {
            // SAFETY: the kernel reads no more than the one group that `arguments` may point to.
            let result = unsafe { libc::syscall(number, arguments[0], arguments[1], arguments[2]) };
            nix::errno::Errno::result(result).map(drop)
        };
        let groups = [group];
        call(libc::SYS_setgroups, [groups.len(), groups.as_ptr() as usize, 0]).context("setgroups")?;
        call(libc::SYS_setresgid, [group as usize; 3]).context("setresgid")?;
        call(libc::SYS_setresuid, [user as usize; 3]).context("setresuid")
    }
}

/// As in `/proc/PID/status`.
pub fn mask(capabilities: &[Capability]) -> String {
    let bits = capabilities.iter().map(|capability| 1_u64 << *capability as u8).sum::<u64>();
    format!("{bits:016x}")
}
