//! Compiles the BPF object with a compiler that knows `bpfel-unknown-none`, and leaves it at `$OUT_DIR/sluice.bpf.o`.

#[path = "toolchain.rs"]
mod toolchain;

use std::{
    env,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

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

    let architecture = env::var("CARGO_CFG_TARGET_ARCH")?;
    let programs = ("proxy-ebpf", "sluice-bpf");
    let features: &[&str] = if env::var_os("CARGO_FEATURE_OTHER_LAYOUT").is_some() { &["other-layout"] } else { &[] };
    let object = Toolchain::find()?.build(Path::new(".."), programs, features, &architecture, &out.join("bpf"))?;
    std::fs::copy(object, out.join("sluice.bpf.o"))?;
    Ok(())
}
