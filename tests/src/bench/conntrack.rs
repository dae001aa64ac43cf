//! The kernel's own table of connections, emptied: it has room for as many as the machine allows, and forgets slowly.

use std::{
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
};

use anyhow::{Context as _, Result, ensure};

use crate::netns::Namespace;

/// `NFNL_SUBSYS_CTNETLINK` and `IPCTNL_MSG_CT_DELETE` (`linux/netfilter/nfnetlink*.h`).
const DELETE: u16 = 1 << 8 | 2;

/// A message that names no connection means all of them.
#[repr(C)]
struct Delete {
    header: libc::nlmsghdr,
    /// Family, version, resource.
    general: [u8; 4],
}

/// What the kernel says to it.
#[repr(C)]
struct Answer {
    header: libc::nlmsghdr,
    error: i32,
    request: libc::nlmsghdr,
}

/// Forgets every connection of a namespace.
pub fn forget(namespace: &Namespace) -> Result<()> {
    namespace.run(forget_here)?.with_context(|| format!("cannot forget the connections of {}", namespace.name()))
}

fn forget_here() -> Result<()> {
    // SAFETY: takes three numbers.
    let socket =
        unsafe { libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::NETLINK_NETFILTER) };
    ensure!(socket >= 0, io::Error::last_os_error());
    // SAFETY: the kernel has just made the descriptor, and nothing else knows it.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    let header = libc::nlmsghdr {
        nlmsg_len: size_of::<Delete>() as u32,
        nlmsg_type: DELETE,
        nlmsg_flags: (libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16,
        nlmsg_seq: 1,
        nlmsg_pid: 0,
    };
    let message = Delete { header, general: [libc::AF_INET as u8, 0, 0, 0] };
    // SAFETY: the kernel reads the message, which outlives the call.
    let sent = unsafe { libc::send(socket.as_raw_fd(), (&raw const message).cast(), size_of::<Delete>(), 0) };
    ensure!(sent >= 0, io::Error::last_os_error());
    // SAFETY: plain memory, for which all zeroes are valid.
    let mut answer: Answer = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes no more than the size of the answer.
    let length = unsafe { libc::recv(socket.as_raw_fd(), (&raw mut answer).cast(), size_of::<Answer>(), 0) };
    ensure!(length >= 0, io::Error::last_os_error());
    ensure!(answer.header.nlmsg_type == libc::NLMSG_ERROR as u16, "no answer but {}", answer.header.nlmsg_type);
    ensure!(answer.error == 0, io::Error::from_raw_os_error(-answer.error));
    Ok(())
}
