//! What may stand around an IP header: VLAN tags before it, IPv4 options and IPv6 extension headers behind it, put into frames.
#![expect(clippy::missing_panics_doc, clippy::expect_used, reason = "a fixture speaks by failing the test")]

use crate::frame::{ETHERNET, Family};

/// IPv6's hop-by-hop options.
pub const HOP_BY_HOP: u8 = 0;
/// IPv6's routing header.
pub const ROUTING: u8 = 43;
/// IPv6's fragment header.
pub const FRAGMENT: u8 = 44;
/// IPv6's destination options.
pub const DESTINATION: u8 = 60;

/// Something to put there.
#[derive(Clone, Debug)]
pub enum Between {
    /// IPv4 options, a multiple of four bytes.
    Options(Vec<u8>),
    /// IPv6 extension headers: the number of each, and what follows its next header and its length.
    Extensions(Vec<(u8, Vec<u8>)>),
}

/// Options that do nothing, as many bytes as there have to be.
pub fn padding(length: usize) -> Vec<u8> {
    let mut bytes = vec![1, length as u8 - 2];
    bytes.resize(length, 0);
    bytes
}

impl Between {
    /// What hosts send, by name, for a family.
    pub fn usual(family: Family) -> Vec<(&'static str, Self)> {
        let extensions = |list: &[(u8, usize)]| {
            Self::Extensions(list.iter().map(|(number, length)| (*number, padding(*length))).collect())
        };
        match family {
            Family::V4 => vec![
                ("router alert", Self::Options(vec![148, 4, 0, 0])),
                ("nothing but nothing", Self::Options(vec![1; 40])),
                ("record route and its end", Self::Options([vec![1, 7, 35, 4], vec![0; 32], vec![0; 4]].concat())),
                ("what stands behind the end", Self::Options(vec![0, 131, 3, 4])),
                ("a timestamp that looks like a route", Self::Options(vec![68, 8, 9, 0, 131, 3, 4, 137])),
            ],
            Family::V6 => vec![
                ("hop-by-hop options", extensions(&[(HOP_BY_HOP, 6)])),
                ("a routing header without segments", Self::Extensions(vec![(ROUTING, vec![2, 0, 0, 0, 0, 0])])),
                ("long destination options", extensions(&[(DESTINATION, 254)])),
                ("three of them", extensions(&[(HOP_BY_HOP, 14), (DESTINATION, 6), (DESTINATION, 22)])),
                ("as many as are looked through", extensions(&[(DESTINATION, 6); 6])),
            ],
        }
    }

    /// The frame with these in it; its lengths and the checksum of its header follow.
    #[must_use]
    pub fn put_into(&self, frame: &[u8]) -> Vec<u8> {
        let mut bytes = frame.to_vec();
        match self {
            Self::Options(options) => {
                bytes[14] = 0x45 + (options.len() / 4) as u8;
                let total = u16::from_be_bytes([bytes[16], bytes[17]]) + options.len() as u16;
                bytes[16..18].copy_from_slice(&total.to_be_bytes());
                bytes.splice(34..34, options.iter().copied());
                sum_up(&mut bytes);
            }
            Self::Extensions(list) => {
                let mut next = bytes[20];
                let mut headers = Vec::new();
                for (number, rest) in list.iter().rev() {
                    let length = ((rest.len() + 2) / 8 - 1) as u8;
                    headers = [[next, length].as_slice(), rest, &headers].concat();
                    next = *number;
                }
                bytes[20] = next;
                let payload = u16::from_be_bytes([bytes[18], bytes[19]]) + headers.len() as u16;
                bytes[18..20].copy_from_slice(&payload.to_be_bytes());
                bytes.splice(54..54, headers);
            }
        }
        bytes
    }
}

/// Computes the checksum of an IPv4 header anew.
pub fn sum_up(frame: &mut [u8]) {
    frame[24..26].fill(0);
    let header = etherparse::Ipv4HeaderSlice::from_slice(&frame[ETHERNET..]).expect("an IPv4 header").to_header();
    frame[24..26].copy_from_slice(&header.calc_header_checksum().to_be_bytes());
}

/// The frame with VLAN tags before its ethertype, the first on the wire first.
#[must_use]
pub fn tagged(frame: &[u8], tags: &[[u8; 4]]) -> Vec<u8> {
    [&frame[..12], tags.concat().as_slice(), &frame[12..]].concat()
}
