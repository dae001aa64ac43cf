//! Whether a kube-proxy runs on this node, which would write everything again.

use std::{fs, path::Path};

/// The kernel's own PID namespace (`PROC_PID_INIT_INO` of `linux/proc_ns.h`).
const FIRST_PID_NAMESPACE: &str = "pid:[4026531836]";
const NAME: &str = "kube-proxy";

/// What can be said of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Process {
    /// There is one, by its id.
    Runs(u32),
    /// There is none.
    None,
    /// Processes of the node cannot be seen from here.
    Unseen,
}

/// Looks for one in this network namespace.
pub fn process() -> Process {
    let numbers = fs::read_dir("/proc").into_iter().flatten().flatten();
    let numbers = numbers.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    if let Some(number) = numbers.into_iter().find(|number| is_kube_proxy(*number)) {
        return Process::Runs(number);
    }
    let own = fs::read_link("/proc/self/ns/pid");
    if own.is_ok_and(|own| own == Path::new(FIRST_PID_NAMESPACE)) { Process::None } else { Process::Unseen }
}

/// One whose network namespace may not be looked at may be of this one.
fn is_kube_proxy(number: u32) -> bool {
    let is_named = fs::read_to_string(format!("/proc/{number}/comm")).is_ok_and(|name| name.trim_end() == NAME);
    let network = |process: &str| fs::read_link(format!("/proc/{process}/ns/net"));
    let is_elsewhere = || match (network(&number.to_string()), network("thread-self")) {
        (Ok(other), Ok(own)) => other != own,
        _ => false,
    };
    is_named && !is_elsewhere()
}
