//! A list that is not complete yet. What it has said so far is kept aside, parsed, and shared with what is known already:
//! a list that is no news costs next to nothing.

use std::{collections::BTreeMap, sync::Arc};

use super::{Defect, ObjectName};

/// Objects by name, with what is wrong with them. None: one that is of no use.
pub(super) type Listed<T> = BTreeMap<ObjectName, (Option<Arc<T>>, Vec<Defect>)>;

/// The objects of a list, so far.
#[derive(Debug)]
pub(super) struct Listing<T>(Listed<T>);

impl<T> Default for Listing<T> {
    fn default() -> Self {
        Self(Listed::new())
    }
}

impl<T: PartialEq> Listing<T> {
    /// A list begins. One that was not completed is forgotten.
    pub(super) fn begin(&mut self) {
        self.0.clear();
    }

    /// Adds an object. `known` is what was known by its name.
    pub(super) fn add(&mut self, name: ObjectName, object: Option<T>, known: Option<&Arc<T>>, defects: Vec<Defect>) {
        let object = object.map(|object| match known {
            Some(known) if **known == object => Arc::clone(known),
            _ => Arc::new(object),
        });
        self.0.insert(name, (object, defects));
    }

    /// The list is complete.
    pub(super) fn take(&mut self) -> Listed<T> {
        std::mem::take(&mut self.0)
    }
}
