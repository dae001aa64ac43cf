//! How long a flow lives that nothing is heard of: the programs and the agent go by the same rule. In go the protocol and the
//! bits of [`crate::flow::state`]; out come seconds of silence.

use crate::{addr::Protocol, flow::state};

/// An established TCP connection; kube-proxy's `tcpEstablishedTimeout`.
const TCP_ESTABLISHED: u32 = 86_400;
/// A TCP connection that is opening or closing; `nf_conntrack`'s default for `SYN_SENT` and `FIN_WAIT`.
const TCP_OTHER: u32 = 120;
/// A connection that both sides have closed, when another one needs its ports. Enough for the last ACK: two, because last-seen
/// is up to one second old.
const CLOSED: u32 = 2;
/// An established SCTP association; `nf_conntrack`'s `sctp_timeout_established`. Linux asks after an idle peer every 30.
const SCTP_ESTABLISHED: u32 = 210;
/// An SCTP association that is opening or closing; `nf_conntrack`'s `sctp_timeout_closed`, the longest of those.
const SCTP_OTHER: u32 = 10;
/// A UDP flow with replies; `nf_conntrack`'s `udp_timeout_stream`.
const UDP_REPLIED: u32 = 120;
/// A UDP flow without; `nf_conntrack`'s `udp_timeout`.
const UDP_UNREPLIED: u32 = 30;

/// Whether the connection is over, but for what is still on the wire.
#[inline(always)]
pub const fn is_closing(bits: u8) -> bool {
    const BOTH: u8 = state::FIN_ORIGINAL | state::FIN_REPLY;
    bits & state::RESET != 0 || bits & BOTH == BOTH
}

/// Whether both sides have opened the connection, and not closed it.
#[inline(always)]
pub const fn is_established(bits: u8) -> bool {
    bits & state::CONFIRMED != 0 && !is_closing(bits)
}

/// Seconds of silence after which a flow's tuple means a new one.
#[inline]
pub const fn seconds(proto: Protocol, bits: u8) -> u32 {
    match proto {
        Protocol::Udp if bits & state::REPLIED != 0 => UDP_REPLIED,
        Protocol::Udp => UDP_UNREPLIED,
        Protocol::Sctp if is_established(bits) => SCTP_ESTABLISHED,
        Protocol::Sctp => SCTP_OTHER,
        _ if is_established(bits) => TCP_ESTABLISHED,
        _ => TCP_OTHER,
    }
}

/// Seconds of silence after which nobody misses a flow whose key, or whose room, another one needs.
#[inline]
pub const fn seconds_to_be_over(proto: Protocol, bits: u8) -> u32 {
    if !matches!(proto, Protocol::Udp) && is_closing(bits) { CLOSED } else { seconds(proto, bits) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_closing_connection_is_one_with_a_reset_or_two_fins() {
        assert!(!is_closing(state::REPLIED | state::CONFIRMED | state::FIN_ORIGINAL));
        assert!(is_closing(state::FIN_ORIGINAL | state::FIN_REPLY));
        assert!(is_closing(state::RESET));
    }

    #[test]
    fn only_a_closed_connection_gives_up_its_ports_early() {
        let closed = state::REPLIED | state::CONFIRMED | state::FIN_ORIGINAL | state::FIN_REPLY;
        assert_eq!(seconds_to_be_over(Protocol::Tcp, closed), 2);
        assert_eq!(seconds_to_be_over(Protocol::Tcp, closed & !state::FIN_REPLY), 86_400);
        assert_eq!(seconds_to_be_over(Protocol::Udp, closed), 120);
        assert_eq!(seconds_to_be_over(Protocol::Sctp, closed), 2);
        assert_eq!(seconds_to_be_over(Protocol::Sctp, closed & !state::FIN_REPLY), 210);
    }

    #[test]
    fn lifetimes_follow_the_state() {
        assert_eq!(seconds(Protocol::Udp, 0), 30);
        assert_eq!(seconds(Protocol::Udp, state::REPLIED | state::CONFIRMED), 120);
        assert_eq!(seconds(Protocol::Tcp, state::REPLIED), 120);
        assert_eq!(seconds(Protocol::Tcp, state::REPLIED | state::CONFIRMED), 86_400);
        assert_eq!(seconds(Protocol::Tcp, state::CONFIRMED | state::RESET), 120);
        assert_eq!(seconds(Protocol::Sctp, state::REPLIED), 10);
        assert_eq!(seconds(Protocol::Sctp, state::REPLIED | state::CONFIRMED), 210);
        assert_eq!(seconds(Protocol::Sctp, state::CONFIRMED | state::RESET), 10);
    }
}
