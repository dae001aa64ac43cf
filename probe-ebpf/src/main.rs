//! The entry points, all of them XDP: the action code is the answer.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]
#![expect(clippy::needless_pass_by_value, reason = "aya's macros hand the context over")]

use aya_ebpf::{macros::xdp, programs::XdpContext};
use probe_ebpf::{contract::CONNECTIONS, measure, stir};

#[xdp]
#[inline(always)]
fn stir(_: XdpContext) -> u32 {
    stir::run();
    1
}

#[xdp]
#[inline(always)]
fn claim_next(_: XdpContext) -> u32 {
    stir::claim_next();
    1
}

#[xdp]
#[inline(always)]
fn begin(context: XdpContext) -> u32 {
    // Which one is the length of the packet.
    stir::begin((context.data_end() - context.data()) as u64 % CONNECTIONS);
    1
}

macro_rules! measured {
    ($($name:ident)+) => {$(
        #[xdp]
        #[inline(always)]
        fn $name(_: XdpContext) -> u32 {
            measure::$name()
        }
    )+};
}

measured!(nothing_v4 nothing_v6 lru_v4 lru_v6 table_v4 table_v6 enter_lru_v4 enter_lru_v6 enter_table_v4 enter_table_v6);

#[cfg(not(target_arch = "bpf"))]
fn main() {}

/// Never reached: nothing here can panic, and a panic would not pass the verifier.
#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// What the kernel asks of programs that call helpers.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 4] = *b"GPL\0";
