//! What is inside a virtual machine: an initramfs with a few tools of this machine, what cargo has built, at the paths
//! it has here, and the modules of the kernel that boots it.

use std::{
    fs::{self, File},
    io::{BufWriter, Write as _},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use xshell::{Shell, cmd};

use crate::{
    cpio::Archive,
    kernel::Kernel,
    machine,
    module::{self, Module},
    workspace::Workspace,
};

/// Tools that are taken from this machine; busybox has the rest. Its own `ip` and `tc` know too little.
const TOOLS: [&str; 7] = ["dash", "busybox", "ip", "tc", "bpftool", "nsenter", "wg"];

/// Loaded at boot, with their parameters: no device shall be there that nobody has made.
const MODULES: [(&str, &str); 13] = [
    ("veth", ""),
    ("sch_ingress", ""),
    ("cls_bpf", ""),
    ("dummy", "numdummies=0"),
    ("bridge", ""),
    ("8021q", ""),
    ("vxlan", ""),
    ("geneve", ""),
    ("ipip", ""),
    ("ip6_tunnel", ""),
    ("wireguard", ""),
    ("sch_netem", ""),
    ("sctp", ""),
];

const DIRECTORIES: [&str; 9] = ["dev", "proc", "sys", "run", "tmp", "root", "var/lib", "etc/netns", "usr/local/bin"];

/// A file system without a kernel's modules.
pub(crate) struct Rootfs<'a> {
    workspace: &'a Workspace,
    archive: Archive,
}

impl<'a> Rootfs<'a> {
    /// The tools, and an init that runs the job.
    pub(crate) fn new(workspace: &'a Workspace) -> Result<Self> {
        let mut rootfs = Self { workspace, archive: Archive::default() };
        let archive = &mut rootfs.archive;
        for directory in DIRECTORIES {
            archive.directory(directory);
        }
        for (link, target) in [("bin", "usr/bin"), ("sbin", "usr/sbin"), ("lib", "usr/lib"), ("lib64", "usr/lib64")] {
            archive.symlink(link, target);
        }
        archive.symlink("var/run", "/run");
        archive.file("init", 0o755, include_bytes!("guest/init"));
        archive.file("etc/passwd", 0o644, "root:x:0:0:root:/root:/bin/sh\n");
        archive.file("etc/hosts", 0o644, "127.0.0.1 localhost\n::1 localhost\n");
        rootfs.tools()?;
        Ok(rootfs)
    }

    /// A program that cargo has built, at the path it has here, without what only debuggers read.
    pub(crate) fn program(&mut self, path: &Path) -> Result<()> {
        let directory = self.workspace.target.join("vm/stripped");
        fs::create_dir_all(&directory)?;
        let stripped = directory.join(path.file_name().context("a program has a name")?);
        cmd!(self.workspace.shell, "strip -o {stripped} {path}").quiet().run()?;
        self.archive.file(path, 0o755, fs::read(stripped)?);
        self.libraries(path)
    }

    /// What tests read, at the paths it has here: the Services of the demonstration, and what commands have printed.
    pub(crate) fn read_by_tests(&mut self) -> Result<()> {
        for directory in ["examples", "tests/tests/snapshots"].map(|path| self.workspace.root.join(path)) {
            if directory.exists() {
                self.tree(&directory)?;
            }
        }
        Ok(())
    }

    /// A directory of this machine, at the same path.
    fn tree(&mut self, directory: &Path) -> Result<()> {
        self.archive.directory(directory);
        for entry in fs::read_dir(directory)? {
            let path = entry?.path();
            if path.is_dir() {
                self.tree(&path)?;
            } else {
                self.file(&path, &path)?;
            }
        }
        Ok(())
    }

    /// The script that the machine is started for. Its exit status is the machine's.
    pub(crate) fn job(&mut self, script: &str) {
        self.archive.file("job", 0o755, script);
    }

    /// Writes the initramfs for `kernel` to `path`.
    pub(crate) fn write(&self, kernel: &Kernel, path: &Path) -> Result<()> {
        let mut file = BufWriter::new(File::create(path)?);
        self.archive.write(&mut file)?;
        modules(&self.workspace.shell, kernel)?.write(&mut file)?;
        Ok(file.flush()?)
    }

    fn tools(&mut self) -> Result<()> {
        for tool in TOOLS {
            let path = machine::in_path(tool).with_context(|| format!("there is no {tool} in the path"))?;
            self.file(&path, &usr(&path))?;
            self.libraries(&path)?;
        }
        self.archive.symlink("usr/bin/sh", "dash");
        for applet in cmd!(self.workspace.shell, "busybox --list").quiet().read()?.lines() {
            let taken = ["usr/bin", "usr/sbin"].map(|directory| Path::new(directory).join(applet));
            if !taken.iter().any(|path| self.archive.contains(path)) {
                self.archive.symlink(&taken[0], "busybox");
            }
        }
        let names = Path::new("/etc/iproute2");
        if names.exists() { self.tree(names) } else { Ok(()) }
    }

    /// What the dynamic loader would load for a program.
    fn libraries(&mut self, program: &Path) -> Result<()> {
        // It fails on static programs, and says nothing that matters.
        let listed = cmd!(self.workspace.shell, "ldd {program}").quiet().ignore_status().ignore_stderr().read()?;
        for library in libraries(&listed) {
            self.file(&library, &usr(&library))?;
        }
        Ok(())
    }

    fn file(&mut self, from: &Path, to: &Path) -> Result<()> {
        let content = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
        let permissions = fs::metadata(from)?.permissions().mode() & 0o777;
        self.archive.file(to, permissions, content);
        Ok(())
    }
}

/// An archive with the modules of a kernel and the list init goes through.
fn modules(shell: &Shell, kernel: &Kernel) -> Result<Archive> {
    let wanted = MODULES.map(|(name, _)| name);
    let directory = kernel.modules.as_deref();
    let modules = directory.map(|directory| module::closure(shell, directory, &wanted)).transpose()?;
    let modules = modules.unwrap_or_default();
    let mut archive = Archive::default();
    archive.file("modules/order", 0o644, modules.iter().map(line).collect::<String>());
    for Module { name, content } in modules {
        archive.file(format!("modules/{name}.ko"), 0o644, content);
    }
    Ok(archive)
}

fn line(module: &Module) -> String {
    let parameters = MODULES.iter().find(|(name, _)| *name == module.name).map_or("", |(_, parameters)| parameters);
    format!("{} {parameters}\n", module.name)
}

/// The paths in the output of `ldd`, the loader's own among them.
fn libraries(listed: &str) -> Vec<PathBuf> {
    let paths = listed.lines().filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')));
    paths.map(PathBuf::from).collect()
}

/// Where a file is in a system with one `/usr`: `/lib/x` is `/usr/lib/x`.
fn usr(path: &Path) -> PathBuf {
    if path.starts_with("/usr") {
        path.to_owned()
    } else {
        Path::new("/usr").join(path.strip_prefix("/").unwrap_or(path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_read_with_the_loader_and_without_the_vdso() {
        let listed = "\tlinux-vdso.so.1 (0x00007f)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f)\n\
            \t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n";
        let expected = ["/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"].map(PathBuf::from);
        assert_eq!(libraries(listed), expected);
        assert!(libraries("\tnot a dynamic executable\n").is_empty());
    }

    #[test]
    fn what_a_merged_system_links_together_is_one_place() {
        assert_eq!(usr(Path::new("/lib64/ld.so")), Path::new("/usr/lib64/ld.so"));
        assert_eq!(usr(Path::new("/usr/bin/ip")), Path::new("/usr/bin/ip"));
    }
}
