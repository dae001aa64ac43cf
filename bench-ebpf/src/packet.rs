//! A packet at XDP, which is plain memory, and at TC, where the kernel's helpers mend transport checksums, because an skb's may
//! be partial.

use aya_ebpf::{
    bindings::{BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, TC_ACT_UNSPEC, xdp_action},
    helpers::generated::{bpf_l4_csum_replace, bpf_redirect, bpf_skb_pull_data},
    programs::{TcContext, XdpContext},
};

use crate::wire::{fold, mend};

/// A program's context.
pub trait Packet {
    /// What a program answers.
    type Action;

    /// Where what can be read begins and ends.
    fn bounds(&self) -> (usize, usize);
    /// Makes headers of that length readable that are not yet.
    fn pull(&self, length: usize);
    /// Mends a transport checksum at an offset, after everything else. Nothing of the packet may be read after it.
    fn mend(&self, csum: &mut u16, offset: usize, addresses: u64, ports: u64, is_udp: bool);
    /// Goes on as it is.
    fn pass(&self) -> Self::Action;
    /// Is dropped.
    fn drop(&self) -> Self::Action;
    /// Leaves where it came in.
    fn transmit(&self) -> Self::Action;

    /// A view of the packet at an offset.
    #[inline(always)]
    fn at<T>(&self, offset: usize) -> Option<&'static mut T> {
        let (data, end) = self.bounds();
        let start = data + offset;
        if start + size_of::<T>() > end {
            return None;
        }
        // SAFETY: a packet does not begin at address 0.
        unsafe { core::hint::assert_unchecked(start != 0) };
        // SAFETY: `start` plus the size of `T` was just found to be inside the packet.
        Some(unsafe { &mut *(start as *mut T) })
    }
}

impl Packet for XdpContext {
    type Action = u32;

    #[inline(always)]
    fn bounds(&self) -> (usize, usize) {
        (self.data(), self.data_end())
    }

    #[inline(always)]
    fn pull(&self, _: usize) {}

    #[inline(always)]
    fn mend(&self, csum: &mut u16, _: usize, addresses: u64, ports: u64, is_udp: bool) {
        if is_udp && *csum == 0 {
            return;
        }
        let sum = mend(*csum, addresses + ports);
        // In UDP, 0 means that there is none (RFC 768).
        *csum = if is_udp && sum == 0 { 0xffff } else { sum };
    }

    #[inline(always)]
    fn pass(&self) -> u32 {
        xdp_action::XDP_PASS
    }

    #[inline(always)]
    fn drop(&self) -> u32 {
        xdp_action::XDP_DROP
    }

    #[inline(always)]
    fn transmit(&self) -> u32 {
        xdp_action::XDP_TX
    }
}

impl Packet for TcContext {
    type Action = i32;

    #[inline(always)]
    fn bounds(&self) -> (usize, usize) {
        (self.data(), self.data_end())
    }

    #[inline(always)]
    fn pull(&self, length: usize) {
        if self.data() + length > self.data_end() && self.len() as usize >= length {
            // SAFETY: a helper on the program's own context. A failure shows in the next bounds check.
            unsafe { bpf_skb_pull_data(self.skb.skb, length as u32) };
        }
    }

    #[inline(always)]
    fn mend(&self, _: &mut u16, offset: usize, addresses: u64, ports: u64, is_udp: bool) {
        let flags = if is_udp { u64::from(BPF_F_MARK_MANGLED_0) } else { 0 };
        let (addresses, ports) = (u64::from(fold(addresses)), u64::from(fold(ports)));
        let pseudo = flags | u64::from(BPF_F_PSEUDO_HDR);
        // SAFETY: a helper on the program's own context.
        unsafe { bpf_l4_csum_replace(self.skb.skb, offset as u32, 0, addresses, pseudo) };
        // SAFETY: as above.
        unsafe { bpf_l4_csum_replace(self.skb.skb, offset as u32, 0, ports, flags) };
    }

    #[inline(always)]
    fn pass(&self) -> i32 {
        TC_ACT_UNSPEC
    }

    #[inline(always)]
    fn drop(&self) -> i32 {
        aya_ebpf::bindings::TC_ACT_SHOT
    }

    #[inline(always)]
    fn transmit(&self) -> i32 {
        // SAFETY: a load of a field of the context the program was called with.
        let ifindex = unsafe { (*self.skb.skb).ifindex };
        // SAFETY: takes two numbers.
        (unsafe { bpf_redirect(ifindex, 0) }) as i32
    }
}
