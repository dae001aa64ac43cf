//! The slices of a Service. Most Services have one or two, and there are many Services: a sorted list is smaller than a
//! map.

use std::sync::Arc;

use super::Slice;

/// Slices by name, in order.
#[derive(Debug, Default)]
pub(super) struct Slices(Vec<(Box<str>, Arc<Slice>)>);

impl Slices {
    fn place(&self, name: &str) -> Result<usize, usize> {
        self.0.binary_search_by(|(other, _)| (**other).cmp(name))
    }

    /// The slice with this name.
    pub(super) fn get(&self, name: &str) -> Option<&Arc<Slice>> {
        self.place(name).ok().and_then(|place| self.0.get(place)).map(|(_, slice)| slice)
    }

    /// Adds a slice, or puts it in the place of another.
    pub(super) fn insert(&mut self, name: &str, slice: Arc<Slice>) {
        match self.place(name) {
            Ok(place) => self.0[place].1 = slice,
            Err(place) => {
                self.0.reserve_exact(1);
                self.0.insert(place, (name.into(), slice));
            }
        }
    }

    /// Removes a slice, if it is there.
    pub(super) fn remove(&mut self, name: &str) {
        if let Ok(place) = self.place(name) {
            self.0.remove(place);
        }
    }

    /// Whether there is none.
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// All of them, in the order of their names.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&str, &Arc<Slice>)> + Clone {
        self.0.iter().map(|(name, slice)| (&**name, slice))
    }
}
