//! Network namespaces that live exactly as long as their handle: they have no name under `/run/netns`, so nothing is
//! left behind when a test panics or is killed.
//!
//! In goes a set-up in the words of `ip`; out come closures and commands that run inside. Other programs reach a
//! namespace by its [`Namespace::path`].

use std::{
    fs::{self, File},
    io::Write as _,
    os::{
        fd::{AsFd as _, AsRawFd as _, OwnedFd},
        unix::process::CommandExt as _,
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
};

use anyhow::{Context as _, Result, bail};
use nix::{
    sched::{CloneFlags, setns, unshare},
    unistd::geteuid,
};

/// A network namespace of our own.
#[derive(Debug)]
pub struct Namespace {
    name: String,
    handle: OwnedFd,
}

/// Fails with a sentence when the process may not make namespaces.
pub fn require_root() -> Result<()> {
    if !geteuid().is_root() {
        bail!("this needs root: it makes network namespaces, cgroups and BPF programs; run it with sudo");
    }
    Ok(())
}

impl Namespace {
    /// An empty namespace whose `lo` is up; `name` is for messages only.
    pub fn new(name: &str) -> Result<Self> {
        require_root()?;
        let made = match thread::scope(|scope| scope.spawn(unshared).join()) {
            Ok(made) => made,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        let handle = made.with_context(|| format!("cannot make namespace {name}"))?;
        let namespace = Self { name: name.to_owned(), handle };
        // Set before any device exists: with it every address is usable at once instead of after duplicate detection.
        namespace.sysctl("net/ipv6/conf/default/accept_dad", "0")?;
        namespace.sysctl("net/ipv6/conf/default/accept_ra", "0")?;
        namespace.sysctl("net/ipv6/conf/default/router_solicitations", "0")?;
        namespace.ip("link set lo up")?;
        Ok(namespace)
    }

    /// What it is called in messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A path that `setns`, `nsenter --net=…` and `ip link … netns …` accept while the handle lives.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), self.handle.as_raw_fd()))
    }

    /// Runs a closure inside, on a thread of its own.
    pub fn run<T: Send>(&self, closure: impl FnOnce() -> T + Send) -> Result<T> {
        let inside = || setns(self.handle.as_fd(), CloneFlags::CLONE_NEWNET).map(|()| closure());
        match thread::scope(|scope| scope.spawn(inside).join()) {
            Ok(result) => result.with_context(|| format!("cannot enter namespace {}", self.name)),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }

    /// A command that will run inside. Unlike `ip netns exec` it sees the mounts of this process, bpffs among them.
    pub fn command(&self, program: impl AsRef<Path>) -> Result<Command> {
        let mut command = Command::new(program.as_ref());
        enter_on_exec(&mut command, self.handle.try_clone()?);
        Ok(command)
    }

    /// Carries out lines in the language of `ip`, without the word `ip`; empty lines are skipped.
    pub fn ip(&self, lines: &str) -> Result<()> {
        let mut ip = self.command("ip")?;
        ip.args(["-force", "-batch", "-"]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = ip.spawn().context("cannot run ip (package iproute2)")?;
        child.stdin.take().context("ip has no stdin")?.write_all(format!("{lines}\n").as_bytes())?;
        let output = child.wait_with_output()?;
        if !output.status.success() {
            bail!("ip failed in namespace {}: {}", self.name, String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(())
    }

    /// Writes a setting; `name` is the path below `/proc/sys`.
    pub fn sysctl(&self, name: &str, value: &str) -> Result<()> {
        self.run(|| fs::write(Path::new("/proc/sys").join(name), value))?
            .with_context(|| format!("cannot set {name} to {value} in namespace {}", self.name))
    }

    /// The index of a device inside.
    pub fn device_index(&self, device: &str) -> Result<u32> {
        self.run(|| nix::net::if_::if_nametoindex(device))?
            .with_context(|| format!("no device {device} in namespace {}", self.name))
    }
}

/// Makes a command start inside the namespace of `handle`.
pub fn enter_on_exec(command: &mut Command, handle: OwnedFd) {
    let enter = move || Ok(setns(handle.as_fd(), CloneFlags::CLONE_NEWNET)?);
    // SAFETY: between fork and exec the closure makes one system call and touches no memory but its own descriptor.
    unsafe { command.pre_exec(enter) };
}

/// Runs on a thread that ends right after, so that no other code finds itself in the new namespace.
fn unshared() -> Result<OwnedFd> {
    unshare(CloneFlags::CLONE_NEWNET)?;
    Ok(File::open("/proc/thread-self/ns/net")?.into())
}
