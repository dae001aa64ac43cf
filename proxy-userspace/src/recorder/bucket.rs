//! A token bucket: a burst, and then one in a while.

use std::time::{Duration, Instant};

/// So many at once.
pub(super) const BURST: u32 = 25;
/// And one more each time so long has passed.
pub(super) const REFILL: Duration = Duration::from_secs(5);

/// How many may still be let through, as the time it takes to fill up to that.
#[derive(Debug)]
pub(super) struct Bucket {
    filled: Duration,
    /// As of then.
    at: Instant,
}

impl Bucket {
    /// A full one.
    pub(super) fn new(now: Instant) -> Self {
        Self { filled: BURST * REFILL, at: now }
    }

    /// Takes one out, if there is one.
    pub(super) fn take(&mut self, now: Instant) -> bool {
        self.settle(now);
        match self.filled.checked_sub(REFILL) {
            Some(rest) => {
                self.filled = rest;
                true
            }
            None => false,
        }
    }

    pub(super) fn is_full(&mut self, now: Instant) -> bool {
        self.settle(now);
        self.filled == BURST * REFILL
    }

    fn settle(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.at);
        self.filled = (self.filled + passed).min(BURST * REFILL);
        self.at = self.at.max(now);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::{BURST, Bucket, REFILL};

    fn taken(bucket: &mut Bucket, now: Instant) -> u32 {
        (0..1000).filter(|_| bucket.take(now)).count() as u32
    }

    #[test]
    fn after_a_burst_there_is_one_in_a_while_and_in_time_a_burst_again() {
        let began = Instant::now();
        let mut bucket = Bucket::new(began);
        assert!(bucket.is_full(began));
        assert_eq!(taken(&mut bucket, began), BURST);
        assert_eq!(taken(&mut bucket, began + REFILL.mul_f64(0.999)), 0);
        assert_eq!(taken(&mut bucket, began + REFILL), 1, "the time that passed before is not lost");
        assert_eq!(taken(&mut bucket, began + 4 * REFILL), 3);
        let later = began + 1000 * REFILL;
        assert!(bucket.is_full(later));
        assert_eq!(taken(&mut bucket, later), BURST, "no more than that");
        assert_eq!(taken(&mut bucket, began), 0, "a clock does not go back");
    }
}
