//! A new flow: whom it is for, which way it goes, and under which source port.

use proxy_common::{
    flow::{Direction, Output, state},
    node::masquerade,
    outcome::{Hook, Outcome},
    service::{Service, flag},
    tuple::Stage,
};

use super::{Flow, Key, Model, Objection, Oracle, bit, choice::Choice, world::Target};

/// What a new tuple is.
pub(super) enum Admission {
    NotOurs,
    Refused(Outcome),
    Admitted,
}

/// Where a backend is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Client,
    Node,
    Pod,
    Elsewhere,
}

/// What a flow needs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    /// Another destination.
    Direct,
    /// Back to the pod it came from, as if the node asked.
    Hairpin,
    /// On to another node, in the node's name.
    Forward,
    /// Another destination, and another source where it leaves for its backend.
    Masked,
}

/// A flow that is being made.
struct Draft {
    flow: Flow,
    way: Way,
    place: Place,
}

impl Model {
    pub(super) fn admit(&mut self, hook: Hook, key: &Key, oracle: &mut dyn Oracle) -> Result<Admission, Objection> {
        let world = &self.world;
        let is_internal = key.stage != Stage::UplinkIn;
        let Some(service) = world.service(key.destination.0, key.destination.1, key.proto) else {
            return Ok(if world.is_cluster_ip(key.destination.0) {
                Admission::Refused(Outcome::RejectNoPort)
            } else if world.is_unallocated(key.destination.0) {
                Admission::Refused(Outcome::DropUnallocated)
            } else {
                Admission::NotOurs
            });
        };
        // Nobody beyond an uplink has an address of the node's, or a ClusterIP.
        if !is_internal && (world.is_of_node(key.source.0) || world.is_cluster_ip(key.source.0)) {
            return Ok(Admission::Refused(Outcome::DropMartian));
        }
        let slots = match self.choices(&service, key, is_internal, oracle)? {
            Choice::Slots(slots) => slots,
            Choice::Refused(reason) => return Ok(Admission::Refused(reason)),
        };
        let Some(chosen) = oracle.chosen(key) else {
            return self.why_dropped(hook, &service, key, &slots, oracle);
        };
        let leads_there = |slot: &u32| self.world.slots.get(*slot as usize) == Some(&chosen.backend);
        let leading: Vec<u32> = slots.iter().copied().filter(leads_there).collect();
        if leading.is_empty() {
            return Objection::wrong(format!("backend {} is in none of the slots {slots:?}", chosen.backend));
        }
        self.note_choice(&service, is_internal, key, &leading);
        let Ok(mut draft) = self.draft(&service, key, chosen.backend) else {
            return Objection::wrong(format!("a flow to backend {} had to be dropped", chosen.backend));
        };
        let first = match draft.way {
            Way::Hairpin | Way::Forward if !self.world.is_source_port(key.source.1) => None,
            _ => Some(key.source.1),
        };
        self.claim(hook, key, &mut draft.flow, first, chosen.source_port, true, oracle)?;
        if draft.way == Way::Masked {
            self.mask(hook, key, &draft, oracle)?;
        }
        self.count(hook, Outcome::Opened);
        Ok(Admission::Admitted)
    }

    /// The flow to a backend, but for the source port; or why there is none.
    fn draft(&self, service: &Service, key: &Key, id: u32) -> Result<Draft, Outcome> {
        let is_internal = key.stage != Stage::UplinkIn;
        let backend = self.world.backend(key.is_v4(), id).ok_or(Outcome::DropNoBackend)?;
        let place = self.place(key, &backend);
        let way = way(is_internal, place, service.flags, self.world.node.flags);
        let masquerade = self.world.masquerade(key.is_v4());
        if way != Way::Direct && masquerade.is_none() {
            return Err(Outcome::DropNoMasquerade);
        }
        let (output, twin_stage) = match way {
            Way::Hairpin => (Output::Hairpin, Stage::FromPod),
            Way::Forward => (Output::Forward, Stage::UplinkIn),
            _ if is_internal => (Output::Stack, Stage::ToPod),
            _ => (Output::Stack, Stage::UplinkOut),
        };
        let source = match (way, masquerade) {
            (Way::Hairpin | Way::Forward, Some(address)) => (address, key.source.1),
            _ => key.source,
        };
        let flow = Flow {
            source,
            destination: (backend.address, backend.port),
            hop: None,
            backend: id,
            generation: backend.generation,
            service: service.index,
            seen: self.now,
            output,
            twin_output: output,
            twin_stage,
            direction: Direction::Original,
            state: 0,
        };
        Ok(Draft { flow, way, place })
    }

    fn place(&self, key: &Key, backend: &Target) -> Place {
        if backend.address == key.source.0 {
            Place::Client
        } else if self.world.is_of_node(backend.address) {
            Place::Node
        } else if backend.is_local {
            Place::Pod
        } else {
            Place::Elsewhere
        }
    }

    /// Enters a pair under the source port that was chosen: the first that was tried unless another flow has its reply.
    #[expect(clippy::too_many_arguments, reason = "a claim has as many sides")]
    fn claim(
        &mut self,
        hook: Hook,
        key: &Key,
        flow: &mut Flow,
        first: Option<u16>,
        chosen: u16,
        is_counted: bool,
        oracle: &mut dyn Oracle,
    ) -> Result<(), Objection> {
        let is_known = first.is_some();
        if let Some(port) = first {
            flow.source.1 = port;
            if self.enter(key, flow) {
                if chosen == port {
                    return Ok(());
                }
                return Objection::wrong(format!("source port {chosen} and not {port}, which was free"));
            }
        }
        if !self.world.is_source_port(chosen) {
            return Objection::wrong(format!("source port {chosen} is none of the node's"));
        }
        flow.source.1 = chosen;
        if !self.enter(key, flow) {
            return Objection::wrong(format!("source port {chosen} is another flow's"));
        }
        // Whether a port chosen by chance was the first that was, only the counter tells.
        if is_counted && (is_known || oracle.count(hook, Outcome::PortChanged) > self.counted_so_far(hook)) {
            self.count(hook, Outcome::PortChanged);
        }
        Ok(())
    }

    fn counted_so_far(&self, hook: Hook) -> u64 {
        self.counted.get(&(hook, Outcome::PortChanged)).copied().unwrap_or(0)
    }

    fn enter(&mut self, key: &Key, flow: &Flow) -> bool {
        let second = u64::from(self.world.node.jiffies_per_second);
        let twin_key = flow.twin_key(key);
        self.table.open(key, flow) || self.table.vacate(&twin_key, self.now, second) && self.table.open(key, flow)
    }

    /// The pair that replaces the source of a flow where it leaves for its backend; one that is alive is this flow's.
    fn mask(&mut self, hook: Hook, key: &Key, draft: &Draft, oracle: &mut dyn Oracle) -> Result<(), Objection> {
        let stage = if draft.place == Place::Pod { Stage::ToPod } else { Stage::UplinkOut };
        let at = Key { source: draft.flow.source, destination: draft.flow.destination, proto: key.proto, stage };
        let second = u64::from(self.world.node.jiffies_per_second);
        if self.table.is_alive(&at, self.now, second) {
            return Ok(());
        }
        self.table.forget(&at);
        self.masked.words[usize::from(bit(at.source.0) >> 6)] |= 1 << (bit(at.source.0) & 63);
        let (Some(chosen), Some(masquerade)) = (oracle.chosen(&at), self.world.masquerade(key.is_v4())) else {
            return Objection::wrong("a masqueraded flow has no second pair");
        };
        let mut flow = Flow {
            source: (masquerade, at.source.1),
            output: Output::Stack,
            twin_output: Output::Stack,
            twin_stage: if stage == Stage::ToPod { Stage::FromPod } else { Stage::UplinkIn },
            state: state::MASK,
            ..draft.flow
        };
        let first = self.world.is_source_port(at.source.1).then_some(at.source.1);
        self.claim(hook, &at, &mut flow, first, chosen.source_port, false, oracle)
    }

    /// Why a flow that may have got one of these slots was dropped.
    fn why_dropped(
        &mut self,
        hook: Hook,
        service: &Service,
        key: &Key,
        slots: &[u32],
        oracle: &mut dyn Oracle,
    ) -> Result<Admission, Objection> {
        let mut reasons = Vec::new();
        for slot in slots {
            let id = self.world.slots.get(*slot as usize).copied().unwrap_or(0);
            let reason = if self.is_free(key.is_v4(), *slot) {
                Outcome::DropNoBackend
            } else {
                match self.draft(service, key, id) {
                    Err(reason) => reason,
                    Ok(_) => Outcome::DropNoPort,
                }
            };
            if !reasons.contains(&reason) {
                reasons.push(reason);
            }
        }
        let is_counted = |reason: &Outcome, oracle: &mut dyn Oracle| {
            oracle.count(hook, *reason) > self.counted.get(&(hook, *reason)).copied().unwrap_or(0)
        };
        let Some(reason) = reasons.into_iter().find(|reason| is_counted(reason, oracle)) else {
            return Objection::wrong("a new flow is not in the table, and nothing was against it");
        };
        if reason != Outcome::DropNoPort {
            return Ok(Admission::Refused(reason));
        }
        let (first, last) = (self.world.node.source_port_first.number(), self.world.node.source_port_last.number());
        if last - first > 16 {
            return Objection::wrong("no source port of many was free");
        }
        // An attempt may have found another flow to be over, or the first pair its port and the second one none.
        let id = self.world.slots.get(slots[0] as usize).copied().unwrap_or(0);
        let is_simple = slots.len() == 1 && self.draft(service, key, id).is_ok_and(|draft| draft.way != Way::Masked);
        let second = u64::from(self.world.node.jiffies_per_second);
        if is_simple && !self.table.has_some_over(self.now, second) {
            return Ok(Admission::Refused(reason));
        }
        Err(Objection::Unknowable)
    }
}

/// Section 7 of the rules, and what follows from where the packet has to go.
fn way(is_internal: bool, place: Place, service: u8, node: u32) -> Way {
    let is_masqueraded = if service & flag::EXTERNAL == 0 {
        !is_internal || node & masquerade::ALL != 0
    } else {
        service & flag::SOURCE_KEPT == 0 && (place == Place::Elsewhere || node & masquerade::LOCAL_BACKENDS != 0)
    };
    match (place, is_internal) {
        (Place::Client, true) => Way::Hairpin,
        (Place::Client | Place::Elsewhere, false) => Way::Forward,
        (Place::Pod | Place::Elsewhere, _) if is_masqueraded => Way::Masked,
        (Place::Pod | Place::Elsewhere | Place::Node, _) => Way::Direct,
    }
}
