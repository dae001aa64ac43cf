//! A virtual machine: qemu with a kernel and an initramfs, whose console is our output and whose job has a status.

use std::{
    fs,
    io::{BufRead as _, BufReader, Read},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc::{Receiver, RecvTimeoutError, channel},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use crate::{kernel::Kernel, rootfs::Rootfs, workspace::Workspace};

/// How the processor of a guest is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Accelerator {
    /// By the hardware.
    Kvm,
    /// By emulation. One thread for all processors, because code that the kernel patches while it runs is not always
    /// seen by the others; and no cmpxchg16b, because that of QEMU 7.2 garbles the flags register, and a guest whose
    /// allocator uses it (6.12 and later) dies sooner or later.
    Tcg,
}

impl Accelerator {
    /// Hardware where it carries a guest to its end. There are machines that have it and cannot.
    pub(crate) fn find(workspace: &Workspace, kernel: &Kernel) -> Result<Self> {
        if fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_err() {
            return Ok(Self::Tcg);
        }
        let known = workspace.target.join("vm/accelerator");
        if let Some(accelerator) = fs::read_to_string(&known).ok().and_then(|name| Self::named(&name)) {
            return Ok(accelerator);
        }
        println!("vm: trying KVM");
        let accelerator = Self::probe(workspace, kernel)?;
        println!("vm: {}", if accelerator == Self::Kvm { "KVM works" } else { "KVM does not work here, emulating" });
        fs::write(known, accelerator.name())?;
        Ok(accelerator)
    }

    fn probe(workspace: &Workspace, kernel: &Kernel) -> Result<Self> {
        let mut rootfs = Rootfs::new(workspace)?;
        rootfs.job("for i in $(seq 200); do busybox true; done\n");
        let mut guest = Guest::new(workspace, kernel, &rootfs, Self::Kvm)?;
        // How it fails is of no interest.
        guest.is_silent = true;
        let works = guest.run(Duration::from_secs(30), |_| ()).is_ok_and(|status| status == 0);
        Ok(if works { Self::Kvm } else { Self::Tcg })
    }

    fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }

    fn named(name: &str) -> Option<Self> {
        [Self::Kvm, Self::Tcg].into_iter().find(|accelerator| accelerator.name() == name.trim())
    }

    fn options(self) -> [&'static str; 4] {
        match self {
            Self::Kvm => ["-accel", "kvm", "-cpu", "host"],
            Self::Tcg => ["-accel", "tcg,thread=single", "-cpu", "max,-cx16"],
        }
    }
}

/// A machine that is ready to boot.
pub(crate) struct Guest {
    image: PathBuf,
    initramfs: PathBuf,
    /// Where the job's status is written, by the second serial line.
    status: PathBuf,
    accelerator: Accelerator,
    /// Whether qemu's own complaints are thrown away.
    is_silent: bool,
}

impl Guest {
    pub(crate) fn new(
        workspace: &Workspace,
        kernel: &Kernel,
        rootfs: &Rootfs<'_>,
        accelerator: Accelerator,
    ) -> Result<Self> {
        // Several machines may run at once, of one kernel too.
        let files = workspace.target.join("vm").join(format!("{}-{}", kernel.name, std::process::id()));
        let [initramfs, status] = [".cpio", ".status"].map(|suffix| suffixed(&files, suffix));
        rootfs.write(kernel, &initramfs)?;
        let image = workspace.root.join(&kernel.image);
        Ok(Self { image, initramfs, status, accelerator, is_silent: false })
    }

    /// Boots, hands each line of the console to `line`, and returns the job's exit status.
    pub(crate) fn run(&self, limit: Duration, mut line: impl FnMut(&str)) -> Result<u8> {
        let deadline = Instant::now() + limit;
        let mut command = self.command();
        command.args(["-serial", "stdio"]).stdin(Stdio::null()).stdout(Stdio::piped());
        if self.is_silent {
            command.stderr(Stdio::null());
        }
        let mut qemu = Qemu(command.args(self.second_serial()).spawn().context("cannot start qemu-system-x86_64")?);
        let console = lines(qemu.0.stdout.take().context("the console is not captured")?);
        loop {
            match console.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(text) => line(text.trim_end_matches('\r')),
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => bail!("the guest was not done after {} s", limit.as_secs()),
            }
        }
        qemu.0.wait()?;
        self.job_status()
    }

    /// Boots with this terminal as the console, and returns the job's exit status.
    pub(crate) fn run_in_terminal(&self) -> Result<u8> {
        // Not `signal=on`: an interrupt is for the shell inside.
        let mut command = self.command();
        command.args(["-chardev", "stdio,id=terminal,signal=off", "-serial", "chardev:terminal"]);
        command.args(self.second_serial()).status().context("cannot start qemu-system-x86_64")?;
        self.job_status()
    }

    fn command(&self) -> Command {
        let mut command = Command::new("qemu-system-x86_64");
        command.args(self.accelerator.options());
        command.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-smp", "2", "-m", "2048"]);
        command.arg("-kernel").arg(&self.image).arg("-initrd").arg(&self.initramfs);
        // The kernel is heard when it dies, and otherwise does not run into the lines of others.
        command.args(["-append", "console=ttyS0 loglevel=1 panic=-1 mitigations=off net.ifnames=0"]);
        command
    }

    fn second_serial(&self) -> [String; 2] {
        ["-serial".into(), format!("file:{}", self.status.display())]
    }

    fn job_status(&self) -> Result<u8> {
        let text = fs::read_to_string(&self.status)?;
        job_status(&text).context("the guest died before its job was done")
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        for file in [&self.initramfs, &self.status] {
            // One that never ran has no status.
            let _ = fs::remove_file(file);
        }
    }
}

/// The path with something behind its last name, which may have dots in it.
fn suffixed(path: &Path, suffix: &str) -> PathBuf {
    let mut path = path.as_os_str().to_owned();
    path.push(suffix);
    path.into()
}

/// A running qemu, which never outlives us.
struct Qemu(Child);

impl Drop for Qemu {
    fn drop(&mut self) {
        // It has ended already, unless something went wrong.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The lines of a stream, read on a thread so that waiting for one can have a limit.
fn lines(stream: impl Read + Send + 'static) -> Receiver<String> {
    let (sender, receiver) = channel();
    thread::spawn(move || {
        for line in BufReader::new(stream).split(b'\n').map_while(Result::ok) {
            if sender.send(String::from_utf8_lossy(&line).into_owned()).is_err() {
                break;
            }
        }
    });
    receiver
}

fn job_status(text: &str) -> Option<u8> {
    text.lines().find_map(|line| line.trim().strip_prefix("status ")?.parse().ok())
}

/// `word` as one word of a shell.
pub(crate) fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// The path as one word of a shell.
pub(crate) fn quoted_path(path: &Path) -> String {
    quoted(&path.to_string_lossy())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_says_nothing_has_no_status() {
        for (text, status) in [("status 3\r\n", Some(3)), ("", None), ("status", None)] {
            assert_eq!(job_status(text), status, "{text:?}");
        }
    }

    #[test]
    fn a_quoted_word_may_hold_quotes() {
        assert_eq!(quoted("it's"), r"'it'\''s'");
    }
}
