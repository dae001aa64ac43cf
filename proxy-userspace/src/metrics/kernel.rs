//! What the programs count and how full their maps are, read from the kernel when somebody asks. A look at every entry of
//! the large tables is taken once in ten seconds at most, however often it is asked for.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
};
use proxy_common::{
    outcome::{Hook, Outcome},
    stats::Stats,
};
use tracing::warn;

use super::owners::{Counts, Owners};
use crate::{
    dataplane::{self, Fill, KnownBackend, Observer, Survey},
    model::ServicePortName,
    progress::IpFamily,
};

/// How old a look at the tables may be.
const FRESH: Duration = Duration::from_secs(10);

/// Whether each backend has series of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PerBackend {
    /// There may be very many.
    No,
    /// As kube-proxy never had them.
    #[default]
    Yes,
}

/// Answers with what the kernel says.
#[derive(Debug)]
pub struct Kernel {
    observer: Observer,
    owners: [Owners; 2],
    per_backend: PerBackend,
    looked: Mutex<Option<(Instant, Arc<Look>)>>,
}

/// A look at the tables.
#[derive(Debug, Default)]
struct Look {
    families: [Survey; 2],
    slots: Option<Fill>,
    evictions: Vec<(&'static str, u64)>,
}

/// Series of one name.
type Series<L> = Vec<(L, u64)>;
type Labels = Vec<(&'static str, String)>;

impl Kernel {
    /// Over open maps.
    pub fn new(observer: Observer, per_backend: PerBackend) -> Self {
        Self { observer, owners: Default::default(), per_backend, looked: Mutex::new(None) }
    }

    /// Whose the counts of a family are.
    pub fn owners(&self, family: IpFamily) -> &Owners {
        &self.owners[family as usize]
    }

    /// The counts of a family.
    pub fn counts(&self, family: IpFamily) -> impl Counts {
        FamilyCounts { observer: &self.observer, family }
    }

    /// Tells the programs how many connections each backend really has, if a Service goes by that: they do not see
    /// connections that end in silence.
    pub fn recount(&self) -> Result<(), dataplane::Error> {
        let (v4, v6) = (self.observer.v4(), self.observer.v6());
        if v4.needs_active()? {
            v4.put_active(&v4.active()?)?;
        }
        if v6.needs_active()? {
            v6.put_active(&v6.active()?)?;
        }
        Ok(())
    }

    /// Makes room for new flows, if there is little.
    pub fn expire(&self) -> Result<u64, dataplane::Error> {
        self.observer.expire()
    }

    /// A look at the tables that is not too old. Who asks while another one looks, waits for what that one sees.
    fn look(&self) -> Arc<Look> {
        let mut looked = self.looked.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((at, look)) = &*looked
            && at.elapsed() < FRESH
        {
            return Arc::clone(look);
        }
        let mut look = Look::take(&self.observer).unwrap_or_else(|error| {
            warn!("metrics: {error}");
            Look::default()
        });
        if let Some((_, before)) = &*looked {
            look.go_on_from(before);
        }
        let look = Arc::new(look);
        *looked = Some((Instant::now(), Arc::clone(&look)));
        look
    }

    fn services(&self, family: IpFamily) -> Vec<(u32, Arc<ServicePortName>, Stats)> {
        let indexes = match family {
            IpFamily::V4 => self.observer.v4().indexes(),
            IpFamily::V6 => self.observer.v6().indexes(),
        }
        .unwrap_or_default();
        let end = indexes.last().map_or(0, |last| last + 1);
        let stats = match family {
            IpFamily::V4 => self.observer.v4().all_service_stats(end),
            IpFamily::V6 => self.observer.v6().all_service_stats(end),
        }
        .unwrap_or_default();
        let counted = indexes.into_iter().filter_map(|index| {
            let (port, stats) = self.owners(family).service(index, stats.get(index as usize)?)?;
            Some((index, port, stats))
        });
        counted.collect()
    }

    fn backends(&self, family: IpFamily) -> Vec<(KnownBackend, Stats)> {
        let backends = match family {
            IpFamily::V4 => self.observer.v4().backends(),
            IpFamily::V6 => self.observer.v6().backends(),
        }
        .unwrap_or_default();
        let end = backends.last().map_or(0, |last| last.id + 1);
        let stats = match family {
            IpFamily::V4 => self.observer.v4().all_backend_stats(end),
            IpFamily::V6 => self.observer.v6().all_backend_stats(end),
        }
        .unwrap_or_default();
        let counted = backends.into_iter().filter(|backend| backend.is_present).filter_map(|backend| {
            let stats = stats.get(backend.id as usize)?;
            Some((backend, self.owners(family).backend(backend.id, backend.generation, stats)))
        });
        counted.collect()
    }
}

impl Look {
    fn take(observer: &Observer) -> Result<Self, dataplane::Error> {
        let before = observer.unevicted()?;
        let families = [observer.v4().survey()?, observer.v6().survey()?];
        let after = observer.unevicted()?;
        let maps = families.iter().flat_map(|survey| &survey.flow_table);
        // What enters or leaves while entries are counted is not to be taken for an eviction.
        let missing = |fill: &Fill, (before, after): (u64, u64)| before.min(after).saturating_sub(fill.entries as u64);
        let evictions =
            maps.zip(before.into_iter().zip(after)).map(|(fill, numbers)| (fill.map, missing(fill, numbers)));
        let evictions = evictions.collect();
        Ok(Self { families, slots: Some(observer.slots()?), evictions })
    }

    /// For the same reason what is gone may seem less than a moment ago.
    fn go_on_from(&mut self, before: &Self) {
        for ((_, now), (_, before)) in self.evictions.iter_mut().zip(&before.evictions) {
            *now = (*now).max(*before);
        }
    }

    fn fills(&self) -> impl Iterator<Item = &Fill> {
        self.families.iter().flat_map(|survey| survey.flow_table.iter().chain(&survey.fills)).chain(&self.slots)
    }
}

struct FamilyCounts<'a> {
    observer: &'a Observer,
    family: IpFamily,
}

impl Counts for FamilyCounts<'_> {
    fn service(&self, index: u32) -> Stats {
        match self.family {
            IpFamily::V4 => self.observer.v4().service_stats(index),
            IpFamily::V6 => self.observer.v6().service_stats(index),
        }
        .unwrap_or_default()
    }

    fn backend(&self, id: u32) -> Stats {
        match self.family {
            IpFamily::V4 => self.observer.v4().backend_stats(id),
            IpFamily::V6 => self.observer.v6().backend_stats(id),
        }
        .unwrap_or_default()
    }
}

impl Collector for Kernel {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        let look = self.look();
        put_outcomes(&mut encoder, &self.observer.counters())?;
        let fill = |number: fn(&Fill) -> u64| -> Series<Labels> {
            look.fills().map(|fill| (vec![("map", fill.map.to_owned())], number(fill))).collect()
        };
        put_gauges(&mut encoder, "sluice_map_entries", "Entries in use", &fill(|fill| fill.entries as u64))?;
        put_gauges(&mut encoder, "sluice_map_capacity", "Entries that fit", &fill(|fill| fill.capacity.into()))?;
        let evictions: Series<Labels> =
            look.evictions.iter().map(|(map, count)| (vec![("map", (*map).to_owned())], *count)).collect();
        let help = "Entries of the flow table that gave way to others";
        put_counters(&mut encoder, "sluice_flow_evictions", help, &evictions)?;
        let mut services = Counted::new("sluice_service", "Service port");
        let mut backends = Counted::new("sluice_backend", "backend");
        for family in IpFamily::ALL {
            let active = &look.families[family as usize].active;
            for (index, port, stats) in self.services(family) {
                services.add(&service_labels(family, &port), &stats, active_of(&active.services, index));
            }
            if self.per_backend == PerBackend::Yes {
                for (backend, stats) in self.backends(family) {
                    let labels = vec![("backend", backend.address.to_string())];
                    backends.add(&labels, &stats, active_of(&active.backends, backend.id));
                }
            }
        }
        services.put(&mut encoder)?;
        backends.put(&mut encoder)
    }
}

fn active_of(active: &HashMap<u32, u32>, number: u32) -> u64 {
    active.get(&number).copied().unwrap_or(0).into()
}

fn service_labels(family: IpFamily, port: &ServicePortName) -> Labels {
    vec![
        ("namespace", port.service.namespace.to_string()),
        ("service", port.service.name.to_string()),
        ("port", port.port.clone()),
        ("protocol", port.protocol.to_string()),
        ("ip_family", family.name().to_owned()),
    ]
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
    fn new(name: &'static str, what: &'static str) -> Self {
        Self { name, what, packets: Vec::new(), bytes: Vec::new(), opened: Vec::new(), active: Vec::new() }
    }

    fn add(&mut self, labels: &Labels, stats: &Stats, active: u64) {
        if *stats == Stats::default() && active == 0 {
            return;
        }
        let directed = |direction: &str| [labels.clone(), vec![("direction", direction.to_owned())]].concat();
        self.packets.push((directed("original"), stats.packets));
        self.packets.push((directed("reply"), stats.reply_packets));
        self.bytes.push((directed("original"), stats.bytes));
        self.bytes.push((directed("reply"), stats.reply_bytes));
        self.opened.push((labels.clone(), stats.opened));
        self.active.push((labels.clone(), active));
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
        let (name, reason) = named(*outcome);
        let key = if name == "sluice_events" { "event" } else { "reason" };
        let labels = vec![(key, reason), ("hook", snake(&format!("{hook:?}")))];
        families.entry(name).or_default().push((labels, *count));
    }
    let described = OUTCOMES.iter().filter_map(|(_, name, help)| Some((name, help, families.get(name)?)));
    described.into_iter().try_for_each(|(name, help, series)| put_counters(encoder, name, help, series))
}

/// The family of an outcome and its name therein.
fn named(outcome: Outcome) -> (&'static str, String) {
    let whole = format!("{outcome:?}");
    let family = OUTCOMES.iter().find_map(|(word, name, _)| Some((*name, whole.strip_prefix(word)?)));
    let (name, rest) = family.unwrap_or(("sluice_events", &whole));
    (name, snake(rest))
}

/// `NoEndpoint` → `no_endpoint`
fn snake(camel: &str) -> String {
    let mut snake = String::new();
    for (index, letter) in camel.char_indices() {
        if letter.is_ascii_uppercase() && index > 0 {
            snake.push('_');
        }
        snake.push(letter.to_ascii_lowercase());
    }
    snake
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

#[cfg(test)]
mod tests {
    use proxy_common::outcome::Outcome;

    use super::named;

    #[test]
    fn outcomes_are_told_by_their_kind_and_reason() {
        let cases = [
            (Outcome::DropNoLocalEndpoint, ("sluice_drops", "no_local_endpoint")),
            (Outcome::RejectNoEndpoint, ("sluice_rejects", "no_endpoint")),
            (Outcome::ResetGone, ("sluice_resets", "gone")),
            (Outcome::RefuseBind, ("sluice_refusals", "bind")),
            (Outcome::PassFragment, ("sluice_passes", "fragment")),
            (Outcome::PortChanged, ("sluice_events", "port_changed")),
        ];
        for (outcome, (family, reason)) in cases {
            assert_eq!(named(outcome), (family, reason.to_owned()));
        }
    }
}
