//! Network namespaces by their cookies, which is how the programs know them. The kernel offers no way from a cookie to its
//! namespace, so those of all processes are looked at.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io,
    os::{fd::AsFd as _, unix::fs::MetadataExt as _},
    path::PathBuf,
    thread,
};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::syscall;

/// What became of a search.
#[derive(Debug, Default)]
pub(super) struct Search {
    /// Cookies of the namespaces that were not found.
    pub(super) missing: BTreeSet<u64>,
    /// What the kernel said where it let nobody in. What is missing may be there.
    pub(super) refused: Option<io::Error>,
}

/// Runs `visit` inside each of the wanted network namespaces that some process is in. It runs on a thread that ends right
/// after, so that no other code finds itself somewhere else. Entering takes `CAP_SYS_ADMIN`, and seeing the processes of
/// pods takes the host's PID namespace.
pub(super) fn visit(wanted: &BTreeSet<u64>, visit: impl FnMut(u64) + Send) -> Search {
    let search = Search { missing: wanted.clone(), refused: None };
    thread::scope(|scope| match scope.spawn(|| search.run(visit)).join() {
        Ok(search) => search,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}

impl Search {
    fn run(mut self, mut visit: impl FnMut(u64)) -> Self {
        for namespace in self.namespaces() {
            if self.missing.is_empty() {
                break;
            }
            match enter(&namespace) {
                Ok(cookie) if self.missing.remove(&cookie) => visit(cookie),
                // A process may end at any time.
                Err(error) if !is_gone(&error) => self.refused = Some(error),
                _ => {}
            }
        }
        self
    }

    /// A path to each namespace that some process is in.
    fn namespaces(&mut self) -> Vec<PathBuf> {
        let mut found = BTreeMap::new();
        for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let path = process.path().join("ns/net");
            match fs::metadata(&path) {
                Ok(namespace) => drop(found.insert(namespace.ino(), path)),
                Err(error) if is_gone(&error) => {}
                Err(error) => self.refused = Some(error),
            }
        }
        found.into_values().collect()
    }
}

/// Moves the calling thread; returns the cookie of where it is then.
fn enter(namespace: &PathBuf) -> io::Result<u64> {
    let namespace = File::open(namespace)?;
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
    syscall::network_namespace_cookie()
}

fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}
