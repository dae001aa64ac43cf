//! What labs leave behind when they are killed: names tell whose it was, and the next lab removes it.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use nix::{sys::signal::kill, unistd::Pid};

const PREFIX: &str = "sluice-lab-";

/// The name of something that belongs to a lab of this process.
pub(super) fn name(number: u32) -> String {
    format!("{PREFIX}{}-{number}", std::process::id())
}

/// Entries of a directory that belong to labs of processes that are gone.
pub(super) fn find(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = fs::read_dir(directory)?.flatten();
    let leftover = entries.filter(|entry| entry.file_name().to_str().and_then(owner).is_some_and(is_gone));
    Ok(leftover.map(|entry| entry.path()).collect())
}

fn owner(name: &str) -> Option<Pid> {
    name.strip_prefix(PREFIX)?.split('-').next()?.parse().ok().map(Pid::from_raw)
}

fn is_gone(process: Pid) -> bool {
    kill(process, None).is_err()
}

#[cfg(test)]
mod tests {
    use super::{find, name};

    #[test]
    fn only_what_belongs_to_a_process_that_is_gone_is_left_over() {
        let directory = tempfile::tempdir().unwrap();
        // No process has a number beyond the kernel's limit of 2²².
        for entry in [name(0), "sluice-lab-4194305-0-node-a".to_owned(), "sluice".to_owned()] {
            std::fs::create_dir(directory.path().join(entry)).unwrap();
        }
        assert_eq!(find(directory.path()).unwrap(), [directory.path().join("sluice-lab-4194305-0-node-a")]);
    }
}
