//! What a load of the programs is for. One that is tried on a single packet leaves out all ways but that packet's, which the verifier then
//! need not look at.

use crate::addr::Protocol;

/// All packets.
pub const EVERYTHING: u16 = 0;

/// The packets of one family and protocol that have neither extension headers nor options.
pub const fn one_way(is_v6: bool, protocol: Protocol) -> u16 {
    (if is_v6 { 6 } else { 4 }) << 8 | protocol as u16
}

#[cfg(test)]
mod tests {
    use super::{EVERYTHING, one_way};
    use crate::addr::Protocol;

    #[test]
    fn each_way_has_a_number_of_its_own() {
        let protocols = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];
        let mut ways: Vec<u16> = protocols.iter().flat_map(|p| [one_way(false, *p), one_way(true, *p)]).collect();
        ways.push(EVERYTHING);
        ways.sort_unstable();
        ways.dedup();
        assert_eq!(ways.len(), 7);
    }
}
