//! Compiles the BPF object with a compiler that knows `bpfel-unknown-none`, and leaves it at `$OUT_DIR/sluice.bpf.o`.
//!
//! A toolchain qualifies when it has a prebuilt `core` for the target (Debian's rustc-web with libstd-rust-web-dev-bpf)
//! or the sources to build one (nightly with rust-src). `SLUICE_BPF_TOOLCHAIN` names one: a rustup name, or a directory
//! with `bin/cargo` and `bin/rustc`.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

fn main() {
    if let Err(error) = build() {
        eprintln!("{error:#}");
        std::process::exit(1);
    }
}

fn build() -> Result<()> {
    let out = PathBuf::from(env::var_os("OUT_DIR").context("OUT_DIR is not set")?);
    for path in ["proxy-ebpf", "proxy-common", "Cargo.toml", "Cargo.lock"] {
        println!("cargo::rerun-if-changed=../{path}");
    }
    println!("cargo::rerun-if-env-changed=SLUICE_BPF_TOOLCHAIN");

    let toolchain = Toolchain::find()?;
    let target_dir = out.join("bpf");
    let mut cargo = toolchain.cargo();
    cargo
        .args(["build", "--locked", "--package", "proxy-ebpf", "--bins", "--profile", "bpf"])
        .args(["--target", "bpfel-unknown-none", "--target-dir"])
        .arg(&target_dir);
    if toolchain.builds_core {
        cargo.args(["-Z", "build-std=core"]);
    }
    let rustflags = [
        "--cfg=bpf_target_arch=\"x86_64\"".replace("x86_64", &env::var("CARGO_CFG_TARGET_ARCH")?),
        "-Ctarget-cpu=v3".into(),
        "-Cdebuginfo=2".into(),
        "-Clink-arg=--btf".into(),
        // Without it, zeroing sixteen bytes becomes a call to a loop over bytes.
        "-Clink-arg=--disable-expand-memcpy-in-order".into(),
    ];
    cargo
        .env("CARGO_ENCODED_RUSTFLAGS", rustflags.join("\x1f"))
        // Inline assembly for BPF is not stable in the language; the names are those of the crates that may use it.
        .env("RUSTC_BOOTSTRAP", if toolchain.builds_core { "1" } else { "aya_ebpf,proxy_ebpf,sluice_bpf" });
    let status = cargo.status().with_context(|| format!("cannot run {}", toolchain.name))?;
    if !status.success() {
        bail!("compiling proxy-ebpf with {} failed (bpf-linker missing? run `cargo xtask setup`)", toolchain.name);
    }
    std::fs::copy(target_dir.join("bpfel-unknown-none/bpf/sluice-bpf"), out.join("sluice.bpf.o"))?;
    Ok(())
}

struct Toolchain {
    name: String,
    /// Directory of `bin/cargo`, or none for one that rustup runs.
    directory: Option<PathBuf>,
    builds_core: bool,
}

impl Toolchain {
    fn find() -> Result<Self> {
        let candidates = match env::var("SLUICE_BPF_TOOLCHAIN") {
            Ok(name) => vec![name],
            Err(_) => vec!["nightly".into(), "/usr".into()],
        };
        for name in &candidates {
            let directory = name.starts_with('/').then(|| PathBuf::from(name));
            let mut toolchain = Self { name: name.clone(), directory, builds_core: false };
            let Some(sysroot) = toolchain.sysroot() else { continue };
            let rustlib = sysroot.join("lib/rustlib");
            if rustlib.join("bpfel-unknown-none/lib").exists() {
                return Ok(toolchain);
            }
            if rustlib.join("src/rust/library/Cargo.lock").exists() {
                toolchain.builds_core = true;
                return Ok(toolchain);
            }
        }
        bail!(
            "no Rust toolchain here can compile for BPF (looked at {}): run `cargo xtask setup`",
            candidates.join(", ")
        )
    }

    fn sysroot(&self) -> Option<PathBuf> {
        let output = self.command("rustc").args(["--print", "sysroot"]).output().ok()?;
        let path = String::from_utf8(output.stdout).ok()?;
        output.status.success().then(|| PathBuf::from(path.trim()))
    }

    fn cargo(&self) -> Command {
        let mut command = self.command("cargo");
        if let Some(directory) = &self.directory {
            command.env("RUSTC", directory.join("bin/rustc"));
        }
        command
    }

    fn command(&self, tool: &str) -> Command {
        let mut command = match &self.directory {
            Some(directory) => Command::new(directory.join("bin").join(tool)),
            None => {
                let mut command = Command::new("rustup");
                command.args(["run", &self.name, tool]);
                command
            }
        };
        // What the outer cargo sets for its own compiler would reach the inner one.
        for variable in
            ["RUSTC", "RUSTDOC", "RUSTC_WRAPPER", "RUSTC_WORKSPACE_WRAPPER", "RUSTUP_TOOLCHAIN", "RUSTFLAGS"]
        {
            command.env_remove(variable);
        }
        command.current_dir(Path::new(".."));
        command
    }
}
