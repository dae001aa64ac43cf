//! How much goes on, per Service port and per backend: the difference of two looks at what the programs count.

use std::{
    collections::HashMap,
    net::SocketAddr,
    time::{Duration, Instant},
};

use proxy_common::{backend::BackendState, stats::Stats};
use serde::Serialize;

use super::{Family, InspectError, Inspector, Names};
use crate::dataplane::FamilyReader;

/// What the programs have counted at one moment.
#[derive(Clone, Debug)]
pub struct Counts {
    at: Instant,
    services: HashMap<(Family, u32), (String, Stats)>,
    /// With the generation: a number may be given to another.
    backends: HashMap<(Family, u32, u32), (SocketAddr, Stats)>,
}

/// What goes on, per second.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Rate {
    /// Name of the Service port, or address of the backend.
    pub name: String,
    /// Connections opened.
    pub opened: f64,
    /// Packets from clients.
    pub packets: f64,
    /// Bytes from clients.
    pub bytes: f64,
    /// Packets from backends.
    pub reply_packets: f64,
    /// Bytes from backends.
    pub reply_bytes: f64,
}

/// What goes on at the node. Whoever does nothing is not among them; the busiest come first.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Rates {
    /// Seconds between the two looks.
    pub seconds: f64,
    /// By Service port.
    pub services: Vec<Rate>,
    /// By backend.
    pub backends: Vec<Rate>,
}

impl Inspector {
    /// What has been counted until now.
    pub fn counts(&self) -> Result<Counts, InspectError> {
        let mut counts = Counts { at: Instant::now(), services: HashMap::new(), backends: HashMap::new() };
        counts.add(self.observer().v4(), Family::Ipv4)?;
        counts.add(self.observer().v6(), Family::Ipv6)?;
        Ok(counts)
    }
}

impl Counts {
    fn add<R: FamilyReader>(&mut self, maps: &R, family: Family) -> Result<(), InspectError> {
        let names = Names::read(maps)?;
        let mut indexes: Vec<(u32, String)> =
            maps.services()?.iter().map(|(front, service)| (service.index, front.proto.to_string())).collect();
        indexes.sort_unstable();
        indexes.dedup_by_key(|(index, _)| *index);
        let end = indexes.last().map_or(0, |(index, _)| index + 1);
        let counts = maps.service_counts(end)?;
        // Index 0 stands for what is no Service port.
        for (index, protocol) in indexes.into_iter().filter(|(index, _)| *index > 0) {
            let stats = counts.get(index as usize).copied().unwrap_or_default();
            self.services.insert((family, index), (format!("{}/{protocol}", names.of(index)), stats));
        }
        let backends = maps.all_backends()?;
        let end = backends.iter().rposition(|backend| backend.state != BackendState::Free).map_or(0, |last| last + 1);
        let counts = maps.backend_counts(end as u32)?;
        for ((id, backend), stats) in (0..).zip(&backends).zip(counts) {
            if backend.state != BackendState::Free {
                let address = SocketAddr::new(backend.addr.into(), backend.port.number());
                self.backends.insert((family, id, backend.generation), (address, stats));
            }
        }
        Ok(())
    }

    /// What has gone on since an earlier look.
    pub fn since(&self, before: &Self) -> Rates {
        let passed = self.at.saturating_duration_since(before.at).max(Duration::from_millis(1));
        let seconds = passed.as_secs_f64();
        let services = self.services.iter().filter_map(|(key, (name, now))| {
            // An index that has got another owner meanwhile starts with this look.
            let (_, then) = before.services.get(key).filter(|(owner, _)| owner == name)?;
            Rate::between(name.clone(), then, now, seconds)
        });
        let backends = self.backends.iter().filter_map(|(key, (address, now))| {
            let (_, then) = before.backends.get(key)?;
            Rate::between(address.to_string(), then, now, seconds)
        });
        Rates { seconds, services: sorted(services), backends: sorted(backends) }
    }
}

/// The busiest first.
fn sorted(rates: impl Iterator<Item = Rate>) -> Vec<Rate> {
    let mut rates: Vec<Rate> = rates.collect();
    rates.sort_by(|a, b| b.load().total_cmp(&a.load()).then_with(|| a.name.cmp(&b.name)));
    rates
}

impl Rate {
    /// None where nothing has gone on.
    fn between(name: String, then: &Stats, now: &Stats, seconds: f64) -> Option<Self> {
        let rate = |count: fn(&Stats) -> u64| per_second(count(now).wrapping_sub(count(then)), seconds);
        (then != now).then(|| Self {
            name,
            opened: rate(|stats| stats.opened),
            packets: rate(|stats| stats.packets),
            bytes: rate(|stats| stats.bytes),
            reply_packets: rate(|stats| stats.reply_packets),
            reply_bytes: rate(|stats| stats.reply_bytes),
        })
    }

    /// How much there is to do for it.
    fn load(&self) -> f64 {
        self.packets + self.reply_packets + self.opened
    }
}

#[expect(clippy::cast_precision_loss, reason = "for people, who read three digits of it")]
fn per_second(count: u64, seconds: f64) -> f64 {
    count as f64 / seconds
}

#[cfg(test)]
mod tests {
    use std::{
        collections::HashMap,
        time::{Duration, Instant},
    };

    use proxy_common::stats::Stats;

    use super::{Counts, Family};

    fn counts(at: Instant, services: &[(u32, &str, u64)]) -> Counts {
        let stats = |packets| Stats { packets, ..Stats::default() };
        let services = services
            .iter()
            .map(|(index, name, packets)| ((Family::Ipv4, *index), ((*name).to_owned(), stats(*packets))));
        Counts { at, services: services.collect(), backends: HashMap::new() }
    }

    #[test]
    fn rates_are_differences_per_second_of_those_that_have_done_something() {
        let start = Instant::now();
        let before = counts(start, &[(1, "a", 100), (2, "b", 7), (3, "c", 0), (4, "old", 5)]);
        let after =
            counts(start + Duration::from_secs(2), &[(1, "a", 120), (2, "b", 7), (3, "c", 100), (4, "new", 90)]);
        let rates = after.since(&before);
        let told: Vec<_> = rates.services.iter().map(|rate| (rate.name.as_str(), rate.packets)).collect();
        assert_eq!(told, [("c", 50.0), ("a", 10.0)]);
    }
}
