//! An embryo's life: a flow of which only the first packets have come. Another CPU may confirm it at any moment, and then its memory is the
//! next flow's: so it is read into a copy, and looked at again, before it counts.

use proxy_common::{
    addr::Protocol,
    flow::{Direction, Flow, Tier, state},
    outcome::{Hook, Outcome},
    tuple::Tuple,
};

use crate::{
    counters::count,
    event,
    family::Family,
    flow::{Entry, confirmed, draft, embryo, leads_to, set_twin, twin_key},
    kernel,
    once::Once as _,
    parse::tcp,
    table,
};

/// Packets each way of a confirmed UDP flow that are added up at once: few exchanges are longer, and none says that it is
/// over.
const EAGER: u8 = 8;

/// What an embryo says, in memory that is this CPU's own; `None` when it is not there any more: another CPU has moved it,
/// and what was read may be another flow's.
#[inline(always)]
pub(crate) fn copy<F: Family>(key: &Tuple<F::Addr>, entry: Entry<F::Addr>) -> Option<Entry<F::Addr>> {
    if has_read::<F>(key, entry.address()) { copied::<F>() } else { None }
}

/// An entry in either tier that is only read: of an embryo its copy.
#[inline(always)]
pub(crate) fn known<F: Family>(key: &Tuple<F::Addr>) -> Option<Entry<F::Addr>> {
    let copied = || embryo::<F>(key).and_then(|entry| copy::<F>(key, entry));
    // It may have moved between the two looks.
    confirmed::<F>(key).or_else(copied).or_else(|| confirmed::<F>(key))
}

/// Reads first, and then looks whether the entry is still the key's: if it is, it was when it was read.
#[inline(never)]
fn has_read<F: Family>(key: &Tuple<F::Addr>, entry: *mut Flow<F::Addr>) -> bool {
    let Some(copy) = copied::<F>() else { return false };
    // SAFETY: the copy is this CPU's own, and nobody else looks at it during the program's run.
    unsafe { *copy.address() = *Entry::at(entry).flow() };
    embryo::<F>(key).is_some_and(|entry_now| entry_now.address() == entry)
}

/// Where [`copy`] has put what it has read.
#[inline(always)]
fn copied<F: Family>() -> Option<Entry<F::Addr>> {
    // SAFETY: as in `flow::draft`; and it is another element than that one's, of which nobody else uses this field.
    F::drafts().get_ptr_mut(1).map(|draft| Entry::at(unsafe { &raw mut (*draft).flow }))
}

/// Looks after an embryo that was worked on as a [`copy`]: a reply is noted in both halves; TCP is confirmed by the client's
/// next ACK after it, SCTP by its COOKIE ECHO, UDP by the reply itself. Where replies do not come this way, by what the client
/// sends next: that it did not give up is the only sign of them. The entry is not to be used after it.
#[inline(always)]
pub(crate) fn hatch<F: Family>(hook: Hook, key: &Tuple<F::Addr>, entry: Entry<F::Addr>, flags: u8) {
    F::Addr::hatch(hook, key, entry.address(), flags);
}

/// What [`hatch`] does.
#[inline(always)]
pub(crate) fn hatch_one<F: Family>(hook: Hook, key: &Tuple<F::Addr>, entry: Entry<F::Addr>, flags: u8) {
    let (Some(copy), Some(draft)) = (copied::<F>(), draft::<F>()) else { return };
    let flow = copy.flow();
    let bits = match flow.direction {
        Direction::Transit => 0,
        Direction::Reply if key.proto == Protocol::Udp => state::REPLIED | state::CONFIRMED,
        Direction::Reply => state::REPLIED,
        Direction::Original => {
            let is_one_way = flow.is_one_way();
            let is_third =
                flags & (tcp::SYN | tcp::ACK | tcp::RST) == tcp::ACK || is_one_way && key.proto == Protocol::Udp;
            let is_confirmed = is_third && (flow.state & state::REPLIED != 0 || is_one_way);
            if is_confirmed { state::CONFIRMED } else { 0 }
        }
    };
    draft.twin_key = twin_key(key, flow);
    if bits & state::CONFIRMED == 0 {
        if flow.next_hop.generation != entry.flow().next_hop.generation {
            keep_way::<F>(key, flow);
        }
        if bits & !flow.state != 0 {
            entry.add_state(bits);
            if let Some(other) = embryo::<F>(&draft.twin_key)
                && leads_to::<F>(other, key)
            {
                other.add_state(bits);
            }
        }
        return;
    }
    draft.flow = *flow;
    draft.flow.state |= bits;
    draft.flow.last_seen = kernel::jiffies();
    draft.flow.eager = if key.proto == Protocol::Udp { EAGER } else { 0 };
    // First enter, then leave: see `flow::open`. Another CPU may do the same at this moment: the flow is confirmed by the one that
    // enters this half, and what the other one knew of its end is not lost.
    let has_twin = !draft.flow.is_one_way();
    if has_twin {
        set_twin(&mut draft.twin, key, &draft.flow);
        if !table::claim::<F>(Tier::Flows, &draft.twin_key, &draft.twin)
            && let Some(other) = confirmed::<F>(&draft.twin_key)
            && leads_to::<F>(other, key)
        {
            other.add_state(draft.flow.state);
        }
    }
    if !table::claim::<F>(Tier::Flows, key, &draft.flow) {
        if let Some(own) = confirmed::<F>(key) {
            own.add_state(draft.flow.state);
        }
        return;
    }
    if has_twin {
        table::leave::<F>(Tier::Embryos, &draft.twin_key);
    }
    table::leave::<F>(Tier::Embryos, key);
    count(hook, Outcome::Confirmed);
    event::flow::<F>(hook, Outcome::Confirmed, key, &draft.flow, 0);
}

/// Lets an embryo keep the way that its copy has learned.
#[inline(always)]
fn keep_way<F: Family>(key: &Tuple<F::Addr>, copy: &Flow<F::Addr>) {
    if let Some(entry) = embryo::<F>(key) {
        entry.set_output(copy.output);
        entry.set_next_hop(copy.next_hop);
    }
}
