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

/// Jiffies since something was noted. Another CPU may have noted it after this one read the clock: then none, and not as many
/// as a word holds.
#[inline(always)]
pub const fn silence(now: u32, last_seen: u32) -> u32 {
    let silent = now.wrapping_sub(last_seen);
    if silent > u32::MAX - AHEAD { 0 } else { silent }
}

/// Jiffies by which a CPU is never behind: minutes, for one that is virtual and was held up.
const AHEAD: u32 = 1 << 20;

/// Whether a time in jiffies, which was minutes ahead at most when it was noted, is still to come. One that has passed is not so
/// again, as a sign would have it, for half of the weeks in which the word overflows, but for minutes of them.
#[inline(always)]
pub const fn is_to_come(now: u32, until: u32) -> bool {
    let left = until.wrapping_sub(now);
    left != 0 && left < AHEAD
}

/// Whether the connection is over, but for what is still on the wire. Where replies do not come this way nobody sees the other
/// side's end: it counts as over with the client's, because a SYN after that begins another.
#[inline(always)]
pub const fn is_closing(bits: u8) -> bool {
    const BOTH: u8 = state::FIN_ORIGINAL | state::FIN_REPLY;
    const ONE_WAY: u8 = state::ONE_WAY | state::FIN_ORIGINAL;
    bits & state::RESET != 0 || bits & BOTH == BOTH || bits & ONE_WAY == ONE_WAY
}

/// Whether a client may still be sent what it has asked for, and acknowledge it, after it has closed its own side: a connection
/// whose replies nobody sees.
#[inline(always)]
const fn may_be_half_closed(bits: u8) -> bool {
    const HALF: u8 = state::ONE_WAY | state::CONFIRMED | state::FIN_ORIGINAL;
    bits & (HALF | state::RESET) == HALF
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
        // Where replies do not come this way, a client that goes on sending gets some.
        Protocol::Udp if bits & (state::REPLIED | state::CONFIRMED) != 0 => UDP_REPLIED,
        Protocol::Udp => UDP_UNREPLIED,
        Protocol::Sctp if is_established(bits) => SCTP_ESTABLISHED,
        Protocol::Sctp => SCTP_OTHER,
        _ if is_established(bits) || may_be_half_closed(bits) => TCP_ESTABLISHED,
        _ => TCP_OTHER,
    }
}

/// Seconds of silence after which nobody misses a flow whose key, or whose room, another one needs.
#[inline]
pub const fn seconds_to_be_over(proto: Protocol, bits: u8) -> u32 {
    match proto {
        Protocol::Tcp if may_be_half_closed(bits) => TCP_OTHER,
        Protocol::Tcp | Protocol::Sctp if is_closing(bits) => CLOSED,
        _ => seconds(proto, bits),
    }
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
    fn what_is_to_come_has_not_passed_and_is_not_far_ahead() {
        for now in [0, 5, u32::MAX, u32::MAX - 5, 1 << 31] {
            assert!(is_to_come(now, now.wrapping_add(1)) && is_to_come(now, now.wrapping_add(30_000)));
            for passed in [0, 1, 30_000, 1 << 30, 1 << 31, u32::MAX - AHEAD] {
                assert!(!is_to_come(now, now.wrapping_sub(passed)), "{passed} ago");
            }
        }
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

    /// A long download after the client's FIN: only its acknowledgements come this way, and the last of them looks like any.
    #[test]
    fn a_connection_whose_replies_go_another_way_outlives_the_clients_end() {
        let open = state::ONE_WAY | state::CONFIRMED;
        let half_closed = open | state::FIN_ORIGINAL;
        assert!(!is_closing(open) && is_closing(half_closed) && is_closing(open | state::RESET));
        assert_eq!((seconds(Protocol::Tcp, open), seconds(Protocol::Tcp, half_closed)), (86_400, 86_400));
        assert_eq!(seconds_to_be_over(Protocol::Tcp, half_closed), 120, "if its room is needed");
        assert_eq!(seconds_to_be_over(Protocol::Tcp, half_closed | state::RESET), 2);
        assert_eq!(seconds(Protocol::Tcp, half_closed | state::RESET), 120);
        assert_eq!(seconds(Protocol::Tcp, state::ONE_WAY), 120, "not confirmed");
        assert_eq!((seconds(Protocol::Udp, state::ONE_WAY), seconds(Protocol::Udp, open)), (30, 120));
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
