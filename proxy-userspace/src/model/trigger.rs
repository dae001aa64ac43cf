//! When those changes of endpoints were made that the kernel does not have yet, as their author says
//! (`endpoints.kubernetes.io/last-change-trigger-time`). A change that changes nothing here is none.

use std::collections::BTreeMap;

use jiff::Timestamp;
use k8s_openapi::api::discovery::v1 as discovery;

use super::ObjectName;

/// The annotation.
pub const TRIGGER_TIME: &str = "endpoints.kubernetes.io/last-change-trigger-time";

/// A change of endpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trigger {
    /// Of which family they are.
    pub is_ipv4: bool,
    /// When it was made.
    pub at: Timestamp,
}

/// Changes that wait, the oldest of each slice.
#[derive(Debug, Default)]
pub(super) struct Triggers(BTreeMap<ObjectName, Trigger>);

impl Triggers {
    /// A slice has changed.
    pub(super) fn note(&mut self, name: &ObjectName, object: &discovery::EndpointSlice) {
        let written = object.metadata.annotations.as_ref().and_then(|annotations| annotations.get(TRIGGER_TIME));
        if let Some(at) = written.and_then(|text| text.parse().ok()) {
            self.0.entry(name.clone()).or_insert(Trigger { is_ipv4: object.address_type != "IPv6", at });
        }
    }

    /// A slice has changed as a list says that is complete now.
    pub(super) fn follow(&mut self, name: &ObjectName, listed: &Self) {
        if let Some(trigger) = listed.0.get(name) {
            self.0.entry(name.clone()).or_insert(*trigger);
        }
    }

    /// Those since the last call.
    pub(super) fn take(&mut self) -> Vec<Trigger> {
        std::mem::take(&mut self.0).into_values().collect()
    }
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;
    use serde_json::json;

    use super::Trigger;
    use crate::{
        model::Model,
        source::{Change, Event},
    };

    fn slice(address: &str, trigger: &str) -> Event {
        let object = json!({
            "metadata": {
                "namespace": "test", "name": "web-1", "labels": {"kubernetes.io/service-name": "web"},
                "annotations": {super::TRIGGER_TIME: trigger},
            },
            "addressType": "IPv4", "endpoints": [{"addresses": [address]}], "ports": [{"name": "", "port": 80}],
        });
        Event::EndpointSlices(Change::Apply(Box::new(serde_json::from_value(object).unwrap())))
    }

    #[test]
    fn a_change_is_as_old_as_the_oldest_that_waits_and_is_told_once() {
        let mut model = Model::new("here".into());
        model.absorb(slice("10.0.0.1", "2026-01-01T00:00:01Z"));
        model.absorb(slice("10.0.0.2", "2026-01-01T00:00:02.5Z"));
        let at = "2026-01-01T00:00:01Z".parse::<Timestamp>().unwrap();
        assert_eq!(model.take_triggers(), [Trigger { is_ipv4: true, at }]);
        assert_eq!(model.take_triggers(), []);
        model.absorb(slice("10.0.0.2", "2026-01-01T00:00:03Z"));
        assert_eq!(model.take_triggers(), [], "nothing has changed but the time");
        model.absorb(slice("10.0.0.3", "yesterday"));
        assert_eq!(model.take_triggers(), [], "that is no time");
    }
}
