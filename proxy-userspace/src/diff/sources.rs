//! Which clients the kernel lets use which Service port. Ranges are written before the frontend that needs them, and
//! removed after the last one that did.

use std::collections::BTreeMap;

use proxy_common::{
    addr::Address,
    service::{Service, flag},
};

use super::Step;
use crate::desired::{Prefix, Sources};

/// The entries of `SOURCES_*`.
#[derive(Debug)]
pub(super) struct ClientRanges<A: Ord> {
    /// What the kernel holds, by index of the Service port.
    held: BTreeMap<u32, Vec<Prefix<A>>>,
    /// Restricted frontends in the kernel that bear the index.
    uses: BTreeMap<u32, usize>,
    /// Indexes whose ranges may be too many now, with those that are wanted where that is known.
    suspects: BTreeMap<u32, Option<Sources<A>>>,
    count: usize,
    capacity: usize,
}

/// There is no room for so many ranges.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Full;

impl<A: Address> ClientRanges<A> {
    /// Takes over what the kernel holds.
    pub(super) fn adopt<'a>(
        entries: impl IntoIterator<Item = (u32, Prefix<A>)>,
        services: impl Iterator<Item = &'a Service>,
        capacity: u32,
    ) -> Self {
        let mut ranges = Self {
            held: BTreeMap::new(),
            uses: BTreeMap::new(),
            suspects: BTreeMap::new(),
            count: 0,
            capacity: capacity as usize,
        };
        for (index, prefix) in entries {
            ranges.held.entry(index).or_default().push(prefix);
            ranges.suspects.insert(index, None);
            ranges.count += 1;
        }
        services.for_each(|service| ranges.hold(service));
        ranges
    }

    /// Writes what the kernel lacks of the ranges of a Service port.
    pub(super) fn put(&mut self, index: u32, wanted: &Sources<A>, steps: &mut Vec<Step<A>>) -> Result<(), Full> {
        let held = self.held.entry(index).or_default();
        let missing: Vec<_> = wanted.iter().filter(|prefix| !held.contains(prefix)).copied().collect();
        if self.count + missing.len() > self.capacity {
            self.suspects.entry(index).or_insert(None);
            return Err(Full);
        }
        self.count += missing.len();
        steps.extend(missing.iter().map(|prefix| Step::PutSource(index, *prefix)));
        held.extend(missing);
        self.suspects.insert(index, Some(wanted.clone()));
        Ok(())
    }

    /// Notes a frontend that is in the kernel now.
    pub(super) fn hold(&mut self, service: &Service) {
        if service.flags & flag::SOURCE_RANGES != 0 {
            *self.uses.entry(service.index).or_default() += 1;
        }
    }

    /// Notes that a frontend is in the kernel no more, or no longer as it was.
    pub(super) fn release(&mut self, service: &Service) {
        if service.flags & flag::SOURCE_RANGES == 0 {
            return;
        }
        self.suspects.entry(service.index).or_insert(None);
        if let Some(uses) = self.uses.get_mut(&service.index) {
            *uses -= 1;
            if *uses == 0 {
                self.uses.remove(&service.index);
            }
        }
    }

    /// Removes what no frontend needs any more.
    pub(super) fn tidy(&mut self, steps: &mut Vec<Step<A>>) {
        for (index, wanted) in std::mem::take(&mut self.suspects) {
            let is_needed = |prefix: &Prefix<A>| match &wanted {
                _ if !self.uses.contains_key(&index) => false,
                Some(wanted) => wanted.contains(prefix),
                None => true,
            };
            let held = self.held.remove(&index).unwrap_or_default();
            let (kept, removed): (Vec<_>, Vec<_>) = held.into_iter().partition(is_needed);
            self.count -= removed.len();
            steps.extend(removed.into_iter().map(|prefix| Step::RemoveSource(index, prefix)));
            if !kept.is_empty() {
                self.held.insert(index, kept);
            }
        }
    }
}
