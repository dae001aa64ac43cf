//! Connections per second from a pod to one on the same node: to its own address, to a Service's by way of the agent's socket hooks
//! and by way of its programs for packets, and by way of rules. Each way has a lab of its own.

use std::{fmt, net::SocketAddr, path::Path, time::Duration};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::{
    cluster::{Size, cluster_ip},
    goals::{Bound, Goal},
    rounds::{Effort, median, percentile},
    rules::LOADERS,
    softirq,
};
use crate::{
    lab::{
        Lab, LabOptions,
        agent::{AgentOptions, SocketLb},
        cluster::Cluster,
        manifest::write_documents,
    },
    traffic::{ChurnPlan, ChurnReport},
};

/// How a connection gets to its backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// It names it.
    Direct,
    /// The agent's hooks change what it names.
    Socket,
    /// The agent's programs translate its packets.
    Packets,
    /// The rules of one of [`LOADERS`] do.
    Rules(usize),
}

impl Way {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Direct, Self::Socket, Self::Packets, Self::Rules(0), Self::Rules(1)];
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Direct => write!(f, "direct, no Service"),
            Self::Socket => write!(f, "Sluice, sockets"),
            Self::Packets => write!(f, "Sluice, packets (TC)"),
            Self::Rules(loader) => write!(f, "{}", LOADERS[*loader].tables),
        }
    }
}

/// So many Services there are on every way but the direct one; the one in the middle is asked.
pub const SERVICES: u32 = 1_000;
const SIZE: Size = Size { services: SERVICES, endpoints: 1, port: 9_000 };
const ASKED: u32 = SERVICES / 2;
/// Whose client asks, and what answers.
const NODE: &str = "node-a";
const CLIENT: &str = "client-a";
const BACKEND: &str = "a1";

/// A lab in which connections take one way.
#[derive(Debug)]
pub struct Track {
    way: Way,
    lab: Held,
}

#[derive(Debug)]
enum Held {
    Bare(Lab),
    WithAgents(Cluster),
}

impl Track {
    /// Builds the lab.
    pub fn new(way: Way) -> Result<Self> {
        let agents = |socket_lb| {
            let options = AgentOptions { socket_lb, ..AgentOptions::default() };
            Cluster::start_with(LabOptions::default(), options, write).map(Held::WithAgents)
        };
        let lab = match way {
            Way::Direct | Way::Rules(_) => Held::Bare(Lab::new(LabOptions::default())?),
            Way::Socket => agents(SocketLb::All)?,
            Way::Packets => agents(SocketLb::Off)?,
        };
        let track = Self { way, lab };
        track.ready()?;
        Ok(track)
    }

    fn lab(&self) -> &Lab {
        match &self.lab {
            Held::Bare(lab) => lab,
            Held::WithAgents(cluster) => &cluster.lab,
        }
    }

    /// The backend has one address more, which is that of the Service's endpoint.
    fn ready(&self) -> Result<()> {
        let (node, backend, address) = (self.lab().node(NODE)?, self.lab().place(BACKEND)?, backend());
        backend.namespace().ip(&format!("addr add {}/32 dev eth0", address.ip()))?;
        node.host.namespace().ip(&format!("route add {}/32 dev pod-{BACKEND}", address.ip()))?;
        backend.accept(SIZE.port)?;
        if let Way::Rules(loader) = self.way {
            LOADERS[loader].fill(node.host.namespace(), SIZE)?;
        }
        Ok(())
    }

    /// What a connection names.
    fn target(&self) -> SocketAddr {
        if self.way == Way::Direct { backend() } else { (cluster_ip(ASKED), 80).into() }
    }

    /// Makes connections for so long.
    pub fn turn(&self, during: Duration) -> Result<Turn> {
        let client = self.lab().place(CLIENT)?;
        let began = self.spent()?;
        let report = client.churn(ChurnPlan { target: self.target(), during })?;
        let taken = self.spent()?.checked_sub(began).context("the clock goes backwards")?;
        Ok(Turn { report, taken })
    }

    /// What connections have taken of the processor that all of them stay on: client, server, and the kernel in between.
    fn spent(&self) -> Result<Duration> {
        Ok(self.lab().place(CLIENT)?.spent()? + self.lab().place(BACKEND)?.spent()? + softirq::spent()?)
    }
}

fn backend() -> SocketAddr {
    (SIZE.address(ASKED, 0, 0), SIZE.port).into()
}

/// All Services as objects, whose endpoints are pods of the node.
fn write(directory: &Path) -> Result<()> {
    let objects = SIZE.objects().filter(|object| object["kind"] != "Node").map(placed).collect::<Vec<_>>();
    write_documents(directory, "services.yaml", &objects)
}

fn placed(mut object: Value) -> Value {
    if object["kind"] == "Service" {
        object["apiVersion"] = json!("v1");
    } else {
        object["apiVersion"] = json!("discovery.k8s.io/v1");
        for endpoint in object["endpoints"].as_array_mut().into_iter().flatten() {
            endpoint["nodeName"] = json!(NODE);
        }
    }
    object
}

/// What a turn was.
#[derive(Clone, Debug)]
pub struct Turn {
    /// What the client saw.
    pub report: ChurnReport,
    /// What it took of the processor. Where nobody else wants it that is all the time there was.
    pub taken: Duration,
}

/// What was found of one way.
#[derive(Clone, Debug)]
pub struct Found {
    /// The way.
    pub way: Way,
    /// Connections per second of the processor, round by round.
    pub rates: Vec<f64>,
    /// The same by the clock on the wall.
    pub on_the_wall: Vec<f64>,
    /// Nanoseconds of every `connect`, sorted.
    pub latencies: Vec<u32>,
}

impl Found {
    /// Of turns, round by round.
    pub fn new(way: Way, turns: &[Turn]) -> Self {
        let rate = |turn: &Turn, time: Duration| f64::from(turn.report.latencies.len() as u32) / time.as_secs_f64();
        let rates = turns.iter().map(|turn| rate(turn, turn.taken)).collect();
        let on_the_wall = turns.iter().map(|turn| rate(turn, turn.report.elapsed)).collect();
        let mut latencies: Vec<u32> = turns.iter().flat_map(|turn| turn.report.latencies.iter().copied()).collect();
        latencies.sort_unstable();
        Self { way, rates, on_the_wall, latencies }
    }

    /// Connections per second of the processor, at the median.
    pub fn rate(&self) -> f64 {
        median(self.rates.clone())
    }

    /// Microseconds in which so many of a hundred connections stood.
    pub fn latency(&self, percent: usize) -> f64 {
        f64::from(percentile(&self.latencies, percent)) / 1e3
    }

    /// How many times as many connections as on another way, in the same round, at the median.
    pub fn ratio_to(&self, other: &Self) -> f64 {
        median(self.rates.iter().zip(&other.rates).map(|(own, other)| own / other).collect())
    }
}

/// Measures all ways, another one being the first in each round.
pub fn measure(ways: &[Way], effort: Effort, mut tell: impl FnMut(&str)) -> Result<Vec<Found>> {
    let mut tracks = Vec::new();
    for way in ways {
        tell(&format!("{way}: building"));
        tracks.push((Track::new(*way)?, Vec::new()));
    }
    for round in 0..effort.rounds {
        let first = round as usize % tracks.len().max(1);
        tracks.rotate_left(first);
        for (track, turns) in &mut tracks {
            tell(&format!("round {} of {}: {}", round + 1, effort.rounds, track.way));
            track.turn(effort.turn / 10)?;
            turns.push(track.turn(effort.turn)?);
        }
        tracks.rotate_right(first);
    }
    Ok(tracks.into_iter().map(|(track, turns)| Found::new(track.way, &turns)).collect())
}

/// What should be.
pub fn judge(found: &[Found]) -> Vec<Goal> {
    let find = |way| found.iter().find(|found| found.way == way);
    let ratio = find(Way::Socket).zip(find(Way::Direct)).map(|(socket, direct)| socket.ratio_to(direct));
    vec![Goal {
        what: format!("{}: connections per second, of direct", Way::Socket),
        bound: Bound::AtLeast(0.95),
        found: ratio,
    }]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn turn(latencies: &[u32], milliseconds: u64) -> Turn {
        let (latencies, taken) = (latencies.to_vec(), Duration::from_millis(milliseconds));
        // Half of the time others were at work.
        Turn { report: ChurnReport { latencies, elapsed: taken * 2 }, taken }
    }

    #[test]
    fn rates_are_of_rounds_and_latencies_of_all_connections() {
        let found =
            Found::new(Way::Socket, &[turn(&[9_000, 1_000], 500), turn(&[2_000], 1_000), turn(&[3_000; 3], 1_000)]);
        assert_eq!(found.rates, [4.0, 1.0, 3.0]);
        assert_eq!(found.on_the_wall, [2.0, 0.5, 1.5]);
        assert!((found.rate() - 3.0).abs() < 1e-9);
        assert!((found.latency(50) - 3.0).abs() < 1e-9 && (found.latency(99) - 9.0).abs() < 1e-9);
    }

    #[test]
    fn the_hooks_are_judged_by_what_a_direct_connection_reached_in_the_same_round() {
        let direct = Found::new(Way::Direct, &[turn(&[1; 100], 1_000), turn(&[1; 50], 1_000), turn(&[1; 100], 1_000)]);
        let socket = Found::new(Way::Socket, &[turn(&[1; 96], 1_000), turn(&[1; 48], 1_000), turn(&[1; 10], 1_000)]);
        let goals = judge(&[direct.clone(), socket]);
        assert!(goals[0].is_met() && (goals[0].found.unwrap() - 0.96).abs() < 1e-9);
        assert_eq!(judge(&[direct])[0].verdict(), "not measured");
    }

    #[test]
    fn the_agent_is_told_of_the_service_that_is_asked_and_of_its_endpoint() {
        let directory = tempfile::tempdir().unwrap();
        write(directory.path()).unwrap();
        let text = std::fs::read_to_string(directory.path().join("services.yaml")).unwrap();
        for wanted in [cluster_ip(ASKED).to_string(), backend().ip().to_string()] {
            assert!(text.contains(&format!("\"{wanted}\"")), "no {wanted}");
        }
        assert!(text.contains("\"nodeName\": \"node-a\"") && !text.contains("\"nodeName\": \"node-1\""));
    }
}
