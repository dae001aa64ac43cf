//! How agents follow each other: ended by a signal, or with the next one waiting already.

use std::{
    fs,
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use nix::{
    sys::{
        signal::{Signal, kill},
        wait::{Id, WaitPidFlag, WaitStatus, waitid},
    },
    unistd::Pid,
};

use super::{Node, agent::sluice_program};
use crate::patience::wait_until;

/// A second agent of a node, with the arguments of the first. Killed when dropped.
#[derive(Debug)]
pub struct Successor {
    child: Child,
}

impl Successor {
    /// Starts it while the first one runs.
    pub fn start(node: &Node) -> Result<Self> {
        Self::start_with(node, |_| Ok(()))
    }

    /// The same, with something done to its command.
    pub fn start_with(node: &Node, change: impl FnOnce(&mut Command) -> Result<()>) -> Result<Self> {
        let line = fs::read(format!("/proc/{}/cmdline", node.agent()?.id())).context("the agent is gone")?;
        let words: Vec<_> = line.split(|octet| *octet == 0).skip(1).map(String::from_utf8_lossy).collect();
        let words = words.iter().map(AsRef::as_ref).filter(|word: &&str| !word.is_empty());
        let mut command: Command = node.host.command(sluice_program()?)?;
        command.args(words).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        change(&mut command)?;
        Ok(Self { child: command.spawn().context("cannot run a second agent")? })
    }

    /// Its process.
    pub fn id(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Successor {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits for a child of this process to end: how it did. It stays to be waited for by whoever started it.
pub fn ended(process: u32) -> Result<WaitStatus> {
    let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT | WaitPidFlag::WNOHANG;
    let id = Pid::from_raw(process.cast_signed());
    let look = || waitid(Id::Pid(id), flags).ok().filter(|status| *status != WaitStatus::StillAlive);
    wait_until(&format!("process {process} to end"), Duration::from_secs(20), look)
}

/// Ends an agent by SIGTERM, and insists that it ends well.
pub fn terminate(process: u32) -> Result<()> {
    let process_id = Pid::from_raw(process.cast_signed());
    kill(process_id, Signal::SIGTERM)?;
    let status = ended(process)?;
    ensure!(status == WaitStatus::Exited(process_id, 0), "SIGTERM: {status:?}");
    Ok(())
}
