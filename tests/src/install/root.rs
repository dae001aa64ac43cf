//! The files of the image: the agent, alone; in tests with the libraries that a binary which is not static needs.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};
use tempfile::TempDir;

/// Where the image has its program, as the Dockerfile says.
pub(super) const ENTRYPOINT: &str = "/sluice";
/// The C library's loader, which knows what a program needs.
const LOADER: &str = "/lib64/ld-linux-x86-64.so.2";

/// A directory with the files. It goes away with the handle.
#[derive(Debug)]
pub(super) struct Root(TempDir);

impl Root {
    /// An image whose entry point is `program`.
    pub(super) fn of(program: &Path) -> Result<Self> {
        let root = Self(tempfile::tempdir()?);
        root.install(program, Path::new(ENTRYPOINT))?;
        libraries(program)?.iter().try_for_each(|library| root.install(library, library))?;
        Ok(root)
    }

    pub(super) fn path(&self) -> &Path {
        self.0.path()
    }

    /// Where a path of the container is as long as it has not begun.
    pub(super) fn join(&self, path: &Path) -> PathBuf {
        self.path().join(path.strip_prefix("/").unwrap_or(path))
    }

    fn install(&self, file: &Path, at: &Path) -> Result<()> {
        let (file, at) = (file.canonicalize()?, self.join(at));
        if let Some(directory) = at.parent() {
            fs::create_dir_all(directory)?;
        }
        // Of another file system it cannot be a link.
        let installed = fs::hard_link(&file, &at).or_else(|_| fs::copy(&file, &at).map(drop));
        installed.with_context(|| format!("cannot put {} into an image", file.display()))
    }
}

/// The libraries that a program is linked with, and the loader; none of one that is static.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let listed = Command::new(LOADER).arg("--list").arg(program).output();
    let listed = listed.with_context(|| format!("cannot run {LOADER}"))?;
    let text = if listed.status.success() { String::from_utf8(listed.stdout)? } else { String::new() };
    let paths = text.lines().filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')));
    Ok(paths.map(PathBuf::from).collect())
}

#[cfg(test)]
mod tests {
    use std::{env, fs};

    use super::{ENTRYPOINT, libraries};

    #[test]
    fn the_dockerfile_names_the_same_entry_point() {
        let text = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../Dockerfile")).unwrap();
        assert!(text.contains(&format!("ENTRYPOINT [\"{ENTRYPOINT}\"]")));
    }

    #[test]
    fn a_dynamic_program_brings_its_c_library() {
        let libraries = libraries(&env::current_exe().unwrap()).unwrap();
        assert!(libraries.iter().any(|library| library.ends_with("libc.so.6")), "{libraries:?}");
    }
}
