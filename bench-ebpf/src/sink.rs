//! The end of the road: counts frames. Those of IPv4, which no kernel sends unasked.

use crate::{maps::ARRIVED, packet::Packet, wire::Ethernet};

/// Counts a frame.
#[inline(always)]
pub fn count<P: Packet>(packet: &P) {
    let Some(ethernet) = packet.at::<Ethernet>(0) else { return };
    if u16::from_be(ethernet.ethertype) != 0x0800 {
        return;
    }
    let Some(arrived) = ARRIVED.get_ptr_mut(0) else { return };
    // SAFETY: the pointer is to this CPU's own value, which stays as long as the map.
    unsafe { *arrived += 1 };
}
