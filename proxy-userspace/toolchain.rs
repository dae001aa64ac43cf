//! The Rust toolchain that compiles for `bpfel-unknown-none`, and how it is called: one choice for the agent's build
//! script and for `cargo xtask`, which both include this file.
//!
//! A toolchain qualifies when it has a prebuilt `core` for the target (Debian's rustc-web with libstd-rust-web-dev-bpf)
//! or the sources to build one (nightly with rust-src). `SLUICE_BPF_TOOLCHAIN` names one: a rustup name, or a directory
//! with `bin/cargo` and `bin/rustc`.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};

/// A toolchain that can compile for BPF.
pub(crate) struct Toolchain {
    /// What it was found by: a rustup name or a directory.
    pub(crate) name: String,
    /// Directory of `bin/cargo`, or none for one that rustup runs.
    directory: Option<PathBuf>,
    builds_core: bool,
}

impl Toolchain {
    /// The first of the candidates that qualifies.
    pub(crate) fn find() -> Result<Self> {
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

    /// cargo's `verb` for a package of BPF programs, in the profile and with the flags of the shipped object.
    ///
    /// `architecture` is that of the kernel it will run on, by Rust's name. Options and a target directory are for the
    /// caller to add.
    pub(crate) fn cargo(&self, workspace: &Path, verb: &str, package: &str, architecture: &str) -> Command {
        let mut command = self.command("cargo");
        command
            .current_dir(workspace)
            .args([verb, "--locked", "--package", package, "--profile", "bpf", "--target", "bpfel-unknown-none"])
            .env("CARGO_ENCODED_RUSTFLAGS", rustflags(architecture).join("\x1f"))
            // Cut up to be compiled anew in parts, the crates are inlined in other places than those that are shipped.
            .env("CARGO_INCREMENTAL", "0")
            // Inline assembly for BPF is not stable in the language; the names are those of the crates that may use it.
            .env("RUSTC_BOOTSTRAP", if self.builds_core { "1" } else { "aya_ebpf,flow_table,proxy_ebpf,sluice_bpf" });
        if self.builds_core {
            command.args(["-Z", "build-std=core"]);
        }
        if let Some(directory) = &self.directory {
            command.env("RUSTC", directory.join("bin/rustc"));
        }
        command
    }

    /// Compiles a package of BPF programs with these of its features; returns where the object `program` lies.
    pub(crate) fn build(
        &self,
        workspace: &Path,
        (package, program): (&str, &str),
        features: &[&str],
        architecture: &str,
        target: &Path,
    ) -> Result<PathBuf> {
        let mut cargo = self.cargo(workspace, "build", package, architecture);
        cargo.args(features.iter().flat_map(|feature| ["--features", feature]));
        cargo.args(["--bins", "--target-dir"]).arg(target);
        let status = cargo.status().with_context(|| format!("cannot run {}", self.name))?;
        ensure!(
            status.success(),
            "compiling {package} with {} failed (bpf-linker missing? run `cargo xtask setup`)",
            self.name
        );
        Ok(target.join("bpfel-unknown-none/bpf").join(program))
    }

    fn sysroot(&self) -> Option<PathBuf> {
        let output = self.command("rustc").args(["--print", "sysroot"]).output().ok()?;
        let path = String::from_utf8(output.stdout).ok()?;
        output.status.success().then(|| PathBuf::from(path.trim()))
    }

    /// `tool` of this toolchain, without what an outer cargo sets for its own compiler.
    fn command(&self, tool: &str) -> Command {
        let mut command = match &self.directory {
            Some(directory) => run_from(&directory.join("bin"), tool),
            None => rustup_run(&self.name, tool),
        };
        for variable in
            ["RUSTC", "RUSTDOC", "RUSTC_WRAPPER", "RUSTC_WORKSPACE_WRAPPER", "RUSTUP_TOOLCHAIN", "RUSTFLAGS"]
        {
            command.env_remove(variable);
        }
        command
    }
}

/// `tool` in the directory `bin`; cargo finds its subcommands there too, and not rustup's.
fn run_from(bin: &Path, tool: &str) -> Command {
    let mut path = bin.as_os_str().to_owned();
    path.push(":");
    path.push(env::var_os("PATH").unwrap_or_default());
    let mut command = Command::new(bin.join(tool));
    command.env("PATH", path);
    command
}

/// `tool` of a toolchain that rustup has; one that it lacks is not to be fetched behind the user's back.
fn rustup_run(toolchain: &str, tool: &str) -> Command {
    let mut command = Command::new("rustup");
    command.args(["run", toolchain, tool]).env("RUSTUP_AUTO_INSTALL", "0");
    command
}

fn rustflags(architecture: &str) -> [String; 5] {
    [
        format!("--cfg=bpf_target_arch=\"{architecture}\""),
        "-Ctarget-cpu=v3".into(),
        "-Cdebuginfo=2".into(),
        "-Clink-arg=--btf".into(),
        // Without it, zeroing sixteen bytes becomes a call to a loop over bytes.
        "-Clink-arg=--disable-expand-memcpy-in-order".into(),
    ]
}
