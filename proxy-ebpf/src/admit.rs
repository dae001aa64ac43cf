//! A new flow: from a tuple nobody knows to a pair of entries.

use core::ffi::c_void;

use aya_ebpf::helpers::generated as helpers;
use proxy_common::{
    addr::{Address as _, Mac, Port},
    flow::{Direction, NextHop, Output},
    node::Node,
    outcome::{Hook, Outcome},
    tuple::{Stage, Tuple},
};

use crate::{
    choose::{Chosen, choose, is_internal},
    counters::count,
    family::Family,
    flow, kernel, service,
};

/// Source ports tried before the flow is dropped. Each is random, so the chance that all are taken is the share of ports
/// in use, to this power.
const ATTEMPTS: u32 = 16;

/// What a new tuple is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Admission {
    /// It is not addressed to a Service.
    NotOurs,
    /// It has a backend, noted in the draft.
    Selected,
    /// It is to be dropped.
    Refused(Outcome),
}

/// How a flow travels, which follows from where its client and its backend are.
struct Way<A> {
    /// Source address towards the backend.
    saddr: A,
    /// The client's source port need not be kept.
    is_masqueraded: bool,
    output: Output,
    twin_stage: Stage,
}

/// Finds the Service of a tuple, chooses a backend, and drafts the flow but for its rewrite.
#[inline(never)]
pub(crate) fn select<F: Family>(key: &Tuple<F::Addr>) -> Admission {
    // NodePorts of loopback addresses are for the node's own sockets, which never come this way.
    if key.saddr.is_loopback() || key.daddr.is_loopback() {
        return Admission::Refused(Outcome::DropMartian);
    }
    let Some(node) = service::node() else { return Admission::NotOurs };
    let Some(service) = service::find::<F>(key.daddr, key.dport, key.proto) else {
        return service::refusal::<F>(key.daddr).map_or(Admission::NotOurs, Admission::Refused);
    };
    let chosen = match choose::<F>(service, key) {
        Ok(chosen) => chosen,
        Err(outcome) => return Admission::Refused(outcome),
    };
    let way = way::<F>(node, key, &chosen);
    if way.is_masqueraded && way.saddr == F::Addr::ANY {
        return Admission::Refused(Outcome::DropNoMasquerade);
    }
    let Some(draft) = flow::draft::<F>() else { return Admission::Refused(Outcome::DropNoBackend) };
    draft.to = Tuple::new(way.saddr, chosen.backend.addr, key.sport, chosen.backend.port, key.proto, key.stage);
    if way.is_masqueraded && !is_source_port(node, key.sport) {
        draft.to.sport = random_source_port(node);
    }
    draft.flow.backend = chosen.id;
    draft.flow.backend_generation = chosen.backend.generation;
    draft.flow.service = service.index;
    draft.flow.last_seen = kernel::jiffies();
    draft.flow.output = way.output;
    draft.flow.twin_output = way.output;
    draft.flow.twin_stage = way.twin_stage;
    draft.flow.direction = Direction::Original;
    draft.flow.state = 0;
    draft.flow.packets = 0;
    draft.flow.bytes = 0;
    draft.flow.next_hop = NextHop { ifindex: 0, generation: 0, dmac: Mac::ZERO, smac: Mac::ZERO };
    Admission::Selected
}

/// A claim in progress, as the loop hands it to each attempt.
struct Claim<A> {
    key: *const Tuple<A>,
    /// The first attempt failed. Not a count: for the verifier every value would be another loop to look at.
    is_retry: u32,
    is_settled: u32,
}

/// Enters the drafted pair, under another source port if another flow has the reply's tuple. Out of line and apart from
/// `select`, because the two together do not fit the stack.
#[inline(never)]
pub(crate) fn claim<F: Family>(hook: Hook, key: &Tuple<F::Addr>) -> bool {
    let mut claim = Claim { key, is_retry: 0, is_settled: 0 };
    // A loop of the kernel's: the verifier looks at one attempt, not at all of them in a row.
    // SAFETY: the callback has the signature the helper asks for, and the claim outlives the call.
    unsafe {
        let attempt: unsafe extern "C" fn(u64, *mut Claim<F::Addr>) -> i64 = attempt::<F>;
        helpers::bpf_loop(ATTEMPTS, attempt as *mut c_void, (&raw mut claim).cast(), 0)
    };
    if claim.is_settled == 0 {
        return false;
    }
    count(hook, Outcome::Opened);
    if claim.is_retry != 0 {
        count(hook, Outcome::PortChanged);
    }
    true
}

/// One attempt. 1 ends the loop.
unsafe extern "C" fn attempt<F: Family>(_: u64, claim: *mut Claim<F::Addr>) -> i64 {
    // SAFETY: this is what `claim` put on its stack, and nobody else looks at it during the loop.
    let claim = unsafe { &mut *claim };
    // SAFETY: the caller of `claim` keeps the key.
    let key = unsafe { &*claim.key };
    let (Some(node), Some(draft)) = (service::node(), flow::draft::<F>()) else { return 1 };
    flow::set_rewrite::<F>(&mut draft.flow.rewrite, key, &draft.to);
    if flow::open::<F>(key, draft) {
        claim.is_settled = 1;
        return 1;
    }
    if !flow::vacate::<F>() {
        claim.is_retry = 1;
        draft.to.sport = random_source_port(node);
    }
    0
}

#[inline(always)]
fn way<F: Family>(node: &Node, key: &Tuple<F::Addr>, chosen: &Chosen<F::Addr>) -> Way<F::Addr> {
    let masquerade = F::masquerade(node);
    match is_internal(key) {
        // A pod that picked itself would answer itself directly: it must believe that the node asks.
        true if chosen.backend.addr == key.saddr => {
            Way { saddr: masquerade, is_masqueraded: true, output: Output::Hairpin, twin_stage: Stage::FromPod }
        }
        true => Way { saddr: key.saddr, is_masqueraded: false, output: Output::Stack, twin_stage: Stage::ToPod },
        false if service::is_local::<F>(chosen.backend) => {
            Way { saddr: key.saddr, is_masqueraded: false, output: Output::Stack, twin_stage: Stage::UplinkOut }
        }
        // The other node would answer the client directly: replies must come back this way.
        false => Way { saddr: masquerade, is_masqueraded: true, output: Output::Forward, twin_stage: Stage::UplinkIn },
    }
}

#[inline(always)]
fn is_source_port(node: &Node, port: Port) -> bool {
    let port = port.number();
    port >= node.source_port_first.number() && port <= node.source_port_last.number()
}

#[inline(always)]
fn random_source_port(node: &Node) -> Port {
    let first = u32::from(node.source_port_first.number());
    let count = u32::from(node.source_port_last.number()).wrapping_sub(first).wrapping_add(1);
    Port::new(first.wrapping_add((kernel::random() >> 16).wrapping_mul(count) >> 16) as u16)
}
