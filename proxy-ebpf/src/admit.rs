//! A new flow: from a tuple nobody knows to entries in the flow table. Find the Service, choose a slot, draft the flow, claim
//! a pair for it; and for what is masqueraded on its way through the kernel a second one.
//!
//! Every step is out of line and leaves what the next one needs in the draft: together they do not fit the stack. And a
//! decision that is needed after `claim` is left there, too, because Linux 6.1 removed a branch on one in a register.

use core::ffi::c_void;

use proxy_common::{
    addr::{Address as _, Mac},
    backend::Backend,
    flow::{Direction, NextHop, Output, state},
    outcome::{Hook, Outcome},
    service::flag,
    tuple::{Stage, Tuple},
};

use crate::{
    choose::{self, is_internal},
    claim::{Claimed, claim, source_port},
    dispatch, event,
    family::Family,
    filter, flow, kernel, newcomer, output, service,
    way::{Place, Way, mask_stage, way},
};

/// What a new tuple is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Admission {
    /// It is not addressed to a Service.
    NotOurs,
    /// Its flow stands in the table.
    Admitted,
    /// Nothing was found against it yet.
    GoOn,
    /// It is to be dropped.
    Refused(Outcome),
}

/// Admits a new flow, or says why not.
#[inline(never)]
pub(crate) fn admit<F: Family>(hook: Hook, key: &Tuple<F::Addr>, context: *mut c_void, ifindex: u32) -> Admission {
    let found = find::<F>(hook, key);
    if found != Admission::GoOn {
        return found;
    }
    let planned = choose::<F>(key);
    if planned != Admission::GoOn {
        return planned;
    }
    if !dispatch::enter::<F>(hook, key, context, ifindex) {
        let refused = pair::<F>(hook, key, context, ifindex);
        if refused != Admission::GoOn {
            return refused;
        }
    }
    event::drafted::<F>(hook, Outcome::Opened, key, ifindex);
    Admission::Admitted
}

/// Enters the pair of the drafted flow, and the one for its source if there is to be one.
#[inline(always)]
fn pair<F: Family>(hook: Hook, key: &Tuple<F::Addr>, context: *mut c_void, ifindex: u32) -> Admission {
    let Some(draft) = flow::draft::<F>() else { return Admission::NotOurs };
    if draft.flow.output == Output::Forward {
        output::choose_source::<F>(context, ifindex);
    }
    match claim::<F, false>(key) {
        Claimed::Nothing => return Admission::Refused(Outcome::DropNoPort),
        Claimed::AsDrafted => {}
        Claimed::WithAnotherPort => event::drafted::<F>(hook, Outcome::PortChanged, key, ifindex),
    }
    if !mask::<F>(context, ifindex) {
        flow::forget_key::<F>(key);
        return Admission::Refused(Outcome::DropNoPort);
    }
    Admission::GoOn
}

/// Finds the Service of a tuple and keeps it in the draft.
#[inline(never)]
fn find<F: Family>(hook: Hook, key: &Tuple<F::Addr>) -> Admission {
    let found = match service::find::<F>(key.daddr, key.dport, key.proto) {
        None if !is_internal(key) => dispatch::of_other_node::<F>(key),
        found => found,
    };
    let Some(service) = found else {
        let Some(reason) = service::refusal::<F>(&key.daddr) else { return Admission::NotOurs };
        return match newcomer::judge::<F>(hook, key) {
            Admission::GoOn => Admission::Refused(reason),
            other => other,
        };
    };
    // Left to `cross`, which comes behind.
    if service.flags & flag::CROSS != 0 {
        return Admission::NotOurs;
    }
    let judged = newcomer::judge::<F>(hook, key);
    if judged != Admission::GoOn {
        return judged;
    }
    if !is_internal(key) && service::is_of_this_side::<F>(&key.saddr) {
        return Admission::Refused(Outcome::DropMartian);
    }
    let Some(draft) = flow::draft::<F>() else { return Admission::NotOurs };
    draft.service = *service;
    if !is_internal(key) && service.flags & flag::DISPATCHED != 0 {
        dispatch::receive::<F>(key);
    }
    Admission::GoOn
}

/// Drafts the flow to a backend that is chosen for it.
#[inline(never)]
fn choose<F: Family>(key: &Tuple<F::Addr>) -> Admission {
    let Some(draft) = flow::draft::<F>() else { return Admission::NotOurs };
    match choose::slot::<F>(&draft.service, key) {
        Ok(slot) => plan::<F>(key, slot),
        Err(outcome) => Admission::Refused(outcome),
    }
}

/// Drafts the flow to the backend of a slot, but for its rewrite.
#[inline(never)]
fn plan<F: Family>(key: &Tuple<F::Addr>, slot: u32) -> Admission {
    let (Some(node), Some(draft)) = (service::node(), flow::draft::<F>()) else { return Admission::NotOurs };
    let (id, backend) = match choose::backend::<F>(slot) {
        Ok(chosen) => chosen,
        Err(outcome) => return Admission::Refused(outcome),
    };
    let place = place::<F>(key, backend);
    let way = way(is_internal(key), place, draft.service.flags, node.flags);
    let masquerade = F::masquerade(node);
    if way != Way::Direct && masquerade == F::Addr::ANY {
        return Admission::Refused(Outcome::DropNoMasquerade);
    }
    draft.to = Tuple::new(key.saddr, backend.addr, key.sport, backend.port, key.proto, key.stage);
    if matches!(way, Way::Hairpin | Way::Forward) {
        draft.to.saddr = masquerade;
        draft.to.sport = source_port::<F, false>(node, key);
    }
    let (output, twin_stage) = match way {
        Way::Hairpin => (Output::Hairpin, Stage::FromPod),
        Way::Forward => (Output::Forward, Stage::UplinkIn),
        _ if is_internal(key) => (Output::Stack, Stage::ToPod),
        _ => (Output::Stack, Stage::UplinkOut),
    };
    let flow = &mut draft.flow;
    flow.backend = id;
    flow.backend_generation = backend.generation;
    flow.service = draft.service.index;
    flow.last_seen = kernel::jiffies();
    flow.output = output;
    flow.twin_output = output;
    flow.twin_stage = twin_stage;
    flow.direction = Direction::Original;
    flow.state = 0;
    flow.packets = 0;
    flow.bytes = 0;
    flow.next_hop = NextHop { ifindex: 0, generation: 0, mtu: 0, dmac: Mac::ZERO, smac: Mac::ZERO };
    draft.is_masked = u8::from(way == Way::Masked);
    draft.mask_stage = mask_stage(place);
    Admission::GoOn
}

#[inline(always)]
fn place<F: Family>(key: &Tuple<F::Addr>, backend: &Backend<F::Addr>) -> Place {
    if F::words(backend.addr) == F::words(key.saddr) {
        Place::Client
    } else if service::is_of_node::<F>(&backend.addr) {
        Place::Node
    } else if backend.is_local != 0 {
        Place::Pod
    } else {
        Place::Elsewhere
    }
}

/// Claims the pair that replaces the source of the flow that was just claimed, where it leaves for its backend, if it is to. One that is
/// there and alive belongs to this very flow, of which only the first pair had been evicted.
#[inline(never)]
fn mask<F: Family>(context: *mut c_void, ifindex: u32) -> bool {
    let (Some(node), Some(draft), Some(key)) = (service::node(), flow::draft::<F>(), flow::mask_key::<F>()) else {
        return false;
    };
    if draft.is_masked == 0 {
        return true;
    }
    *key = draft.to;
    key.stage = draft.mask_stage;
    if flow::is_alive::<F>(key, node) {
        return true;
    }
    flow::forget_key::<F>(key);
    filter::let_through::<F::Addr>(&key.saddr);
    draft.to.saddr = F::masquerade(node);
    draft.to.sport = source_port::<F, false>(node, key);
    if matches!(key.stage, Stage::UplinkOut) {
        output::choose_source::<F>(context, ifindex);
    }
    draft.flow.output = Output::Stack;
    draft.flow.twin_output = Output::Stack;
    draft.flow.twin_stage = if matches!(key.stage, Stage::ToPod) { Stage::FromPod } else { Stage::UplinkIn };
    draft.flow.state = state::MASK;
    claim::<F, false>(key) != Claimed::Nothing
}
