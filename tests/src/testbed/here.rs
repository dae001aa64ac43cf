//! Many packets in a row: run on a thread that is in the test bed's namespace and stays there.

use std::{fs::File, thread};

use anyhow::{Context as _, Result};
use aya::programs::{Program, ProgramError, ProgramFd};
use nix::sched::{CloneFlags, setns};
use proxy_common::outcome::Hook;

use super::{Ran, Testbed, load_once, program, run_tc, run_xdp};

impl Testbed {
    /// Runs a closure in the namespace, on a thread of its own.
    pub fn inside<T: Send>(&mut self, closure: impl FnOnce(&mut Self) -> Result<T> + Send) -> Result<T> {
        let path = self.namespace.path();
        let inside = || {
            setns(File::open(path)?, CloneFlags::CLONE_NEWNET)?;
            closure(self)
        };
        match thread::scope(|scope| scope.spawn(inside).join()) {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }

    /// Verifies the program of a hook.
    pub fn load(&mut self, hook: Hook) -> Result<()> {
        let name = program(hook)?;
        match self.object.program_mut(name).with_context(|| format!("no program {name}"))? {
            Program::Xdp(program) => load_once(program.load())?,
            Program::SchedClassifier(program) => load_once(program.load())?,
            _ => anyhow::bail!("{name} is of another kind"),
        }
        Ok(())
    }

    /// The program of a hook, verified, for others to call.
    pub fn descriptor(&mut self, hook: Hook) -> Result<ProgramFd> {
        self.load(hook)?;
        let name = program(hook)?;
        let descriptor = match self.object.program(name).with_context(|| format!("no program {name}"))? {
            Program::Xdp(program) => program.fd()?,
            Program::SchedClassifier(program) => program.fd()?,
            _ => anyhow::bail!("{name} is of another kind"),
        };
        Ok(descriptor.try_clone()?)
    }

    /// The program of a hook for several threads, which must be in the namespace.
    pub fn runner(&mut self, hook: Hook) -> Result<Runner<'_>> {
        self.load(hook)?;
        let name = program(hook)?;
        Ok(Runner {
            program: self.object.program(name).with_context(|| format!("no program {name}"))?,
            uplink: self.uplink,
        })
    }

    /// Runs the program of a hook, which must be loaded, on the thread of the caller; `None` where the kernel makes no packet
    /// of these bytes for it.
    pub fn run_here(&mut self, hook: Hook, bytes: &[u8]) -> Result<Option<Ran>> {
        let name = program(hook)?;
        let uplink = self.uplink;
        let mut out = vec![0; bytes.len() + 256];
        let result = match self.object.program_mut(name).with_context(|| format!("no program {name}"))? {
            Program::Xdp(program) => run_xdp(program, bytes, &mut out, uplink, 0),
            Program::SchedClassifier(program) => run_tc(program, bytes, &mut out, uplink, 0),
            _ => anyhow::bail!("{name} is of another kind"),
        };
        let (action, length) = match result {
            Ok(result) => result,
            Err(ProgramError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::EINVAL) => {
                return Ok(None);
            }
            Err(error) => return Err(error.into()),
        };
        out.truncate(length as usize);
        Ok(Some(Ran { action: action.cast_signed(), bytes: out }))
    }
}

/// A program that is verified, to be run by whoever has this.
#[derive(Clone, Copy)]
pub struct Runner<'a> {
    program: &'a Program,
    uplink: u32,
}

impl Runner<'_> {
    /// Runs it on the thread of the caller over bytes that came in by the uplink.
    pub fn run(&self, bytes: &[u8]) -> Result<Ran> {
        let mut out = vec![0; bytes.len() + 256];
        let (action, length) = match self.program {
            Program::Xdp(program) => run_xdp(program, bytes, &mut out, self.uplink, 0)?,
            Program::SchedClassifier(program) => run_tc(program, bytes, &mut out, self.uplink, 0)?,
            _ => anyhow::bail!("a program that sees no packets"),
        };
        out.truncate(length as usize);
        Ok(Ran { action: action.cast_signed(), bytes: out })
    }
}
