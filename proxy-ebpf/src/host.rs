//! Whom a frame is for. Programs at a device see frames before the kernel drops those that are for other hosts: a switch floods
//! what it has not learnt yet, and a card in promiscuous mode takes everything.

use core::ffi::c_void;

use crate::{maps::LOCAL_MACS, packet::Packet, parse::Ethernet};

/// Of a MAC: it is that of many.
pub(crate) const GROUP: u8 = 1;

/// Whether a frame is addressed to a host, and not to this one.
#[inline(never)]
pub(crate) fn is_another<P: Packet>(context: *mut c_void) -> bool {
    if P::NETWORK == 0 {
        return false;
    }
    let packet = P::from_context(context);
    let Some(ethernet) = packet.at::<Ethernet>(0) else { return false };
    let dmac = ethernet.dmac;
    // SAFETY: entries are never written in place.
    dmac.octets[0] & GROUP == 0 && unsafe { LOCAL_MACS.get(&dmac) }.is_none()
}
