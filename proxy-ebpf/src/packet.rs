//! A packet under our hands: bounds-checked views of it, and the ways to change it. `XdpPacket` is plain memory;
//! `TcPacket` leaves transport checksums to the kernel's helpers, because an skb's may be partial.

use aya_ebpf::{
    EbpfContext as _,
    bindings::{
        BPF_F_ADJ_ROOM_ENCAP_L3_IPV4, BPF_F_ADJ_ROOM_ENCAP_L3_IPV6, BPF_F_ADJ_ROOM_FIXED_GSO, BPF_F_MARK_MANGLED_0,
        BPF_F_PSEUDO_HDR, BPF_F_RECOMPUTE_CSUM, bpf_adj_room_mode::BPF_ADJ_ROOM_MAC,
    },
    helpers::generated as helpers,
    programs::{TcContext, XdpContext},
};
use core::{ffi::c_void, mem};

use proxy_common::{addr::Mac, flow::NextHop};

use crate::{
    checksum,
    family::Family,
    parse::{Ethernet, Summed},
    vlan::{self, Memory, Tag, Tags},
};

/// `BPF_F_IPV6` of `bpf_l4_csum_replace`: an IPv6 address change does not alter a checksum over the whole packet.
/// Kernel 6.16, commit ead7f9b8de65 ("bpf: Fix L4 csum update on IPv6 in `CHECKSUM_COMPLETE`"); refused by older ones.
const BPF_F_IPV6: u64 = 128;

/// `gso_size` of what is to be cut up where its pieces end, which must not be pulled into one: SCTP. Its headers are in one
/// piece.
const GSO_BY_FRAGS: usize = 0xffff;

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

/// A number that is no larger than a mask of ones: said where the compiler cannot see that it knew. Verifiers of 6.12 and before
/// forget what they knew of a number when its bytes are swapped, and let nothing without bounds be added to a pointer.
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

/// Length of an Ethernet header without tags.
pub const ETHERNET: usize = size_of::<Ethernet>();

/// More than headers and what an IP header says follows them.
const LONGEST: usize = 0x1_ffff;

/// What the datapath needs of a packet.
pub trait Packet {
    /// A frame without an skb: it can only leave by devices that take such.
    const IS_FRAME: bool;

    /// Where the IP header stands: behind that of the link, which a device may not have.
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

    /// Views of the link-layer addresses and of the IP header, by one comparison: `None` also where there are no such addresses. As
    /// for [`Self::at`], no other view may be written through while they live.
    #[inline(always)]
    fn frame<H>(&self) -> Option<(&'static mut Macs, &'static mut H)> {
        let start = self.data();
        if Self::NETWORK == 0 || start + Self::NETWORK + size_of::<H>() > self.data_end() {
            return None;
        }
        // SAFETY: as in `at`.
        unsafe { core::hint::assert_unchecked(start != 0) };
        // SAFETY: both lie before what was just found to be inside the packet, and do not overlap.
        let macs = unsafe { &mut *(start as *mut Macs) };
        // SAFETY: as above.
        let header = unsafe { &mut *((start + Self::NETWORK) as *mut H) };
        Some((macs, header))
    }

    /// Whether the packet has at least `length` bytes.
    fn holds(&self, length: usize) -> bool;

    /// Whether that many can be read: a frame may have more in other pages.
    #[inline(always)]
    fn shows(&self, length: usize) -> bool {
        // By comparison of pointers: their difference is not for programs without CAP_PERFMON.
        self.data() + bounded::<LONGEST>(length) <= self.data_end()
    }

    /// Begins without any tags, but does not tell the verifier.
    fn forget_tags(&mut self, ethernet: &Ethernet);

    /// Whether it has tags that do not stand in the frame.
    fn has_hidden_tag(&self) -> bool;

    /// All tags, if there are no more than two and they are whole.
    fn tags(&self) -> Option<Tags>;

    /// Takes those out that stand in the frame. Views are stale after it.
    fn take_tags(&mut self, tags: &Tags) -> bool;

    /// Puts in again what was taken out. Views are stale after it.
    fn put_tags_back(&mut self) -> bool;

    /// What is remembered of the tags it had, of whatever kind, when it came: 0 without any.
    fn memory(&self) -> u64;

    /// Whether it had tags when it came.
    #[inline(always)]
    fn is_tagged(&self) -> bool {
        self.memory() != 0
    }

    /// How many bytes behind its headers each segment has of a packet that will be cut into segments; 0 for any other.
    fn segment(&self) -> u32;

    /// Device it came in by (or, on the way out, leaves by).
    fn ifindex(&self) -> u32;

    /// The context, for helpers.
    fn context(&self) -> *mut c_void;

    /// The same, loaded from where the packet stands: for a rare way, so that no usual one has to keep it at hand.
    #[inline(always)]
    fn stored_context(&self) -> *mut c_void {
        self.context()
    }

    /// Cuts it off after `length` bytes, of which it has at least as many. What was to be segmented later is not any more.
    /// Views are stale after it.
    fn cut(&mut self, length: usize) -> bool;

    /// Makes room for that many bytes between the Ethernet header and what follows it, in which anything may be: in the
    /// Ethernet header too. Views are stale after it.
    fn make_room(&mut self, length: usize) -> bool;

    /// Makes room for another IP header before the one it has, as [`Self::make_room`] does. Of what will be cut up later every
    /// segment gets one, and is shorter by it.
    fn wrap<F: Family>(&mut self) -> bool;

    /// Mends the transport checksum at `offset` for a change of addresses and ports that was made. Views are stale after it.
    fn mend_checksum<F: Family, L: Summed>(
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
    tags: Memory,
    ingress: u32,
}

impl XdpPacket {
    /// Takes the context of an XDP program.
    #[inline(always)]
    pub fn new(context: XdpContext) -> Self {
        // Read once: the kernel follows three pointers for it.
        let ingress = context_word!(context.ctx, aya_ebpf::bindings::xdp_md, ingress_ifindex) as u32;
        Self { context, tags: Memory::NOTHING, ingress }
    }

    /// Of all its parts, and asked for, as the difference of two pointers is not for every program.
    #[inline(always)]
    fn length(&self) -> usize {
        // SAFETY: a helper on the program's own context.
        (unsafe { helpers::bpf_xdp_get_buff_len(self.context.ctx) }) as usize
    }
}

/// The addresses of an Ethernet header, which stand before all tags: destination, source.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Macs([u32; 3]);

const _: () = assert!(
    mem::offset_of!(NextHop, smac) == mem::offset_of!(NextHop, dmac) + size_of::<Mac>()
        && mem::offset_of!(NextHop, dmac).is_multiple_of(align_of::<Macs>())
        && align_of::<NextHop>() == align_of::<Macs>()
        && size_of::<Macs>() == 2 * size_of::<Mac>()
);

impl Macs {
    /// Those of a frame for a next hop: three words, where the compiler would copy halves of such.
    #[inline(always)]
    pub(crate) fn of(next_hop: &NextHop) -> Self {
        let addresses = core::ptr::from_ref(next_hop).cast::<Self>().wrapping_byte_add(mem::offset_of!(NextHop, dmac));
        // SAFETY: the two addresses follow each other there, at a word's boundary.
        unsafe { *addresses }
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
        self.shows(length) || length <= self.length()
    }

    #[inline(always)]
    fn forget_tags(&mut self, ethernet: &Ethernet) {
        self.tags = Memory::nothing(ethernet);
    }

    #[inline(always)]
    fn has_hidden_tag(&self) -> bool {
        false
    }

    #[inline(always)]
    fn tags(&self) -> Option<Tags> {
        standing_tags(self, Tag::NONE)
    }

    #[inline(always)]
    fn take_tags(&mut self, tags: &Tags) -> bool {
        let length = if tags.inner.is_some() { 2 * size_of::<Tag>() } else { size_of::<Tag>() };
        let Some(macs) = self.at::<Macs>(0) else { return false };
        let macs = *macs;
        // SAFETY: a helper on the program's own context.
        if (unsafe { helpers::bpf_xdp_adjust_head(self.context.ctx, length as i32) }) != 0 {
            return false;
        }
        self.tags = Memory::of(tags.outer, tags.inner);
        let Some(place) = self.at::<Macs>(0) else { return false };
        *place = macs;
        true
    }

    #[inline(always)]
    fn put_tags_back(&mut self) -> bool {
        !self.tags.is_something() || put_back(self.context.ctx.cast(), self.tags)
    }

    #[inline(always)]
    fn memory(&self) -> u64 {
        self.tags.number()
    }

    #[inline(always)]
    fn segment(&self) -> u32 {
        0
    }

    #[inline(always)]
    fn ifindex(&self) -> u32 {
        self.ingress
    }

    #[inline(always)]
    fn context(&self) -> *mut c_void {
        self.context.as_ptr()
    }

    #[inline(always)]
    fn stored_context(&self) -> *mut c_void {
        // SAFETY: a field of a live packet.
        unsafe { (&raw const self.context.ctx).read_volatile() }.cast()
    }

    #[inline(always)]
    fn cut(&mut self, length: usize) -> bool {
        let change = length as i32 - self.length() as i32;
        // SAFETY: a helper on the program's own context.
        (unsafe { helpers::bpf_xdp_adjust_tail(self.context.ctx, change) }) == 0
    }

    #[inline(always)]
    fn make_room(&mut self, length: usize) -> bool {
        // SAFETY: a helper on the program's own context.
        (unsafe { helpers::bpf_xdp_adjust_head(self.context.ctx, -(length as i32)) }) == 0
    }

    #[inline(always)]
    fn wrap<F: Family>(&mut self) -> bool {
        self.make_room(size_of::<F::Header>())
    }

    #[inline(always)]
    fn mend_checksum<F: Family, L: Summed>(&mut self, field: &mut u16, _: usize, addresses: u16, ports: u16) -> bool {
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

/// Puts tags into a frame again that they were taken out of.
#[inline(never)]
fn put_back(context: *mut c_void, tags: Memory) -> bool {
    let (outer, inner) = (tags.outer(), tags.inner());
    let packet = XdpPacket::from_context(context);
    let length = if inner.is_some() { 2 * size_of::<Tag>() } else { size_of::<Tag>() };
    let Some(macs) = packet.at::<Macs>(0) else { return false };
    let macs = *macs;
    // SAFETY: a helper on the program's own context.
    if (unsafe { helpers::bpf_xdp_adjust_head(packet.context.ctx, -(length as i32)) }) != 0 {
        return false;
    }
    let Some(place) = packet.at::<Macs>(0) else { return false };
    *place = macs;
    let Some(first) = packet.at::<Tag>(size_of::<Macs>()) else { return false };
    *first = outer;
    if inner.is_some() {
        let Some(second) = packet.at::<Tag>(size_of::<Macs>() + size_of::<Tag>()) else { return false };
        *second = inner;
    }
    true
}

/// The tags of a packet whose first may be hidden.
#[inline(always)]
fn standing_tags<P: Packet>(packet: &P, hidden: Tag) -> Option<Tags> {
    let first = *packet.at::<Tag>(size_of::<Macs>())?;
    if !vlan::is_tag(first.protocol) {
        return Some(Tags { outer: hidden, inner: Tag::NONE, ethertype: first.protocol });
    }
    let second = *packet.at::<Tag>(size_of::<Macs>() + size_of::<Tag>())?;
    if !vlan::is_tag(second.protocol) {
        let (outer, inner) = if hidden.is_some() { (hidden, first) } else { (first, Tag::NONE) };
        return Some(Tags { outer, inner, ethertype: second.protocol });
    }
    let third = *packet.at::<u16>(size_of::<Macs>() + 2 * size_of::<Tag>())?;
    let has_more = hidden.is_some() || vlan::is_tag(third);
    (!has_more).then_some(Tags { outer: first, inner: second, ethertype: third })
}

/// An skb. It begins with an IP header where the device has none of its own.
pub struct TcPacket<const NETWORK: usize = ETHERNET> {
    context: TcContext,
    tags: Memory,
}

impl<const NETWORK: usize> TcPacket<NETWORK> {
    /// Takes the context of a classifier.
    #[inline(always)]
    pub const fn new(context: TcContext) -> Self {
        Self { context, tags: Memory::NOTHING }
    }

    #[inline(always)]
    fn length(&self) -> usize {
        context_word!(self.context.skb.skb, aya_ebpf::bindings::__sk_buff, len)
    }

    #[inline(always)]
    fn gso_size(&self) -> usize {
        context_word!(self.context.skb.skb, aya_ebpf::bindings::__sk_buff, gso_size)
    }
}

impl<const NETWORK: usize> Packet for TcPacket<NETWORK> {
    const IS_FRAME: bool = false;
    const NETWORK: usize = NETWORK;

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
        if self.data() + wanted > self.data_end() && self.gso_size() != GSO_BY_FRAGS {
            // SAFETY: a helper on the program's own context. A failure shows in the next bounds check.
            unsafe { helpers::bpf_skb_pull_data(self.context.skb.skb, wanted as u32) };
        }
    }

    #[inline(always)]
    fn holds(&self, length: usize) -> bool {
        length <= self.length()
    }

    #[inline(always)]
    fn segment(&self) -> u32 {
        context_word!(self.context.skb.skb, aya_ebpf::bindings::__sk_buff, gso_size) as u32
    }

    #[inline(always)]
    fn forget_tags(&mut self, ethernet: &Ethernet) {
        self.tags = Memory::nothing(ethernet);
    }

    #[inline(always)]
    fn has_hidden_tag(&self) -> bool {
        context_word!(self.context.skb.skb, aya_ebpf::bindings::__sk_buff, vlan_present) != 0
    }

    #[inline(always)]
    fn tags(&self) -> Option<Tags> {
        let hidden = if self.has_hidden_tag() {
            Tag {
                protocol: context_word!(self.context.skb.skb, aya_ebpf::bindings::__sk_buff, vlan_proto) as u16,
                control: (context_word!(self.context.skb.skb, aya_ebpf::bindings::__sk_buff, vlan_tci) as u16).to_be(),
            }
        } else {
            Tag::NONE
        };
        standing_tags(self, hidden)
    }

    /// Of two tags the first is hidden after it, whether it was before or not; the kernel puts it before the second.
    #[inline(always)]
    fn take_tags(&mut self, tags: &Tags) -> bool {
        let is_hidden = self.has_hidden_tag() && !tags.inner.is_some();
        self.tags = Memory::of(if is_hidden { Tag::NONE } else { tags.outer }, Tag::NONE);
        // SAFETY: a helper on the program's own context.
        is_hidden || unsafe { helpers::bpf_skb_vlan_pop(self.context.skb.skb) } == 0
    }

    #[inline(always)]
    fn put_tags_back(&mut self) -> bool {
        let Tag { protocol, control } = self.tags.outer();
        // SAFETY: a helper on the program's own context.
        protocol == 0
            || unsafe { helpers::bpf_skb_vlan_push(self.context.skb.skb, protocol, u16::from_be(control)) } == 0
    }

    #[inline(always)]
    fn memory(&self) -> u64 {
        self.tags.number()
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
    fn stored_context(&self) -> *mut c_void {
        // SAFETY: a field of a live packet.
        unsafe { (&raw const self.context.skb.skb).read_volatile() }.cast()
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
    fn wrap<F: Family>(&mut self) -> bool {
        let kind = if F::IS_V6 { BPF_F_ADJ_ROOM_ENCAP_L3_IPV6 } else { BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 };
        let (skb, length) = (self.context.skb.skb, size_of::<F::Header>() as i32);
        // Segments of TCP may be made shorter, datagrams that will be cut apart may not.
        // SAFETY: a helper on the program's own context.
        (unsafe { helpers::bpf_skb_adjust_room(skb, length, BPF_ADJ_ROOM_MAC, kind.into()) }) == 0
            // SAFETY: as above.
            || (unsafe {
                let fixed = u64::from(kind | BPF_F_ADJ_ROOM_FIXED_GSO);
                helpers::bpf_skb_adjust_room(skb, length, BPF_ADJ_ROOM_MAC, fixed)
            }) == 0
    }

    #[inline(always)]
    fn mend_checksum<F: Family, L: Summed>(&mut self, _: &mut u16, offset: usize, addresses: u16, ports: u16) -> bool {
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
