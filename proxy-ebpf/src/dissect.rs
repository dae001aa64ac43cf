//! Understands bytes as the programs do, on the host and without a kernel: what a fuzzer of the parser runs. In go the bytes
//! of a frame; out comes what the programs would take it for.

use core::{ffi::c_void, slice};

use proxy_common::outcome::Outcome;

use crate::{
    family::{Family, V4, V6},
    packet::Packet,
    parse::{Ethernet, Summed, Tcp, Transport, Udp, ethertype},
    vlan::Tags,
};

/// What a frame is taken for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dissected {
    /// Where its transport header begins.
    pub transport: usize,
    /// Where the packet ends.
    pub end: usize,
    /// Source and destination port.
    pub ports: (u16, u16),
}

/// Bytes in memory. They begin two bytes behind a whole word, so that an IP header begins at one: the host's references must
/// be aligned, which BPF's need not be.
pub struct Bytes {
    room: Vec<u64>,
    length: usize,
}

const SHIFT: usize = 2;

impl Bytes {
    /// A copy.
    pub fn new(bytes: &[u8]) -> Self {
        let mut frame = Self { room: vec![0; (bytes.len() + SHIFT).div_ceil(8) + 1], length: bytes.len() };
        frame.as_mut().copy_from_slice(bytes);
        frame
    }

    fn as_mut(&mut self) -> &mut [u8] {
        // SAFETY: the room is that long, and two bytes longer.
        let start = unsafe { self.room.as_mut_ptr().cast::<u8>().add(SHIFT) };
        // SAFETY: as above, and all of it is written.
        unsafe { slice::from_raw_parts_mut(start, self.length) }
    }
}

impl Packet for Bytes {
    const IS_FRAME: bool = true;
    const NETWORK: usize = size_of::<Ethernet>();

    fn from_context(_: *mut c_void) -> Self {
        Self::new(&[])
    }

    fn linearize(&mut self, _: usize) {}

    fn data(&self) -> usize {
        self.room.as_ptr().expose_provenance() + SHIFT
    }

    fn data_end(&self) -> usize {
        self.data() + self.length
    }

    fn holds(&self, length: usize) -> bool {
        length <= self.length
    }

    fn segment(&self) -> u32 {
        0
    }

    fn ifindex(&self) -> u32 {
        0
    }

    fn context(&self) -> *mut c_void {
        core::ptr::null_mut()
    }

    fn cut(&mut self, length: usize) -> bool {
        self.length = self.length.min(length);
        true
    }

    fn make_room(&mut self, _: usize) -> bool {
        false
    }

    fn wrap<F: Family>(&mut self) -> bool {
        false
    }

    fn mend_checksum<F: Family, L: Summed>(&mut self, _: &mut u16, _: usize, _: u16, _: u16) -> bool {
        true
    }

    fn account(&mut self, _: u16) {}

    fn decrement_hop_limit<F: Family>(&mut self, _: usize) {}

    fn forget_tags(&mut self, _: &Ethernet) {}

    fn has_hidden_tag(&self) -> bool {
        false
    }

    fn tags(&self) -> Option<Tags> {
        None
    }

    fn take_tags(&mut self, _: &Tags) -> bool {
        false
    }

    fn put_tags_back(&mut self) -> bool {
        true
    }

    fn memory(&self) -> u64 {
        0
    }
}

/// What the programs take a frame for, if they understand it. Tags and fragments are for others.
pub fn dissect(bytes: &[u8]) -> Option<Dissected> {
    let mut packet = Bytes::new(bytes);
    match packet.at::<Ethernet>(0)?.ethertype {
        ethertype::IPV4 => internet::<V4>(&mut packet),
        ethertype::IPV6 => internet::<V6>(&mut packet),
        _ => None,
    }
}

fn internet<F: Family>(packet: &mut Bytes) -> Option<Dissected> {
    let header = packet.at::<F::Header>(Bytes::NETWORK)?;
    let (protocol, transport, end) = match F::payload(header) {
        Ok(payload) => {
            let start = Bytes::NETWORK + size_of::<F::Header>();
            (payload.protocol, start, start + usize::from(payload.length))
        }
        Err(Outcome::PassMalformed) => return None,
        Err(_) => F::walk(packet).ok().map(|walked| (walked.protocol, walked.offset, walked.end))?,
    };
    let length = u16::try_from(end.checked_sub(transport)?).ok()?;
    if !packet.holds(end) {
        return None;
    }
    let ports = match protocol {
        6 => ports::<Tcp>(packet, transport, length)?,
        17 => ports::<Udp>(packet, transport, length)?,
        _ => return None,
    };
    Some(Dissected { transport, end, ports })
}

fn ports<L: Transport>(packet: &Bytes, start: usize, length: u16) -> Option<(u16, u16)> {
    let header = packet.at::<L::Header>(start).filter(|header| L::is_sound(packet, header, start, length))?;
    let (sport, dport) = L::ports(header);
    Some((sport.number(), dport.number()))
}

#[cfg(test)]
mod tests {
    use super::{Dissected, dissect};

    fn datagram() -> Vec<u8> {
        let mut frame = vec![0; 14 + 20 + 8];
        frame[12] = 0x08;
        frame[14] = 0x45;
        frame[17] = 28;
        frame[23] = 17;
        frame[34..40].copy_from_slice(&[0, 53, 0x30, 0x39, 0, 8]);
        frame
    }

    #[test]
    fn a_datagram_is_understood_and_no_part_of_it_is() {
        let frame = datagram();
        assert_eq!(dissect(&frame), Some(Dissected { transport: 34, end: 42, ports: (53, 12_345) }));
        for length in 0..frame.len() {
            assert_eq!(dissect(&frame[..length]), None, "{length} bytes");
        }
    }

    #[test]
    fn options_are_passed_by() {
        let mut frame = datagram();
        (frame[14], frame[17]) = (0x46, 32);
        frame.splice(34..34, [148, 4, 0, 0]);
        assert_eq!(dissect(&frame), Some(Dissected { transport: 38, end: 46, ports: (53, 12_345) }));
    }

    #[test]
    fn what_is_understood_lies_in_the_frame_whatever_a_byte_says() {
        for at in 0..datagram().len() {
            for value in 0..=u8::MAX {
                let mut frame = datagram();
                frame[at] = value;
                if let Some(found) = dissect(&frame) {
                    assert!(found.transport + 8 <= found.end && found.end <= frame.len(), "byte {at} is {value}");
                }
            }
        }
    }
}
