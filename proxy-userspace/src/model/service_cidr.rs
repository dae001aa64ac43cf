//! A ServiceCIDR: where the API server takes ClusterIPs from.

use ipnet::IpNet;
use k8s_openapi::api::networking::v1 as networking;
use proxy_common::node::SERVICE_CIDRS;

use super::{
    ObjectName,
    defect::{Defect, ObjectReference, Problem},
};

/// Ranges of addresses that only Services have.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct ServiceCidr {
    /// Seconds since 1970.
    created: i64,
    object: ObjectReference,
    ranges: Vec<IpNet>,
}

impl ServiceCidr {
    /// A range of everything would leave nothing of the network.
    pub(super) fn parse(object: &networking::ServiceCIDR, defects: &mut Vec<Defect>) -> Self {
        let reference = ObjectReference::of("ServiceCIDR", &object.metadata);
        let mut ranges = Vec::new();
        for text in object.spec.iter().filter_map(|spec| spec.cidrs.as_ref()).flatten() {
            match text.trim().parse::<IpNet>() {
                Ok(range) if range.prefix_len() > 0 => ranges.push(range.trunc()),
                _ => defects.push(Defect { object: reference.clone(), problem: Problem::cidr("spec.cidrs", text) }),
            }
        }
        let created = object.metadata.creation_timestamp.as_ref().map_or(0, |time| time.0.as_second());
        Self { created, object: reference, ranges }
    }

    /// Its name.
    pub(super) fn name(&self) -> &ObjectName {
        &self.object.name
    }
}

/// The ranges of all of them, as many of each family as there is room for: those of the oldest. What finds no room is told.
pub(super) fn ranges<'a>(cidrs: impl IntoIterator<Item = &'a ServiceCidr>, defects: &mut Vec<Defect>) -> Vec<IpNet> {
    let mut oldest_first: Vec<&ServiceCidr> = cidrs.into_iter().collect();
    oldest_first.sort_unstable();
    let mut ranges: Vec<IpNet> = Vec::new();
    for cidr in oldest_first {
        for range in &cidr.ranges {
            let of_family = |other: &&IpNet| other.addr().is_ipv4() == range.addr().is_ipv4();
            if ranges.iter().any(|other| other.contains(range)) {
                continue;
            }
            if ranges.iter().filter(of_family).count() < SERVICE_CIDRS {
                ranges.push(*range);
            } else {
                defects.push(Defect { object: cidr.object.clone(), problem: Problem::TooManyCidrs(*range) });
            }
        }
    }
    ranges
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::networking::v1::ServiceCIDR;
    use serde_json::{Value, json};

    use crate::{
        model::Model,
        source::{Change, Event},
    };

    fn cidr(name: &str, created: &str, cidrs: &Value) -> ServiceCIDR {
        let metadata = json!({"name": name, "creationTimestamp": created});
        serde_json::from_value(json!({"metadata": metadata, "spec": {"cidrs": cidrs}})).unwrap()
    }

    fn ranges(model: &Model) -> Option<Vec<String>> {
        model.service_ranges().map(|ranges| ranges.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn ranges_are_those_of_all_objects_each_once_and_the_oldest_first() {
        const OLD: &str = "2026-01-01T00:00:00Z";
        const NEW: &str = "2026-01-02T00:00:00Z";
        type Case = (&'static str, Vec<ServiceCIDR>, Vec<&'static str>, usize);
        let cases: Vec<Case> = vec![
            ("none", vec![], vec![], 0),
            (
                "both families",
                vec![cidr("a", OLD, &json!(["10.96.0.0/16", "fd00::/112"]))],
                vec!["10.96.0.0/16", "fd00::/112"],
                0,
            ),
            (
                "the older before the first by name",
                vec![cidr("a", NEW, &json!(["10.97.0.0/16"])), cidr("z", OLD, &json!(["10.96.0.0/16"]))],
                vec!["10.96.0.0/16", "10.97.0.0/16"],
                0,
            ),
            (
                "one within another",
                vec![cidr("a", OLD, &json!(["10.96.0.0/12"])), cidr("b", NEW, &json!(["10.96.7.0/24"]))],
                vec!["10.96.0.0/12"],
                0,
            ),
            (
                "nonsense",
                vec![cidr("a", OLD, &json!(["0.0.0.0/0", "10.96.0.0/33", "\u{1b}[2J", "10.96.0.1/16"]))],
                vec!["10.96.0.0/16"],
                3,
            ),
            ("no spec", vec![ServiceCIDR::default()], vec![], 0),
            (
                "more than there is room for",
                vec![cidr(
                    "a",
                    OLD,
                    &json!(["10.1.0.0/16", "10.2.0.0/16", "10.3.0.0/16", "10.4.0.0/16", "10.5.0.0/16", "fd00::/112"]),
                )],
                vec!["10.1.0.0/16", "10.2.0.0/16", "10.3.0.0/16", "10.4.0.0/16", "fd00::/112"],
                1,
            ),
        ];
        for (name, objects, expected, count) in cases {
            let mut model = Model::new("here".into());
            let defects = model.absorb(Event::ServiceCidrs(Change::Replace(objects.clone())));
            assert_eq!(
                (ranges(&model).unwrap(), defects.len()),
                (expected.iter().map(ToString::to_string).collect(), count),
                "{name}"
            );
            let again = model.absorb(Event::ServiceCidrs(Change::Replace(objects)));
            assert_eq!(again, [], "{name}: a relist is no news");
        }
    }

    #[test]
    fn nothing_is_known_before_the_first_list_and_all_is_followed_after_it() {
        let mut model = Model::new("here".into());
        assert_eq!(ranges(&model), None);
        let created = "2026-01-01T00:00:00Z";
        model.absorb(Event::ServiceCidrs(Change::Replace(vec![cidr("a", created, &json!(["10.96.0.0/16"]))])));
        model.absorb(Event::ServiceCidrs(Change::Apply(Box::new(cidr("b", created, &json!(["10.97.0.0/16"]))))));
        assert_eq!(ranges(&model).unwrap(), ["10.96.0.0/16", "10.97.0.0/16"]);
        let name = crate::model::ObjectName { namespace: "".into(), name: "a".into() };
        model.absorb(Event::ServiceCidrs(Change::Delete(name)));
        assert_eq!(ranges(&model).unwrap(), ["10.97.0.0/16"]);
    }
}
