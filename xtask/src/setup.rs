//! `setup`: installs what the machine lacks, says what and why, and is silent when there is nothing to do.
//!
//! The BPF toolchain is either a nightly with rust-src that is already there, or Debian's packages with their prebuilt
//! `core` for BPF; the linker is built with cargo.

use anyhow::{Result, bail, ensure};
use clap::Args;
use xshell::cmd;

use crate::{
    debian::{self, Package},
    machine,
    toolchain::Toolchain,
    workspace::Workspace,
};

/// Install what is needed and missing; every other verb does this first, for itself.
#[derive(Args)]
pub(crate) struct Arguments {
    /// Also what virtual machines need.
    #[arg(long)]
    vm: bool,
}

/// A purpose for which something must be installed.
#[derive(Clone, Copy)]
pub(crate) struct Need {
    /// Said when it cannot be met, after the missing programs.
    purpose: &'static str,
    packages: &'static [Package],
    /// Programs that show that it is met on systems without these packages.
    programs: &'static [&'static str],
}

/// Compiling and linting.
pub(crate) const BPF: Need = Need { purpose: "compiling for BPF", packages: &BPF_PACKAGES, programs: &[] };

/// Tests on the running kernel.
pub(crate) const KERNEL: Need = Need {
    purpose: "tests on the running kernel",
    packages: &[
        Package { name: "bpftool", why: "shows programs and maps" },
        Package { name: "iproute2", why: "makes network namespaces and devices" },
        Package { name: "util-linux", why: "enters namespaces, mounts file systems" },
        Package { name: "wireguard-tools", why: "gives WireGuard devices their keys" },
    ],
    programs: &["bpftool", "ip", "tc", "nsenter", "wg"],
};

/// The other ways of programming a node.
pub(crate) const RULES: Need = Need {
    purpose: "rules like those of other proxies",
    packages: &[
        Package { name: "nftables", why: "loads rules as kube-proxy's mode nftables does" },
        Package { name: "iptables", why: "loads rules as its mode iptables does" },
        Package { name: "ipset", why: "makes sets as its mode ipvs does" },
    ],
    programs: &["nft", "iptables-restore", "ipset"],
};

/// Virtual machines.
pub(crate) const VM: Need = Need {
    purpose: "virtual machines",
    packages: &[
        Package { name: "qemu-system-x86", why: "runs the virtual machines" },
        Package { name: "busybox-static", why: "the small tools inside them" },
        Package { name: "dash", why: "their shell" },
        Package { name: "xz-utils", why: "unpacks their kernel modules" },
        Package { name: "binutils", why: "strips what is put into them" },
    ],
    programs: &["qemu-system-x86_64", "busybox", "dash", "xz", "strip"],
};

const BPF_PACKAGES: [Package; 7] = [
    Package { name: "rustc-web", why: "a Rust compiler that knows the BPF target" },
    Package { name: "cargo-web", why: "its cargo" },
    Package { name: "rust-web-clippy", why: "its lints" },
    Package { name: "libstd-rust-web-dev-bpf", why: "the core library, built for BPF" },
    Package { name: "rust-web-llvm", why: "the LLVM tools of that compiler" },
    Package { name: "llvm-22-dev", why: "the LLVM that bpf-linker is linked with" },
    Package { name: "libpolly-22-dev", why: "named by the linker flags of that LLVM" },
];

/// The release of bpf-linker this repository is built with.
const LINKER: &str = "0.13.0";

pub(crate) fn run(workspace: &Workspace, arguments: &Arguments) -> Result<()> {
    ensure(workspace, &[BPF, KERNEL])?;
    if arguments.vm { ensure(workspace, &[VM]) } else { Ok(()) }
}

/// Sees to it that every need is met.
pub(crate) fn ensure(workspace: &Workspace, needs: &[Need]) -> Result<()> {
    for need in needs {
        packages(workspace, need)?;
    }
    linker(workspace)
}

fn packages(workspace: &Workspace, need: &Need) -> Result<()> {
    let is_compiler = need.packages == BPF_PACKAGES;
    // A toolchain that was there before is as good: only what Debian's lacks is its linter, which is a package.
    if is_compiler && Toolchain::find().is_ok_and(|toolchain| toolchain.name != "/usr") {
        return Ok(());
    }
    if debian::is_debian() {
        let missing = debian::missing(&workspace.shell, need.packages)?;
        return if missing.is_empty() { Ok(()) } else { debian::install(&workspace.shell, &missing) };
    }
    if is_compiler && Toolchain::find().is_err() {
        bail!(
            "this is not Debian, where packages provide a compiler for BPF: install one with \
             `rustup toolchain install nightly --component rust-src --component clippy`"
        );
    }
    programs(need)
}

/// The same for systems whose packages have other names.
fn programs(need: &Need) -> Result<()> {
    let missing: Vec<&str> =
        need.programs.iter().filter(|program| machine::in_path(program).is_none()).copied().collect();
    ensure!(missing.is_empty(), "{} need {}: install what provides them", need.purpose, missing.join(", "));
    Ok(())
}

fn linker(workspace: &Workspace) -> Result<()> {
    let shell = &workspace.shell;
    let version = cmd!(shell, "bpf-linker --version").quiet().ignore_stderr().read().unwrap_or_default();
    if version.strip_prefix("bpf-linker ").is_some_and(is_new_enough) {
        return Ok(());
    }
    println!("setup: bpf-linker {LINKER}, which makes one BPF object out of what the compiler emits");
    ensure!(debian::is_debian(), "this is not Debian, whose LLVM is known: run `cargo install bpf-linker`");
    let install = ["install", "bpf-linker", "--locked", "--version", LINKER];
    workspace
        .cargo(&install)
        .args(["--no-default-features", "--features", "llvm-22"])
        .env("LLVM_PREFIX", LLVM)
        .run()?;
    Ok(())
}

/// Where Debian's llvm-22-dev is.
const LLVM: &str = "/usr/lib/llvm-22";

/// Whether a version of bpf-linker is the pinned one or a later one.
fn is_new_enough(version: &str) -> bool {
    numbers(version) >= numbers(LINKER)
}

fn numbers(version: &str) -> Vec<u32> {
    version.trim().split('.').map_while(|number| number.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pinned_linker_and_later_ones_are_accepted() {
        for (version, accepted) in
            [("0.13.0\n", true), ("0.14.1", true), ("1.0.0", true), ("0.9.15", false), ("", false)]
        {
            assert_eq!(is_new_enough(version), accepted, "{version}");
        }
    }
}
