//! Whether the maps hold what the model has.

use std::{collections::BTreeMap, net::IpAddr};

use anyhow::Result;
use aya::maps::PerCpuArray;
use proxy_common::{
    addr::{Ipv4, Ipv6},
    flow::Flow,
    outcome::{self, Hook, Outcome},
};

use super::{Rig, Wire, key, name};
use crate::{
    fuzz::{HOOKS, scene::BACKENDS},
    model::{self, Model},
};

impl Rig<'_> {
    /// What was counted since the beginning of time.
    pub(super) fn counters(&mut self) -> Result<BTreeMap<(Hook, Outcome), u64>> {
        let map = PerCpuArray::<_, u64>::try_from(self.bed.map("COUNTERS")?)?;
        let mut counters = BTreeMap::new();
        for hook in HOOKS {
            for outcome in Outcome::ALL {
                let count = map.get(&outcome::counter(hook, outcome), 0)?.iter().sum();
                if count > 0 {
                    counters.insert((hook, outcome), count);
                }
            }
        }
        Ok(counters)
    }

    /// What was counted in this episode.
    pub fn count(&mut self) -> Result<BTreeMap<(Hook, Outcome), u64>> {
        let before = &self.before.clone();
        let now = self.counters()?.into_iter();
        let since = now.map(|(what, count)| (what, count - before.get(&what).copied().unwrap_or(0)));
        Ok(since.filter(|(_, count)| *count > 0).collect())
    }

    /// Says where the tables are not what the model has.
    pub fn compare(&mut self, model: &Model) -> Result<Option<String>> {
        let counted = self.count()?;
        if counted != model.counted {
            return Ok(Some(difference("counted", &counted, &model.counted)));
        }
        if let Some(difference) = self.compare_family::<Ipv4>(model)? {
            return Ok(Some(difference));
        }
        self.compare_family::<Ipv6>(model)
    }

    fn compare_family<A: Wire>(&mut self, model: &Model) -> Result<Option<String>> {
        for (map, tier) in [("FLOWS", &model.table.confirmed), ("EMBRYOS", &model.table.embryos)] {
            let have: BTreeMap<_, _> =
                self.flows::<A>(map)?.iter().map(|(tuple, flow)| (key(tuple), shown(flow))).collect();
            let want = tier.iter().filter(|(key, _)| key.source.0.is_ipv4() == A::IS_V4);
            let want: BTreeMap<_, _> = want.map(|(key, flow)| (*key, shown_model(flow))).collect();
            if have != want {
                return Ok(Some(difference(map, &have, &want)));
            }
        }
        let have: BTreeMap<_, _> = self
            .affinities::<A>()?
            .iter()
            .map(|(client, it)| ((client.service, client.addr.into()), (it.backend, it.backend_generation, it.slot)))
            .collect();
        let want = model.affinities.iter().filter(|((_, client), _)| client.is_ipv4() == A::IS_V4);
        let want: BTreeMap<(u32, IpAddr), _> =
            want.map(|(client, it)| (*client, (it.backend, it.generation, it.slot))).collect();
        if have != want {
            return Ok(Some(difference("AFFINITY", &have, &want)));
        }
        let active = self.array::<u32>(&name("ACTIVE", A::IS_V4))?;
        for id in 0..=BACKENDS {
            let (have, want) = (active.get(&id, 0)?, model.table.active.get(&(A::IS_V4, id)).copied().unwrap_or(0));
            if have != want {
                return Ok(Some(format!("{} of backend {id}: {have} and not {want}", name("ACTIVE", A::IS_V4))));
            }
        }
        Ok(None)
    }
}

/// What is compared of a flow.
fn shown<A: Wire>(flow: &Flow<A>) -> String {
    let to = &flow.rewrite;
    let (source, destination): (IpAddr, IpAddr) = (to.saddr.into(), to.daddr.into());
    let hop = &flow.next_hop;
    let hop =
        (hop.ifindex != 0).then_some((u32::from(hop.generation), model::Hop { mac: hop.dmac.octets, mtu: hop.mtu }));
    format!(
        "to {:?} backend {}/{} service {} {:?}/{:?}/{:?} {:?} state {} hop {hop:?}",
        ((source, to.sport.number()), (destination, to.dport.number())),
        flow.backend,
        flow.backend_generation,
        flow.service,
        flow.output,
        flow.twin_output,
        flow.twin_stage,
        flow.direction,
        flow.state,
    )
}

fn shown_model(flow: &model::Flow) -> String {
    format!(
        "to {:?} backend {}/{} service {} {:?}/{:?}/{:?} {:?} state {} hop {:?}",
        (flow.source, flow.destination),
        flow.backend,
        flow.generation,
        flow.service,
        flow.output,
        flow.twin_output,
        flow.twin_stage,
        flow.direction,
        flow.state,
        flow.hop,
    )
}

fn difference<K: Ord + std::fmt::Debug, V: PartialEq + std::fmt::Debug>(
    what: &str,
    have: &BTreeMap<K, V>,
    want: &BTreeMap<K, V>,
) -> String {
    use std::fmt::Write as _;
    let mut text = format!("{what} differ:");
    for (key, value) in have {
        if want.get(key) != Some(value) {
            let _ = write!(text, "\n  program {key:?}: {value:?}");
        }
    }
    for (key, value) in want {
        if have.get(key) != Some(value) {
            let _ = write!(text, "\n  model   {key:?}: {value:?}");
        }
    }
    text
}
