//! What nobody who balances connections does: tried by a process that is confined as the agent is. One line per system call: its
//! name, what the container alone makes of it, and what is left once the process has confined itself as the agent does.
#![expect(clippy::print_stdout, reason = "the findings are its output")]

use std::{io, path::Path};

/// What each is called, and its number.
const ATTEMPTS: [(&str, libc::c_long); 8] = [
    ("mount", libc::SYS_mount),
    ("umount2", libc::SYS_umount2),
    ("setns", libc::SYS_setns),
    ("unshare", libc::SYS_unshare),
    ("ptrace", libc::SYS_ptrace),
    ("init_module", libc::SYS_init_module),
    ("finit_module", libc::SYS_finit_module),
    ("getpid", libc::SYS_getpid),
];

fn main() {
    let before = ATTEMPTS.map(|(_, call)| attempt(call));
    proxy_userspace::confine::confine(Path::new("/sys/fs/bpf/sluice"), None);
    for ((name, call), before) in ATTEMPTS.into_iter().zip(before) {
        println!("{name} {before} {}", attempt(call));
    }
}

/// The error's number; 0 of what was done. These arguments alone make each fail, most of them with another error than EPERM.
fn attempt(call: libc::c_long) -> i32 {
    // SAFETY: no call takes the address 1, and none has a request, a flag or a descriptor of this number that does anything.
    let result = unsafe { libc::syscall(call, 1, 0, 0, 0, 0) };
    if result < 0 { io::Error::last_os_error().raw_os_error().unwrap_or_default() } else { 0 }
}
