//! Packets per second: frames that are really received and really sent (`BPF_F_TEST_XDP_LIVE_FRAMES`), through a veth into another
//! namespace, where those that arrive are counted.
//!
//! The kernel injects frames at a node's uplink; each is restored first. Programs send them back out; for the kernel's own forwarding, and for
//! rules, they are passed on to it.

use std::{fmt, time::Duration};

use anyhow::{Context as _, Result, ensure};

use super::{
    case::{Case, Kind},
    cluster::{Size, cluster_ip},
    conntrack,
    course::{Contestant, Course, STRANGERS, ends},
    goals::{Bound, Goal},
    restored::Traffic,
    road::{End, Road},
    rounds::{Effort, median},
    rules::LOADERS,
    yardstick::{Place, Role, Yardstick},
};
use crate::{
    frame::{Flags, Frame, Transport},
    patience::wait_until,
    testbed::{NODE, PORT, ROUTER_MAC, TARGET, Testbed, UPLINK_MAC},
};

/// Who sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Runner {
    /// Nobody: counted and dropped where they come in.
    Drop,
    /// A program that sends everything back.
    Send,
    /// The smallest honest balancer.
    Floor,
    /// The agent's program.
    Sluice,
    /// The kernel, to pods, without a balancer.
    Forward,
    /// Rules: which of [`LOADERS`], and of how many Services.
    Rules(usize, u32),
}

/// What is measured: who, with which packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heat {
    /// Who.
    pub runner: Runner,
    /// Packets of connections that are known, or of new ones.
    pub is_new: bool,
    /// Of so many flows, if they are known.
    pub flows: u32,
}

impl Heat {
    const fn known(runner: Runner, flows: u32) -> Self {
        Self { runner, is_new: false, flows }
    }

    const fn new(runner: Runner) -> Self {
        Self { runner, is_new: true, flows: 1 }
    }

    /// All of them, with rules of so many Services.
    pub fn all(services: &[u32]) -> Vec<Self> {
        let rules =
            || (0..LOADERS.len()).flat_map(|loader| services.iter().map(move |count| Runner::Rules(loader, *count)));
        let mut heats = vec![Self::known(Runner::Drop, 1), Self::known(Runner::Send, 1)];
        for flows in KNOWN {
            heats.extend([Runner::Floor, Runner::Sluice].map(|runner| Self::known(runner, flows)));
        }
        heats.push(Self::known(Runner::Forward, 1_000));
        heats.extend(rules().map(|runner| Self::known(runner, 1_000)));
        heats.extend([Runner::Floor, Runner::Sluice].into_iter().chain(rules()).map(Self::new));
        heats
    }

    fn case(self) -> Case {
        Case::new(if self.is_new { Kind::New } else { Kind::Established }, self.flows)
    }
}

/// How many flows are known.
const KNOWN: [u32; 2] = [1, 1_000];

impl fmt::Display for Heat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.runner {
            Runner::Drop => return write!(f, "XDP_DROP"),
            Runner::Send => return write!(f, "XDP_TX"),
            Runner::Floor => write!(f, "floor")?,
            Runner::Sluice => write!(f, "Sluice")?,
            Runner::Forward => return write!(f, "forwarding, no Service"),
            Runner::Rules(loader, 1) => write!(f, "{}, 1 Service", LOADERS[loader].tables)?,
            Runner::Rules(loader, services) => write!(f, "{}, {services} Services", LOADERS[loader].tables)?,
        }
        match (self.is_new, self.flows) {
            (true, _) => write!(f, ", new"),
            (false, 1) => write!(f, ", known, 1 flow"),
            (false, flows) => write!(f, ", known, {flows} flows"),
        }
    }
}

/// What a turn was.
#[derive(Clone, Copy, Debug)]
pub struct Turn {
    /// Frames that were injected.
    pub sent: u32,
    /// Frames that came out at the other end.
    pub arrived: u32,
    /// What all that was done with them took of the one processor they stay on.
    pub taken: Duration,
}

/// What was found of one.
#[derive(Clone, Debug)]
pub struct Found {
    /// Of whom.
    pub heat: Heat,
    /// Round by round.
    pub turns: Vec<Turn>,
}

impl Found {
    /// Frames that arrived, per second of a processor's time, at the median.
    pub fn rate(&self) -> f64 {
        median(self.rates())
    }

    /// The same round by round.
    pub fn rates(&self) -> Vec<f64> {
        self.turns.iter().map(|turn| f64::from(turn.arrived) / turn.taken.as_secs_f64()).collect()
    }

    /// How many of a thousand frames did not arrive, in all rounds.
    pub fn lost(&self) -> f64 {
        let sent: f64 = self.turns.iter().map(|turn| f64::from(turn.sent)).sum();
        let arrived: f64 = self.turns.iter().map(|turn| f64::from(turn.arrived)).sum();
        1_000.0 * (1.0 - arrived / sent)
    }

    /// How many times as fast as another, in the same round, at the median.
    pub fn ratio_to(&self, other: &Self) -> f64 {
        median(self.rates().into_iter().zip(other.rates()).map(|(own, other)| own / other).collect())
    }
}

/// What should be.
pub fn judge(found: &[Found]) -> Vec<Goal> {
    let find = |heat: Heat| found.iter().find(|found| found.heat == heat);
    let goal = |flows| {
        let [sluice, floor] = [Runner::Sluice, Runner::Floor].map(|runner| Heat::known(runner, flows));
        let ratio = find(sluice).zip(find(floor)).map(|(sluice, floor)| sluice.ratio_to(floor));
        Goal {
            what: format!("{sluice}: packets per second, of the floor's"),
            bound: Bound::AtLeast(1.15),
            found: ratio,
        }
    };
    KNOWN.map(goal).into()
}

/// Frames for a first guess.
const GUESS: u32 = 10_000;
/// So many connections the kernel's table has room for in any case, and its masquerading ports.
const NEW: u32 = 20_000;
/// More new flows than any of the other tables has room for.
const FILLING: u32 = 300_000;
/// Frames of a known flow that is to be kept are few; the map of the sink's object need not be large.
const FEW: u32 = 1_024;
/// How long frames may be under way.
const UNDER_WAY: Duration = Duration::from_millis(200);
/// A client beyond the router.
const CLIENT: ([u8; 4], u16) = ([100, 128, 0, 1], 20_000);

/// All roads, and who runs on them. Lives in the namespace of the test bed.
pub struct Stadium<'a> {
    course: Course<'a>,
    _end: End,
    /// What sends frames on the other roads, and what counts them on all.
    rig: Yardstick,
    plain: Road,
    rules: Vec<(Runner, Road)>,
}

/// One with its frames.
struct Entry {
    found: Found,
    traffic: Traffic,
    count: u32,
}

impl<'a> Stadium<'a> {
    /// Builds the roads that the heats need, with rules.
    pub fn new(bed: &'a mut Testbed, heats: &[Heat], tell: &mut impl FnMut(&str)) -> Result<Self> {
        let mut rig = Yardstick::new(NODE, FEW)?;
        let end = End::of(bed, &mut rig)?;
        let plain = Road::new("plain", &mut rig)?;
        let mut rules: Vec<(Runner, Road)> = Vec::new();
        for heat in heats {
            let Runner::Rules(loader, services) = heat.runner else { continue };
            if rules.iter().all(|(runner, _)| *runner != heat.runner) {
                tell(&format!("{}: rules of {services} Services", LOADERS[loader].tables));
                let road = Road::new(LOADERS[loader].tables, &mut rig)?;
                // The transport checksum is that of the first flow, which only this would look at.
                road.namespace.sysctl("net/netfilter/nf_conntrack_checksum", "0")?;
                LOADERS[loader].fill(&road.namespace, size(services))?;
                rules.push((heat.runner, road));
            }
        }
        Ok(Self { course: Course::new(bed)?, _end: end, rig, plain, rules })
    }

    /// Measures them: those whose flows are known first, because new ones drive them out of tables.
    pub fn measure(&mut self, heats: &[Heat], effort: Effort, mut tell: impl FnMut(&str)) -> Result<Vec<Found>> {
        let mut found = Vec::new();
        for is_new in [false, true] {
            let mut entries = Vec::new();
            for heat in heats.iter().filter(|heat| heat.is_new == is_new) {
                tell(&format!("{heat}: making its flows"));
                entries.push(self.entry(*heat, effort)?);
            }
            for round in 0..effort.rounds {
                let first = round as usize % entries.len().max(1);
                entries.rotate_left(first);
                for entry in &mut entries {
                    tell(&format!("round {} of {}: {}", round + 1, effort.rounds, entry.found.heat));
                    let turn = self.turn(entry.found.heat, &entry.traffic, entry.count)?;
                    entry.found.turns.push(turn);
                }
                entries.rotate_right(first);
            }
            found.extend(entries.into_iter().map(|entry| entry.found));
        }
        Ok(found)
    }

    fn entry(&mut self, heat: Heat, effort: Effort) -> Result<Entry> {
        let traffic = self.traffic(heat)?;
        if heat.is_new && matches!(heat.runner, Runner::Floor | Runner::Sluice) {
            self.send(heat, &traffic, FILLING)?;
        }
        let guess = self.turn(heat, &traffic, GUESS)?;
        ensure!(guess.arrived > 0, "{heat}: nothing arrived of {GUESS} frames");
        #[expect(clippy::cast_sign_loss, reason = "a time is not negative")]
        let count = (effort.turn.as_secs_f64() / guess.taken.as_secs_f64() * f64::from(GUESS)) as u32;
        let is_bounded = heat.is_new && matches!(heat.runner, Runner::Rules(..));
        let count = count.max(GUESS).min(if is_bounded { NEW } else { u32::MAX });
        Ok(Entry { found: Found { heat, turns: vec![] }, traffic, count })
    }

    fn traffic(&mut self, heat: Heat) -> Result<Traffic> {
        match heat.runner {
            Runner::Floor => self.course.traffic(heat.case(), Contestant::Floor),
            Runner::Sluice => self.course.traffic(heat.case(), Contestant::Sluice),
            _ => packets(&mut self.rig, heat),
        }
    }

    /// Some frames to warm the caches, and then so many.
    fn turn(&mut self, heat: Heat, traffic: &Traffic, count: u32) -> Result<Turn> {
        if let (Runner::Rules(..), true) = (heat.runner, heat.is_new) {
            conntrack::forget(&self.road(heat.runner)?.namespace)?;
        }
        self.send(heat, traffic, (count / 20).max(heat.flows))?;
        self.send(heat, traffic, count)
    }

    /// Sends frames, and waits for all of them as long as any can be under way.
    fn send(&mut self, heat: Heat, traffic: &Traffic, count: u32) -> Result<Turn> {
        let before = self.rig.arrived()?;
        let taken = match heat.runner {
            Runner::Floor => self.course.inject(Contestant::Floor, traffic, count)?,
            Runner::Sluice => self.course.inject(Contestant::Sluice, traffic, count)?,
            runner => self.send_here(runner, traffic, count)?,
        };
        let all = before + u64::from(count);
        let rig = &mut self.rig;
        // That some are lost is a finding.
        let _ = wait_until("frames", UNDER_WAY, || rig.arrived().ok().filter(|arrived| *arrived >= all));
        let arrived = u32::try_from(self.rig.arrived()? - before)?;
        ensure!(arrived <= count, "{heat}: {arrived} frames arrived of {count}");
        Ok(Turn { sent: count, arrived, taken })
    }

    fn send_here(&mut self, runner: Runner, traffic: &Traffic, count: u32) -> Result<Duration> {
        let role = match runner {
            Runner::Drop => Role::Sink,
            Runner::Send => Role::Send,
            _ => Role::Null,
        };
        let program = self.rig.descriptor(role, Place::Xdp)?;
        self.rig.call(Place::Xdp, &program)?;
        let road = self.rules.iter().find(|(rules, _)| *rules == runner).map_or(&self.plain, |(_, road)| road);
        let rig = &mut self.rig;
        road.namespace.run(|| rig.inject(traffic, road.uplink, count))?
    }

    fn road(&self, runner: Runner) -> Result<&Road> {
        Ok(&self.rules.iter().find(|(rules, _)| *rules == runner).context("no road has these rules")?.1)
    }
}

/// One endpoint of each: a packet looks at the Service's alone, and `iptables-restore` takes the square of the number of chains.
fn size(services: u32) -> Size {
    Size { services, endpoints: 1, port: TARGET }
}

/// The frames of a heat of the kernel's: for the Service in the middle of the rules, or for a pod.
fn packets(rig: &mut Yardstick, heat: Heat) -> Result<Traffic> {
    let destination = match heat.runner {
        Runner::Rules(_, services) => (cluster_ip(services / 2).into(), PORT),
        _ => (size(1).address(0, 0, 0).into(), TARGET),
    };
    let flags = if heat.is_new { Flags::SYN } else { Flags::ACK };
    let frame = |number: u16| {
        let source = if heat.is_new { (STRANGERS.v4.into(), 0xc000) } else { (CLIENT.0.into(), CLIENT.1 + number) };
        let frame = Frame::new(source, destination, Transport::Tcp(flags));
        Frame { macs: (UPLINK_MAC, ROUTER_MAC), payload: vec![b'x'; 64], ..frame }
    };
    // They differ in their ports alone: the checksum of the IP header is right for all.
    let flows: Vec<_> = (0..heat.flows as u16).map(|number| ends(&frame(number))).collect();
    let traffic = rig.traffic(&frame(0), &flows)?;
    Ok(Traffic { is_new: heat.is_new, ..traffic })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(runner: Runner, turns: &[(u32, u32, u64)]) -> Found {
        let turn = |(sent, arrived, milliseconds)| Turn { sent, arrived, taken: Duration::from_millis(milliseconds) };
        Found { heat: Heat::known(runner, 1_000), turns: turns.iter().copied().map(turn).collect() }
    }

    #[test]
    fn what_counts_is_what_arrived() {
        let found = found(Runner::Sluice, &[(1_000, 500, 1_000), (1_000, 1_000, 1_000), (1_000, 600, 1_000)]);
        assert!((found.rate() - 600.0).abs() < 1e-9);
        assert!((found.lost() - 300.0).abs() < 1e-9);
    }

    #[test]
    fn a_slow_round_changes_no_ratio_and_the_goal_is_judged_by_it() {
        let floor = found(Runner::Floor, &[(100, 100, 100), (100, 100, 400), (100, 100, 100)]);
        let sluice = found(Runner::Sluice, &[(120, 120, 100), (120, 120, 400), (120, 120, 100)]);
        let goals = judge(&[floor, sluice]);
        assert_eq!(goals.iter().map(Goal::verdict).collect::<Vec<_>>(), ["not measured", "met"]);
        assert!((goals[1].found.unwrap() - 1.2).abs() < 1e-9);
    }

    #[test]
    fn every_heat_is_there_once_and_has_a_name_of_its_own() {
        let heats = Heat::all(&[1, 1_000]);
        let names: std::collections::BTreeSet<String> = heats.iter().map(ToString::to_string).collect();
        assert_eq!(names.len(), heats.len());
        assert!(names.contains("iptables, 1000 Services, new") && names.contains("Sluice, known, 1 flow"));
    }
}
