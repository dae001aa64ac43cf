//! The entry points: one per hook. Each turns its context into a packet or a socket, calls the story, and turns the
//! answer into the action code of its kind of program.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

use aya_ebpf::{
    bindings::{TC_ACT_UNSPEC, xdp_action},
    macros::{cgroup_sock_addr, classifier, xdp},
    programs::{SockAddrContext, TcContext, XdpContext},
};
use proxy_ebpf::kernel;

#[xdp]
fn uplink_xdp(_: XdpContext) -> u32 {
    xdp_action::XDP_PASS
}

#[classifier]
fn uplink_in(_: TcContext) -> i32 {
    TC_ACT_UNSPEC
}

#[classifier]
fn uplink_out(_: TcContext) -> i32 {
    TC_ACT_UNSPEC
}

#[classifier]
fn pod_in(_: TcContext) -> i32 {
    TC_ACT_UNSPEC
}

#[classifier]
fn pod_out(_: TcContext) -> i32 {
    TC_ACT_UNSPEC
}

#[cgroup_sock_addr(connect4)]
fn connect4(_: SockAddrContext) -> i32 {
    1
}

#[cgroup_sock_addr(connect6)]
fn connect6(_: SockAddrContext) -> i32 {
    1
}

#[cgroup_sock_addr(sendmsg4)]
fn sendmsg4(_: SockAddrContext) -> i32 {
    1
}

#[cgroup_sock_addr(sendmsg6)]
fn sendmsg6(_: SockAddrContext) -> i32 {
    1
}

#[cgroup_sock_addr(recvmsg4)]
fn recvmsg4(_: SockAddrContext) -> i32 {
    1
}

#[cgroup_sock_addr(recvmsg6)]
fn recvmsg6(_: SockAddrContext) -> i32 {
    1
}

#[cgroup_sock_addr(getpeername4)]
fn getpeername4(_: SockAddrContext) -> i32 {
    1
}

#[cgroup_sock_addr(getpeername6)]
fn getpeername6(_: SockAddrContext) -> i32 {
    1
}

/// Not attached anywhere: the agent runs it twice to learn how long a jiffy is.
#[xdp]
fn jiffies(_: XdpContext) -> u32 {
    kernel::jiffies()
}

#[cfg(not(target_arch = "bpf"))]
fn main() {}

/// Never reached: the library denies everything that could panic, and a panic would not pass the verifier.
#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// Programs that call GPL-only helpers must say so to the kernel.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 4] = *b"GPL\0";
