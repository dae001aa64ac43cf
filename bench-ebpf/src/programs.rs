//! The entry points: a null program, the floor, and what restores the packet, each for XDP and TC; and the ends of a road for
//! frames that are really sent.
#![expect(clippy::needless_pass_by_value, reason = "aya's macros hand the context over")]

use aya_ebpf::{
    bindings::{TC_ACT_UNSPEC, xdp_action},
    macros::{classifier, xdp},
    programs::{TcContext, XdpContext},
};
use bench_ebpf::{contract::NOT_CALLED, floor, restore, sink};

#[xdp(frags)]
#[inline(always)]
fn null_xdp(_: XdpContext) -> u32 {
    xdp_action::XDP_PASS
}

#[classifier]
#[inline(always)]
fn null_tc(_: TcContext) -> i32 {
    TC_ACT_UNSPEC
}

#[xdp(frags)]
#[inline(always)]
fn floor_xdp(context: XdpContext) -> u32 {
    floor::run(&context)
}

#[classifier]
#[inline(always)]
fn floor_tc(context: TcContext) -> i32 {
    floor::run(&context)
}

/// Takes what arrives.
#[xdp(frags)]
#[inline(always)]
fn sink_xdp(context: XdpContext) -> u32 {
    sink::count(&context);
    xdp_action::XDP_DROP
}

/// Sends everything back.
#[xdp(frags)]
#[inline(always)]
fn send_xdp(_: XdpContext) -> u32 {
    xdp_action::XDP_TX
}

#[xdp(frags)]
#[inline(always)]
fn restore_xdp(context: XdpContext) -> u32 {
    if restore::restore(&context) {
        restore::call_xdp(&context);
    }
    NOT_CALLED
}

#[classifier]
#[inline(always)]
fn restore_tc(context: TcContext) -> i32 {
    if restore::restore(&context) {
        restore::call_tc(&context);
    }
    NOT_CALLED as i32
}

/// Never reached: nothing here can panic, and a panic would not pass the verifier.
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// What the kernel asks of programs that call helpers.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 4] = *b"GPL\0";
