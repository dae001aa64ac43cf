//! From where a Service's load balancer addresses may be used.

use std::collections::BTreeSet;

use ipnet::IpNet;
use k8s_openapi::api::core::v1 as core;

use super::{defect::Problem, sloppy};

/// Extends the ranges to NodePorts and external IPs.
const SCOPE: &str = "service.sluice.dev/source-ranges-scope";

/// What the ranges are asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SourceScope {
    /// The load balancer's addresses, as kube-proxy has it.
    #[default]
    LoadBalancer,
    /// NodePorts and external IPs, too.
    All,
}

/// From where a Service may be used, by family. None: from everywhere. An empty set: from nowhere.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SourceRanges {
    /// IPv4.
    pub v4: Option<BTreeSet<IpNet>>,
    /// IPv6.
    pub v6: Option<BTreeSet<IpNet>>,
    /// For which of its frontends that holds.
    pub scope: SourceScope,
}

impl SourceRanges {
    /// Ranges of one family leave the other one open, and a range of everything is no restriction. One that cannot be
    /// read restricts the family it seems to be of, or both.
    pub(super) fn parse(object: &core::Service, mut note: impl FnMut(Problem)) -> Self {
        let mut ranges = Self { scope: parse_scope(object, &mut note), ..Self::default() };
        let written = object.spec.iter().filter_map(|spec| spec.load_balancer_source_ranges.as_ref()).flatten();
        for text in written.map(|text| text.trim()) {
            let range = sloppy::range(text);
            for is_ipv4 in [true, false].into_iter().filter(|is_ipv4| may_be_of(text, *is_ipv4)) {
                ranges.of_family_mut(is_ipv4).get_or_insert_default().extend(range.map(|range| range.trunc()));
            }
            if range.is_none() {
                note(Problem::source_range(text));
            }
        }
        let is_everything = |ranges: &BTreeSet<IpNet>| ranges.iter().any(|range| range.prefix_len() == 0);
        ranges.v4 = ranges.v4.filter(|ranges| !is_everything(ranges));
        ranges.v6 = ranges.v6.filter(|ranges| !is_everything(ranges));
        ranges
    }

    fn of_family_mut(&mut self, is_ipv4: bool) -> &mut Option<BTreeSet<IpNet>> {
        if is_ipv4 { &mut self.v4 } else { &mut self.v6 }
    }
}

fn may_be_of(text: &str, is_ipv4: bool) -> bool {
    match (text.contains(':'), text.contains('.')) {
        (true, _) => !is_ipv4,
        (false, true) => is_ipv4,
        (false, false) => true,
    }
}

fn parse_scope(object: &core::Service, note: &mut impl FnMut(Problem)) -> SourceScope {
    match object.metadata.annotations.as_ref().and_then(|annotations| annotations.get(SCOPE)).map(String::as_str) {
        Some("all") => SourceScope::All,
        None | Some("load-balancer") => SourceScope::LoadBalancer,
        Some(other) => {
            note(Problem::source_scope(other));
            SourceScope::LoadBalancer
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::{SourceRanges, SourceScope};

    fn parse(ranges: &Value, annotations: &Value) -> (SourceRanges, usize) {
        let object = json!({
            "metadata": {"name": "web", "annotations": annotations},
            "spec": {"loadBalancerSourceRanges": ranges},
        });
        let mut problems = 0;
        let ranges = SourceRanges::parse(&serde_json::from_value(object).unwrap(), |_| problems += 1);
        (ranges, problems)
    }

    #[test]
    fn ranges_are_split_by_family_and_what_cannot_be_read_lets_nobody_in() {
        type Case = (&'static str, Value, Option<Vec<&'static str>>, Option<Vec<&'static str>>, usize);
        let cases: Vec<Case> = vec![
            ("nothing written", json!(null), None, None, 0),
            ("an empty list", json!([]), None, None, 0),
            ("spaces around", json!([" 192.0.2.0/24 "]), Some(vec!["192.0.2.0/24"]), None, 0),
            ("bits beyond the prefix", json!(["192.0.2.7/24"]), Some(vec!["192.0.2.0/24"]), None, 0),
            ("IPv6 alone", json!(["2001:db8::/32"]), None, Some(vec!["2001:db8::/32"]), 0),
            (
                "both families",
                json!(["192.0.2.0/24", "2001:db8::/32", "198.51.100.0/24"]),
                Some(vec!["192.0.2.0/24", "198.51.100.0/24"]),
                Some(vec!["2001:db8::/32"]),
                0,
            ),
            (
                "everything of one family",
                json!(["192.0.2.0/24", "0.0.0.0/0", "fd00::/8"]),
                None,
                Some(vec!["fd00::/8"]),
                0,
            ),
            ("everything of the other", json!(["192.0.2.0/24", "::/0"]), Some(vec!["192.0.2.0/24"]), None, 0),
            ("nonsense", json!(["nonsense"]), Some(vec![]), Some(vec![]), 1),
            ("an empty text", json!([""]), Some(vec![]), Some(vec![]), 1),
            ("too long a prefix", json!(["192.0.2.0/33", "192.0.2.0/24"]), Some(vec!["192.0.2.0/24"]), None, 1),
            ("an address", json!(["2001:db8::1"]), None, Some(vec![]), 1),
            ("a control character", json!(["192.0.2.0/24\u{1b}[2J"]), Some(vec![]), None, 1),
        ];
        for (name, written, v4, v6, problems) in cases {
            let (ranges, found) = parse(&written, &json!({}));
            let texts = |ranges: Option<std::collections::BTreeSet<ipnet::IpNet>>| {
                ranges.map(|ranges| ranges.iter().map(ToString::to_string).collect::<Vec<_>>())
            };
            let wanted = |texts: Option<Vec<&str>>| texts.map(|texts| texts.iter().map(ToString::to_string).collect());
            assert_eq!((texts(ranges.v4), texts(ranges.v6), found), (wanted(v4), wanted(v6), problems), "{name}");
        }
    }

    #[test]
    fn an_annotation_extends_the_ranges_to_the_other_ways_in() {
        let scope = |value: &str| {
            let (ranges, problems) = parse(&json!([]), &json!({"service.sluice.dev/source-ranges-scope": value}));
            (ranges.scope, problems)
        };
        assert_eq!(parse(&json!([]), &json!({})).0.scope, SourceScope::LoadBalancer);
        assert_eq!(scope("all"), (SourceScope::All, 0));
        assert_eq!(scope("load-balancer"), (SourceScope::LoadBalancer, 0));
        assert_eq!(scope("All"), (SourceScope::LoadBalancer, 1));
    }
}
