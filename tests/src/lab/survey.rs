//! Reaches every Service from everywhere, and says who answered.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use anyhow::Result;
use serde::Serialize;

use super::{Lab, Node, manifest::Published};
use crate::{
    patience::patience,
    traffic::{Ask, Protocol, Target, place::Place},
};

/// Requests per round; the rounds go on until every backend has answered.
const ROUND: u32 = 8;

/// How long every backend may take to answer.
const DEADLINE: Duration = Duration::from_secs(10);

/// One way to a Service.
#[derive(Clone, Debug, Serialize)]
pub struct Finding {
    /// The Service.
    pub service: String,
    /// `pod`, `node` or `outside`.
    pub from: &'static str,
    /// The place the requests came from.
    pub client: String,
    /// What they were addressed to: `cluster address`, or `node port of` a node.
    pub to: String,
    /// Address, port and protocol.
    pub target: String,
    /// `IPv4` or `IPv6`.
    pub family: &'static str,
    /// TCP or UDP.
    pub protocol: Protocol,
    /// How often which pod answered.
    pub answers: BTreeMap<String, u32>,
    /// Backends that never answered.
    pub missing: Vec<String>,
    /// How often there was no answer, by reason.
    pub failures: BTreeMap<String, u32>,
}

impl Finding {
    /// Every backend answered, nobody else did, and no request was lost.
    pub fn is_complete(&self) -> bool {
        self.missing.is_empty() && self.failures.is_empty()
    }
}

/// A client and a target to try it with.
#[derive(Clone, Debug)]
pub struct Way<'lab> {
    /// `pod`, `node` or `outside`.
    pub from: &'static str,
    /// Where the requests come from.
    pub client: &'lab Place,
    /// `cluster address`, or `node port of` a node.
    pub to: String,
    /// What they are addressed to.
    pub target: Target,
}

/// Every way to a port of a Service: its cluster address from the pods that back nothing, from the pods behind it, and
/// from the nodes; its node port from the nodes and from outside, at each node.
pub fn ways<'lab>(lab: &'lab Lab, port: &Published) -> Vec<Way<'lab>> {
    let mut ways = Vec::new();
    for node in &lab.nodes {
        let clients =
            node.pods.iter().filter(|pod| pod.name().starts_with("client-") || port.pods.contains(pod.name()));
        ways.extend(clients.map(|client| to_cluster("pod", client, port)));
        ways.push(to_cluster("node", &node.host, port));
        ways.extend([("node", &node.host), ("outside", &lab.client)].into_iter().filter_map(|(from, client)| {
            let (to, target) = (format!("node port of {}", node.plan.name), at_node(node, port)?);
            Some(Way { from, client, to, target })
        }));
    }
    ways
}

fn to_cluster<'lab>(from: &'static str, client: &'lab Place, port: &Published) -> Way<'lab> {
    Way { from, client, to: "cluster address".to_owned(), target: port.cluster }
}

fn at_node(node: &Node, port: &Published) -> Option<Target> {
    let address = (node.addresses().of(port.family()), port.node_port?).into();
    Some(Target { address, protocol: port.cluster.protocol })
}

/// Asks until every backend has answered, or something went wrong, or time is up.
pub fn try_way(way: &Way<'_>, port: &Published) -> Result<Finding> {
    let mut finding = Finding {
        service: port.service.clone(),
        from: way.from,
        client: way.client.name().to_owned(),
        to: way.to.clone(),
        target: way.target.to_string(),
        family: port.family().name(),
        protocol: port.cluster.protocol,
        answers: BTreeMap::new(),
        missing: port.pods.iter().cloned().collect(),
        failures: BTreeMap::new(),
    };
    let deadline = Instant::now() + patience(DEADLINE);
    while finding.failures.is_empty() && !finding.missing.is_empty() && Instant::now() < deadline {
        // The first one alone: with nothing behind it, eight would take eight times as long to say so.
        let count = if finding.answers.is_empty() { 1 } else { ROUND };
        ask_round(way, port, count, &mut finding)?;
    }
    Ok(finding)
}

fn ask_round(way: &Way<'_>, port: &Published, count: u32, finding: &mut Finding) -> Result<()> {
    for answer in way.client.ask_times(Ask::new(way.target), count)? {
        match answer {
            Ok(answer) if port.pods.contains(&answer.pod) => *finding.answers.entry(answer.pod).or_default() += 1,
            Ok(answer) => *finding.failures.entry(format!("answered by {}", answer.pod)).or_default() += 1,
            Err(failure) => *finding.failures.entry(failure.to_string()).or_default() += 1,
        }
    }
    finding.missing.retain(|pod| !finding.answers.contains_key(pod));
    Ok(())
}
