//! What the agent gives up before it begins, so that whoever gets hold of it has little. In: what the process was given. Out: what it keeps,
//! for every thread that is started afterwards. What a kernel cannot do is left away and told; nothing here keeps an agent from starting.

use std::{collections::BTreeMap, io, path::Path};

use caps::{CapSet, Capability, CapsHashSet};
use landlock::{ABI, AccessFs, PathBeneath, PathFd, Ruleset, RulesetAttr as _, RulesetCreatedAttr as _, RulesetStatus};
use proxy_common::names::confined;
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};
use tracing::{info, warn};

use crate::dataplane;

/// What the agent has a use for. Everything else goes.
const USEFUL: [Capability; 6] = [
    Capability::CAP_BPF,
    Capability::CAP_NET_ADMIN,
    Capability::CAP_PERFMON,
    // Both or none: to find the sockets of pods.
    Capability::CAP_SYS_ADMIN,
    Capability::CAP_SYS_PTRACE,
    // A kubeconfig, or files of objects, may be another user's.
    Capability::CAP_DAC_READ_SEARCH,
];

/// System calls that nobody who balances connections makes. They fail with EPERM.
const REFUSED: [libc::c_long; 30] = [
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_unshare,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    libc::SYS_userfaultfd,
    libc::SYS_open_by_handle_at,
];

/// Why something could not be given up.
#[derive(Debug, thiserror::Error)]
enum ConfineError {
    #[error("capabilities cannot be given up: {0}")]
    Capabilities(#[from] caps::errors::CapsError),
    #[error("the kernel takes no filter of system calls: {0}")]
    Seccomp(#[from] seccompiler::Error),
    #[error("the filter of system calls is none: {0}")]
    Filter(#[from] seccompiler::BackendError),
    #[error("Landlock: {0}")]
    Landlock(#[from] landlock::RulesetError),
    #[error("Landlock: {0}")]
    Path(#[from] landlock::PathFdError),
    #[error("privileges can still be gained: {0}")]
    Prctl(#[from] io::Error),
    #[error("the kernel has no Landlock: files are guarded by their permissions alone")]
    NoLandlock,
}

/// Gives up what is not needed to keep what is pinned under a path, and files in a directory of its own. To be called while the process has one thread. Returns bits of
/// [`confined`].
pub fn confine(pin_path: &Path, state: Option<&Path>) -> u32 {
    let kept = useful(|capability| caps::has_cap(None, CapSet::Permitted, capability).unwrap_or(false));
    let enters_pods = kept.contains(&Capability::CAP_SYS_PTRACE);
    let steps = [
        (confined::CAPABILITIES, keep(&kept)),
        (confined::NO_NEW_PRIVILEGES, no_new_privileges()),
        (confined::SYSTEM_CALLS, refuse_system_calls()),
        // It would also keep the agent from looking for sockets in other processes' namespaces.
        (confined::FILES, if enters_pods { Ok(()) } else { guard_files(pin_path, state) }),
    ];
    let mut done = 0;
    for (bit, step) in steps {
        match step {
            Ok(()) if bit == confined::FILES && enters_pods => {}
            Ok(()) => done |= bit,
            Err(error) => warn!("{error}"),
        }
    }
    let kept: Vec<String> = kept.iter().map(|capability| format!("{capability}")).collect();
    info!(kept = kept.join(" "), confined = describe(done).join(", "), "privileges");
    done
}

/// What bits of [`confined`] mean.
pub(crate) fn describe(bits: u32) -> Vec<&'static str> {
    let all = [
        (confined::CAPABILITIES, "few capabilities"),
        (confined::NO_NEW_PRIVILEGES, "no new privileges"),
        (confined::SYSTEM_CALLS, "filtered system calls"),
        (confined::FILES, "writes only to pins, network settings and its state"),
    ];
    all.into_iter().filter(|(bit, _)| bits & bit != 0).map(|(_, name)| name).collect()
}

/// Of what there is, what is of use.
fn useful(has: impl Fn(Capability) -> bool) -> CapsHashSet {
    let mut kept: CapsHashSet = USEFUL.into_iter().filter(|capability| has(*capability)).collect();
    // The kernel takes SYS_ADMIN for these, as it did before there were such capabilities.
    let stands_in = !has(Capability::CAP_BPF) || !has(Capability::CAP_PERFMON);
    let enters_pods = has(Capability::CAP_SYS_ADMIN) && has(Capability::CAP_SYS_PTRACE);
    if !enters_pods {
        kept.remove(&Capability::CAP_SYS_PTRACE);
        if !stands_in {
            kept.remove(&Capability::CAP_SYS_ADMIN);
        }
    }
    kept
}

fn keep(kept: &CapsHashSet) -> Result<(), ConfineError> {
    if caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP)? {
        for capability in caps::runtime::thread_all_supported().difference(kept) {
            caps::drop(None, CapSet::Bounding, *capability)?;
        }
    }
    // What a program that is executed would inherit.
    if caps::runtime::ambient_set_supported().is_ok() {
        caps::clear(None, CapSet::Ambient)?;
    }
    caps::clear(None, CapSet::Inheritable)?;
    caps::set(None, CapSet::Effective, kept)?;
    caps::set(None, CapSet::Permitted, kept)?;
    Ok(())
}

fn no_new_privileges() -> Result<(), ConfineError> {
    Ok(rustix::thread::set_no_new_privs(true).map_err(io::Error::from)?)
}

fn refuse_system_calls() -> Result<(), ConfineError> {
    let rules: BTreeMap<i64, _> = REFUSED.into_iter().map(|call| (call, Vec::new())).collect();
    let refuse = SeccompAction::Errno(libc::EPERM.cast_unsigned());
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, refuse, std::env::consts::ARCH.try_into()?)?;
    let program: BpfProgram = filter.try_into()?;
    Ok(seccompiler::apply_filter(&program)?)
}

/// Reading is left to permissions: objects and credentials may lie anywhere.
fn guard_files(pin_path: &Path, state: Option<&Path>) -> Result<(), ConfineError> {
    let writes = AccessFs::from_write(ABI::V3);
    let settings = AccessFs::WriteFile | AccessFs::Truncate;
    let pinning = AccessFs::MakeDir
        | AccessFs::MakeReg
        | AccessFs::MakeSym
        | AccessFs::RemoveDir
        | AccessFs::RemoveFile
        | AccessFs::Refer;
    let mut rules = Ruleset::default().handle_access(writes)?.create()?;
    let root = dataplane::pin_root(pin_path);
    rules = rules.add_rule(PathBeneath::new(PathFd::new(&root)?, writes))?;
    // A BPF file system that is mounted anew has another root, below the same directory.
    if let Some(parent) = root.parent().filter(|_| root != pin_path) {
        rules = rules.add_rule(PathBeneath::new(PathFd::new(parent)?, pinning))?;
    }
    // One that is missing is told of when something is to be written there.
    if let Some(state) = state.filter(|state| state.is_dir()) {
        rules = rules.add_rule(PathBeneath::new(PathFd::new(state)?, writes))?;
    }
    for path in ["/proc/sys/net", "/dev/null"].map(Path::new).into_iter().filter(|path| path.exists()) {
        rules = rules.add_rule(PathBeneath::new(PathFd::new(path)?, settings))?;
    }
    match rules.restrict_self()?.ruleset {
        RulesetStatus::NotEnforced => Err(ConfineError::NoLandlock),
        RulesetStatus::FullyEnforced | RulesetStatus::PartiallyEnforced => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, io, thread};

    use caps::Capability;

    use super::{guard_files, no_new_privileges, refuse_system_calls, useful};

    #[test]
    fn what_is_kept_is_of_use_and_whole() {
        use Capability::{CAP_BPF, CAP_CHOWN, CAP_NET_ADMIN, CAP_PERFMON, CAP_SYS_ADMIN, CAP_SYS_PTRACE};
        let cases: [(&str, &[Capability], &[Capability]); 5] = [
            ("what the manifest gives", &[CAP_BPF, CAP_NET_ADMIN, CAP_PERFMON], &[CAP_BPF, CAP_NET_ADMIN, CAP_PERFMON]),
            ("what is of no use", &[CAP_BPF, CAP_PERFMON, CAP_CHOWN], &[CAP_BPF, CAP_PERFMON]),
            ("to mount, once", &[CAP_BPF, CAP_PERFMON, CAP_SYS_ADMIN], &[CAP_BPF, CAP_PERFMON]),
            (
                "to enter pods",
                &[CAP_BPF, CAP_PERFMON, CAP_SYS_ADMIN, CAP_SYS_PTRACE],
                &[CAP_BPF, CAP_PERFMON, CAP_SYS_ADMIN, CAP_SYS_PTRACE],
            ),
            ("as before Linux 5.8", &[CAP_NET_ADMIN, CAP_SYS_ADMIN], &[CAP_NET_ADMIN, CAP_SYS_ADMIN]),
        ];
        for (name, given, expected) in cases {
            assert_eq!(useful(|one| given.contains(&one)), expected.iter().copied().collect(), "{name}");
        }
    }

    /// On a thread of its own, because there is no way back.
    fn confined<T: Send + 'static>(act: impl FnOnce() -> T + Send + 'static) -> T {
        thread::spawn(act).join().unwrap()
    }

    #[test]
    fn system_calls_that_nobody_needs_are_refused() {
        let (refused, allowed) = confined(|| {
            refuse_system_calls().unwrap();
            // SAFETY: it would fail for want of arguments.
            let result = unsafe { libc::unshare(0) };
            let refused = (result, io::Error::last_os_error().raw_os_error());
            (refused, fs::read_to_string("/proc/self/comm").is_ok())
        });
        assert_eq!(refused, (-1, Some(libc::EPERM)));
        assert!(allowed);
    }

    #[test]
    fn nothing_is_written_beside_the_pins_and_the_state() {
        let pins = tempfile::tempdir().unwrap();
        let state = tempfile::tempdir().unwrap();
        let elsewhere = tempfile::tempdir().unwrap();
        fs::write(elsewhere.path().join("there"), "to be read").unwrap();
        let (inside, outside) = (pins.path().join("pin"), elsewhere.path().to_owned());
        let kept = state.path().to_owned();
        let (written, refused, read) = confined(move || {
            no_new_privileges().unwrap();
            guard_files(inside.parent().unwrap(), Some(&kept)).unwrap();
            let refused = fs::write(outside.join("new"), "").map_err(|error| error.kind());
            let replaced =
                fs::write(kept.join("new"), "").and_then(|()| fs::rename(kept.join("new"), kept.join("old")));
            (fs::write(inside, "").and(replaced).is_ok(), refused, fs::read_to_string(outside.join("there")).is_ok())
        });
        assert_eq!((written, refused, read), (true, Err(io::ErrorKind::PermissionDenied), true));
    }
}
