//! What the programs tell while somebody watches: the records of the ring buffer `EVENTS`, and the entries of `WATCH` by which
//! they know that somebody does.

use crate::{
    addr::{Ipv6, Port},
    backend::BackendId,
};

/// Bytes of `EVENTS`: 3,640 records.
pub const ROOM: usize = 262_144;

/// Entries of `WATCH`.
pub mod watch {
    /// Low 32 bits of jiffies until which somebody watches; 0 when nobody ever did. Written by who watches, again and again: of one
    /// that was killed nothing is left to be cleaned up.
    pub const UNTIL: u32 = 0;
    /// Records for which there was no room. Written by the programs.
    pub const LOST: u32 = 1;
    /// How many there are.
    pub const ENTRIES: usize = 2;
}

/// One thing that happened to a packet or a socket. What has no name in the enums of this version is left out by who reads it,
/// who may be of another one: kinds are numbers here.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Event {
    /// Nanoseconds since the node was started (`CLOCK_BOOTTIME`).
    pub at: u64,
    /// Source, before any rewrite; an IPv4 address is mapped. Unspecified for a socket.
    pub saddr: Ipv6,
    /// Destination: what a socket named, or is bound to.
    pub daddr: Ipv6,
    /// Index of the Service port, if there is a backend.
    pub service: u32,
    /// The backend; 0 without one.
    pub backend: BackendId,
    /// [`crate::backend::Backend::generation`] of it.
    pub backend_generation: u32,
    /// Device the packet came in by, or leaves by; 0 where that is not at hand.
    pub ifindex: u32,
    /// Source port; 0 where there is none, or it was not understood.
    pub sport: Port,
    /// Destination port; the same.
    pub dport: Port,
    /// What the IP header calls what follows it.
    pub proto: u8,
    /// [`crate::outcome::Hook`]
    pub hook: u8,
    /// [`crate::outcome::Outcome`]
    pub outcome: u8,
    /// Of which family the tables are that have its Service and its backend: 4 or 6. 0 for what is no IP.
    pub family: u8,
}

impl Event {
    /// A record, if these bytes are as many as one has.
    pub const fn read(bytes: &[u8]) -> Option<Self> {
        if bytes.len() != size_of::<Self>() {
            return None;
        }
        // SAFETY: there are as many bytes as were just counted, and all that stands in a record is numbers.
        Some(unsafe { bytes.as_ptr().cast::<Self>().read_unaligned() })
    }
}

crate::no_padding!(Event: u64, Ipv6, Ipv6, u32, u32, u32, u32, Port, Port, u8, u8, u8, u8);
crate::map_type!(Event);

#[cfg(test)]
mod tests {
    use super::Event;

    #[test]
    fn a_record_is_read_of_its_bytes_and_of_no_others() {
        let mut bytes = [0_u8; size_of::<Event>() + 1];
        bytes[58..60].copy_from_slice(&[0x1f, 0x90]);
        let event = Event::read(&bytes[..size_of::<Event>()]).unwrap();
        assert_eq!(event.dport.number(), 8_080);
        assert_eq!(Event::read(&bytes), None);
        assert_eq!(Event::read(&bytes[1..1]), None);
    }
}
