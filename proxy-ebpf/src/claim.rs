//! Enters a drafted pair into the flow table, under another source port if another flow, or a connection of another proxy, has the
//! reply's tuple, and under another address of the node if there is one and no port was found.
//!
//! What the attempts found is left in the draft, which is a map's: of its content the verifier knows nothing. Linux 6.1 goes
//! through the callback of a loop once only, so that what one attempt cannot leave on the stack it takes for impossible.

use core::ffi::c_void;

use aya_ebpf::helpers::generated as helpers;
use proxy_common::{
    addr::{Address as _, Port},
    node::{FURTHER, Node},
    tuple::Tuple,
};

use crate::{family::Family, flow, kernel, newcomer, pick, service};

/// Source ports tried before the flow is dropped. Each is anywhere, so the chance that all are taken is the share of ports
/// in use, to this power.
const ATTEMPTS: u32 = 16;
/// Attempts with the node's first address, before its others have their turn.
const WITH_FIRST: u64 = 8;

/// What became of a claim.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Claimed {
    /// No port was free.
    Nothing,
    /// The pair stands as it was drafted.
    AsDrafted,
    /// The pair stands, with another source port.
    WithAnotherPort,
}

/// What the loop hands to each attempt: a helper takes no pointer but one to the stack.
struct Claim<A> {
    key: *const Tuple<A>,
}

/// Enters the drafted pair, whose original half's key this is. One that crosses the families has a source port of those for it,
/// and the address it has.
#[inline(never)]
pub(crate) fn claim<F: Family, const CROSSES: bool>(key: &Tuple<F::Addr>) -> Claimed {
    let Some(draft) = flow::draft::<F>() else { return Claimed::Nothing };
    draft.is_settled = 0;
    draft.is_retry = 0;
    let mut claim = Claim { key };
    // A loop of the kernel's: the verifier looks at one attempt, not at all of them in a row.
    // SAFETY: the callback has the signature the helper asks for, and the claim outlives the call.
    unsafe {
        let attempt: unsafe extern "C" fn(u64, *mut Claim<F::Addr>) -> i64 = attempt::<F, CROSSES>;
        helpers::bpf_loop(ATTEMPTS, attempt as *mut c_void, (&raw mut claim).cast(), 0)
    };
    let Some(draft) = flow::draft::<F>() else { return Claimed::Nothing };
    match (draft.is_settled, draft.is_retry) {
        (0, _) => Claimed::Nothing,
        (_, 0) => Claimed::AsDrafted,
        _ => Claimed::WithAnotherPort,
    }
}

/// One attempt. 1 ends the loop.
unsafe extern "C" fn attempt<F: Family, const CROSSES: bool>(index: u64, claim: *mut Claim<F::Addr>) -> i64 {
    // SAFETY: this is what `claim` put on its stack, and nobody else looks at it during the loop.
    let claim = unsafe { &*claim };
    // SAFETY: the caller of `claim` keeps the key.
    let key = unsafe { &*claim.key };
    let (Some(node), Some(draft)) = (service::node(), flow::draft::<F>()) else { return 1 };
    flow::set_rewrite::<F>(&mut draft.flow.rewrite, key, &draft.to);
    let is_anothers = newcomer::are_others_at_work() && newcomer::meets_foreign_replies::<F>(key);
    if !is_anothers && flow::open::<F>(key, draft) {
        draft.is_settled = 1;
        return 1;
    }
    if is_anothers || !flow::vacate::<F>() {
        draft.is_retry = 1;
        draft.to.sport = another_source_port::<F, CROSSES>(node, key, index);
        if !CROSSES && index >= WITH_FIRST && is_one_of_ours::<F>(node, draft.to.saddr) {
            draft.to.saddr = another_address::<F>(node, index);
        }
    }
    0
}

/// Whether an address is one of those, and not a client's, nor the node's within a tunnel.
#[inline(always)]
fn is_one_of_ours<F: Family>(node: &Node, address: F::Addr) -> bool {
    let is = |other: &F::Addr| F::words(*other) == F::words(address);
    is(&F::masquerade(node)) || F::further(node).iter().any(is)
}

/// In turn each of the addresses that masqueraded flows may bear.
#[inline(always)]
fn another_address<F: Family>(node: &Node, index: u64) -> F::Addr {
    match F::further(node).get(index as usize & FURTHER) {
        Some(address) if *address != F::Addr::ANY => *address,
        _ => F::masquerade(node),
    }
}

/// The client's port if it may stand for the node's, else one of those that may: by the tuple, so that a connection whose
/// entries were evicted is known to its backend under the port it had.
#[inline(always)]
pub(crate) fn source_port<F: Family, const CROSSES: bool>(node: &Node, key: &Tuple<F::Addr>) -> Port {
    let number = key.sport.number();
    let (first, last) = source_ports::<CROSSES>(node);
    let may_stay = number >= first.number() && number <= last.number();
    if may_stay { key.sport } else { scaled::<CROSSES>(node, pick::flow_hash::<F>(key)) }
}

/// The ports that may stand for the node's, first and last.
#[inline(always)]
const fn source_ports<const CROSSES: bool>(node: &Node) -> (Port, Port) {
    if CROSSES {
        (node.cross_port_first, node.cross_port_last)
    } else {
        (node.source_port_first, node.source_port_last)
    }
}

/// In the same order whenever the tuple is a new flow's, as long as the node's first address is tried; then at random, whoever
/// has taken those.
#[inline(always)]
fn another_source_port<F: Family, const CROSSES: bool>(node: &Node, key: &Tuple<F::Addr>, index: u64) -> Port {
    let word = if index < WITH_FIRST {
        pick::flow_hash::<F>(key).wrapping_mul(2 * index as u32 + 3)
    } else {
        kernel::random()
    };
    scaled::<CROSSES>(node, word)
}

/// The port that a word falls on.
#[inline(always)]
fn scaled<const CROSSES: bool>(node: &Node, word: u32) -> Port {
    let (first, last) = source_ports::<CROSSES>(node);
    let first = u32::from(first.number());
    let count = u32::from(last.number()).wrapping_sub(first).wrapping_add(1);
    Port::new(first.wrapping_add((word >> 16).wrapping_mul(count) >> 16) as u16)
}
