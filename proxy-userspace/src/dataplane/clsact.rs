//! TC programs as filters of the clsact qdisc, for kernels before 6.6. A filter cannot be pinned; it is known again by
//! its priority and handle, which are ours alone.

use std::{fs, io};

use aya::{
    Ebpf,
    programs::{
        Link as _, Program, ProgramError, SchedClassifier, TcAttachType,
        tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions, TcError, TcHandle},
    },
};

use super::program::{Hook, ProgramName};

/// Of our filters. Low numbers run first.
const PRIORITY: u16 = 5;
/// Of what stands behind them.
const PRIORITY_BEHIND: u16 = 6;
/// "SL".
const HANDLE: TcHandle = TcHandle::new(0x534c, 1);

fn priority(program: ProgramName) -> u16 {
    if program.crosses() { PRIORITY_BEHIND } else { PRIORITY }
}

fn attach_type(program: ProgramName) -> Option<TcAttachType> {
    match program.hook() {
        Hook::Ingress => Some(TcAttachType::Ingress),
        Hook::Egress => Some(TcAttachType::Egress),
        Hook::Xdp | Hook::Socket(_) => None,
    }
}

/// Makes the program run as our filter on a device. An existing filter gets it atomically.
pub(super) fn ensure(object: &mut Ebpf, program: ProgramName, device: &str) -> Result<(), ProgramError> {
    let (Some(Program::SchedClassifier(loaded)), Some(at)) =
        (object.program_mut(program.as_str()), attach_type(program))
    else {
        return Err(ProgramError::UnexpectedProgramType);
    };
    if replace(loaded, device, at, priority(program)).is_ok() {
        return Ok(());
    }
    // Fails when the qdisc is there already; if it failed for another reason, so does the next step.
    let _ = tc::qdisc_add_clsact(device);
    let options = NlOptions { priority: priority(program), handle: HANDLE, classid: None };
    let id = loaded.attach_with_options(device, at, TcAttachOptions::Netlink(options))?;
    keep(loaded.take_link(id)?);
    Ok(())
}

/// Gives our filter on a device the program, if there is one; says whether there was.
pub(super) fn replace_program(object: &mut Ebpf, program: ProgramName, device: &str) -> bool {
    match (object.program_mut(program.as_str()), attach_type(program)) {
        (Some(Program::SchedClassifier(loaded)), Some(at)) => replace(loaded, device, at, priority(program)).is_ok(),
        _ => false,
    }
}

fn replace(loaded: &mut SchedClassifier, device: &str, at: TcAttachType, priority: u16) -> Result<(), ProgramError> {
    let filter = SchedClassifierLink::attached(device, at, priority, HANDLE, None).map_err(TcError::IoError)?;
    let id = loaded.attach_to_link(filter)?;
    keep(loaded.take_link(id)?);
    Ok(())
}

/// Leaves the filter in the kernel: dropping the link would remove it.
fn keep(link: SchedClassifierLink) {
    std::mem::forget(link);
}

/// Removes our filters at one side of a device, and says whether there was one.
pub(super) fn remove(device: &str, at: TcAttachType) -> bool {
    [PRIORITY, PRIORITY_BEHIND].into_iter().filter(|priority| remove_at(device, at, *priority)).count() > 0
}

fn remove_at(device: &str, at: TcAttachType, priority: u16) -> bool {
    SchedClassifierLink::attached(device, at, priority, HANDLE, None).is_ok_and(|filter| filter.detach().is_ok())
}

/// Removes our filter of a program from a device.
pub(super) fn remove_program(device: &str, program: ProgramName) -> bool {
    attach_type(program).is_some_and(|at| remove_at(device, at, priority(program)))
}

/// The names of the devices of the calling thread's network namespace.
pub(super) fn device_names() -> io::Result<Vec<String>> {
    let text = fs::read_to_string("/proc/thread-self/net/dev")?;
    // Two lines of headings, then `name: counters`.
    Ok(text.lines().skip(2).filter_map(|line| Some(line.split_once(':')?.0.trim().to_owned())).collect())
}
