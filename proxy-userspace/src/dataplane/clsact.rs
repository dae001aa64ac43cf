//! TC programs as filters of the clsact qdisc, for kernels before 6.6. A filter cannot be pinned; it is known again by
//! its priority and handle, which are ours alone.

use std::{io, pin::pin};

use aya::{
    Ebpf,
    programs::{
        Link as _, Program, ProgramError, SchedClassifier, TcAttachType,
        tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions, TcError, TcHandle},
    },
};
use futures::TryStreamExt as _;
use rtnetlink::{
    Handle,
    packet_route::link::{LinkAttribute, LinkMessage},
};
use serde::Serialize;

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

/// A side of a clsact qdisc.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    /// What the device receives.
    Ingress,
    /// What it sends.
    Egress,
}

impl Side {
    /// In a word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        }
    }
}

/// The sides of devices of the calling thread's network namespace at which there is a filter of ours. Must not be called in a
/// tokio runtime.
pub(super) fn present() -> io::Result<Vec<(String, Side)>> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
        let (connection, handle, _) = rtnetlink::new_connection()?;
        tokio::spawn(connection);
        let links: Vec<LinkMessage> = handle.link().get().execute().try_collect().await.map_err(io::Error::other)?;
        let mut found = Vec::new();
        for link in links {
            for side in [Side::Ingress, Side::Egress] {
                if has_filter(&handle, link.header.index, side).await {
                    found.push((name(&link), side));
                }
            }
        }
        Ok(found)
    })
}

fn name(link: &LinkMessage) -> String {
    let name = |attribute: &LinkAttribute| match attribute {
        LinkAttribute::IfName(name) => Some(name.clone()),
        _ => None,
    };
    link.attributes.iter().find_map(name).unwrap_or_default()
}

/// A device that goes away meanwhile has none.
async fn has_filter(handle: &Handle, index: u32, side: Side) -> bool {
    let request = handle.traffic_filter(index.cast_signed()).get();
    let request = match side {
        Side::Ingress => request.ingress(),
        Side::Egress => request.egress(),
    };
    let mut filters = pin!(request.execute());
    while let Ok(Some(filter)) = filters.try_next().await {
        let (priority, handle) = ((filter.header.info >> 16) as u16, u32::from(filter.header.handle));
        if [PRIORITY, PRIORITY_BEHIND].contains(&priority) && handle == u32::from(HANDLE) {
            return true;
        }
    }
    false
}

/// Removes our filters at one side of a device.
pub(super) fn remove(device: &str, side: Side) {
    let at = match side {
        Side::Ingress => TcAttachType::Ingress,
        Side::Egress => TcAttachType::Egress,
    };
    for priority in [PRIORITY, PRIORITY_BEHIND] {
        remove_at(device, at, priority);
    }
}

fn remove_at(device: &str, at: TcAttachType, priority: u16) -> bool {
    SchedClassifierLink::attached(device, at, priority, HANDLE, None).is_ok_and(|filter| filter.detach().is_ok())
}

/// Removes our filter of a program from a device.
pub(super) fn remove_program(device: &str, program: ProgramName) -> bool {
    attach_type(program).is_some_and(|at| remove_at(device, at, priority(program)))
}
