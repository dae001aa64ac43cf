//! Fragments for tests: a packet cut as RFC 791 and RFC 8200 have it, and put together again. Nothing here shares code with
//! the datapath.
#![expect(clippy::missing_panics_doc, reason = "a fixture speaks by failing the test")]

use crate::frame::{ETHERNET, Frame};

/// Length of an IP header, of a packet that begins with an Ethernet header.
fn internet(bytes: &[u8]) -> usize {
    if bytes[12..14] == [8, 0] { 20 } else { 40 }
}

/// Writes the checksum of an IPv4 header.
pub fn seal(bytes: &mut [u8]) {
    bytes[24..26].fill(0);
    let header = etherparse::Ipv4HeaderSlice::from_slice(&bytes[14..34]).expect("an IPv4 header").to_header();
    bytes[24..26].copy_from_slice(&header.calc_header_checksum().to_be_bytes());
}

/// One fragment of a packet: the bytes behind its IP header from `offset` on, at most `length` of them. Offsets and lengths
/// are multiples of eight, but for the last length.
pub fn fragment(packet: &[u8], id: u16, offset: usize, length: usize) -> Vec<u8> {
    let (head, body) = packet.split_at(ETHERNET + internet(packet));
    let end = body.len().min(offset + length);
    let (piece, more, place) = (&body[offset..end], end < body.len(), (offset / 8) as u16);
    let mut bytes = head.to_vec();
    if internet(packet) == 20 {
        bytes[16..18].copy_from_slice(&(20 + piece.len() as u16).to_be_bytes());
        bytes[18..20].copy_from_slice(&id.to_be_bytes());
        bytes[20..22].copy_from_slice(&(place | if more { 0x2000 } else { 0 }).to_be_bytes());
        seal(&mut bytes);
    } else {
        let next = std::mem::replace(&mut bytes[20], 44);
        bytes[18..20].copy_from_slice(&(8 + piece.len() as u16).to_be_bytes());
        bytes.extend([next, 0]);
        bytes.extend((place << 3 | u16::from(more)).to_be_bytes());
        bytes.extend([0, 1]);
        bytes.extend(id.to_be_bytes());
    }
    bytes.extend(piece);
    bytes
}

/// All fragments of a packet, with so many bytes in each.
pub fn cut(packet: &[u8], id: u16, length: usize) -> Vec<Vec<u8>> {
    let body = packet.len() - ETHERNET - internet(packet);
    (0..body).step_by(length).map(|offset| fragment(packet, id, offset, length)).collect()
}

/// Puts fragments that are in order together again and reads the packet, with all its checksums.
pub fn reassemble(fragments: &[Vec<u8>]) -> Frame {
    let header = internet(&fragments[0]);
    let extra = if header == 20 { 0 } else { 8 };
    let mut bytes = fragments[0][..ETHERNET + header].to_vec();
    for fragment in fragments {
        assert_eq!(fragment[26..ETHERNET + header], bytes[26..], "all have the same addresses");
        if header == 20 {
            let slice = etherparse::Ipv4HeaderSlice::from_slice(&fragment[14..34]).expect("an IPv4 header");
            assert_eq!(slice.header_checksum(), slice.to_header().calc_header_checksum(), "checksum of a fragment");
        }
    }
    let body: Vec<u8> = fragments.iter().flat_map(|fragment| fragment[ETHERNET + header + extra..].to_vec()).collect();
    if header == 20 {
        bytes[16..18].copy_from_slice(&(20 + body.len() as u16).to_be_bytes());
        bytes[18..22].fill(0);
        seal(&mut bytes);
    } else {
        bytes[18..20].copy_from_slice(&(body.len() as u16).to_be_bytes());
        bytes[20] = fragments[0][54];
    }
    bytes.extend(body);
    Frame::read(&bytes)
}
