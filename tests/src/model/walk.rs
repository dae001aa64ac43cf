//! What stands around an IP header: VLAN tags before it, IPv4 options and IPv6 extension headers behind it.

use proxy_common::outcome::Outcome;

use super::wire::{ETHERNET, Header, Payload, half};

/// Number of IPv6's fragment header, which stands for any fragment.
pub(super) const FRAGMENT: u8 = 44;
/// The most extension headers that are looked through, and where the last one may end.
const MOST: usize = 6;
const END: usize = 0x7ff;

/// What a frame's tags say.
pub(super) enum Tagged {
    /// It has none.
    No,
    /// It is of a VLAN, and no device of the node is: there are none here. Or it has tags beyond counting.
    Foreign,
    /// It has a priority, and is of no VLAN.
    Priority,
}

/// Looks at the tags of a frame.
pub(super) fn tags(bytes: &[u8]) -> Tagged {
    let is_tag = |at| matches!(half(bytes, at), Some(0x8100 | 0x88a8));
    if !is_tag(12) {
        return Tagged::No;
    }
    let numbers: Vec<u16> = [12, 16]
        .into_iter()
        .take_while(|at| is_tag(*at))
        .map(|at| half(bytes, at + 2).map_or(1, |control| control & 0x0fff))
        .collect();
    if numbers.iter().any(|number| *number != 0) || is_tag(20) { Tagged::Foreign } else { Tagged::Priority }
}

/// Goes on to what is behind options or extension headers, or to the header of a fragment.
pub(super) fn walk(bytes: &[u8], ip: &Header) -> Result<Payload, Outcome> {
    let (protocol, start, end) = if ip.is_v4 { options(bytes, ip)? } else { extensions(bytes, ip)? };
    if !ip.is_v4 && start > END - 8 {
        return Err(Outcome::PassExtension);
    }
    match end.checked_sub(start) {
        Some(length) if end <= bytes.len() => Ok(Payload { protocol, start, length }),
        _ => Err(Outcome::PassMalformed),
    }
}

/// Options end, do nothing, or say how long they are. A route that is still to be taken is no affair of ours.
fn options(bytes: &[u8], ip: &Header) -> Result<(u8, usize, usize), Outcome> {
    let byte = |at: usize| bytes.get(at).copied().ok_or(Outcome::PassMalformed);
    let end = ETHERNET + ip.size_with_options();
    let mut at = ETHERNET + ip.size();
    while at < end {
        match byte(at)? {
            0 => break,
            1 => at += 1,
            131 | 137 => return Err(Outcome::PassOptions),
            _ => {
                let length = usize::from(byte(at + 1)?);
                at += length;
                if length < 2 || at > end {
                    return Err(Outcome::PassMalformed);
                }
            }
        }
    }
    let protocol = if ip.is_fragment() { FRAGMENT } else { ip.protocol() };
    Ok((protocol, end, ETHERNET + ip.length()))
}

/// Hop-by-hop options come first; routing headers without segments left and destination options are passed by. No frame is a
/// jumbogram.
fn extensions(bytes: &[u8], ip: &Header) -> Result<(u8, usize, usize), Outcome> {
    let start = ETHERNET + ip.size();
    let (mut protocol, mut at) = (ip.protocol(), start);
    if ip.length() == 0 {
        return Err(Outcome::PassMalformed);
    }
    for _ in 0..MOST {
        match protocol {
            0 if at != start => return Err(Outcome::PassMalformed),
            0 | 43 | 60 => {}
            _ => break,
        }
        let header = bytes.get(at..at + 8).ok_or(Outcome::PassMalformed)?;
        if protocol == 43 && header[3] != 0 {
            return Err(Outcome::PassExtension);
        }
        protocol = header[0];
        at += (usize::from(header[1]) + 1) * 8;
    }
    match protocol {
        0 | 43 | 51 | 60 | 135 | 139 | 140 => Err(Outcome::PassExtension),
        protocol => Ok((protocol, at, start + ip.length())),
    }
}
