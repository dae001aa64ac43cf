//! VLAN tags. A tagged frame is what its VLAN's device would get: the tags name it, one after the other, and a frame of a VLAN
//! this node has no device for is passed on. For as long as it is looked at, the tags that stand in the frame are taken out; it
//! gets them back whatever becomes of it, because it goes up the kernel or back where it came from: what would leave by another
//! way has its way found by the kernel, which knows the tags of that one.

use proxy_common::{node::Vlan, outcome::Outcome};

use crate::{
    kernel::{forgotten, unknown_zero},
    maps::VLANS,
    packet::Packet,
    parse::{Ethernet, ethertype},
};

/// A tag as it stands in a frame: protocol and control information, in network order.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Tag {
    /// 802.1Q or 802.1ad.
    pub protocol: u16,
    /// Priority and number of the VLAN.
    pub control: u16,
}

impl Tag {
    /// None.
    pub(crate) const NONE: Self = Self { protocol: 0, control: 0 };

    /// Whether there is one.
    #[inline(always)]
    pub(crate) const fn is_some(self) -> bool {
        self.protocol != 0
    }

    /// The number of the VLAN, which stands below the priority.
    #[inline(always)]
    const fn number(self) -> u16 {
        u16::from_be(self.control) & 0x0fff
    }
}

/// The tags of a packet, and what is behind them.
pub struct Tags {
    /// The first on the wire.
    pub outer: Tag,
    /// The second.
    pub inner: Tag,
    /// What follows, in network order.
    pub ethertype: u16,
}

/// What a packet remembers of its tags: nothing if it had none. One number, and no more is known of it by the verifier, which
/// therefore looks once at what becomes of packets with and without.
#[derive(Clone, Copy)]
pub(crate) struct Memory(u64);

impl Memory {
    /// Of a packet without tags.
    pub(crate) const NOTHING: Self = Self(0);

    /// Of a packet without tags as well; at its beginning is a whole Ethernet header.
    #[inline(always)]
    pub(crate) fn nothing(packet: &Ethernet) -> Self {
        Self(unknown_zero(core::ptr::from_ref(packet) as usize))
    }

    /// Of tags that were taken out. The first may be none, if they are kept elsewhere.
    #[inline(always)]
    pub(crate) fn of(outer: Tag, inner: Tag) -> Self {
        const HAS_TAGS: u64 = 1 << 63;
        let word = |tag: Tag| u64::from(tag.protocol) | u64::from(tag.control) << 16;
        // What stands at the highest bit is one of a tag's control information: its protocol tells that there is one.
        Self(forgotten(word(outer) | word(inner) << 32 | if inner.is_some() { 0 } else { HAS_TAGS }))
    }

    /// As the number it is.
    #[inline(always)]
    pub(crate) const fn number(self) -> u64 {
        self.0
    }

    /// Whether there is anything to remember.
    #[inline(always)]
    pub(crate) const fn is_something(self) -> bool {
        self.0 != 0
    }

    /// The first tag.
    #[inline(always)]
    pub(crate) const fn outer(self) -> Tag {
        Tag { protocol: self.0 as u16, control: (self.0 >> 16) as u16 }
    }

    /// The second one.
    #[inline(always)]
    pub(crate) const fn inner(self) -> Tag {
        Tag { protocol: (self.0 >> 32) as u16, control: (self.0 >> 48) as u16 }
    }
}

/// Whether an ethertype, in network order, is that of a tag.
#[inline(always)]
pub(crate) const fn is_tag(number: u16) -> bool {
    number == ethertype::VLAN || number == ethertype::QINQ
}

/// Takes the tags out of a frame. What is left is the ethertype behind them, or 0 for a frame to be passed on; the
/// reason to be counted stands above it.
#[inline(never)]
pub(crate) fn enter<P: Packet>(packet: &mut P) -> u32 {
    const UNCOUNTED: u32 = 0;
    const COUNTED: u32 = (Outcome::PassVlan as u32) << 16;
    let Some(tags) = packet.tags() else { return COUNTED };
    let Some(outer) = device(packet.ifindex(), tags.outer) else { return COUNTED };
    if tags.inner.is_some() && device(outer, tags.inner).is_none() {
        return COUNTED;
    }
    if tags.ethertype != ethertype::IPV4 && tags.ethertype != ethertype::IPV6 {
        return UNCOUNTED;
    }
    if packet.take_tags(&tags) { tags.ethertype.into() } else { COUNTED }
}

/// The device of a VLAN on another device. A tag with number 0 has a priority only, and is the other device's.
#[inline(always)]
fn device(parent: u32, tag: Tag) -> Option<u32> {
    if tag.number() == 0 {
        return Some(parent);
    }
    // SAFETY: entries are replaced, never written in place.
    unsafe { VLANS.get(&Vlan { parent, protocol: tag.protocol, number: tag.number() }) }.copied()
}
