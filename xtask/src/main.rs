//! The one door to building, testing and running Sluice: `cargo xtask <verb>`, one file per verb.
//!
//! Every verb installs first what it needs and the machine lacks (`setup`), so that a fresh machine needs Rust, a C
//! compiler and nothing else.
#![expect(clippy::print_stdout, reason = "a command line speaks on its standard output")]

mod bench;
mod build;
mod check;
mod docs;
mod fuzz;
mod image;
mod run;
mod setup;
mod test;
mod traps;
mod vm;

mod cpio;
mod debian;
mod failures;
mod guest;
mod kernel;
mod machine;
mod module;
#[path = "../../tests/src/mutation.rs"]
mod mutation;
mod report;
mod rootfs;
mod scenarios;
mod shipped;
mod summary;
#[path = "../../proxy-userspace/toolchain.rs"]
mod toolchain;
mod workspace;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

use workspace::Workspace;

/// Builds, checks, tests and runs Sluice.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    Setup(setup::Arguments),
    Build(build::Arguments),
    /// Format, lints (host and BPF), documentation, warnings being errors, and what is shipped besides.
    Check,
    Test(test::Arguments),
    Vm(vm::Arguments),
    Run(run::Arguments),
    Bench(bench::Arguments),
    Fuzz(fuzz::Arguments),
    Traps(traps::Arguments),
    Image(image::Arguments),
    /// Write the reference pages of docs/ from the code, and make the book if mdbook is there.
    Docs,
}

fn main() -> ExitCode {
    match perform(&Cli::parse().verb) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn perform(verb: &Verb) -> Result<ExitCode> {
    let workspace = Workspace::open()?;
    match verb {
        Verb::Setup(arguments) => setup::run(&workspace, arguments)?,
        Verb::Build(arguments) => build::run(&workspace, arguments)?,
        Verb::Check => check::run(&workspace)?,
        Verb::Test(arguments) => return test::run(&workspace, arguments),
        Verb::Vm(arguments) => return vm::run(&workspace, arguments),
        Verb::Run(arguments) => return run::run(&workspace, arguments),
        Verb::Bench(arguments) => return bench::run(&workspace, arguments),
        Verb::Fuzz(arguments) => return fuzz::run(&workspace, arguments),
        Verb::Image(arguments) => image::run(&workspace, arguments)?,
        Verb::Docs => docs::run(&workspace)?,
        Verb::Traps(arguments) => return traps::run(&workspace, arguments),
    }
    Ok(ExitCode::SUCCESS)
}
