//! Who owns which part of `SLOTS`. A range is never changed once it is written: other content is another range, and
//! equal content is the same range, however many frontends lead to it.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use proxy_common::{backend::BackendId, service::Range};

use super::GRACE;

/// How long a range rests when there is no room left otherwise: long enough for the plan that freed it to be carried out,
/// and a thousand times what a packet needs that has read the range just before.
const SHORT_REST: Duration = Duration::from_millis(250);

type Content = Arc<[BackendId]>;

/// The owners of `SLOTS`.
#[derive(Debug)]
pub(super) struct Ranges {
    /// Ranges in use or resting, by first slot. They never overlap.
    held: BTreeMap<u32, Held>,
    by_content: HashMap<Content, u32>,
    /// Gaps between them: first slot → length. Neighbouring gaps are one.
    gaps: BTreeMap<u32, u32>,
    /// Ranges nothing leads to any more, in the order of time.
    resting: VecDeque<(Instant, u32)>,
    /// How many there are, in use or not.
    slots: u32,
}

#[derive(Debug)]
struct Held {
    content: Content,
    uses: u32,
    resting_since: Option<Instant>,
}

impl Ranges {
    /// No slot is in use.
    pub(super) fn new(slots: u32) -> Self {
        Self {
            held: BTreeMap::new(),
            by_content: HashMap::new(),
            gaps: BTreeMap::from([(0, slots)]),
            resting: VecDeque::new(),
            slots,
        }
    }

    /// Takes over a range that the kernel leads to. False when it overlaps another one or lies outside: whoever wrote
    /// it, it cannot be relied on.
    pub(super) fn adopt(&mut self, range: Range, content: &[BackendId]) -> bool {
        if range.count == 0 {
            return range.first == 0;
        }
        if let Some(held) = self.held.get_mut(&range.first) {
            let is_same = held.content.len() == range.count as usize;
            held.uses += u32::from(is_same);
            return is_same;
        }
        if content.len() != range.count as usize || !self.cut(range) {
            return false;
        }
        let content: Content = content.into();
        self.by_content.entry(Arc::clone(&content)).or_insert(range.first);
        self.held.insert(range.first, Held { content, uses: 1, resting_since: None });
        true
    }

    /// One more use of the range with this content. The flag says that its slots have yet to be written. None when no
    /// gap is large enough.
    pub(super) fn hold(&mut self, content: &[BackendId], now: Instant) -> Option<(Range, bool)> {
        let count = content.len() as u32;
        if count == 0 {
            return Some((Range::default(), false));
        }
        if let Some(&first) = self.by_content.get(content)
            && let Some(held) = self.held.get_mut(&first)
        {
            held.uses += 1;
            held.resting_since = None;
            return Some((Range { first, count }, false));
        }
        self.wake(now, GRACE);
        let first = self.gap(count).or_else(|| {
            self.wake(now, SHORT_REST);
            self.gap(count)
        })?;
        let range = Range { first, count };
        self.cut(range);
        let content: Content = content.into();
        self.by_content.insert(Arc::clone(&content), first);
        self.held.insert(first, Held { content, uses: 1, resting_since: None });
        Some((range, true))
    }

    /// Whether there is room for a hash table, or it is there already. Tables are large and a Service can do without, so
    /// they leave alone a quarter of the slots, for those who have nothing else.
    pub(super) fn has_room_for_table(&mut self, content: &[BackendId], now: Instant) -> bool {
        if self.by_content.contains_key(content) {
            return true;
        }
        self.wake(now, GRACE);
        let is_large_enough = |length: &u32| *length as usize >= content.len();
        let free: u32 = self.gaps.values().sum();
        self.gaps.values().any(is_large_enough) && free as usize >= content.len() + self.slots as usize / 4
    }

    /// What a range holds.
    pub(super) fn content(&self, range: Range) -> &[BackendId] {
        let held = self.held.get(&range.first).filter(|held| held.content.len() == range.count as usize);
        held.map(|held| held.content.as_ref()).unwrap_or_default()
    }

    /// One use less. The last one lets the range rest before its slots are given to another.
    pub(super) fn release(&mut self, range: Range, now: Instant) {
        // Here, too, or ranges that are found again and again without a search would leave a record of each rest.
        self.wake(now, GRACE);
        let Some(held) = self.held.get_mut(&range.first).filter(|held| held.content.len() == range.count as usize)
        else {
            return;
        };
        held.uses = held.uses.saturating_sub(1);
        if held.uses == 0 {
            held.resting_since = Some(now);
            self.resting.push_back((now, range.first));
        }
    }

    /// Lets the slots below `end` that nothing leads to rest: another agent may have let go of them just now.
    pub(super) fn rest_below(&mut self, end: u32, now: Instant) {
        let gaps: Vec<_> = self.gaps.range(..end).map(|(first, length)| (*first, *length)).collect();
        for (first, length) in gaps {
            let range = Range { first, count: length.min(end - first) };
            self.cut(range);
            // Content nobody asks for: these slots only rest.
            let content: Content = vec![0; range.count as usize].into();
            self.held.insert(first, Held { content, uses: 0, resting_since: Some(now) });
            self.resting.push_back((now, first));
        }
    }

    /// Makes the range part of no gap.
    fn cut(&mut self, range: Range) -> bool {
        let Some((&first, &length)) = self.gaps.range(..=range.first).next_back() else { return false };
        let (Some(end), gap_end) = (range.first.checked_add(range.count), first + length) else { return false };
        if end > gap_end {
            return false;
        }
        self.gaps.remove(&first);
        if first < range.first {
            self.gaps.insert(first, range.first - first);
        }
        if end < gap_end {
            self.gaps.insert(end, gap_end - end);
        }
        true
    }

    fn gap(&self, count: u32) -> Option<u32> {
        self.gaps.iter().find(|(_, length)| **length >= count).map(|(first, _)| *first)
    }

    fn wake(&mut self, now: Instant, rest: Duration) {
        while let Some((since, first)) = self.resting.front().copied() {
            if now.saturating_duration_since(since) < rest {
                break;
            }
            self.resting.pop_front();
            // It may have found a use since, or have found and lost one.
            if self.held.get(&first).is_some_and(|held| held.resting_since == Some(since)) {
                self.free(first);
            }
        }
    }

    fn free(&mut self, first: u32) {
        let Some(held) = self.held.remove(&first) else { return };
        if self.by_content.get(&held.content) == Some(&first) {
            self.by_content.remove(&held.content);
        }
        let (mut first, mut length) = (first, held.content.len() as u32);
        if let Some((&before, &before_length)) = self.gaps.range(..first).next_back()
            && before + before_length == first
        {
            self.gaps.remove(&before);
            (first, length) = (before, before_length + length);
        }
        if let Some(after_length) = self.gaps.remove(&(first + length)) {
            length += after_length;
        }
        self.gaps.insert(first, length);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use proxy_common::service::Range;

    use super::{GRACE, Ranges, SHORT_REST};

    #[test]
    fn equal_content_is_one_range_written_once() {
        let (mut ranges, now) = (Ranges::new(8), Instant::now());
        let (first, is_new) = ranges.hold(&[1, 2], now).unwrap();
        assert!(is_new);
        assert_eq!(ranges.hold(&[1, 2], now), Some((first, false)));
    }

    #[test]
    fn a_released_range_rests_and_then_its_slots_are_given_out_again() {
        let (mut ranges, now) = (Ranges::new(4), Instant::now());
        let (range, _) = ranges.hold(&[1, 2, 3], now).unwrap();
        ranges.release(range, now);
        assert_eq!(ranges.hold(&[4, 5], now), None);
        assert_eq!(ranges.hold(&[4, 5, 6, 7], now + GRACE), Some((Range { first: 0, count: 4 }, true)));
    }

    #[test]
    fn a_range_rests_less_when_there_is_no_room_otherwise() {
        let (mut ranges, now) = (Ranges::new(4), Instant::now());
        let (first, _) = ranges.hold(&[1], now).unwrap();
        ranges.release(first, now);
        assert_eq!(ranges.hold(&[2, 3], now + SHORT_REST), Some((Range { first: 1, count: 2 }, true)), "there is room");
        assert_eq!(ranges.hold(&[4], now + SHORT_REST), Some((Range { first: 3, count: 1 }, true)));
        assert_eq!(ranges.hold(&[5], now), None, "the plan that freed it may be this one");
        assert_eq!(ranges.hold(&[5], now + SHORT_REST), Some((Range { first: 0, count: 1 }, true)));
    }

    #[test]
    fn a_resting_range_is_used_again_without_a_write() {
        let (mut ranges, now) = (Ranges::new(4), Instant::now());
        let (range, _) = ranges.hold(&[1, 2], now).unwrap();
        ranges.release(range, now);
        assert_eq!(ranges.hold(&[1, 2], now), Some((range, false)));
        // The rest that was begun before must not free it under its new user.
        assert_eq!(ranges.hold(&[3, 4, 5], now + GRACE), None);
    }

    #[test]
    fn ranges_that_take_turns_leave_no_trail() {
        let (mut ranges, mut now) = (Ranges::new(8), Instant::now());
        let (mut old, _) = ranges.hold(&[1], now).unwrap();
        for turn in 0..100 {
            let content: &[u32] = if turn % 2 == 0 { &[1, 2] } else { &[1] };
            let (new, _) = ranges.hold(content, now).unwrap();
            ranges.release(old, now);
            (old, now) = (new, now + GRACE / 2);
        }
        assert!(ranges.resting.len() < 5, "{} records", ranges.resting.len());
    }

    #[test]
    fn an_overlapping_range_is_not_adopted() {
        let mut ranges = Ranges::new(8);
        assert!(ranges.adopt(Range { first: 2, count: 3 }, &[1, 2, 3]));
        assert!(ranges.adopt(Range { first: 2, count: 3 }, &[1, 2, 3]));
        assert!(!ranges.adopt(Range { first: 2, count: 2 }, &[1, 2]));
        assert!(!ranges.adopt(Range { first: 4, count: 1 }, &[3]));
        assert!(!ranges.adopt(Range { first: 7, count: 2 }, &[1, 2]));
    }

    #[test]
    fn a_hash_table_leaves_a_quarter_of_the_slots_alone() {
        let (mut ranges, now) = (Ranges::new(8), Instant::now());
        assert!(ranges.has_room_for_table(&[1, 2, 1, 2, 1, 2], now));
        assert!(!ranges.has_room_for_table(&[1, 2, 1, 2, 1, 2, 1], now));
        ranges.hold(&[1, 2, 1, 2, 1, 2], now).unwrap();
        assert!(!ranges.has_room_for_table(&[1, 2], now));
        assert!(ranges.has_room_for_table(&[1, 2, 1, 2, 1, 2], now), "it is there already");
        assert!(ranges.hold(&[1, 2], now).is_some());
    }

    #[test]
    fn slots_that_were_in_use_just_now_rest() {
        let (mut ranges, now) = (Ranges::new(8), Instant::now());
        assert!(ranges.adopt(Range { first: 2, count: 2 }, &[1, 2]));
        ranges.rest_below(6, now);
        assert_eq!(ranges.hold(&[9], now).map(|(range, _)| range.first), Some(6));
        assert_eq!(ranges.hold(&[8, 7], now + GRACE).map(|(range, _)| range.first), Some(0));
    }
}
