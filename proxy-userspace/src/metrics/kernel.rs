//! What the programs count and how full their maps are, read from the kernel when somebody asks. A look at every entry of
//! the large tables is taken once in ten seconds at most, however often it is asked for.

mod reading;

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use prometheus_client::{collector::Collector, encoding::DescriptorEncoder};
use proxy_common::stats::Stats;
use tracing::warn;

pub(crate) use self::reading::named;
#[cfg(test)]
pub(super) use self::reading::sample;
use self::reading::{Reading, Used};
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

impl Kernel {
    fn read(&self) -> Reading {
        let look = self.look();
        let mut reading = Reading {
            counters: self.observer.counters(),
            fills: look.fills().copied().collect(),
            evictions: look.evictions.clone(),
            ..Reading::default()
        };
        for family in IpFamily::ALL {
            let active = &look.families[family as usize].active;
            for (index, port, stats) in self.services(family) {
                let labels = service_labels(family, &port);
                reading.services.push(Used { labels, stats, active: active_of(&active.services, index) });
            }
            if self.per_backend == PerBackend::Yes {
                for (backend, stats) in self.backends(family) {
                    let labels = vec![("backend", backend.address.to_string())];
                    reading.backends.push(Used { labels, stats, active: active_of(&active.backends, backend.id) });
                }
            }
        }
        reading
    }
}

impl Collector for Kernel {
    fn encode(&self, encoder: DescriptorEncoder) -> fmt::Result {
        self.read().encode(encoder)
    }
}

fn active_of(active: &HashMap<u32, u32>, number: u32) -> u64 {
    active.get(&number).copied().unwrap_or(0).into()
}

fn service_labels(family: IpFamily, port: &ServicePortName) -> reading::Labels {
    vec![
        ("namespace", port.service.namespace.to_string()),
        ("service", port.service.name.to_string()),
        ("port", port.port.clone()),
        ("protocol", port.protocol.to_string()),
        ("ip_family", family.name().to_owned()),
    ]
}
