//! Numbers that are given out, taken back, and given out again only after a grace.

use std::{
    collections::{BTreeSet, VecDeque},
    time::Instant,
};

use super::GRACE;

/// The numbers of one map.
#[derive(Debug)]
pub(super) struct Ids {
    /// May be given out, all below `next`.
    free: BTreeSet<u32>,
    /// Taken back, in the order of time.
    resting: VecDeque<(Instant, u32)>,
    /// Never given out so far.
    next: u32,
    end: u32,
}

impl Ids {
    /// Numbers from 1 up to, not including, `end`: 0 is never given out, so that a zeroed entry means nothing.
    pub(super) fn new(end: u32) -> Self {
        Self { free: BTreeSet::new(), resting: VecDeque::new(), next: 1, end }
    }

    /// Marks a number as given out before anything is taken.
    pub(super) fn claim(&mut self, id: u32) {
        if id >= self.next {
            self.free.extend(self.next..id);
            self.next = id + 1;
        }
        self.free.remove(&id);
    }

    /// The smallest number that may be given out.
    pub(super) fn take(&mut self, now: Instant) -> Option<u32> {
        self.wake(now);
        if let Some(id) = self.free.pop_first() {
            return Some(id);
        }
        let id = self.next;
        (id < self.end).then(|| {
            self.next += 1;
            id
        })
    }

    /// Takes a number back.
    pub(super) fn put_back(&mut self, id: u32, now: Instant) {
        if id != 0 {
            self.resting.push_back((now, id));
        }
    }

    /// Gives a number out again that still rests. False when it is no longer this owner's to have.
    pub(super) fn revive(&mut self, id: u32) -> bool {
        let resting = self.resting.len();
        self.resting.retain(|(_, other)| *other != id);
        resting != self.resting.len() || self.free.remove(&id)
    }

    fn wake(&mut self, now: Instant) {
        while let Some((since, id)) = self.resting.front().copied() {
            if now.saturating_duration_since(since) < GRACE {
                break;
            }
            self.resting.pop_front();
            self.free.insert(id);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::{GRACE, Ids};

    #[test]
    fn zero_is_never_given_out() {
        assert_eq!(Ids::new(4).take(Instant::now()), Some(1));
    }

    #[test]
    fn a_number_rests_before_it_is_given_out_again() {
        let (mut ids, now) = (Ids::new(8), Instant::now());
        assert_eq!(ids.take(now), Some(1));
        ids.put_back(1, now);
        assert_eq!(ids.take(now), Some(2));
        assert_eq!(ids.take(now + GRACE), Some(1));
    }

    #[test]
    fn no_number_is_left_at_the_end() {
        let (mut ids, now) = (Ids::new(2), Instant::now());
        assert_eq!(ids.take(now), Some(1));
        assert_eq!(ids.take(now), None);
    }

    #[test]
    fn a_claimed_number_is_taken_and_the_gaps_before_it_are_free() {
        let (mut ids, now) = (Ids::new(8), Instant::now());
        ids.claim(3);
        let taken: Vec<_> = std::iter::from_fn(|| ids.take(now)).collect();
        assert_eq!(taken, [1, 2, 4, 5, 6, 7]);
    }

    #[test]
    fn a_resting_number_can_be_revived_by_its_owner() {
        let (mut ids, now) = (Ids::new(8), Instant::now());
        ids.claim(1);
        ids.put_back(1, now);
        assert!(ids.revive(1));
        assert_eq!(ids.take(now + GRACE), Some(2));
    }
}
