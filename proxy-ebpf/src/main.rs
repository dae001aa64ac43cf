//! The entry points: one per hook. Each turns its context into a packet or a socket, calls the story, and turns the
//! answer into the action code of its kind of program.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]
#![expect(clippy::needless_pass_by_value, reason = "aya's macros hand the context over")]
#![expect(clippy::cast_sign_loss, reason = "the helper's answer is an action code")]

use aya_ebpf::{
    bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC, xdp_action},
    helpers::generated::bpf_redirect,
    macros::{cgroup_sock, cgroup_sock_addr, classifier, xdp},
    programs::{SockAddrContext, SockContext, TcContext, XdpContext},
};
use proxy_common::{
    outcome::{Hook, Outcome},
    tuple::Stage,
};
use proxy_ebpf::{
    bind,
    counters::count,
    cross, datapath, event, kernel,
    output::Verdict,
    packet::{ETHERNET, Packet, TcPacket, XdpPacket},
    socket::{self, Answer},
};

#[xdp(frags)]
#[inline(always)]
fn uplink_xdp(context: XdpContext) -> u32 {
    let mut packet = XdpPacket::new(context);
    match datapath::run(Hook::UplinkXdp, Stage::UplinkIn, &mut packet) {
        Ok(Verdict::PASS) => xdp_action::XDP_PASS,
        Ok(verdict) if verdict.ifindex == packet.ifindex() => xdp_action::XDP_TX,
        // SAFETY: takes two numbers.
        Ok(verdict) => (unsafe { bpf_redirect(verdict.ifindex, 0) }) as u32,
        Err(reason) => {
            count(Hook::UplinkXdp, reason);
            event::packet::<XdpPacket>(Hook::UplinkXdp, reason, packet.stored_context());
            xdp_action::XDP_DROP
        }
    }
}

#[classifier]
#[inline(always)]
fn uplink_in(context: TcContext) -> i32 {
    classify(Hook::UplinkIn, Stage::UplinkIn, context)
}

#[classifier]
#[inline(always)]
fn uplink_out(context: TcContext) -> i32 {
    classify(Hook::UplinkOut, Stage::UplinkOut, context)
}

/// For an uplink without a header of its own: what came by it begins with an IP header.
#[classifier]
#[inline(always)]
fn uplink_in_l3(context: TcContext) -> i32 {
    classify_bare(Hook::UplinkIn, Stage::UplinkIn, context)
}

/// The same on the way out.
#[classifier]
#[inline(always)]
fn uplink_out_l3(context: TcContext) -> i32 {
    classify_bare(Hook::UplinkOut, Stage::UplinkOut, context)
}

#[classifier]
#[inline(always)]
fn pod_in(context: TcContext) -> i32 {
    classify(Hook::PodIn, Stage::FromPod, context)
}

#[classifier]
#[inline(always)]
fn pod_out(context: TcContext) -> i32 {
    classify(Hook::PodOut, Stage::ToPod, context)
}

/// Between the families: behind `uplink_in`, or XDP.
#[classifier]
#[inline(always)]
fn cross_uplink_in(context: TcContext) -> i32 {
    cross::run(Hook::CrossUplinkIn, &mut TcPacket::new(context))
}

/// The same behind `pod_in`.
#[classifier]
#[inline(always)]
fn cross_pod_in(context: TcContext) -> i32 {
    cross::run(Hook::CrossPodIn, &mut TcPacket::new(context))
}

/// What goes on its way is left to whoever stands behind us in the chain.
#[inline(always)]
fn classify(hook: Hook, stage: Stage, context: TcContext) -> i32 {
    let mut packet = TcPacket::<ETHERNET>::new(context);
    let verdict = datapath::run(hook, stage, &mut packet);
    act(hook, &packet, verdict)
}

#[inline(always)]
fn classify_bare(hook: Hook, stage: Stage, context: TcContext) -> i32 {
    let mut packet = TcPacket::<0>::new(context);
    let verdict = datapath::run_bare(hook, stage, &mut packet);
    act(hook, &packet, verdict)
}

#[inline(always)]
fn act<P: Packet>(hook: Hook, packet: &P, verdict: Result<Verdict, Outcome>) -> i32 {
    match verdict {
        Ok(Verdict::PASS) => TC_ACT_UNSPEC,
        // SAFETY: takes two numbers.
        Ok(verdict) => (unsafe { bpf_redirect(verdict.ifindex, 0) }) as i32,
        Err(reason) => {
            count(hook, reason);
            event::packet::<P>(hook, reason, packet.stored_context());
            TC_ACT_SHOT
        }
    }
}

#[cgroup_sock_addr(connect4)]
#[inline(always)]
fn connect4(context: SockAddrContext) -> i32 {
    verdict(socket::connect4(&context))
}

#[cgroup_sock_addr(connect6)]
#[inline(always)]
fn connect6(context: SockAddrContext) -> i32 {
    verdict(socket::connect6(&context))
}

#[cgroup_sock_addr(sendmsg4)]
#[inline(always)]
fn sendmsg4(context: SockAddrContext) -> i32 {
    verdict(socket::sendmsg4(&context))
}

#[cgroup_sock_addr(sendmsg6)]
#[inline(always)]
fn sendmsg6(context: SockAddrContext) -> i32 {
    verdict(socket::sendmsg6(&context))
}

#[cgroup_sock_addr(recvmsg4)]
#[inline(always)]
fn recvmsg4(context: SockAddrContext) -> i32 {
    socket::name_peer4(&context);
    1
}

#[cgroup_sock_addr(recvmsg6)]
#[inline(always)]
fn recvmsg6(context: SockAddrContext) -> i32 {
    socket::name_peer6(&context);
    1
}

#[cgroup_sock_addr(getpeername4)]
#[inline(always)]
fn getpeername4(context: SockAddrContext) -> i32 {
    socket::name_peer4(&context);
    1
}

#[cgroup_sock_addr(getpeername6)]
#[inline(always)]
fn getpeername6(context: SockAddrContext) -> i32 {
    socket::name_peer6(&context);
    1
}

#[cgroup_sock(post_bind4)]
#[inline(always)]
fn post_bind4(context: SockContext) -> i32 {
    verdict(bind::post_bind4(&context))
}

#[cgroup_sock(post_bind6)]
#[inline(always)]
fn post_bind6(context: SockContext) -> i32 {
    verdict(bind::post_bind6(&context))
}

#[cgroup_sock(sock_release)]
#[inline(always)]
fn sock_release(context: SockContext) -> i32 {
    socket::release(&context);
    1
}

#[inline(always)]
fn verdict(answer: Answer) -> i32 {
    match answer {
        Answer::GoOn => 1,
        Answer::Refuse => 0,
    }
}

/// Not attached anywhere: tests run it, to see the clock the flow table goes by.
#[xdp]
#[inline(always)]
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
