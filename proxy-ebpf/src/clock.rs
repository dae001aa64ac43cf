//! What the low half of the kernel's clock can tell: how long ago something was.

pub(crate) use proxy_common::lifetime::silence;

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
