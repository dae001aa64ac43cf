//! `docs`: the reference pages of the book, written anew by the agent's tests, which alone know what they should say.

use anyhow::Result;

use crate::{setup, shipped, workspace::Workspace};

pub(crate) fn run(workspace: &Workspace) -> Result<()> {
    setup::ensure(workspace, &[setup::BPF])?;
    let tests = ["test", "--package", "proxy-userspace", "--lib", "--", "packaging::book::"];
    workspace.cargo(&tests).env("SLUICE_WRITE_DOCS", "1").run()?;
    shipped::book(workspace)
}
