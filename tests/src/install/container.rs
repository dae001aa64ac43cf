//! A container that was started from the manifest.

use std::{
    fs::File,
    os::unix::process::CommandExt as _,
    panic,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::{
        Arc,
        mpsc::{self, Sender},
    },
    thread,
};

use anyhow::{Context as _, Result};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, setns, unshare},
    sys::{prctl, signal::Signal},
};

use super::{
    confinement::Confinement,
    kubelet::{Given, Host},
    manifest::Manifest,
    mounts,
    probe::Probes,
    root::{ENTRYPOINT, Root},
};
use crate::lab::cgroup;

/// Its process, the first of a PID namespace. It is killed when the handle is dropped.
#[derive(Debug)]
pub struct Container {
    /// The process. Its output is piped.
    pub child: Child,
    /// What kubelet finds out about it.
    pub probes: Probes,
    /// The thread that started it ends with this, and the process with the thread.
    _held: Sender<()>,
    _given: Given,
    _root: Arc<Root>,
}

impl Container {
    /// Starts `program` as the image's entry point, with the manifest's arguments and then these.
    pub fn start(manifest: &Manifest, host: &Host, program: &Path, more: &[String]) -> Result<Self> {
        let (root, given) = (Root::of(program)?, Given::to(manifest, host)?);
        let confinement = Confinement::of(manifest)?;
        let mut command = Command::new(ENTRYPOINT);
        command.args(&manifest.arguments).args(more).env_clear().envs(&given.variables);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // Not for an interrupt from the terminal.
        command.process_group(0);
        // SAFETY: between fork and exec the closure makes one system call.
        unsafe { command.pre_exec(|| Ok(prctl::set_pdeathsig(Signal::SIGKILL)?)) };
        cgroup::enter_on_exec(&mut command, &host.cgroup)?;
        let namespace = File::open(&host.namespace).context("cannot open the network namespace")?;
        let root = Arc::new(root);
        let (binds, files) = (given.binds.clone(), Arc::clone(&root));
        let begin = move || -> Result<Child> {
            unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWIPC)?;
            setns(namespace, CloneFlags::CLONE_NEWNET)?;
            mounts::enter(&files, &binds)?;
            confinement.enter().context("cannot confine the container")?;
            command.spawn().context("cannot run the container's program")
        };
        let (held, until) = mpsc::channel::<()>();
        let (started, child) = mpsc::channel();
        thread::Builder::new().name("container".into()).spawn(move || {
            let _ = started.send(begin());
            let _ = until.recv();
        })?;
        let child = child.recv()?.with_context(|| format!("the container of {} does not start", host.name))?;
        let probes = Probes::start(host, &manifest.liveness, &manifest.readiness)?;
        Ok(Self { child, probes, _held: held, _given: given, _root: root })
    }
}

impl Container {
    /// Runs the image's program once more in the container, where `kubectl exec` runs it: without the container's variables, and refused
    /// nothing.
    pub fn exec(&self, arguments: &[&str]) -> Result<Output> {
        let process = PathBuf::from(format!("/proc/{}/ns", self.child.id()));
        let enter = || -> Result<Output> {
            let namespaces = ["pid", "net", "mnt"].map(|name| File::open(process.join(name)));
            // A thread of a process with others gets no other mounts as long as it shares its root with them.
            unshare(CloneFlags::CLONE_NEWNS)?;
            for namespace in namespaces {
                setns(namespace?, CloneFlags::empty())?;
            }
            unshare(CloneFlags::CLONE_NEWNS)?;
            let mut command = Command::new(ENTRYPOINT);
            command.args(arguments).env_clear();
            // The container's was mounted from outside of its PID namespace, and shows the node's processes.
            let own = || Ok(mount(None::<&str>, "/proc", Some("proc"), MsFlags::empty(), None::<&str>)?);
            // SAFETY: between fork and exec the closure makes one system call.
            unsafe { command.pre_exec(own) };
            command.output().context("cannot run the container's program again")
        };
        thread::scope(|scope| scope.spawn(enter).join().unwrap_or_else(|panic| panic::resume_unwind(panic)))
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
