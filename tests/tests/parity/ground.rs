//! The lab as the cases need it: routes to every address of the Services, and a gateway that answers whatever leaks out.

use std::{collections::BTreeMap, net::SocketAddr, path::Path, thread};

use anyhow::{Context as _, Result, bail, ensure};
use tempfile::TempDir;
use tests::{
    lab::{
        Lab, LabOptions,
        address::{CLIENT, Family, NODES, of_pod, on_wire},
        agent::AgentOptions,
        manifest::write_nodes,
    },
    traffic::{Ask, Findings, Inquiry, Protocol, Target},
};

use crate::{
    case::Case,
    fixture::{Fixture, PORT, TARGET_PORTS, UNDEFINED_PORT, write_service_cidr},
    oracle::{Client, Settings},
};

/// Where Services have their addresses, of both families.
const SERVICE_NETWORKS: [[&str; 2]; 3] = [
    ["10.96.0.0/16", "fd00:10:96::/112"],
    ["198.51.100.0/24", "2001:db8:100::/64"],
    ["203.0.113.0/24", "2001:db8:113::/64"],
];

/// No node port, not among the source ports of masqueraded flows, and each used once: a connection of one case is never
/// taken for that of another.
const FIRST_SOURCE_PORT: u16 = 33_000;

/// A lab with a directory that its agents watch.
pub(crate) struct Ground {
    pub(crate) lab: Lab,
    source: TempDir,
    /// By client, family and protocol.
    next_ports: BTreeMap<(&'static str, Family, Protocol), u16>,
}

impl Ground {
    /// Without agents.
    pub(crate) fn new(services: &[Fixture]) -> Result<Self> {
        let source = tempfile::tempdir()?;
        write_nodes(source.path())?;
        write_service_cidr(source.path())?;
        services.iter().try_for_each(|service| service.write(source.path()))?;
        let lab = Lab::new(LabOptions::default())?;
        lead_the_client_to_services(&lab)?;
        let networks = SERVICE_NETWORKS.as_flattened().iter();
        let local: Vec<_> = networks.map(|network| format!("route add local {network} dev lo")).collect();
        lab.gateway.namespace().ip(&local.join("\n"))?;
        let back: Vec<_> = NODES
            .iter()
            .map(|node| {
                let (pods, via) = (of_pod(node.number, 0), on_wire(node.host));
                format!("route add {}/24 via {}\nroute add {}/64 via {}", pods.v4, via.v4, pods.v6, via.v6)
            })
            .collect();
        lab.gateway.namespace().ip(&back.join("\n"))?;
        // It answers from addresses that it does not have.
        lab.gateway.namespace().sysctl("net/ipv6/ip_nonlocal_bind", "1")?;
        lab.gateway.serve(&[PORT, UNDEFINED_PORT])?;
        for node in &lab.nodes {
            node.host.serve(&TARGET_PORTS)?;
        }
        Ok(Self { lab, source, next_ports: BTreeMap::new() })
    }

    /// The directory that the agents watch.
    pub(crate) fn source(&self) -> &Path {
        self.source.path()
    }

    /// Starts agents with these settings, in place of those before.
    pub(crate) fn start(&self, settings: Settings) -> Result<()> {
        let switches = [
            ("--masquerade-all", settings.masquerade_all),
            ("--masquerade-local-backends", settings.masquerade_local_backends),
            ("--nodeport-addresses=all", settings.every_address),
        ];
        let more = switches.iter().filter(|(_, on)| *on).map(|(switch, _)| (*switch).to_owned()).collect();
        self.lab.start_agents(
            self.source(),
            &AgentOptions { socket_lb: settings.socket_lb, more, ..AgentOptions::default() },
        )
    }

    /// Asks all the cases at once; what was found about each, in their order.
    pub(crate) fn ask(&mut self, cases: &[&Case]) -> Result<Vec<Findings>> {
        let mut by_place: BTreeMap<&'static str, (Vec<usize>, Vec<Inquiry>)> = BTreeMap::new();
        for (number, case) in cases.iter().enumerate() {
            let inquiry = case.inquiry(self.take_ports(case.client, case.target(), case.times())?);
            let (numbers, inquiries) = by_place.entry(case.client.place()).or_default();
            numbers.push(number);
            inquiries.push(inquiry);
        }
        let mut found = Vec::new();
        thread::scope(|scope| {
            let ask = |(place, (numbers, inquiries)): (_, (Vec<usize>, _))| {
                let lab = &self.lab;
                scope.spawn(move || Ok(numbers.into_iter().zip(lab.place(place)?.inquire(inquiries)?)))
            };
            let threads: Vec<_> = by_place.into_iter().map(ask).collect();
            for thread in threads {
                let findings: Result<_> = thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                found.extend(findings?);
            }
            anyhow::Ok(())
        })?;
        found.sort_by_key(|(number, _)| *number);
        Ok(found.into_iter().map(|(_, findings)| findings).collect())
    }

    /// Who answers so many requests of a client's.
    pub(crate) fn hear(&mut self, client: Client, target: Target, times: u16) -> Result<Vec<String>> {
        let source = client.source(Family::of(target.address.ip()));
        let port = self.take_ports(client, target, times)?;
        let ask = Ask::new(target).from(SocketAddr::new(source, port));
        let found = self.lab.place(client.place())?.inquire(vec![Inquiry { ask, times }])?;
        let findings = found.into_iter().next().context("no finding for one inquiry")?;
        if let Some((failure, _)) = findings.failure {
            bail!("{} asked {target}: {failure}", client.place());
        }
        Ok(findings.answers.into_iter().map(|answer| answer.pod).collect())
    }

    fn take_ports(&mut self, client: Client, target: Target, times: u16) -> Result<u16> {
        let user = (client.place(), Family::of(target.address.ip()), target.protocol);
        let next = self.next_ports.entry(user).or_insert(FIRST_SOURCE_PORT);
        let first = *next;
        *next = first.checked_add(times).context("no source port is left that was not used")?;
        Ok(first)
    }
}

/// By node-a from its first address, by node-b from the second.
fn lead_the_client_to_services(lab: &Lab) -> Result<()> {
    let (client, second) = (lab.client.namespace(), on_wire(CLIENT + 1));
    // What a node passes on to the gateway stays on one wire, and the node's kernel says so. A client that believed it would
    // go past the node from then on, even when the address has become a Service's.
    for family in ["ipv4", "ipv6"] {
        for device in ["all", "eth0"] {
            client.sysctl(&format!("net/{family}/conf/{device}/accept_redirects"), "0")?;
        }
    }
    client.ip(&format!("addr add {}/24 dev eth0\naddr add {}/64 dev eth0 nodad", second.v4, second.v6))?;
    for (node, table) in NODES.iter().zip(["main", "101"]) {
        let via = on_wire(node.host);
        for [v4, v6] in SERVICE_NETWORKS {
            client.ip(&format!(
                "route add {v4} via {} table {table}\nroute add {v6} via {} table {table}",
                via.v4, via.v6
            ))?;
        }
    }
    // Rules alone do not tell their family.
    for (family, source) in [("-4", second.of(Family::V4)), ("-6", second.of(Family::V6))] {
        let source = source.to_string();
        let rule = client.command("ip")?.args([family, "rule", "add", "from", &source, "lookup", "101"]).status()?;
        ensure!(rule.success(), "cannot route by the source {source}");
    }
    Ok(())
}
