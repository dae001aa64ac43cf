//! `check`: what a change must satisfy before it is tested.

use anyhow::{Context as _, Result, ensure};

use crate::{setup, shipped, toolchain::Toolchain, workspace::Workspace};

pub(crate) fn run(workspace: &Workspace) -> Result<()> {
    setup::ensure(workspace, &[setup::BPF])?;
    workspace.cargo(&["fmt", "--all", "--check"]).run().context("run `cargo fmt --all`")?;
    shipped::check(workspace)?;
    workspace.cargo(&["clippy", "--workspace", "--all-targets", "--", "--deny=warnings"]).run()?;
    for package in ["proxy-ebpf", "flow-table", "bench-ebpf", "probe-ebpf"] {
        bpf_clippy(workspace, package)?;
    }
    workspace.cargo(&["doc", "--no-deps", "--workspace"]).env("RUSTDOCFLAGS", "-Dwarnings").run()?;
    Ok(())
}

/// The lints of programs as the BPF target sees them: half of the datapath is compiled for no other.
fn bpf_clippy(workspace: &Workspace, package: &str) -> Result<()> {
    let toolchain = Toolchain::find()?;
    println!("$ cargo clippy --package {package} --target bpfel-unknown-none  # with {}", toolchain.name);
    let mut clippy = toolchain.cargo(&workspace.root, "clippy", package, std::env::consts::ARCH);
    clippy.args(["--lib", "--bins", "--target-dir"]).arg(workspace.target.join("bpf-clippy"));
    clippy.args(["--", "--deny=warnings"]);
    let status = clippy.status().with_context(|| format!("cannot run cargo clippy of {}", toolchain.name))?;
    ensure!(status.success(), "clippy for the BPF target failed");
    Ok(())
}
