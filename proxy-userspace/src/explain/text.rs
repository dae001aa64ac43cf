//! The answer for people: a line for each thing that is to be known, the question first. May change.

use std::net::SocketAddr;

use super::{
    answer::{
        Affinity, Answer, Backend, Choice, Clients, Connection, Fate, Frontend, Packet, Reason, SecondStep, Way,
        WayKind,
    },
    question::Origin,
};
use crate::inspect::{Kind, Share};

/// Width of the column of names.
const NAMES: usize = 13;

pub(super) fn describe(answer: &Answer) -> String {
    let mut rows = vec![
        ("Packet", packet(&answer.packet)),
        ("Seen by", seen_by(answer)),
        ("Result", fate(answer.result).to_owned()),
        ("Reason", reason(&answer.reason, answer.result)),
    ];
    rows.extend(answer.also.iter().map(|also| ("Also", reason(also, answer.result))));
    rows.extend(answer.connection.iter().map(|known| ("Connection", connection(known))));
    rows.extend(answer.service.iter().map(|service| ("Service", frontend(service))));
    rows.extend(answer.choice.iter().flat_map(|choice| choices(choice, answer.result)));
    rows.extend(answer.backend.iter().map(|chosen| ("Backend", backend(chosen))));
    rows.extend(answer.after.iter().map(|after| ("Becomes", packet(after))));
    rows.extend(answer.way.iter().map(|taken| ("Goes", way(taken))));
    rows.extend(answer.second_step.iter().map(|step| ("Then", second_step(step))));
    rows.extend(answer.notes.iter().map(|note| ("Note", note.clone())));
    rows.into_iter().map(|(name, value)| format!("{:<NAMES$}{value}\n", label(name))).collect::<Vec<_>>().concat()
}

fn label(name: &str) -> String {
    if name.is_empty() { String::new() } else { format!("{name}:") }
}

fn packet(packet: &Packet) -> String {
    format!("{} {} → {}", packet.kind, packet.source, packet.destination)
}

fn seen_by(answer: &Answer) -> String {
    match (&answer.device, answer.from) {
        (Some(device), Origin::Pod) => format!("{} at {device}, a pod's device", answer.program),
        (Some(device), _) => format!("{} at {device}, an uplink", answer.program),
        (None, _) => "the programs for sockets of the node itself".into(),
    }
}

fn fate(fate: Fate) -> &'static str {
    match fate {
        Fate::Translated => "translated",
        Fate::Known => "known",
        Fate::Dispatched => "dispatched",
        Fate::PassedOn => "passed on",
        Fate::Dropped => "dropped",
        Fate::Rejected => "rejected",
    }
}

/// What the line above has said is not said again.
fn reason(reason: &Reason, result: Fate) -> String {
    let sentence = reason.sentence.strip_prefix(&format!("{}: ", fate(result))).unwrap_or(&reason.sentence);
    match &reason.counted_as {
        Some(series) => format!("{sentence} ({series})"),
        None => sentence.to_owned(),
    }
}

fn second_step(step: &SecondStep) -> String {
    format!("its source becomes {} where it leaves for its backend", step.source)
}

fn connection(known: &Connection) -> String {
    let kept = if known.is_kept { "" } else { ", which it leaves" };
    format!(
        "{}, last packet {} s ago, to {} (backend {}){kept}",
        known.phase, known.idle_seconds, known.destination, known.backend
    )
}

fn frontend(service: &Frontend) -> String {
    let port = service.frontend_port;
    let address = service.frontend_address.map_or_else(
        || format!("NodePort {port}"),
        |address| format!("{} {}", kind(service.kind), SocketAddr::new(address, port)),
    );
    let remarks = [
        (service.keeps_source, "keeps the client's address"),
        (service.has_source_ranges, "for clients in certain ranges only"),
        (service.is_dispatched, "answered by the backend's node"),
        (service.is_crossed, "backends of the other family"),
    ];
    let remarks = remarks.into_iter().filter(|(is_so, _)| *is_so).map(|(_, text)| text.to_owned());
    [service.name.to_string(), address].into_iter().chain(remarks).collect::<Vec<_>>().join(", ")
}

fn kind(kind: Kind) -> &'static str {
    match kind {
        Kind::ClusterIp => "ClusterIP",
        Kind::NodePort => "NodePort",
        Kind::External => "external address",
    }
}

/// Whom a new connection is chosen from.
fn choices(choice: &Choice, fate: Fate) -> Vec<(&'static str, String)> {
    if matches!(fate, Fate::Known | Fate::PassedOn) {
        return Vec::new();
    }
    let clients = match choice.clients {
        Clients::Internal => "pods and processes of this node",
        Clients::External => "clients outside",
    };
    let mut rows = vec![("Choice", format!("{} of {} for {clients}", choice.algorithm, count(choice.backends)))];
    if matches!(fate, Fate::Dropped | Fate::Rejected) {
        return rows;
    }
    rows.extend(choice.affinity.iter().map(|known| ("Affinity", affinity(known))));
    rows.extend(choice.candidates.iter().map(|share| ("Candidate", candidate(share, choice.slots))));
    let others = choice.backends - choice.candidates.len();
    if others > 0 {
        rows.push(("", format!("and {others} more")));
    }
    rows
}

fn count(backends: usize) -> String {
    match backends {
        0 => "no backend".into(),
        1 => "1 backend".into(),
        more => format!("{more} backends"),
    }
}

fn affinity(affinity: &Affinity) -> String {
    let kept = match (affinity.is_kept, affinity.idle_seconds) {
        (true, Some(idle)) => format!("the client stays with the backend it had {idle} s ago"),
        (_, Some(idle)) => format!("the client had another backend {idle} s ago, which it does not stay with"),
        (_, None) => "the client had no backend yet".into(),
    };
    format!("{kept}; it is forgotten after {} s", affinity.seconds)
}

fn candidate(share: &Share, slots: u32) -> String {
    let percent = f64::from(share.slots) * 100.0 / f64::from(slots.max(1));
    format!("{} (backend {}), {}, {percent:.1} %", share.address, share.id, share.state.name())
}

fn backend(backend: &Backend) -> String {
    let place = match (backend.is_local, backend.node) {
        (true, _) => "on this node".to_owned(),
        (false, Some(node)) => format!("on node {node}"),
        (false, None) => "on another node".into(),
    };
    format!("{} (backend {}), {}, {place}", backend.address, backend.id, backend.state.name())
}

fn way(way: &Way) -> String {
    let by = |text: &str| way.device.as_ref().map_or_else(|| text.to_owned(), |device| format!("{text} by {device}"));
    let text = match way.kind {
        WayKind::Stack => "on through the kernel, which routes it".into(),
        WayKind::Forward => by("out at once"),
        WayKind::Hairpin => by("back to the pod it came from"),
        WayKind::Dispatch => by("to the node of its backend"),
        WayKind::Answer => by("back to the client"),
        WayKind::Socket => "from the socket to its backend, as any packet of the node".into(),
    };
    way.mac.as_ref().map_or_else(|| text.clone(), |mac| format!("{text}, to {mac}"))
}
