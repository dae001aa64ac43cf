//! What is heard of the API server, by the resource that is watched: whether a watch lives shows nowhere else, because the kernel
//! goes on with what was known last. There are no series of what nobody watches.

use std::sync::atomic::AtomicU64;

use jiff::Timestamp;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

/// `resource`, as the API's paths name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResourceLabel {
    resource: &'static str,
}

/// The series of all watches.
#[derive(Clone, Debug, Default)]
pub(super) struct Watches {
    /// Seconds since 1970.
    last_contact: Family<ResourceLabel, Gauge<f64, AtomicU64>>,
    errors: Family<ResourceLabel, Counter>,
}

impl Watches {
    pub(super) fn register(&self, registry: &mut Registry) {
        let what = "When the API server said something last on the watch of a resource: a list, an event or a bookmark, 0 if \
                    nothing yet";
        registry.register("sluice_watch_last_contact_timestamp_seconds", what, self.last_contact.clone());
        registry.register("sluice_watch_errors", "Times that the watch of a resource failed", self.errors.clone());
    }

    /// Begins the series of a resource.
    pub(super) fn begin(&self, resource: &'static str) -> Watch {
        let watch = Watch { watches: self.clone(), label: ResourceLabel { resource } };
        drop(watch.watches.last_contact.get_or_create(&watch.label));
        drop(watch.watches.errors.get_or_create(&watch.label));
        watch
    }
}

/// The series of one watch. Clones count into the same ones.
#[derive(Clone, Debug)]
pub struct Watch {
    watches: Watches,
    label: ResourceLabel,
}

impl Watch {
    /// The server has said something.
    pub fn hear(&self) {
        let now = Timestamp::now().as_duration().as_secs_f64();
        self.watches.last_contact.get_or_create(&self.label).set(now);
    }

    /// The watch has failed, and is tried again.
    pub fn fail(&self) {
        self.watches.errors.get_or_create(&self.label).inc();
    }

    /// The server has no such resource, and need not: there is nothing to be told of it until it says something.
    pub fn forget(&self) {
        self.watches.last_contact.remove(&self.label);
        self.watches.errors.remove(&self.label);
    }
}

#[cfg(test)]
mod tests {
    use prometheus_client::{encoding::text::encode, registry::Registry};

    use super::Watches;

    #[test]
    fn a_watch_has_series_from_its_beginning_on_and_none_of_what_the_server_does_not_have() {
        let (watches, mut registry) = (Watches::default(), Registry::default());
        watches.register(&mut registry);
        let said = |words: &str| {
            let mut text = String::new();
            encode(&mut text, &registry).unwrap();
            text.lines().any(|line| line.starts_with(words))
        };
        let contact = "sluice_watch_last_contact_timestamp_seconds{resource=\"nodes\"} ";
        let errors = "sluice_watch_errors_total{resource=\"nodes\"} ";
        assert!(!said(contact) && !said(errors), "nobody watches");
        let watch = watches.begin("nodes");
        assert!(said(&format!("{contact}0")) && said(&format!("{errors}0")));
        watch.fail();
        watch.hear();
        assert!(said(&format!("{contact}1")) && said(&format!("{errors}1")));
        watch.forget();
        assert!(!said(contact) && !said(errors));
        watch.hear();
        assert!(said(contact));
    }
}
