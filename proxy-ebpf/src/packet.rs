//! A packet under our hands: bounds-checked views of it, and the ways to change it. `XdpPacket` is plain memory;
//! `TcPacket` leaves transport checksums to the kernel's helpers, because an skb's may be partial.

use aya_ebpf::{
    EbpfContext as _,
    bindings::{BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, BPF_F_RECOMPUTE_CSUM, bpf_adj_room_mode::BPF_ADJ_ROOM_MAC},
    helpers::generated as helpers,
    programs::{TcContext, XdpContext},
};
use core::ffi::c_void;

use crate::{
    checksum,
    family::Family,
    parse::{ETHERNET, Transport},
};

/// `BPF_F_IPV6` of `bpf_l4_csum_replace`: an IPv6 address change does not alter a checksum over the whole packet.
/// Kernel 6.16, commit ead7f9b8de65 ("bpf: Fix L4 csum update on IPv6 in `CHECKSUM_COMPLETE`"); refused by older ones.
const BPF_F_IPV6: u64 = 128;

/// Loads a word of the context at a constant offset, in one instruction: the verifier refuses a pointer into the context
/// that was computed first, which is what the compiler likes to make when it needs the field twice.
macro_rules! context_word {
    ($context:expr, $type:ty, $field:ident) => {{
        let context = $context;
        #[cfg(target_arch = "bpf")]
        let word: usize = {
            let word;
            // SAFETY: a load of a field of the context the program was called with.
            unsafe {
                core::arch::asm!(
                    "{word} = *(u32 *)({context} + {offset})",
                    word = out(reg) word,
                    context = in(reg) context,
                    offset = const core::mem::offset_of!($type, $field),
                    options(pure, readonly, nostack, preserves_flags),
                )
            };
            word
        };
        // SAFETY: as above.
        #[cfg(not(target_arch = "bpf"))]
        let word = (unsafe { (&raw const (*context).$field).read() }) as usize;
        word
    }};
}

/// A number that is no larger than a mask of ones: said where the compiler cannot see that it knew. Verifiers of 6.12 and before forget what they knew of a number when its bytes are swapped, and let nothing
/// without bounds be added to a pointer.
#[inline(always)]
pub(crate) fn bounded<const MASK: usize>(length: usize) -> usize {
    #[cfg(target_arch = "bpf")]
    let length = {
        let bounded: usize;
        // SAFETY: arithmetic on one register.
        unsafe {
            core::arch::asm!(
                "{length} &= {mask}",
                mask = const MASK,
                length = inlateout(reg) length => bounded,
                options(pure, nomem, nostack, preserves_flags),
            );
        };
        bounded
    };
    length
}

/// More than headers and what an IP header says follows them.
const LONGEST: usize = 0x1_ffff;

/// What the datapath needs of a packet.
pub trait Packet {
    /// A frame without an skb: it can only leave by devices that take such.
    const IS_FRAME: bool;

    /// Where the IP header stands: behind that of the link.
    const NETWORK: usize;

    /// The packet a context is of: for what is out of line, which takes the context alone.
    fn from_context(context: *mut c_void) -> Self;

    /// Makes at least the first `length` bytes readable, if there are as many.
    fn linearize(&mut self, length: usize);

    /// Where it begins.
    fn data(&self) -> usize;

    /// Where what can be read ends.
    fn data_end(&self) -> usize;

    /// A view of `T` at `offset`, if the packet is that long. No write through any other view may happen while it lives.
    #[inline(always)]
    fn at<T>(&self, offset: usize) -> Option<&'static mut T> {
        let start = self.data() + offset;
        if start + size_of::<T>() > self.data_end() {
            return None;
        }
        // SAFETY: a packet does not begin at address 0; told, because `None` would be tested for otherwise.
        unsafe { core::hint::assert_unchecked(start != 0) };
        // SAFETY: `start` plus the size of `T` was just found to be inside the packet.
        Some(unsafe { &mut *(start as *mut T) })
    }

    /// Whether the packet has at least `length` bytes.
    fn holds(&self, length: usize) -> bool;

    /// Device it came in by (or, on the way out, leaves by).
    fn ifindex(&self) -> u32;

    /// The context, for helpers.
    fn context(&self) -> *mut c_void;

    /// Cuts it off after `length` bytes, of which it has at least as many. What was to be segmented later is not any more.
    /// Views are stale after it.
    fn cut(&mut self, length: usize) -> bool;

    /// Makes room for that many bytes between the Ethernet header and what follows it, in which anything may be: in the
    /// Ethernet header too. Views are stale after it.
    fn make_room(&mut self, length: usize) -> bool;

    /// Mends the transport checksum at `offset` for a change of addresses and ports that was made. Views are stale after it.
    fn mend_checksum<F: Family, L: Transport>(
        &mut self,
        field: &mut u16,
        offset: usize,
        addresses: u16,
        ports: u16,
    ) -> bool;

    /// Notes a change that no checksum in the packet makes up for, in one that the device made over the whole packet.
    fn account(&mut self, change: u16);

    /// Takes one from the hop limit. Views are stale after it.
    fn decrement_hop_limit<F: Family>(&mut self, offset: usize);
}

/// A frame in the driver's hands.
pub struct XdpPacket {
    context: XdpContext,
}

impl XdpPacket {
    /// Takes the context of an XDP program.
    #[inline(always)]
    pub const fn new(context: XdpContext) -> Self {
        Self { context }
    }
}

impl Packet for XdpPacket {
    const IS_FRAME: bool = true;
    const NETWORK: usize = ETHERNET;

    #[inline(always)]
    fn from_context(context: *mut c_void) -> Self {
        Self::new(XdpContext::new(context.cast()))
    }

    #[inline(always)]
    fn data(&self) -> usize {
        context_word!(self.context.ctx, aya_ebpf::bindings::xdp_md, data)
    }

    #[inline(always)]
    fn data_end(&self) -> usize {
        context_word!(self.context.ctx, aya_ebpf::bindings::xdp_md, data_end)
    }

    #[inline(always)]
    fn linearize(&mut self, _: usize) {}

    #[inline(always)]
    fn holds(&self, length: usize) -> bool {
        // By comparison of pointers: their difference is not for programs without CAP_PERFMON.
        self.data() + bounded::<LONGEST>(length) <= self.data_end()
    }

    #[inline(always)]
    fn ifindex(&self) -> u32 {
        context_word!(self.context.ctx, aya_ebpf::bindings::xdp_md, ingress_ifindex) as u32
    }

    #[inline(always)]
    fn context(&self) -> *mut c_void {
        self.context.as_ptr()
    }

    #[inline(always)]
    fn cut(&mut self, length: usize) -> bool {
        let context = self.context.ctx;
        // Of all its parts, and asked for: the difference of two pointers is not for programs without CAP_PERFMON.
        // SAFETY: a helper on the program's own context.
        let have = unsafe { helpers::bpf_xdp_get_buff_len(context) };
        // SAFETY: as above.
        (unsafe { helpers::bpf_xdp_adjust_tail(context, length as i32 - have as i32) }) == 0
    }

    #[inline(always)]
    fn make_room(&mut self, length: usize) -> bool {
        // SAFETY: a helper on the program's own context.
        (unsafe { helpers::bpf_xdp_adjust_head(self.context.ctx, -(length as i32)) }) == 0
    }

    #[inline(always)]
    fn mend_checksum<F: Family, L: Transport>(
        &mut self,
        field: &mut u16,
        _: usize,
        addresses: u16,
        ports: u16,
    ) -> bool {
        if !L::HAS_STATE && *field == 0 {
            return true;
        }
        let sum = checksum::update(*field, u32::from(addresses) + u32::from(ports));
        // In UDP, 0 means that there is none (RFC 768).
        *field = if !L::HAS_STATE && sum == 0 { 0xffff } else { sum };
        true
    }

    #[inline(always)]
    fn account(&mut self, _: u16) {}

    #[inline(always)]
    fn decrement_hop_limit<F: Family>(&mut self, offset: usize) {
        if let Some(header) = self.at::<F::Header>(offset) {
            F::decrement_hop_limit(header);
        }
    }
}

/// An skb.
pub struct TcPacket {
    context: TcContext,
}

impl TcPacket {
    /// Takes the context of a classifier.
    #[inline(always)]
    pub const fn new(context: TcContext) -> Self {
        Self { context }
    }

    #[inline(always)]
    fn length(&self) -> usize {
        context_word!(self.context.skb.skb, aya_ebpf::bindings::__sk_buff, len)
    }
}

impl Packet for TcPacket {
    const IS_FRAME: bool = false;
    const NETWORK: usize = ETHERNET;

    #[inline(always)]
    fn from_context(context: *mut c_void) -> Self {
        Self::new(TcContext::new(context.cast()))
    }

    #[inline(always)]
    fn data(&self) -> usize {
        context_word!(self.context.skb.skb, aya_ebpf::bindings::__sk_buff, data)
    }

    #[inline(always)]
    fn data_end(&self) -> usize {
        context_word!(self.context.skb.skb, aya_ebpf::bindings::__sk_buff, data_end)
    }

    #[inline(always)]
    fn linearize(&mut self, length: usize) {
        let wanted = length.min(self.length());
        if self.data() + wanted > self.data_end() {
            // SAFETY: a helper on the program's own context. A failure shows in the next bounds check.
            unsafe { helpers::bpf_skb_pull_data(self.context.skb.skb, wanted as u32) };
        }
    }

    #[inline(always)]
    fn holds(&self, length: usize) -> bool {
        length <= self.length()
    }

    #[inline(always)]
    fn ifindex(&self) -> u32 {
        context_word!(self.context.skb.skb, aya_ebpf::bindings::__sk_buff, ifindex) as u32
    }

    #[inline(always)]
    fn context(&self) -> *mut c_void {
        self.context.as_ptr()
    }

    #[inline(always)]
    fn cut(&mut self, length: usize) -> bool {
        // SAFETY: a helper on the program's own context.
        (unsafe { helpers::bpf_skb_change_tail(self.context.skb.skb, length as u32, 0) }) == 0
    }

    #[inline(always)]
    fn make_room(&mut self, length: usize) -> bool {
        // SAFETY: a helper on the program's own context.
        (unsafe { helpers::bpf_skb_adjust_room(self.context.skb.skb, length as i32, BPF_ADJ_ROOM_MAC, 0) }) == 0
    }

    #[inline(always)]
    fn mend_checksum<F: Family, L: Transport>(
        &mut self,
        _: &mut u16,
        offset: usize,
        addresses: u16,
        ports: u16,
    ) -> bool {
        let skb = self.context.skb.skb;
        let offset = (offset + L::CSUM) as u32;
        // A checksum of 0 stays 0 in UDP, and none becomes it.
        let base = if L::HAS_STATE { 0 } else { u64::from(BPF_F_MARK_MANGLED_0) };
        let pseudo = base | u64::from(BPF_F_PSEUDO_HDR);
        let addresses = u64::from(addresses);
        let mut status = if F::IS_V6 {
            // SAFETY: a helper on the program's own context.
            unsafe { helpers::bpf_l4_csum_replace(skb, offset, 0, addresses, pseudo | BPF_F_IPV6) }
        } else {
            -1
        };
        if status != 0 {
            // SAFETY: as above.
            status = unsafe { helpers::bpf_l4_csum_replace(skb, offset, 0, addresses, pseudo) };
        }
        if status == 0 {
            // SAFETY: as above.
            status = unsafe { helpers::bpf_l4_csum_replace(skb, offset, 0, u64::from(ports), base) };
        }
        status == 0
    }

    #[inline(always)]
    fn account(&mut self, change: u16) {
        // SAFETY: a helper on the program's own context; fails where no such checksum was made.
        unsafe { helpers::bpf_csum_update(self.context.skb.skb, u32::from(change)) };
    }

    #[inline(always)]
    fn decrement_hop_limit<F: Family>(&mut self, offset: usize) {
        let Some(header) = self.at::<F::Header>(offset) else { return };
        if !F::IS_V6 {
            F::decrement_hop_limit(header);
            return;
        }
        // Nothing in an IPv6 header makes up for the change, so a checksum over the whole packet must follow it.
        let hop_limit = F::hop_limit(header) - 1;
        // SAFETY: a helper on the program's own context; the source is one byte on the stack.
        unsafe {
            helpers::bpf_skb_store_bytes(
                self.context.skb.skb,
                (offset + F::HOP_LIMIT) as u32,
                (&raw const hop_limit).cast(),
                1,
                u64::from(BPF_F_RECOMPUTE_CSUM),
            )
        };
    }
}
