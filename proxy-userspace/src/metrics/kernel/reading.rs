//! What was read of the kernel, as series of metrics.

use std::{collections::BTreeMap, fmt};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
};
use proxy_common::{
    outcome::{Hook, Outcome},
    stats::Stats,
};

use crate::{
    dataplane::Fill,
    inspect::meaning::{hook_name, snake},
};

/// Series of one name.
type Series<L> = Vec<(L, u64)>;
pub(super) type Labels = Vec<(&'static str, String)>;

/// Everything that was read.
#[derive(Debug, Default)]
pub(in crate::metrics) struct Reading {
    pub(super) counters: Vec<(Hook, Outcome, u64)>,
    pub(super) fills: Vec<Fill>,
    pub(super) evictions: Vec<(&'static str, u64)>,
    pub(super) services: Vec<Used>,
    pub(super) backends: Vec<Used>,
}

/// A Service port, or a backend, and how it was used.
#[derive(Debug)]
pub(super) struct Used {
    pub(super) labels: Labels,
    pub(super) stats: Stats,
    /// Connections that go on.
    pub(super) active: u64,
}

impl Collector for Reading {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        put_outcomes(&mut encoder, &self.counters)?;
        let fill = |number: fn(&Fill) -> u64| -> Series<Labels> {
            self.fills.iter().map(|fill| (vec![("map", fill.map.to_owned())], number(fill))).collect()
        };
        put_gauges(&mut encoder, "sluice_map_entries", "Entries in use", &fill(|fill| fill.entries as u64))?;
        put_gauges(&mut encoder, "sluice_map_capacity", "Entries that fit", &fill(|fill| fill.capacity.into()))?;
        let evictions: Series<Labels> =
            self.evictions.iter().map(|(map, count)| (vec![("map", (*map).to_owned())], *count)).collect();
        let help = "Entries of the flow table that gave way to others";
        put_counters(&mut encoder, "sluice_flow_evictions", help, &evictions)?;
        Counted::of("sluice_service", "Service port", &self.services).put(&mut encoder)?;
        Counted::of("sluice_backend", "backend", &self.backends).put(&mut encoder)
    }
}

/// Counts of Service ports, or of backends. One that nobody has used has no series: there may be very many.
struct Counted {
    name: &'static str,
    what: &'static str,
    packets: Series<Labels>,
    bytes: Series<Labels>,
    opened: Series<Labels>,
    active: Series<Labels>,
}

impl Counted {
    fn of(name: &'static str, what: &'static str, all: &[Used]) -> Self {
        let mut counted =
            Self { name, what, packets: Vec::new(), bytes: Vec::new(), opened: Vec::new(), active: Vec::new() };
        for used in all {
            counted.add(used);
        }
        counted
    }

    fn add(&mut self, Used { labels, stats, active }: &Used) {
        if *stats == Stats::default() && *active == 0 {
            return;
        }
        let directed = |direction: &str| [labels.clone(), vec![("direction", direction.to_owned())]].concat();
        self.packets.push((directed("original"), stats.packets));
        self.packets.push((directed("reply"), stats.reply_packets));
        self.bytes.push((directed("original"), stats.bytes));
        self.bytes.push((directed("reply"), stats.reply_bytes));
        self.opened.push((labels.clone(), stats.opened));
        self.active.push((labels.clone(), *active));
    }

    fn put(&self, encoder: &mut DescriptorEncoder) -> fmt::Result {
        let Self { name, what, .. } = self;
        put_counters(encoder, &format!("{name}_packets"), &format!("Packets of a {what}"), &self.packets)?;
        put_counters(
            encoder,
            &format!("{name}_bytes"),
            &format!("Bytes of a {what}, IP headers included"),
            &self.bytes,
        )?;
        let help = format!("Connections opened to a {what}");
        put_counters(encoder, &format!("{name}_connections_opened"), &help, &self.opened)?;
        let help = format!("Connections of a {what} that go on, as of the last ten seconds");
        put_gauges(encoder, &format!("{name}_connections_active"), &help, &self.active)
    }
}

/// Families by the first word of an outcome's name, and what they count.
const OUTCOMES: [(&str, &str, &str); 6] = [
    ("Drop", "sluice_drops", "Packets dropped, and sockets refused as if they had been"),
    ("Reject", "sluice_rejects", "Clients told that nothing listens"),
    ("Reset", "sluice_resets", "Connections ended because their backend has gone"),
    ("Refuse", "sluice_refusals", "Sockets refused"),
    ("Pass", "sluice_passes", "Packets of ours that were passed on untouched"),
    ("", "sluice_events", "Things that happened to flows"),
];

fn put_outcomes(encoder: &mut DescriptorEncoder, counters: &[(Hook, Outcome, u64)]) -> fmt::Result {
    let mut families: BTreeMap<&str, Series<Labels>> = BTreeMap::new();
    for (hook, outcome, count) in counters {
        let (name, key, reason) = named(*outcome);
        let labels = vec![(key, reason), ("hook", hook_name(*hook))];
        families.entry(name).or_default().push((labels, *count));
    }
    let described = OUTCOMES.iter().filter_map(|(_, name, help)| Some((name, help, families.get(name)?)));
    described.into_iter().try_for_each(|(name, help, series)| put_counters(encoder, name, help, series))
}

/// The family of an outcome, its label therein, and the value of that.
pub(crate) fn named(outcome: Outcome) -> (&'static str, &'static str, String) {
    let whole = format!("{outcome:?}");
    let family = OUTCOMES.iter().find_map(|(word, name, _)| Some((*name, whole.strip_prefix(word)?)));
    let (name, rest) = family.unwrap_or(("sluice_events", &whole));
    (name, if name == "sluice_events" { "event" } else { "reason" }, snake(rest))
}

fn put_counters(encoder: &mut DescriptorEncoder, name: &str, help: &str, series: &[(Labels, u64)]) -> fmt::Result {
    put(encoder, name, help, MetricType::Counter, series, ConstCounter::new)
}

fn put_gauges(encoder: &mut DescriptorEncoder, name: &str, help: &str, series: &[(Labels, u64)]) -> fmt::Result {
    put(encoder, name, help, MetricType::Gauge, series, ConstGauge::new)
}

fn put<M: EncodeMetric>(
    encoder: &mut DescriptorEncoder,
    name: &str,
    help: &str,
    kind: MetricType,
    series: &[(Labels, u64)],
    metric: fn(u64) -> M,
) -> fmt::Result {
    let mut family = encoder.encode_descriptor(name, help, None, kind)?;
    series.iter().try_for_each(|(labels, value)| metric(*value).encode(family.encode_family(labels)?))
}

/// A series of every name, with every label, for whoever has no kernel to read.
#[cfg(test)]
pub(in crate::metrics) fn sample() -> Reading {
    use crate::{
        model::{ObjectName, ServicePortName},
        progress::IpFamily,
    };
    let service = ObjectName { namespace: "default".into(), name: "web".into() };
    let port = ServicePortName { service, port: "http".into(), protocol: proxy_common::addr::Protocol::Tcp };
    let used = |labels| vec![Used { labels, stats: Stats { opened: 1, ..Stats::default() }, active: 1 }];
    Reading {
        counters: Outcome::ALL.into_iter().map(|outcome| (Hook::PodIn, outcome, 1)).collect(),
        fills: vec![Fill { map: "FLOWS_V4", entries: 1, capacity: 2 }],
        evictions: vec![("FLOWS_V4", 1)],
        services: used(super::service_labels(IpFamily::V4, &port)),
        backends: used(vec![("backend", "192.0.2.1:80".to_owned())]),
    }
}

#[cfg(test)]
mod tests {
    use proxy_common::outcome::Outcome;

    use super::named;

    #[test]
    fn outcomes_are_told_by_their_kind_and_reason() {
        let cases = [
            (Outcome::DropNoLocalEndpoint, ("sluice_drops", "reason", "no_local_endpoint")),
            (Outcome::RejectNoEndpoint, ("sluice_rejects", "reason", "no_endpoint")),
            (Outcome::ResetGone, ("sluice_resets", "reason", "gone")),
            (Outcome::RefuseBind, ("sluice_refusals", "reason", "bind")),
            (Outcome::PassFragment, ("sluice_passes", "reason", "fragment")),
            (Outcome::PortChanged, ("sluice_events", "event", "port_changed")),
        ];
        for (outcome, (family, label, value)) in cases {
            assert_eq!(named(outcome), (family, label, value.to_owned()));
        }
    }
}
