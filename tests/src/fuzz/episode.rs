//! An episode: a world at random and a history of events in it. Each event follows from the seed, its own number and what has
//! become of those before, so that a history can be had again with some of its events left out.

use std::collections::BTreeMap;

use anyhow::Result;
use proxy_common::outcome::Hook;

use super::{
    chance::Chance,
    rig::Rig,
    scene,
    traffic::{self, Event, Kind},
};
use crate::{
    model::{Expected, Model, Objection, Verdict},
    testbed::{Ran, action},
};

/// Events of an episode.
pub const EVENTS: u32 = 2_000;
/// So much may go by in all: the programs' clock is a word.
const LONGEST: u64 = 3_000_000_000;

/// What an episode was like.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// Packets by kind, whether they were spoilt, and hook.
    pub packets: BTreeMap<(Kind, bool, Hook), u64>,
    /// Packets by verdict and whether they were changed.
    pub verdicts: BTreeMap<(Hook, &'static str), u64>,
    /// Packets of which the kernel makes none for a hook.
    pub refused: u64,
    /// Whether it ended early, because what was chosen could not be known.
    pub is_unknowable: bool,
}

/// Where programs and model do not agree.
#[derive(Clone, Debug)]
pub struct Difference {
    /// Number of the event.
    pub event: u32,
    /// What happened, and what was expected.
    pub what: String,
}

/// How often the tables are compared.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Compare {
    /// When it is over.
    AtTheEnd,
    /// After every event.
    Always,
}

/// Runs the events of these numbers. The first difference ends it.
pub fn run(rig: &mut Rig<'_>, seed: u64, events: &[u32], compare: Compare) -> Result<(Tally, Option<Difference>)> {
    let world = scene::world(&mut Chance::new(seed, u64::MAX));
    let mut tally = Tally::default();
    rig.begin(&world)?;
    let mut model = Model::new(world);
    for &number in events {
        let event = traffic::event(&mut Chance::new(seed, number.into()), &model);
        let shown = if compare == Compare::Always { Some(event.clone()) } else { None };
        let mut what = happen(rig, &mut model, event, &mut tally)?;
        if tally.is_unknowable {
            return Ok((tally, None));
        }
        if what.is_none() && compare == Compare::Always {
            what = rig.compare(&model)?.map(|what| format!("after {}:\n{what}", show(shown.as_ref())));
        }
        if let Some(what) = what {
            return Ok((tally, Some(Difference { event: number, what })));
        }
    }
    let what = rig.compare(&model)?;
    let event = events.last().copied().unwrap_or(0);
    Ok((tally, what.map(|what| Difference { event, what })))
}

fn show(event: Option<&Event>) -> String {
    match event {
        Some(Event::Packet(kind, is_spoilt, hook, bytes)) => {
            let spoilt = if *is_spoilt { ", spoilt" } else { "" };
            format!("{kind:?}{spoilt} at {hook:?}\n  in      {}", hex(bytes))
        }
        Some(Event::Change(_)) => "a change by the agent".into(),
        Some(Event::Time(jiffies)) => format!("{jiffies} jiffies"),
        Some(Event::Eviction(key)) => format!("the eviction of {key:?}"),
        None => "nothing".into(),
    }
}

/// Lets something happen to the programs and to the model.
fn happen(rig: &mut Rig<'_>, model: &mut Model, event: Event, tally: &mut Tally) -> Result<Option<String>> {
    match event {
        Event::Packet(kind, is_spoilt, hook, bytes) => {
            let Some(ran) = rig.run(hook, &bytes)? else {
                tally.refused += 1;
                return Ok(None);
            };
            *tally.packets.entry((kind, is_spoilt, hook)).or_default() += 1;
            let complaint = match model.run(hook, &bytes, rig) {
                Ok(expected) => {
                    *tally.verdicts.entry((hook, name(&expected, &bytes))).or_default() += 1;
                    judge(hook, &expected, &ran)
                }
                Err(Objection::Wrong(what)) => Some(what),
                Err(Objection::Unknowable) => {
                    tally.is_unknowable = true;
                    None
                }
            };
            let spoilt = if is_spoilt { ", spoilt" } else { "" };
            Ok(complaint.map(|what| {
                let (before, after) = (hex(&bytes), hex(&ran.bytes));
                let action = ran.action;
                format!("{kind:?}{spoilt} at {hook:?}: {what}\n  in      {before}\n  program {action} {after}")
            }))
        }
        Event::Time(jiffies) => {
            if model.now + u64::from(jiffies) < LONGEST {
                rig.age(jiffies)?;
                model.now += u64::from(jiffies);
            }
            Ok(None)
        }
        Event::Eviction(key) => {
            rig.evict(&key)?;
            model.table.evict(&key);
            Ok(None)
        }
        Event::Change(world) => {
            rig.tell(&world)?;
            model.world = *world;
            Ok(None)
        }
    }
}

fn name(expected: &Expected, bytes: &[u8]) -> &'static str {
    match expected.verdict {
        Verdict::Pass if expected.bytes == bytes => "untouched",
        Verdict::Pass => "translated",
        Verdict::SendOut => "sent out",
        Verdict::Drop => "dropped",
    }
}

/// What is not as expected.
fn judge(hook: Hook, expected: &Expected, ran: &Ran) -> Option<String> {
    let wanted = match (hook, expected.verdict) {
        (Hook::UplinkXdp, Verdict::Pass) => action::XDP_PASS,
        (Hook::UplinkXdp, Verdict::Drop) => action::XDP_DROP,
        (Hook::UplinkXdp, Verdict::SendOut) => action::XDP_TX,
        (_, Verdict::Pass) => action::TC_NEXT,
        (_, Verdict::Drop) => action::TC_DROP,
        (_, Verdict::SendOut) => action::TC_REDIRECT,
    };
    if ran.action != wanted {
        return Some(format!("action {wanted} expected\n  model   {}", hex(&expected.bytes)));
    }
    if expected.verdict == Verdict::Drop || expected.is_met_by(&ran.bytes) {
        return None;
    }
    Some(format!("other bytes expected\n  model   {wanted} {}", hex(&expected.bytes)))
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    let write = |mut text: String, byte: &u8| {
        let _ = write!(text, "{byte:02x}");
        text
    };
    bytes.iter().fold(String::new(), write)
}

/// The shortest history that still shows a difference: events are left out, in ever smaller numbers, while it does.
pub fn minimise(rig: &mut Rig<'_>, seed: u64) -> Result<Option<(Vec<u32>, Difference)>> {
    let mut attempt = |events: &[u32]| -> Result<Option<(Vec<u32>, Difference)>> {
        // What is left to chance may hide it once.
        for _ in 0..3 {
            if let (_, Some(difference)) = run(rig, seed, events, Compare::Always)? {
                let until = events.iter().position(|event| *event == difference.event).unwrap_or(0);
                return Ok(Some((events[..=until].to_vec(), difference)));
            }
        }
        Ok(None)
    };
    let all: Vec<u32> = (0..EVENTS).collect();
    let Some(mut best) = attempt(&all)? else { return Ok(None) };
    let mut chunk = best.0.len() / 2;
    while chunk > 0 {
        let mut start = 0;
        while start < best.0.len() {
            let mut fewer = best.0.clone();
            fewer.drain(start..(start + chunk).min(fewer.len()));
            match attempt(&fewer)? {
                Some(found) => best = found,
                None => start += chunk,
            }
        }
        chunk /= 2;
    }
    Ok(Some(best))
}
