//! Where the repository and its build directory are, and how cargo is called in it.

use std::{env, path::PathBuf};

use anyhow::{Context as _, Result};
use serde_json::Value;
use xshell::{Cmd, Shell, cmd};

/// The repository this program was started from.
pub(crate) struct Workspace {
    /// Runs commands in the root of the repository.
    pub(crate) shell: Shell,
    /// The directory of the workspace's `Cargo.toml`.
    pub(crate) root: PathBuf,
    /// Where cargo builds.
    pub(crate) target: PathBuf,
}

impl Workspace {
    /// Finds the repository by the manifest cargo started us with, and changes into it.
    pub(crate) fn open() -> Result<Self> {
        let manifest =
            env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from);
        let root = manifest.parent().context("xtask is not in a workspace")?.to_owned();
        let shell = Shell::new()?;
        shell.change_dir(&root);
        let mut workspace = Self { shell, root, target: PathBuf::new() };
        workspace.target = workspace.target_directory()?;
        Ok(workspace)
    }

    /// cargo with `arguments`, as if it had been called from a shell and not from `cargo run`.
    ///
    /// Build scripts that watch cargo's own variables would otherwise run again each time a crate is built by the other
    /// of the two ways.
    pub(crate) fn cargo<'a>(&'a self, arguments: &[&str]) -> Cmd<'a> {
        let leaked = env::vars_os().map(|(name, _)| name).filter(|name| {
            let name = name.to_string_lossy();
            name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_") || name == "LD_LIBRARY_PATH"
        });
        leaked.fold(cmd!(self.shell, "cargo {arguments...}"), Cmd::env_remove)
    }

    /// Runs cargo and returns the executables it has built, with the names of their targets.
    ///
    /// `arguments` must not contain `--message-format`.
    pub(crate) fn executables(&self, arguments: &[&str]) -> Result<Vec<Executable>> {
        Executable::all(self.cargo(arguments))
    }

    fn target_directory(&self) -> Result<PathBuf> {
        let metadata = self.cargo(&["metadata", "--no-deps", "--offline", "--format-version=1"]).quiet().read()?;
        let metadata: Value = serde_json::from_str(&metadata)?;
        Ok(metadata["target_directory"].as_str().context("cargo metadata names no target directory")?.into())
    }
}

/// A program or a test that cargo has built.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Executable {
    /// Name of the cargo target.
    pub(crate) name: String,
    pub(crate) path: PathBuf,
}

impl Executable {
    /// Those that a command of cargo builds.
    pub(crate) fn all(cargo: Cmd<'_>) -> Result<Vec<Self>> {
        let messages = cargo.arg("--message-format=json-render-diagnostics").read()?;
        messages.lines().filter_map(|line| Self::from_message(line).transpose()).collect()
    }

    fn from_message(line: &str) -> Result<Option<Self>> {
        let message: Value = serde_json::from_str(line).with_context(|| format!("not a message of cargo: {line}"))?;
        let path = message["executable"].as_str().map(PathBuf::from);
        let name = message["target"]["name"].as_str().map(str::to_owned);
        Ok(path.zip(name).map(|(path, name)| Self { name, path }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_without_an_executable_are_passed_over() {
        let library = r#"{"reason":"compiler-artifact","target":{"name":"tests"},"executable":null}"#;
        assert_eq!(Executable::from_message(library).unwrap(), None);
        let program = r#"{"reason":"compiler-artifact","target":{"name":"lab"},"executable":"/t/lab"}"#;
        let lab = Executable { name: "lab".into(), path: "/t/lab".into() };
        assert_eq!(Executable::from_message(program).unwrap(), Some(lab));
    }
}
