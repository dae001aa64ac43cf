//! Compiles the programs that the datapath is measured against, and those that try the flow table, as the datapath is compiled, and
//! leaves them at `$OUT_DIR/bench.bpf.o` and `$OUT_DIR/probe.bpf.o`.

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
    for path in [
        "bench-ebpf",
        "flow-table",
        "probe-ebpf",
        "proxy-common",
        "Cargo.toml",
        "Cargo.lock",
        "proxy-userspace/toolchain.rs",
    ] {
        println!("cargo::rerun-if-changed=../{path}");
    }
    println!("cargo::rerun-if-env-changed=SLUICE_BPF_TOOLCHAIN");
    let architecture = env::var("CARGO_CFG_TARGET_ARCH")?;
    for (package, program, object) in
        [("bench-ebpf", "bench-bpf", "bench.bpf.o"), ("probe-ebpf", "probe-bpf", "probe.bpf.o")]
    {
        let built =
            Toolchain::find()?.build(Path::new(".."), (package, program), &[], &architecture, &out.join("bpf"))?;
        std::fs::copy(built, out.join(object))?;
    }
    Ok(())
}
