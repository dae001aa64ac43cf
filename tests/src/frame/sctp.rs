//! SCTP packets of one chunk, with the checksum over all of it from another implementation of CRC32c than the datapath's.

/// A kind of chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk(pub u8);

impl Chunk {
    /// Carries text.
    pub const DATA: Self = Self(0);
    /// Opens.
    pub const INIT: Self = Self(1);
    /// Opens back.
    pub const INIT_ACK: Self = Self(2);
    /// Asks whether somebody is there.
    pub const HEARTBEAT: Self = Self(4);
    /// Ends at once.
    pub const ABORT: Self = Self(6);
    /// Ends.
    pub const SHUTDOWN: Self = Self(7);
    /// Ends, too.
    pub const SHUTDOWN_ACK: Self = Self(8);
    /// Proves that the INIT ACK arrived.
    pub const COOKIE_ECHO: Self = Self(10);
    /// Says that the association is open.
    pub const COOKIE_ACK: Self = Self(11);
    /// The last word.
    pub const SHUTDOWN_COMPLETE: Self = Self(14);
}

/// The tag of built packets.
pub const TAG: [u8; 4] = [0x5c, 0x7b, 1, 2];

/// Where the checksum stands.
const CHECKSUM: std::ops::Range<usize> = 8..12;
/// Where the chunk begins.
const FIRST: usize = 12;

/// A packet of one chunk; what it holds is padded to four bytes.
pub(super) fn packet(sport: u16, dport: u16, Chunk(kind): Chunk, body: &[u8]) -> Vec<u8> {
    let mut bytes = [sport.to_be_bytes(), dport.to_be_bytes()].concat();
    bytes.extend(TAG);
    bytes.extend([0; 4]);
    bytes.extend([kind, 0]);
    bytes.extend((4 + body.len() as u16).to_be_bytes());
    bytes.extend(body);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    let sum = checksum(&bytes);
    bytes[CHECKSUM].copy_from_slice(&sum);
    bytes
}

/// RFC 9260 appendix A: over everything, with zeros in its own place; low byte first.
pub fn checksum(packet: &[u8]) -> [u8; 4] {
    let mut packet = packet.to_vec();
    packet[CHECKSUM].fill(0);
    crc32c::crc32c(&packet).to_le_bytes()
}

/// Ports, the chunk and what it holds, after the checksum was computed anew.
pub(super) fn read(packet: &[u8]) -> (u16, u16, Chunk, &[u8]) {
    assert_eq!(packet[CHECKSUM], checksum(packet), "checksum of SCTP");
    let word = |at: usize| u16::from_be_bytes([packet[at], packet[at + 1]]);
    let end = FIRST + usize::from(word(FIRST + 2));
    (word(0), word(2), Chunk(packet[FIRST]), &packet[FIRST + 4..end])
}
