//! Compiles the BPF object with a compiler that knows `bpfel-unknown-none`, and leaves it at `$OUT_DIR/sluice.bpf.o`.

#[path = "toolchain.rs"]
mod toolchain;

use std::{
    env,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};

use toolchain::Toolchain;

fn main() {
    if let Err(error) = build() {
        eprintln!("{error:#}");
        std::process::exit(1);
    }
}

fn build() -> Result<()> {
    let out = PathBuf::from(env::var_os("OUT_DIR").context("OUT_DIR is not set")?);
    for path in ["proxy-ebpf", "proxy-common", "Cargo.toml", "Cargo.lock", "proxy-userspace/toolchain.rs"] {
        println!("cargo::rerun-if-changed=../{path}");
    }
    println!("cargo::rerun-if-env-changed=SLUICE_BPF_TOOLCHAIN");

    let toolchain = Toolchain::find()?;
    let target_dir = out.join("bpf");
    let mut cargo = toolchain.cargo(Path::new(".."), "build", &env::var("CARGO_CFG_TARGET_ARCH")?);
    cargo.args(["--bins", "--target-dir"]).arg(&target_dir);
    let status = cargo.status().with_context(|| format!("cannot run {}", toolchain.name()))?;
    if !status.success() {
        bail!("compiling proxy-ebpf with {} failed (bpf-linker missing? run `cargo xtask setup`)", toolchain.name());
    }
    std::fs::copy(target_dir.join("bpfel-unknown-none/bpf/sluice-bpf"), out.join("sluice.bpf.o"))?;
    Ok(())
}
