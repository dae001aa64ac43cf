//! From what a rehearsal has shown to an answer: what became of the packet, why, and what that was chosen by.

use proxy_common::{
    addr::{Mac, Protocol},
    flow::Output,
    outcome::Outcome,
    service::{Pick, Service, flag},
};

use super::{
    answer::{
        Affinity, Answer, Backend, Choice, Clients, Connection, Fate, Frontend, Packet, Reason, SecondStep, Way,
        WayKind,
    },
    packet,
    place::Stand,
    question::{Origin, Question},
};
use crate::{
    dataplane::{Action, AnyCall, Attached, Moment, Rehearsal, SeenBackend, SeenFlow, netlink::NodeNetwork},
    inspect::{Kind, PortName, Share, State, algorithm, meaning::meaning, phase},
    metrics::named,
};

/// Backends that are named, at most.
const CANDIDATES: usize = 10;

/// What was asked, and where that led.
pub(super) struct Case<'a> {
    pub(super) question: &'a Question,
    pub(super) call: &'a AnyCall,
    pub(super) stand: &'a Stand,
    pub(super) network: &'a NodeNetwork,
    pub(super) attached: &'a Attached,
}

/// The answer.
pub(super) fn answer(case: &Case<'_>, seen: &Rehearsal) -> Answer {
    let unserved = unserved(case);
    let fate = if unserved.is_some() { Fate::PassedOn } else { fate(case.stand.origin, seen) };
    let decisive = decisive(fate, seen);
    // That it was opened, too, says nothing more.
    let also = seen.outcomes.iter().filter(|outcome| {
        unserved.is_none()
            && Some(**outcome) != decisive
            && **outcome != Outcome::Opened
            && !(fate == Fate::Translated && is_unmasqueraded_socket(case.stand.origin, seen))
    });
    let service = seen.service.map(|service| service.value);
    Answer {
        packet: tried(case, seen),
        from: case.stand.origin,
        program: case.stand.program.as_str(),
        device: case.stand.device.as_ref().map(|device| device.name.clone()),
        result: fate,
        reason: unserved.map_or_else(|| reason(fate, decisive, service.as_ref()), uncounted),
        also: also.map(|outcome| counted(*outcome)).collect(),
        service: frontend(seen),
        choice: service.filter(|_| unserved.is_none()).map(|service| choice(case.stand, &service, fate, seen)),
        backend: seen
            .flow
            .zip(seen.backend)
            .filter(|_| unserved.is_none())
            .map(|(flow, backend)| chosen(&flow, &backend)),
        connection: seen.known.map(|known| connection(&known, seen)),
        after: after(case, fate, seen),
        way: way(case, fate, seen),
        second_step: second_step(case, seen),
        notes: notes(case, fate, seen),
    }
}

/// Why no program is asked, where the one that was tried only stands for those that sockets meet.
fn unserved(case: &Case<'_>) -> Option<&'static str> {
    if case.stand.origin != Origin::Node {
        None
    } else if !case.attached.has_sockets() {
        Some("no program is attached to a cgroup: sockets of the node are not balanced (--socket-lb=off)")
    } else if packet::protocol(case.call) == Protocol::Sctp {
        Some("no hook is there for the node's own SCTP sockets: they are not balanced")
    } else {
        None
    }
}

/// A socket of the node needs no address to be masqueraded with, which the program for pods asks for where it is tried in its place.
fn is_unmasqueraded_socket(origin: Origin, seen: &Rehearsal) -> bool {
    origin == Origin::Node && seen.outcomes.contains(&Outcome::DropNoMasquerade)
}

fn fate(origin: Origin, seen: &Rehearsal) -> Fate {
    let has = |outcome| seen.outcomes.contains(&outcome);
    let is_told = [Outcome::RejectNoEndpoint, Outcome::RejectNoPort, Outcome::ResetGone].into_iter().any(has);
    match seen.action {
        Action::Dropped if is_unmasqueraded_socket(origin, seen) => Fate::Translated,
        Action::Dropped => Fate::Dropped,
        _ if is_told => Fate::Rejected,
        _ if has(Outcome::Dispatched) => Fate::Dispatched,
        _ if has(Outcome::Opened) => Fate::Translated,
        _ if seen.flow.is_some() => Fate::Known,
        _ => Fate::PassedOn,
    }
}

/// The outcome that says why, if anything was counted.
fn decisive(fate: Fate, seen: &Rehearsal) -> Option<Outcome> {
    let first = |family: &str| {
        let is_in = |outcome: &&Outcome| named(**outcome).0 == family;
        seen.outcomes.iter().find(is_in).copied()
    };
    match fate {
        Fate::Translated => Some(Outcome::Opened),
        Fate::Dispatched => Some(Outcome::Dispatched),
        Fate::Known => None,
        Fate::PassedOn => first("sluice_passes"),
        Fate::Dropped => first("sluice_drops"),
        Fate::Rejected => first("sluice_rejects").or_else(|| first("sluice_resets")),
    }
}

fn reason(fate: Fate, decisive: Option<Outcome>, service: Option<&Service>) -> Reason {
    if let Some(outcome) = decisive {
        return counted(outcome);
    }
    let sentence = match (fate, service) {
        (Fate::Known, _) => "it belongs to a connection that is known, and goes where that goes",
        (_, Some(service)) if service.flags & flag::CROSS != 0 => {
            "the Service's backends are of the other family: it is left to the program that stands behind this one"
        }
        _ => "it is not addressed to a Service: the kernel does with it what it would do without Sluice",
    };
    uncounted(sentence)
}

fn uncounted(sentence: &str) -> Reason {
    Reason { counted_as: None, sentence: sentence.into() }
}

fn counted(outcome: Outcome) -> Reason {
    let (series, label, value) = named(outcome);
    Reason { counted_as: Some(format!("{series}_total{{{label}=\"{value}\"}}")), sentence: meaning(outcome).into() }
}

/// The packet before the program has seen it.
fn tried(case: &Case<'_>, seen: &Rehearsal) -> Packet {
    Packet {
        kind: packet::kind(packet::protocol(case.call), seen.moment).into(),
        source: seen.client.to_string(),
        destination: case.question.destination().to_string(),
    }
}

fn frontend(seen: &Rehearsal) -> Option<Frontend> {
    let service = seen.service?;
    let has = |bit: u8| service.value.flags & bit != 0;
    let kind = match service.address {
        None => Kind::NodePort,
        Some(_) if has(flag::EXTERNAL) => Kind::External,
        Some(_) => Kind::ClusterIp,
    };
    Some(Frontend {
        name: PortName::of_index(service.value.index, seen.name.as_ref()),
        index: service.value.index,
        kind,
        frontend_address: service.address,
        frontend_port: service.port,
        keeps_source: has(flag::SOURCE_KEPT),
        has_source_ranges: has(flag::SOURCE_RANGES),
        is_dispatched: has(flag::DISPATCHED),
        is_crossed: has(flag::CROSS),
    })
}

fn choice(stand: &Stand, service: &Service, fate: Fate, seen: &Rehearsal) -> Choice {
    let is_outside = stand.origin == Origin::Uplink;
    let candidates = seen.candidates.iter().take(CANDIDATES);
    Choice {
        clients: if is_outside { Clients::External } else { Clients::Internal },
        algorithm: algorithm(service.pick),
        varies: varies(service, seen),
        slots: seen.candidates.iter().map(|(_, slots)| slots).sum(),
        backends: seen.candidates.len(),
        candidates: candidates.map(|(backend, slots)| share(backend, *slots)).collect(),
        affinity: (service.flags & flag::AFFINITY != 0).then(|| affinity(service, fate, seen)),
    }
}

/// Whether another connection of the same client may get another backend.
fn varies(service: &Service, seen: &Rehearsal) -> bool {
    seen.candidates.len() > 1 && service.flags & flag::AFFINITY == 0 && service.pick != Pick::SourceHash
}

fn share(backend: &SeenBackend, slots: u32) -> Share {
    Share { address: backend.address, id: backend.id, state: backend.state.into(), slots }
}

fn affinity(service: &Service, fate: Fate, seen: &Rehearsal) -> Affinity {
    let remembered = seen.affinity.filter(|known| known.silence <= service.affinity_seconds);
    let chosen = seen.flow.filter(|_| fate == Fate::Translated).map(|flow| flow.backend);
    Affinity {
        seconds: service.affinity_seconds,
        is_kept: chosen.is_some() && remembered.map(|known| known.backend) == chosen,
        idle_seconds: seen.affinity.map(|known| known.silence),
    }
}

/// The backend of a flow. One whose number was given to another meanwhile has gone.
fn chosen(flow: &SeenFlow, backend: &SeenBackend) -> Backend {
    let is_same = flow.generation == backend.generation;
    Backend {
        id: backend.id,
        address: if is_same { backend.address } else { flow.destination },
        state: if is_same { backend.state.into() } else { State::Gone },
        is_local: is_same && backend.is_local,
        node: backend.node.filter(|_| is_same),
        generation: flow.generation,
    }
}

fn connection(known: &SeenFlow, seen: &Rehearsal) -> Connection {
    let is_same = |flow: SeenFlow| (flow.backend, flow.destination) == (known.backend, known.destination);
    Connection {
        phase: phase(known.state),
        idle_seconds: known.silence,
        backend: known.backend,
        destination: known.destination,
        is_kept: seen.action != Action::Dropped && seen.flow.is_some_and(is_same),
    }
}

fn after(case: &Case<'_>, fate: Fate, seen: &Rehearsal) -> Option<Packet> {
    match fate {
        Fate::Dropped | Fate::PassedOn => None,
        Fate::Translated | Fate::Known if case.stand.origin == Origin::Node => {
            let destination = seen.flow?.destination.to_string();
            Some(Packet { destination, ..tried(case, seen) })
        }
        _ => packet::read(case.stand, &seen.bytes),
    }
}

fn way(case: &Case<'_>, fate: Fate, seen: &Rehearsal) -> Option<Way> {
    let plain = |kind| Some(Way { kind, device: None, mac: None });
    let came_by = || case.stand.device.as_ref().map(|device| device.name.clone());
    match (fate, seen.action) {
        (Fate::Dropped, _) => None,
        (Fate::Rejected, _) => Some(Way { kind: WayKind::Answer, device: came_by(), mac: None }),
        (Fate::Translated | Fate::Known, _) if case.stand.origin == Origin::Node => plain(WayKind::Socket),
        (_, Action::Sent) => seen.flow.map(|flow| sent(case, &flow, came_by())),
        (..) => plain(WayKind::Stack),
    }
}

fn sent(case: &Case<'_>, flow: &SeenFlow, came_by: Option<String>) -> Way {
    let kind = match flow.output {
        Output::Hairpin => return Way { kind: WayKind::Hairpin, device: came_by, mac: None },
        Output::Dispatch | Output::Tunnel => WayKind::Dispatch,
        Output::Forward | Output::Stack => WayKind::Forward,
    };
    let device = case.network.links.iter().find(|link| link.ifindex == flow.next_hop.ifindex);
    Way { kind, device: device.map(|device| device.name.clone()), mac: Some(mac(flow.next_hop.dmac)) }
}

fn mac(mac: Mac) -> String {
    mac.octets.map(|octet| format!("{octet:02x}")).join(":")
}

/// The node's own sockets bear the node's address anyhow.
fn second_step(case: &Case<'_>, seen: &Rehearsal) -> Option<SecondStep> {
    let step = seen.second_step.filter(|_| case.stand.origin != Origin::Node)?;
    Some(SecondStep { source: step.source })
}

fn notes(case: &Case<'_>, fate: Fate, seen: &Rehearsal) -> Vec<String> {
    let Case { stand, question, .. } = case;
    let service = seen.service.map(|service| service.value);
    let is_new = matches!(fate, Fate::Translated | Fate::Dispatched);
    let varies = is_new && service.is_some_and(|service| varies(&service, seen));
    let picks = |pick| service.is_some_and(|service| service.pick == pick);
    let is_random = picks(Pick::Random) || picks(Pick::LeastConnections);
    let notes = [
        (varies && is_random, "each new connection is given a backend anew: this is one draw of many"),
        (varies && picks(Pick::RoundRobin), "the next connection gets the next backend: this one would get this"),
        (
            varies && picks(Pick::Hash),
            "addresses and ports decide: another source port may lead elsewhere, on every node to the same",
        ),
        (!question.has_port() && is_new, "the source port was made up; name the client's to ask for one connection"),
        (
            seen.known.is_some() && seen.moment == Moment::First,
            "the connection that had this tuple is over: this is what a new one meets",
        ),
        (stand.origin == Origin::Node && unserved(case).is_none(), NODE_NOTE),
        (stand.origin == Origin::Pod && is_new && chooses_at_connect(case, service.as_ref()), POD_NOTE),
        (
            case.attached.is_guess,
            "TC's programs have no pins on a kernel before 6.6: where they are is a guess by the defaults",
        ),
    ];
    notes.into_iter().filter(|(is_so, _)| *is_so).map(|(_, note)| note.to_owned()).collect()
}

const NODE_NOTE: &str = "the node's own sockets are given their backend at connect(), by the same tables: the program for pods was tried in \
    the place of that";
const POD_NOTE: &str = "with --socket-lb=all a pod's TCP socket is given its backend at connect(), by the same tables: its packets bear \
    the backend's address already";

/// Whether a pod's socket need not send this packet: what needs to know the client's address is left to packets.
fn chooses_at_connect(case: &Case<'_>, service: Option<&Service>) -> bool {
    const BY_PACKETS: u8 = flag::EXTERNAL | flag::AFFINITY | flag::SOURCE_RANGES | flag::CROSS;
    packet::protocol(case.call) == Protocol::Tcp
        && case.attached.has_sockets()
        && service.is_some_and(|service| service.flags & BY_PACKETS == 0 && service.pick != Pick::SourceHash)
}

#[cfg(test)]
mod tests {
    use proxy_common::outcome::Outcome;

    use super::*;

    fn seen(action: Action, outcomes: &[Outcome], flow: Option<SeenFlow>) -> Rehearsal {
        Rehearsal {
            client: "10.0.0.5:40000".parse().unwrap(),
            moment: Moment::First,
            action,
            bytes: Vec::new(),
            outcomes: outcomes.to_vec(),
            known: None,
            flow,
            second_step: None,
            service: None,
            name: None,
            backend: None,
            candidates: Vec::new(),
            affinity: None,
        }
    }

    fn flow() -> SeenFlow {
        SeenFlow {
            source: "10.0.0.5:40000".parse().unwrap(),
            destination: "10.0.0.6:8080".parse().unwrap(),
            backend: 1,
            generation: 1,
            service: 1,
            output: Output::Stack,
            next_hop: proxy_common::flow::NextHop::default(),
            state: 0,
            is_confirmed: false,
            silence: 0,
        }
    }

    #[test]
    fn what_became_of_a_packet_follows_from_what_was_said_and_what_was_counted() {
        use Outcome::{Dispatched, DropSource, Moved, Opened, PassOtherHost, RejectNoEndpoint, ResetGone};
        let cases = [
            ("new", seen(Action::Passed, &[Opened], Some(flow())), Fate::Translated, Some(Opened)),
            ("chosen anew", seen(Action::Passed, &[Opened, Moved], Some(flow())), Fate::Translated, Some(Opened)),
            ("known", seen(Action::Passed, &[], Some(flow())), Fate::Known, None),
            ("known, and forwarded", seen(Action::Sent, &[], Some(flow())), Fate::Known, None),
            ("dispatched", seen(Action::Sent, &[Opened, Dispatched], Some(flow())), Fate::Dispatched, Some(Dispatched)),
            ("not ours", seen(Action::Passed, &[], None), Fate::PassedOn, None),
            ("another's", seen(Action::Passed, &[PassOtherHost], None), Fate::PassedOn, Some(PassOtherHost)),
            ("refused", seen(Action::Dropped, &[DropSource], None), Fate::Dropped, Some(DropSource)),
            ("told", seen(Action::Sent, &[RejectNoEndpoint], None), Fate::Rejected, Some(RejectNoEndpoint)),
            ("ended", seen(Action::Sent, &[ResetGone], None), Fate::Rejected, Some(ResetGone)),
        ];
        for (name, seen, expected, outcome) in cases {
            assert_eq!((fate(Origin::Pod, &seen), decisive(expected, &seen)), (expected, outcome), "{name}");
        }
    }

    #[test]
    fn a_backend_whose_number_is_anothers_is_told_as_gone() {
        let backend = SeenBackend {
            id: 1,
            address: "10.0.0.9:80".parse().unwrap(),
            node: None,
            state: proxy_common::backend::BackendState::Serving,
            is_local: true,
            generation: 2,
        };
        let told = chosen(&flow(), &backend);
        assert_eq!((told.state, told.address, told.is_local), (State::Gone, flow().destination, false));
    }
}
