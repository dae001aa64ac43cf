//! A new flow between the families. As in `admit`, but that there is one way only: masqueraded, and sent on from here.

use core::ffi::c_void;

use aya_ebpf::bindings::{BPF_FIB_LKUP_RET_NO_NEIGH, BPF_FIB_LOOKUP_SRC};
use proxy_common::{
    addr::{Address as _, Ipv4, Ipv6, Mac},
    flow::{Direction, NextHop, Output},
    node::Node,
    outcome::{Hook, Outcome},
    service::flag,
    tuple::{Stage, Tuple},
};

use super::next_hop;
use crate::{
    admit::Admission,
    choose,
    claim::{Claimed, claim, source_port},
    event,
    family::V6,
    flow, kernel, newcomer, service,
};

/// Admits a new flow, or says why not.
#[inline(never)]
pub(super) fn admit(hook: Hook, key: &Tuple<Ipv6>, context: *mut c_void, ifindex: u32) -> Admission {
    let stage = if matches!(hook, Hook::CrossPodIn) { Stage::FromPod } else { Stage::UplinkIn };
    let found = find(hook, key, stage);
    if found != Admission::GoOn {
        return found;
    }
    let planned = choose(key);
    if planned != Admission::GoOn {
        return planned;
    }
    choose_source(context, ifindex);
    match claim::<V6, true>(key) {
        Claimed::Nothing => return Admission::Refused(Outcome::DropNoPort),
        Claimed::AsDrafted => {}
        Claimed::WithAnotherPort => event::drafted::<V6>(hook, Outcome::PortChanged, key, ifindex),
    }
    event::drafted::<V6>(hook, Outcome::Opened, key, ifindex);
    Admission::Admitted
}

/// Finds the Service of a tuple, if its backends are of the other family, and keeps it in the draft.
#[inline(never)]
fn find(hook: Hook, key: &Tuple<Ipv6>, stage: Stage) -> Admission {
    let any = if key.daddr.is_mapped() { Ipv6::mapped(Ipv4::ANY) } else { Ipv6::ANY };
    let Some(service) = service::find_as::<V6>(key.daddr, any, key.dport, key.proto) else {
        return Admission::NotOurs;
    };
    if service.flags & flag::CROSS == 0 {
        return Admission::NotOurs;
    }
    let judged = newcomer::judge::<V6>(hook, key);
    if judged != Admission::GoOn {
        return judged;
    }
    if matches!(stage, Stage::UplinkIn) && service::is_of_this_side::<V6>(&key.saddr) {
        return Admission::Refused(Outcome::DropMartian);
    }
    let Some(draft) = flow::draft::<V6>() else { return Admission::NotOurs };
    draft.service = *service;
    // By which it is known where the client is.
    draft.to = *key;
    draft.to.stage = stage;
    Admission::GoOn
}

/// Drafts the flow to a backend that is chosen for it.
#[inline(never)]
fn choose(key: &Tuple<Ipv6>) -> Admission {
    let Some(draft) = flow::draft::<V6>() else { return Admission::NotOurs };
    match choose::slot::<V6>(&draft.service, &draft.to) {
        Ok(slot) => plan(key, slot),
        Err(outcome) => Admission::Refused(outcome),
    }
}

/// Drafts the flow to the backend of a slot, but for its rewrite.
#[inline(never)]
fn plan(key: &Tuple<Ipv6>, slot: u32) -> Admission {
    let (Some(node), Some(draft)) = (service::node(), flow::draft::<V6>()) else { return Admission::NotOurs };
    let (id, backend) = match choose::backend::<V6>(slot) {
        Ok(chosen) => chosen,
        Err(outcome) => return Admission::Refused(outcome),
    };
    if backend.addr.is_mapped() == key.daddr.is_mapped() {
        return Admission::NotOurs;
    }
    // It cannot be shown its own address as a client's.
    if service::is_of_node::<V6>(&backend.addr) {
        return Admission::Refused(Outcome::DropNotCrossed);
    }
    let masquerade = masquerade(node, &backend.addr);
    if masquerade == Ipv6::ANY || masquerade == Ipv6::mapped(Ipv4::ANY) {
        return Admission::Refused(Outcome::DropNoMasquerade);
    }
    let sport = source_port::<V6, true>(node, key);
    draft.to = Tuple::new(masquerade, backend.addr, sport, backend.port, key.proto, Stage::Cross);
    let flow = &mut draft.flow;
    flow.backend = id;
    flow.backend_generation = backend.generation;
    flow.service = draft.service.index;
    flow.last_seen = kernel::jiffies();
    flow.output = Output::Forward;
    flow.twin_output = Output::Forward;
    flow.twin_stage = Stage::Cross;
    flow.direction = Direction::Original;
    flow.state = 0;
    flow.packets = 0;
    flow.bytes = 0;
    flow.next_hop = NextHop { ifindex: 0, generation: 0, mtu: 0, dmac: Mac::ZERO, smac: Mac::ZERO };
    Admission::GoOn
}

/// The address the node's own traffic to a backend bears.
#[inline(always)]
fn masquerade(node: &Node, backend: &Ipv6) -> Ipv6 {
    if backend.is_mapped() { Ipv6::mapped(node.masquerade_v4) } else { node.masquerade_v6 }
}

/// As [`crate::output::choose_source`], for either family.
#[inline(never)]
fn choose_source(context: *mut c_void, ifindex: u32) {
    let Some(draft) = flow::draft::<V6>() else { return };
    let daddr = draft.to.daddr;
    let any = if daddr.is_mapped() { Ipv6::mapped(Ipv4::ANY) } else { Ipv6::ANY };
    let mut question = next_hop::question(ifindex, &any, &daddr, draft.to.proto);
    (question.sport, question.dport) = (draft.to.sport, draft.to.dport);
    let answer = question.ask(context, BPF_FIB_LOOKUP_SRC);
    if answer != 0 && answer != i64::from(BPF_FIB_LKUP_RET_NO_NEIGH) {
        return;
    }
    let [first, ..] = question.source;
    let source = if daddr.is_mapped() {
        Ipv6::mapped(Ipv4 { octets: first.to_ne_bytes() })
    } else {
        Ipv6::from_words(question.source)
    };
    if source != any {
        draft.to.saddr = source;
    }
}
