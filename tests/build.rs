//! Compiles the programs that the datapath is measured against, as the datapath is compiled, and leaves them at
//! `$OUT_DIR/bench.bpf.o`.

#[path = "../proxy-userspace/toolchain.rs"]
mod toolchain;

use std::{
    env,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

use toolchain::Toolchain;

fn main() -> Result<()> {
    let out = PathBuf::from(env::var_os("OUT_DIR").context("OUT_DIR is not set")?);
    for path in ["bench-ebpf", "proxy-common", "Cargo.toml", "Cargo.lock", "proxy-userspace/toolchain.rs"] {
        println!("cargo::rerun-if-changed=../{path}");
    }
    println!("cargo::rerun-if-env-changed=SLUICE_BPF_TOOLCHAIN");
    let architecture = env::var("CARGO_CFG_TARGET_ARCH")?;
    let programs = ("bench-ebpf", "bench-bpf");
    let object = Toolchain::find()?.build(Path::new(".."), programs, &architecture, &out.join("bpf"))?;
    std::fs::copy(object, out.join("bench.bpf.o"))?;
    Ok(())
}
