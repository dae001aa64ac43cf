//! `sluice status`: how the node's dataplane is, at a glance.

use std::{collections::BTreeMap, fmt::Write as _};

use clap::Args;

use super::{
    Failure,
    output::{Target, ago, columns, word},
};
use crate::inspect::{AgentStatus, Attached, NodeStatus, Status};

/// What to show.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  sluice status\n  sluice status -v\n  sluice status -o json | jq .agent.is_running"
)]
pub(super) struct Arguments {
    /// Every program and every map.
    #[arg(short, long)]
    verbose: bool,
    #[command(flatten)]
    target: Target,
}

pub(super) fn execute(arguments: &Arguments) -> Result<(), Failure> {
    let status = arguments.target.inspector()?.status()?;
    arguments.target.show(&status, |status| describe(status, arguments.verbose))
}

fn describe(status: &Status, verbose: bool) -> String {
    let node = &status.node;
    let addresses: Vec<String> = node.masquerade_addresses.iter().map(ToString::to_string).collect();
    let mut rows = agent(&status.agent);
    rows.extend([
        ["Maps".into(), format!("layout {}, pinned under {}", status.layout, status.pin_path)],
        ["Masquerades as".into(), if addresses.is_empty() { "nobody".into() } else { addresses.join(" ") }],
        ["NodePorts".into(), span(node.node_ports)],
        ["Source ports".into(), span(node.source_ports)],
    ]);
    rows.extend(beside(node));
    rows.extend(devices(&status.attached).into_iter().map(|(target, programs)| [target, programs]));
    let mut text = String::new();
    for [name, value] in &rows {
        let _ = writeln!(text, "{:<18}{value}", format!("{name}:"));
    }
    if verbose {
        text += "\n";
        text += &programs(&status.attached);
    }
    text += "\n";
    text += &maps(status, verbose);
    text
}

/// Who else translates connections, if anybody does.
fn beside(node: &NodeStatus) -> Option<[String; 2]> {
    let said = match node.new_connections {
        "left" => "left to another proxy of this node: the agent hands over, or has just begun".into(),
        "held" => "held for an instant: another version takes over".into(),
        _ if node.foreign_connections > 0 => {
            format!("taken; {} that another proxy had before go on with it", node.foreign_connections)
        }
        _ => return None,
    };
    Some(["New connections".into(), said])
}

fn span([first, last]: [u16; 2]) -> String {
    format!("{first}-{last}")
}

fn agent(agent: &AgentStatus) -> Vec<[String; 2]> {
    let since =
        |seconds: Option<u64>| seconds.map_or_else(|| "never".into(), |seconds| format!("{} ago", ago(seconds)));
    let running = if agent.is_running {
        format!("running (pid {}, version {}, started {})", agent.pid, agent.version, since(agent.started_seconds_ago))
    } else {
        format!("not running: traffic goes on as the maps say; last seen {}", since(agent.alive_seconds_ago))
    };
    let synced = match agent.failures {
        0 => since(agent.synced_seconds_ago),
        failures => format!("{}; {failures} attempts have failed since: see its log", since(agent.synced_seconds_ago)),
    };
    vec![
        ["Agent".into(), running],
        ["Last news".into(), since(agent.heard_seconds_ago)],
        ["In the kernel".into(), synced],
        ["Algorithm".into(), agent.algorithm.clone()],
        ["Confined".into(), if agent.confined.is_empty() { "no".into() } else { agent.confined.join(", ") }],
    ]
}

/// Programs by device, in one line each.
fn devices(attached: &[Attached]) -> Vec<(String, String)> {
    let mut devices: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for Attached { target, program, mechanism, is_dead, .. } in attached {
        let shown = match (target.as_str(), is_dead) {
            (_, true) => format!("{program} (gone)"),
            // Of a cgroup there are eleven, always the same.
            ("cgroup", _) => program.clone(),
            _ => format!("{program} ({mechanism})"),
        };
        devices.entry(target).or_default().push(shown);
    }
    devices.into_iter().map(|(target, programs)| (target.to_owned(), programs.join(" "))).collect()
}

fn programs(attached: &[Attached]) -> String {
    let headings = ["TARGET", "PROGRAM", "MECHANISM", "PROGRAM ID", "LINK ID", "DEVICE GONE"];
    let row = |link: &Attached| {
        let Attached { target, program, mechanism, program_id, link_id, is_dead } = link;
        let (program_id, link_id) = (program_id.to_string(), link_id.to_string());
        [target.clone(), program.clone(), mechanism.clone(), program_id, link_id, word(*is_dead)]
    };
    columns(&headings, attached.iter().map(row), "Nothing is attached.")
}

fn maps(status: &Status, verbose: bool) -> String {
    let headings = ["MAP", "ENTRIES", "CAPACITY", "FULL"];
    let shown = status.maps.iter().filter(|map| verbose || map.entries > 0).map(|map| {
        let percent = map.entries as u64 * 100 / u64::from(map.capacity.max(1));
        [map.name.clone(), map.entries.to_string(), map.capacity.to_string(), format!("{percent} %")]
    });
    columns(&headings, shown, "All maps are empty.")
}
