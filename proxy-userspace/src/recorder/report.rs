//! From defects to what an Event says. Defects of one object for one reason share an Event.

use std::collections::BTreeMap;

use k8s_openapi::{
    api::{core::v1 as core, events::v1 as events},
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta},
    jiff::Timestamp,
};

use crate::model::{Defect, ObjectReference, escaped};

/// Who reports. The API server wants it to be a qualified name.
const CONTROLLER: &str = "sluice";
/// Bytes of a note.
const NOTE: usize = 1024;
/// Bytes of the name of who reports.
const INSTANCE: usize = 128;
/// Bytes of a name.
const NAME: usize = 253;
/// Where Events are that are about objects without a namespace.
const DEFAULT_NAMESPACE: &str = "default";

/// What an Event says, but for when and how often.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Report {
    object: ObjectReference,
    reason: &'static str,
    note: String,
}

/// What is to be said about defects. An object without a name cannot be named.
pub(super) fn reports(defects: &[Defect]) -> Vec<Report> {
    let mut notes: BTreeMap<(&ObjectReference, &'static str), Vec<String>> = BTreeMap::new();
    for Defect { object, problem } in defects.iter().filter(|defect| !defect.object.name.name.is_empty()) {
        notes.entry((object, problem.reason())).or_default().push(problem.to_string());
    }
    let report = |((object, reason), notes): ((&ObjectReference, _), Vec<String>)| Report {
        object: object.clone(),
        reason,
        note: cut(&escaped(&notes.join("; ")), NOTE),
    };
    notes.into_iter().map(report).collect()
}

impl Report {
    /// Where its Event belongs.
    pub(super) fn namespace(&self) -> &str {
        let namespace = &*self.object.name.namespace;
        if namespace.is_empty() { DEFAULT_NAMESPACE } else { namespace }
    }

    /// The Event, seen for the first time at a node.
    pub(super) fn event(&self, node: &str, at: Timestamp) -> events::Event {
        let some = |text: &str| Some(text.to_owned()).filter(|text| !text.is_empty());
        events::Event {
            action: some(action(self.reason)),
            event_time: Some(MicroTime(at)),
            metadata: ObjectMeta {
                name: Some(name(&self.object.name.name, at)),
                namespace: some(self.namespace()),
                ..ObjectMeta::default()
            },
            note: some(&self.note),
            reason: some(self.reason),
            regarding: Some(core::ObjectReference {
                api_version: some(self.object.api_version()),
                kind: some(self.object.kind),
                name: some(&self.object.name.name),
                namespace: some(&self.object.name.namespace),
                uid: some(&self.object.uid),
                ..core::ObjectReference::default()
            }),
            reporting_controller: some(CONTROLLER),
            reporting_instance: some(&cut(node, INSTANCE)),
            type_: some("Warning"),
            ..events::Event::default()
        }
    }
}

/// What was attempted: to have it is the API's wish.
fn action(reason: &str) -> &'static str {
    match reason {
        "FailedToStartServiceHealthcheck" => "Listen",
        "FailedToWatch" => "Watch",
        _ => "Serve",
    }
}

/// As client-go makes it, unique by the time. An object may have a name that leaves no room for that.
fn name(object: &str, at: Timestamp) -> String {
    let suffix = format!(".{:x}", at.as_nanosecond());
    let kept = object.get(..NAME - suffix.len()).unwrap_or(object);
    format!("{}{suffix}", kept.trim_end_matches(['.', '-']))
}

/// No longer than so many bytes.
fn cut(text: &str, bytes: usize) -> String {
    const DOTS: &str = "…";
    if text.len() <= bytes {
        return text.to_owned();
    }
    let end = (0..=bytes - DOTS.len()).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
    format!("{}{DOTS}", &text[..end])
}

#[cfg(test)]
mod tests;
