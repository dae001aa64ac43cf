//! The flow table: tracked connections, their pairs, their lifetimes. Two tiers of LRU maps: a flow is born in the small
//! one (`EMBRYOS_*`) and moves to the large one (`FLOWS_*`) when it is confirmed, so that a flood of first packets cannot
//! evict a confirmed connection.

use proxy_common::{
    addr::{Address as _, Mac, Protocol},
    flow::{Direction, Draft, Flow, NextHop, Output, Rewrite, Tier, state},
    lifetime::{self, is_closing, is_established},
    node::Node,
    outcome::{Hook, Outcome},
    tuple::{Stage, Tuple},
};

use crate::{
    active, checksum, clock::silence, counters::count, event, family::Family, kernel, once::Once as _, parse::tcp,
    service, stats, table,
};

/// An entry of a flow table. The kernel may give the memory to another flow after an eviction, which takes the least
/// recently used: not one that was looked up a moment ago. But what is taken out, or replaced by an insert under its key, is
/// given away at once, to the next flow that is entered; so nothing that is in use is replaced, and an embryo, which another
/// CPU may confirm and take out meanwhile, is worked on as a copy ([`crate::embryo`]).
#[derive(Clone, Copy)]
pub(crate) struct Entry<A: 'static>(*mut Flow<A>);

impl<A: Copy> Entry<A> {
    /// The flow, as it is now.
    #[inline(always)]
    pub(crate) fn flow(&self) -> &'static Flow<A> {
        // SAFETY: the pointer came from a map look-up; map memory outlives the program's run.
        unsafe { &*self.0 }
    }

    #[inline(always)]
    fn set_last_seen(self, now: u32) {
        // SAFETY: as in `flow`; an aligned word, so that no other CPU sees half of it.
        unsafe { (*self.0).last_seen = now };
    }

    #[inline(always)]
    pub(crate) fn add_state(self, bits: u8) {
        // SAFETY: as in `flow`. Two CPUs may lose one of two bits set at the same instant; the next packet sets it again.
        unsafe { (*self.0).state |= bits };
    }

    /// The entry at an address that a look-up or [`Self::address`] gave.
    #[inline(always)]
    pub(crate) const fn at(address: *mut Flow<A>) -> Self {
        Self(address)
    }

    /// What functions out of line take.
    #[inline(always)]
    pub(crate) const fn address(self) -> *mut Flow<A> {
        self.0
    }

    /// Notes a packet. `true` when what was noted is to be added up now.
    #[inline(always)]
    pub(crate) fn note(self, bytes: u32) -> bool {
        /// Before the number overflows; that of bytes does not before it, because a packet has no more than 65,535.
        const MANY: u16 = 0x8000;
        const ENDS: u8 = state::FIN_ORIGINAL | state::FIN_REPLY | state::RESET;
        // SAFETY: as in `flow`. Two CPUs may lose one of two packets noted at the same instant.
        let flow = unsafe { &mut *self.0 };
        flow.packets = flow.packets.wrapping_add(1);
        flow.bytes = flow.bytes.wrapping_add(bytes);
        u32::from(flow.state & ENDS) | u32::from(flow.eager) | u32::from(flow.packets & MANY) != 0
    }

    /// Packets and bytes that were noted; they are noted no more.
    #[inline(always)]
    pub(crate) fn take_noted(self) -> (u16, u32) {
        // SAFETY: as in `note`.
        let flow = unsafe { &mut *self.0 };
        let noted = (flow.packets, flow.bytes);
        (flow.packets, flow.bytes) = (0, 0);
        flow.eager = flow.eager.saturating_sub(1);
        noted
    }

    /// Lets the next packets be added up at once.
    #[inline(always)]
    fn set_eager(self, packets: u8) {
        // SAFETY: as in `note`.
        unsafe { (*self.0).eager = packets };
    }

    /// Says where the packet goes from now on. Whoever reads it before the next hop sends one packet the other way there was.
    #[inline(always)]
    pub(crate) fn set_output(self, output: Output) {
        // SAFETY: as in `flow`.
        unsafe { (*self.0).output = output };
    }

    /// Keeps a next hop. The generation is written last: a reader that sees it sees the rest.
    #[inline(always)]
    pub(crate) fn set_next_hop(self, next_hop: NextHop) {
        // SAFETY: as in `flow`.
        let place = unsafe { &mut (*self.0).next_hop };
        place.ifindex = next_hop.ifindex;
        place.mtu = next_hop.mtu;
        place.dmac = next_hop.dmac;
        place.smac = next_hop.smac;
        place.generation = next_hop.generation;
    }
}

/// What a known tuple's packet means for its flow.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Advance {
    /// It belongs to the flow.
    Keep,
    /// The tuple is used anew: forget the flow and choose again.
    Afresh,
    /// The connection's backend has left for good: forget the flow and tell the client.
    Gone,
}

#[inline(always)]
pub(crate) fn confirmed<F: Family>(tuple: &Tuple<F::Addr>) -> Option<Entry<F::Addr>> {
    table::find::<F>(Tier::Flows, tuple)
}

#[inline(always)]
pub(crate) fn embryo<F: Family>(tuple: &Tuple<F::Addr>) -> Option<Entry<F::Addr>> {
    table::find::<F>(Tier::Embryos, tuple)
}

/// Room for a pair in the making. What is in it does not outlive the packet; nobody else writes it meanwhile, because
/// programs that handle packets do not interrupt each other on one CPU.
#[inline(always)]
pub(crate) fn draft<F: Family>() -> Option<&'static mut Draft<F::Addr>> {
    // SAFETY: the pointer is to this CPU's own value, which stays as long as the map.
    F::drafts().get_ptr_mut(0).map(|draft| unsafe { &mut *draft })
}

/// Room for the key of the pair that replaces a flow's source.
#[inline(always)]
pub(crate) fn mask_key<F: Family>() -> Option<&'static mut Tuple<F::Addr>> {
    // SAFETY: as in `draft`; and it is another element than that one's.
    F::drafts().get_ptr_mut(1).map(|draft| unsafe { &mut (*draft).to })
}

/// The rewrite from one set of addresses and ports to another.
#[inline(always)]
pub(crate) fn set_rewrite<F: Family>(place: &mut Rewrite<F::Addr>, from: &Tuple<F::Addr>, to: &Tuple<F::Addr>) {
    place.saddr = to.saddr;
    place.daddr = to.daddr;
    place.sport = to.sport;
    place.dport = to.dport;
    place.addr_delta = checksum::delta(from.saddr.sum() + from.daddr.sum(), to.saddr.sum() + to.daddr.sum());
    place.port_delta = checksum::delta(
        u32::from(from.sport.word()) + u32::from(from.dport.word()),
        u32::from(to.sport.word()) + u32::from(to.dport.word()),
    );
}

/// Key of the other half.
#[inline(always)]
pub(crate) fn twin_key<A: Copy>(key: &Tuple<A>, flow: &Flow<A>) -> Tuple<A> {
    let to = &flow.rewrite;
    Tuple::new(to.daddr, to.saddr, to.dport, to.sport, key.proto, flow.twin_stage)
}

/// Makes the other half from this one, field by field, because a whole one does not fit the stack.
#[inline(always)]
pub(crate) fn set_twin<A: Copy>(twin: &mut Flow<A>, key: &Tuple<A>, flow: &Flow<A>) {
    twin.rewrite.saddr = key.daddr;
    twin.rewrite.daddr = key.saddr;
    twin.rewrite.sport = key.dport;
    twin.rewrite.dport = key.sport;
    twin.rewrite.addr_delta = checksum::negate(flow.rewrite.addr_delta);
    twin.rewrite.port_delta = checksum::negate(flow.rewrite.port_delta);
    twin.next_hop = NextHop { ifindex: 0, generation: 0, mtu: 0, dmac: Mac::ZERO, smac: Mac::ZERO };
    twin.backend = flow.backend;
    twin.backend_generation = flow.backend_generation;
    twin.service = flow.service;
    twin.last_seen = flow.last_seen;
    twin.output = flow.twin_output;
    twin.twin_output = flow.output;
    twin.twin_stage = key.stage;
    twin.direction = match flow.direction {
        Direction::Original => Direction::Reply,
        _ => Direction::Original,
    };
    twin.state = flow.state;
    twin.eager = flow.eager;
    twin.packets = 0;
    twin.bytes = 0;
}

/// Whether a pair is the one by which its flow is counted.
#[inline(always)]
fn counts<A>(flow: &Flow<A>) -> bool {
    !flow.is_mask() && flow.direction != Direction::Transit
}

/// Enters a new pair, whose original half is `draft.flow`. The reply's key is claimed first and must be free in both tiers:
/// another flow that has it would get this one's replies. The order (claim among the embryos, then look among the
/// confirmed) is what makes it safe against `embryo::hatch`, which enters among the confirmed before it leaves the embryos.
///
/// `false` when the key is another flow's.
#[inline(always)]
pub(crate) fn open<F: Family>(key: &Tuple<F::Addr>, draft: &mut Draft<F::Addr>) -> bool {
    draft.twin_key = twin_key(key, &draft.flow);
    set_twin(&mut draft.twin, key, &draft.flow);
    let is_claimed = table::claim::<F>(Tier::Embryos, &draft.twin_key, &draft.twin);
    let holder = if is_claimed { confirmed::<F>(&draft.twin_key) } else { half::<F>(&draft.twin_key) };
    if holder.is_none() && !is_claimed {
        // The holder left for the other tier while we looked, or there is no room: another attempt will tell.
        return false;
    }
    if let Some(holder) = holder {
        if is_claimed {
            table::leave::<F>(Tier::Embryos, &draft.twin_key);
        }
        // A reply half whose original was evicted: this very flow.
        if !is_same::<F>(&holder.flow().rewrite, &draft.twin.rewrite) {
            return false;
        }
        if is_closing(holder.flow().state) {
            // It is of the connection before, whose end is not this one's.
            table::leave::<F>(Tier::Flows, &draft.twin_key);
            table::enter::<F>(Tier::Embryos, &draft.twin_key, &draft.twin);
        } else {
            holder.set_last_seen(draft.flow.last_seen);
            draft.flow.state = holder.flow().state;
        }
        if draft.flow.is_confirmed() {
            // Unless another CPU has done so.
            table::claim::<F>(Tier::Flows, key, &draft.flow);
            return true;
        }
    }
    // Another CPU may have opened the same flow a moment ago: then its backend counts, and the reply claimed here is
    // never used.
    if table::claim::<F>(Tier::Embryos, key, &draft.flow) && counts(&draft.flow) {
        active::raise::<F>(draft.flow.backend);
    }
    true
}

/// Compared word by word: a derived comparison of bytes would load bytes.
#[inline(always)]
fn is_same<F: Family>(a: &Rewrite<F::Addr>, b: &Rewrite<F::Addr>) -> bool {
    F::words(a.saddr) == F::words(b.saddr)
        && F::words(a.daddr) == F::words(b.daddr)
        && a.sport.word() == b.sport.word()
        && a.dport.word() == b.dport.word()
}

/// Whether an entry is the other half of a flow, and not of another that got the key when that half was evicted.
#[inline(always)]
pub(crate) fn leads_to<F: Family>(half: Entry<F::Addr>, key: &Tuple<F::Addr>) -> bool {
    let to = &half.flow().rewrite;
    F::words(to.saddr) == F::words(key.daddr)
        && F::words(to.daddr) == F::words(key.saddr)
        && to.sport.word() == key.dport.word()
        && to.dport.word() == key.sport.word()
}

/// Forgets the flow that has the key of the drafted reply, if it is over: ports of closed connections would run out
/// otherwise. `true` when the key is free now.
#[inline(never)]
pub(crate) fn vacate<F: Family>() -> bool {
    let (Some(node), Some(draft)) = (service::node(), draft::<F>()) else { return false };
    let key = &draft.twin_key;
    let Some(holder) = half::<F>(key) else { return true };
    let flow = holder.flow();
    let silent = silence(kernel::jiffies(), flow.last_seen);
    let is_over = silent > lifetime::seconds_to_be_over(key.proto, flow.state).saturating_mul(node.jiffies_per_second);
    if is_over {
        stats::add_up::<F>(holder);
        forget::<F>(key, flow);
    }
    is_over
}

/// Cuts a rewrite in two: the first step, left in `draft.flow.rewrite`, changes the destination only; an entry for the
/// uplink's egress does the rest.
#[inline(always)]
pub(crate) fn cut<F: Family>(key: &Tuple<F::Addr>, flow: &Flow<F::Addr>) {
    F::Addr::cut(key, flow);
}

/// What [`cut`] does.
#[inline(always)]
pub(crate) fn cut_in_two<F: Family>(key: &Tuple<F::Addr>, flow: &Flow<F::Addr>) {
    let Some(draft) = draft::<F>() else { return };
    let to = &flow.rewrite;
    draft.twin_key = Tuple::new(key.saddr, to.daddr, key.sport, to.dport, key.proto, Stage::UplinkOut);
    draft.to = Tuple::new(to.saddr, to.daddr, to.sport, to.dport, key.proto, Stage::UplinkOut);
    draft.twin = *flow;
    set_rewrite::<F>(&mut draft.twin.rewrite, &draft.twin_key, &draft.to);
    draft.twin.output = Output::Stack;
    draft.twin.twin_output = Output::Stack;
    draft.twin.direction = Direction::Transit;
    // Over a tunnel every packet comes this way.
    let is_there =
        embryo::<F>(&draft.twin_key).is_some_and(|entry| is_same::<F>(&entry.flow().rewrite, &draft.twin.rewrite));
    if !is_there {
        table::enter::<F>(Tier::Embryos, &draft.twin_key, &draft.twin);
    }
    set_rewrite::<F>(&mut draft.flow.rewrite, key, &draft.twin_key);
}

/// Forgets the pair of a key, if there is one.
#[inline(never)]
pub(crate) fn forget_key<F: Family>(key: &Tuple<F::Addr>) {
    if let Some(entry) = half::<F>(key) {
        forget::<F>(key, entry.flow());
    }
}

/// Whether a key's flow is there, not closing, and not silent for longer than it lives.
#[inline(always)]
pub(crate) fn is_alive<F: Family>(key: &Tuple<F::Addr>, node: &Node) -> bool {
    half::<F>(key).is_some_and(|entry| {
        let flow = entry.flow();
        let lifetime = lifetime::seconds(key.proto, flow.state).saturating_mul(node.jiffies_per_second);
        !is_closing(flow.state) && silence(kernel::jiffies(), flow.last_seen) <= lifetime
    })
}

/// Forgets a pair, wherever its halves are.
#[inline(always)]
pub(crate) fn forget<F: Family>(key: &Tuple<F::Addr>, flow: &Flow<F::Addr>) {
    F::Addr::forget(key, flow);
}

/// What [`forget`] does.
#[inline(always)]
pub(crate) fn forget_pair<F: Family>(key: &Tuple<F::Addr>, flow: &Flow<F::Addr>) {
    // One place for both keys, as the stack is short where this is called.
    let mut place = twin_key(key, flow);
    if !is_closing(flow.state) && counts(flow) {
        active::lower::<F>(flow.backend);
    }
    if !flow.is_one_way() && half::<F>(&place).is_none_or(|half| leads_to::<F>(half, key)) {
        table::leave::<F>(Tier::Flows, &place);
        table::leave::<F>(Tier::Embryos, &place);
    }
    place = *key;
    table::leave::<F>(Tier::Flows, &place);
    table::leave::<F>(Tier::Embryos, &place);
}

/// Looks after a known flow that has something to say: TCP flags that open or close, or a second gone by.
#[inline(always)]
pub(crate) fn advance<F: Family>(
    hook: Hook,
    key: &Tuple<F::Addr>,
    entry: Entry<F::Addr>,
    flags: u8,
    node: &Node,
) -> Advance {
    if flags & (tcp::SYN | tcp::FIN | tcp::RST) != 0 && F::Addr::note_flags(key, entry.0, flags) {
        return Advance::Afresh;
    }
    let silent = silence(kernel::jiffies(), entry.flow().last_seen);
    if silent >= node.jiffies_per_second {
        return F::Addr::refresh(hook, key, entry.0, silent, node.jiffies_per_second);
    }
    Advance::Keep
}

/// Whether a packet asks for a connection.
#[inline(always)]
pub(crate) const fn is_opening(flags: u8) -> bool {
    flags & (tcp::SYN | tcp::ACK) == tcp::SYN
}

/// TCP's beginnings and ends, and those of SCTP that mean the same. `true` when a handshake is not this flow's: a SYN starts a
/// new connection on its tuple, or a backend answers the SYN of one that went past us, from a port that was used here before.
#[inline(always)]
pub(crate) fn note_flags<F: Family>(key: &Tuple<F::Addr>, entry: Entry<F::Addr>, flags: u8) -> bool {
    let flow = entry.flow();
    if is_opening(flags)
        && flow.direction == Direction::Original
        && !flow.is_mask()
        && (is_closing(flow.state) || !service::still_serves::<F>(flow.backend, flow.backend_generation))
    {
        return true;
    }
    if flags & (tcp::SYN | tcp::ACK) == tcp::SYN | tcp::ACK
        && flow.direction == Direction::Reply
        && is_closing(flow.state)
    {
        return true;
    }
    let mut bits = 0;
    if flags & tcp::RST != 0 {
        bits |= state::RESET;
    }
    if flags & tcp::FIN != 0 {
        bits |= if flow.direction == Direction::Reply { state::FIN_REPLY } else { state::FIN_ORIGINAL };
    }
    if bits & !flow.state != 0 {
        if is_closing(flow.state | bits) && !is_closing(flow.state) && counts(flow) {
            active::lower::<F>(flow.backend);
        }
        entry.add_state(bits);
        if !flow.is_one_way()
            && let Some(other) = half::<F>(&twin_key(key, flow))
            && leads_to::<F>(other, key)
        {
            other.add_state(bits);
        }
    }
    false
}

/// Once a second: last-seen is written, and the other half touched, or rebuilt when it was evicted. The tuple is used anew
/// when the flow was silent for longer than it lives, or its reply's key has gone to another flow meanwhile.
///
/// That a connection's backend has gone is looked for here only, because the agent says so long after the fact.
#[inline(always)]
pub(crate) fn refresh<F: Family>(
    hook: Hook,
    key: &Tuple<F::Addr>,
    entry: Entry<F::Addr>,
    silent: u32,
    second: u32,
) -> Advance {
    let flow = entry.flow();
    let lifetime = lifetime::seconds(key.proto, flow.state);
    // What replaces the source of another pair lives as long as that one.
    let is_over = silent > lifetime.saturating_mul(second) && !flow.is_mask();
    match flow.direction {
        Direction::Original if is_over => return Advance::Afresh,
        // A backend may break any silence of a connection that nobody has closed.
        Direction::Reply if is_over && (key.proto == Protocol::Udp || !is_established(flow.state)) => {
            return Advance::Afresh;
        }
        _ => {}
    }
    let now = kernel::jiffies();
    entry.set_last_seen(now);
    if flow.is_confirmed() {
        entry.set_eager(1);
    }
    // A connection that is dispatched goes on to its node for as long as its client likes: that one knows what has become of it.
    if flow.direction == Direction::Transit || flow.is_one_way() {
        return Advance::Keep;
    }
    if key.proto != Protocol::Udp && service::is_gone::<F>(flow.backend, flow.backend_generation) {
        // What the backend still sends leaves the other half alone, so that the client's next packet comes here.
        return if flow.direction == Direction::Original { Advance::Gone } else { Advance::Keep };
    }
    let other = twin_key(key, flow);
    if let Some(other) = half::<F>(&other) {
        if !leads_to::<F>(other, key) {
            return if flow.direction == Direction::Original { Advance::Afresh } else { Advance::Keep };
        }
        other.set_last_seen(now);
        stats::add_up::<F>(other);
        return Advance::Keep;
    }
    let Some(draft) = draft::<F>() else { return Advance::Keep };
    set_twin(&mut draft.twin, key, flow);
    let is_rebuilt = if flow.is_confirmed() {
        table::claim::<F>(Tier::Flows, &other, &draft.twin)
    } else {
        table::claim::<F>(Tier::Embryos, &other, &draft.twin)
    };
    if is_rebuilt {
        count(hook, Outcome::Repaired);
        event::flow::<F>(hook, Outcome::Repaired, key, flow, 0);
    }
    Advance::Keep
}

/// An entry in either tier.
#[inline(always)]
pub(crate) fn half<F: Family>(key: &Tuple<F::Addr>) -> Option<Entry<F::Addr>> {
    confirmed::<F>(key).or_else(|| embryo::<F>(key))
}

#[cfg(test)]
mod tests {
    use proxy_common::addr::{Ipv4, Port};

    use super::*;
    use crate::family::V4;

    fn address(last: u8) -> Ipv4 {
        Ipv4 { octets: [10, 0, 0, last] }
    }

    fn pair() -> (Tuple<Ipv4>, Flow<Ipv4>) {
        let key = Tuple::new(address(1), address(9), Port::new(4000), Port::new(80), Protocol::Tcp, Stage::FromPod);
        let to = Tuple::new(address(1), address(5), Port::new(4000), Port::new(8080), Protocol::Tcp, Stage::FromPod);
        let mut flow = Flow {
            rewrite: Rewrite::default(),
            next_hop: NextHop::default(),
            backend: 7,
            backend_generation: 1,
            service: 3,
            last_seen: 11,
            output: Output::Stack,
            twin_output: Output::Stack,
            twin_stage: Stage::ToPod,
            direction: Direction::Original,
            state: 0,
            eager: 0,
            packets: 0,
            bytes: 0,
        };
        set_rewrite::<V4>(&mut flow.rewrite, &key, &to);
        (key, flow)
    }

    #[test]
    fn a_pair_can_be_rebuilt_from_either_half() {
        let (key, flow) = pair();
        let reply_key = twin_key(&key, &flow);
        assert_eq!((reply_key.saddr, reply_key.daddr), (address(5), address(1)));
        assert_eq!(reply_key.stage, Stage::ToPod);
        let mut reply = flow;
        set_twin(&mut reply, &key, &flow);
        assert_eq!((reply.rewrite.saddr, reply.rewrite.sport), (address(9), Port::new(80)));
        assert_eq!(twin_key(&reply_key, &reply), key);
        let mut rebuilt = reply;
        set_twin(&mut rebuilt, &reply_key, &reply);
        assert_eq!(rebuilt, flow);
    }
}
