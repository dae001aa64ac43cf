//! What can go wrong, and when.

use super::resource::{Query, Resource, Verb};

/// Something that goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The answer is an error with this HTTP status.
    Refuse(u16),
    /// The request is taken, and nothing is ever answered.
    Silence,
    /// The connection ends in the middle of the body.
    BreakOff,
    /// The answer begins, and then nothing comes any more; the connection stays open.
    Stall,
}

/// The requests that something goes wrong with.
#[derive(Clone, Copy, Debug)]
pub struct On {
    resource: Resource,
    verb: Option<Verb>,
    /// Only pages after the first.
    is_continued: bool,
}

impl On {
    /// All requests for a resource.
    pub fn all(resource: Resource) -> Self {
        Self { resource, verb: None, is_continued: false }
    }

    /// Lists, or the pages of them.
    pub fn list(resource: Resource) -> Self {
        Self { verb: Some(Verb::List), ..Self::all(resource) }
    }

    /// Pages of lists after the first.
    pub fn next_page(resource: Resource) -> Self {
        Self { is_continued: true, ..Self::list(resource) }
    }

    /// Watches.
    pub fn watch(resource: Resource) -> Self {
        Self { verb: Some(Verb::Watch), ..Self::all(resource) }
    }

    fn matches(self, resource: Resource, query: &Query) -> bool {
        self.resource == resource
            && self.verb.is_none_or(|verb| verb == query.verb())
            && (!self.is_continued || query.continue_token.is_some())
    }
}

/// What is still to go wrong.
#[derive(Debug, Default)]
pub(super) struct Faults {
    waiting: Vec<(On, Fault, usize)>,
}

impl Faults {
    pub(super) fn add(&mut self, on: On, fault: Fault, times: usize) {
        self.waiting.push((on, fault, times));
    }

    pub(super) fn clear(&mut self) {
        self.waiting.clear();
    }

    /// What goes wrong with this request.
    pub(super) fn take(&mut self, resource: Resource, query: &Query) -> Option<Fault> {
        let (_, fault, times) = self.waiting.iter_mut().find(|(on, ..)| on.matches(resource, query))?;
        let fault = *fault;
        *times = times.saturating_sub(1);
        self.waiting.retain(|(.., times)| *times > 0);
        Some(fault)
    }
}
