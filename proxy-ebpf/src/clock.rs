//! What the low half of the kernel's clock can tell: how long ago something was.

/// Jiffies since something was noted. Another CPU may have noted it after this one read the clock: then none, and not as many
/// as a word holds.
#[inline(always)]
pub(crate) fn silence(now: u32, last_seen: u32) -> u32 {
    let silent = now.wrapping_sub(last_seen);
    if silent > u32::MAX - AHEAD { 0 } else { silent }
}

/// Jiffies by which a CPU is never behind: minutes, for one that is virtual and was held up.
const AHEAD: u32 = 1 << 20;

#[cfg(test)]
mod tests {
    use super::silence;

    #[test]
    fn a_clock_that_was_read_too_early_shows_no_silence() {
        assert_eq!(silence(1_000, 990), 10);
        assert_eq!(silence(1_000, 1_001), 0);
        assert_eq!(silence(5, u32::MAX - 4), 10, "the clock wraps");
        assert_eq!(silence(u32::MAX, 3), 0);
    }
}
