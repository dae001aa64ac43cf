//! How the entries of one connection follow from each other: the two halves of a pair, and those of its second step.

use proxy_common::{
    flow::{Direction, Flow},
    tuple::{Stage, Tuple},
};

/// Key of the other half.
pub(super) fn twin_key<A: Copy>(key: &Tuple<A>, flow: &Flow<A>) -> Tuple<A> {
    let to = &flow.rewrite;
    Tuple::new(to.daddr, to.saddr, to.dport, to.sport, key.proto, flow.twin_stage)
}

/// Where a packet of the flow, with its destination replaced and its source as it was, may get another source.
pub(super) fn second_steps<A: Copy>(key: &Tuple<A>, flow: &Flow<A>) -> [Tuple<A>; 2] {
    let to = &flow.rewrite;
    [Stage::ToPod, Stage::UplinkOut].map(|stage| Tuple::new(key.saddr, to.daddr, key.sport, to.dport, key.proto, stage))
}

/// Whether an entry only replaces the source of another entry's flow.
pub(super) fn is_second_step<A>(flow: &Flow<A>) -> bool {
    flow.is_mask() || flow.direction == Direction::Transit
}
