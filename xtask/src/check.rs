//! `check`: what a change must satisfy before it is tested.

use anyhow::{Context as _, Result, ensure};

use crate::{setup, toolchain::Toolchain, workspace::Workspace};

pub(crate) fn run(workspace: &Workspace) -> Result<()> {
    setup::ensure(workspace, &[setup::BPF])?;
    workspace.cargo(&["fmt", "--all", "--check"]).run().context("run `cargo fmt --all`")?;
    workspace.cargo(&["clippy", "--workspace", "--all-targets", "--", "--deny=warnings"]).run()?;
    bpf_clippy(workspace)?;
    workspace.cargo(&["doc", "--no-deps", "--workspace"]).env("RUSTDOCFLAGS", "-Dwarnings").run()?;
    Ok(())
}

/// The datapath's lints as the BPF target sees it: half of it is compiled for no other.
fn bpf_clippy(workspace: &Workspace) -> Result<()> {
    let toolchain = Toolchain::find()?;
    println!("$ cargo clippy --package proxy-ebpf --target bpfel-unknown-none  # with {}", toolchain.name());
    let mut clippy = toolchain.cargo(&workspace.root, "clippy", std::env::consts::ARCH);
    clippy
        .args(["--package", "proxy-ebpf", "--lib", "--bins", "--target-dir"])
        .arg(workspace.target.join("bpf-clippy"));
    clippy.args(["--", "--deny=warnings"]);
    let status = clippy.status().with_context(|| format!("cannot run cargo clippy of {}", toolchain.name()))?;
    ensure!(status.success(), "clippy for the BPF target failed");
    Ok(())
}
