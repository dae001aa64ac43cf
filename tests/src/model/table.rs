//! The flow table: pairs of entries in two tiers, and when they end. A flow is born an embryo and becomes confirmed; one half
//! can be made from the other.

use std::collections::BTreeMap;

use proxy_common::{
    addr::Protocol,
    flow::{Direction, Output, state},
    tuple::Stage,
};

use super::{End, Hop, World};

/// A 5-tuple at a stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    /// Who sends.
    pub source: End,
    /// Who receives.
    pub destination: End,
    /// By which protocol.
    pub proto: Protocol,
    /// Where it is seen.
    pub stage: Stage,
}

impl Key {
    pub(super) fn is_v4(&self) -> bool {
        self.source.0.is_ipv4()
    }
}

/// One half of a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// New source.
    pub source: End,
    /// New destination.
    pub destination: End,
    /// Generation of the routes when its next hop was found, and the hop.
    pub hop: Option<(u32, Hop)>,
    /// Whom it leads to.
    pub backend: u32,
    /// And the backend's generation.
    pub generation: u32,
    /// Index of the Service port.
    pub service: u32,
    /// Time of the last note of a packet.
    pub seen: u64,
    /// Where its packets go.
    pub output: Output,
    /// Where the other half's go.
    pub twin_output: Output,
    /// The other half's stage.
    pub twin_stage: Stage,
    /// Which half this is.
    pub direction: Direction,
    /// Bits of `flow::state`.
    pub state: u8,
}

impl Flow {
    pub(super) fn is_mask(&self) -> bool {
        self.state & state::MASK != 0
    }

    /// Whether the connection is over, but for what is still on the wire.
    pub(super) fn is_closing(&self) -> bool {
        is_closing(self.state)
    }

    /// Whether it is the pair by which its flow is counted.
    pub(super) fn counts(&self) -> bool {
        !self.is_mask() && self.direction != Direction::Transit
    }

    /// The key of the other half.
    pub(super) fn twin_key(&self, key: &Key) -> Key {
        Key { source: self.destination, destination: self.source, proto: key.proto, stage: self.twin_stage }
    }

    /// The other half.
    pub(super) fn twin(&self, key: &Key) -> Self {
        Self {
            source: key.destination,
            destination: key.source,
            hop: None,
            output: self.twin_output,
            twin_output: self.output,
            twin_stage: key.stage,
            direction: if self.direction == Direction::Original { Direction::Reply } else { Direction::Original },
            ..*self
        }
    }

    /// Whether it is the other half of a key's flow, and not of another that got the key.
    fn leads_to(&self, key: &Key) -> bool {
        self.source == key.destination && self.destination == key.source
    }
}

pub(super) fn is_closing(bits: u8) -> bool {
    const BOTH: u8 = state::FIN_ORIGINAL | state::FIN_REPLY;
    bits & state::RESET != 0 || bits & BOTH == BOTH
}

const ESTABLISHED: u64 = 86_400;

/// Seconds of silence a flow lives through.
pub(super) fn lifetime(proto: Protocol, bits: u8) -> u64 {
    match proto {
        Protocol::Udp if bits & state::REPLIED != 0 => 120,
        Protocol::Udp => 30,
        _ if bits & state::CONFIRMED != 0 && !is_closing(bits) => ESTABLISHED,
        _ => 120,
    }
}

/// Whether nobody misses a flow whose key another one needs.
fn is_over(key: &Key, flow: &Flow, now: u64, second: u64) -> bool {
    let is_closed = key.proto != Protocol::Udp && flow.is_closing();
    let seconds = if is_closed { 2 } else { lifetime(key.proto, flow.state) };
    now - flow.seen > seconds * second
}

/// What a packet means for the flow of its tuple.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Advance {
    Keep,
    Afresh,
    Gone,
    /// It is kept, and its other half was made anew.
    Repaired,
}

/// All flows, and how many each backend has.
#[derive(Default)]
pub struct Table {
    /// Those that are confirmed.
    pub confirmed: BTreeMap<Key, Flow>,
    /// Those that are not.
    pub embryos: BTreeMap<Key, Flow>,
    /// By family (IPv4?) and backend: opened and not yet closed.
    pub active: BTreeMap<(bool, u32), u32>,
}

impl Table {
    /// An entry in either tier.
    pub fn half(&self, key: &Key) -> Option<Flow> {
        self.confirmed.get(key).or_else(|| self.embryos.get(key)).copied()
    }

    pub(super) fn half_mut(&mut self, key: &Key) -> Option<&mut Flow> {
        self.confirmed.get_mut(key).or_else(|| self.embryos.get_mut(key))
    }

    fn other_half_mut(&mut self, key: &Key, flow: &Flow) -> Option<&mut Flow> {
        self.half_mut(&flow.twin_key(key)).filter(|other| other.leads_to(key))
    }

    /// Takes one half out, as the kernel does when the table is full.
    pub fn evict(&mut self, key: &Key) {
        self.remove(key);
    }

    fn remove(&mut self, key: &Key) {
        self.confirmed.remove(key);
        self.embryos.remove(key);
    }

    fn raise(&mut self, key: &Key, flow: &Flow) {
        if flow.counts() {
            *self.active.entry((key.is_v4(), flow.backend)).or_default() += 1;
        }
    }

    fn lower(&mut self, key: &Key, flow: &Flow) {
        if flow.counts() {
            let count = self.active.entry((key.is_v4(), flow.backend)).or_default();
            *count = count.saturating_sub(1);
        }
    }

    /// Forgets both halves, unless the other's key has gone to another flow.
    pub(super) fn forget(&mut self, key: &Key) {
        let Some(flow) = self.half(key) else { return };
        if !flow.is_closing() {
            self.lower(key, &flow);
        }
        let twin_key = flow.twin_key(key);
        if self.half(&twin_key).is_none_or(|other| other.leads_to(key)) {
            self.remove(&twin_key);
        }
        self.remove(key);
    }

    /// Enters a new pair. The reply's key must be free: another flow that has it would get this one's replies. `false` if it
    /// is not.
    pub(super) fn open(&mut self, key: &Key, flow: &Flow) -> bool {
        let mut flow = *flow;
        let twin_key = flow.twin_key(key);
        let twin = flow.twin(key);
        if let Some(holder) = self.half(&twin_key) {
            if (holder.source, holder.destination) != (twin.source, twin.destination) {
                return false;
            }
            // The reply half of this very flow, whose original half was evicted; or of the connection before it.
            if holder.is_closing() {
                self.confirmed.remove(&twin_key);
                self.embryos.insert(twin_key, twin);
            } else {
                if let Some(holder) = self.half_mut(&twin_key) {
                    holder.seen = flow.seen;
                }
                flow.state = holder.state;
            }
            if flow.state & state::CONFIRMED != 0 {
                self.confirmed.insert(*key, flow);
                return true;
            }
        } else {
            self.embryos.insert(twin_key, twin);
        }
        if !self.embryos.contains_key(key) {
            self.embryos.insert(*key, flow);
            self.raise(key, &flow);
        }
        true
    }

    /// Forgets the holder of a key if it is over: closed and silent for two seconds, or silent for longer than it lives.
    pub(super) fn vacate(&mut self, key: &Key, now: u64, second: u64) -> bool {
        let Some(holder) = self.half(key) else { return true };
        let is_over = is_over(key, &holder, now, second);
        if is_over {
            self.forget(key);
        }
        is_over
    }

    /// Whether there is a flow that would have to leave its key to another.
    pub(super) fn has_some_over(&self, now: u64, second: u64) -> bool {
        self.confirmed.iter().chain(&self.embryos).any(|(key, flow)| is_over(key, flow, now, second))
    }

    /// Whether a key's flow is there, not closing, and not silent for longer than it lives.
    pub(super) fn is_alive(&self, key: &Key, now: u64, second: u64) -> bool {
        self.half(key)
            .is_some_and(|flow| !flow.is_closing() && now - flow.seen <= lifetime(key.proto, flow.state) * second)
    }

    /// What a packet with these TCP flags means for a known flow, with what it notes.
    pub(super) fn advance(&mut self, key: &Key, flags: u8, now: u64, world: &World) -> Advance {
        let Some(flow) = self.half(key) else { return Advance::Keep };
        if self.note_flags(key, &flow, flags, world) {
            return Advance::Afresh;
        }
        let second = u64::from(world.node.jiffies_per_second);
        if now - flow.seen < second { Advance::Keep } else { self.refresh(key, now, second, world) }
    }

    /// `true` when a handshake is not this flow's.
    fn note_flags(&mut self, key: &Key, flow: &Flow, flags: u8, world: &World) -> bool {
        const FIN: u8 = 1;
        const RST: u8 = 4;
        const SYN: u8 = 2;
        const SYN_ACK: u8 = 18;
        let serves = world.still_serves(key.is_v4(), flow.backend, flow.generation);
        let afresh = match flags & SYN_ACK {
            SYN => flow.direction == Direction::Original && !flow.is_mask() && (flow.is_closing() || !serves),
            SYN_ACK => flow.direction == Direction::Reply && flow.is_closing(),
            _ => false,
        };
        if afresh {
            return true;
        }
        let mut bits = 0;
        if flags & RST != 0 {
            bits |= state::RESET;
        }
        if flags & FIN != 0 {
            bits |= if flow.direction == Direction::Reply { state::FIN_REPLY } else { state::FIN_ORIGINAL };
        }
        if bits & !flow.state != 0 {
            if is_closing(flow.state | bits) && !flow.is_closing() {
                self.lower(key, flow);
            }
            if let Some(own) = self.half_mut(key) {
                own.state |= bits;
            }
            if let Some(other) = self.other_half_mut(key, flow) {
                other.state |= bits;
            }
        }
        false
    }

    /// Once a second.
    fn refresh(&mut self, key: &Key, now: u64, second: u64, world: &World) -> Advance {
        let Some(flow) = self.half(key) else { return Advance::Keep };
        let is_original = flow.direction == Direction::Original;
        let lifetime = lifetime(key.proto, flow.state);
        // What replaces the source of another pair lives as long as that one.
        let is_over = now - flow.seen > lifetime * second && !flow.is_mask();
        // A backend may break any silence of a connection that nobody has closed.
        if is_over && (is_original || flow.direction == Direction::Reply && lifetime != ESTABLISHED) {
            return Advance::Afresh;
        }
        if let Some(own) = self.half_mut(key) {
            own.seen = now;
        }
        if flow.direction == Direction::Transit {
            return Advance::Keep;
        }
        if key.proto == Protocol::Tcp && world.is_gone(key.is_v4(), flow.backend, flow.generation) {
            return if is_original { Advance::Gone } else { Advance::Keep };
        }
        let twin_key = flow.twin_key(key);
        if let Some(other) = self.half_mut(&twin_key) {
            if !other.leads_to(key) {
                return if is_original { Advance::Afresh } else { Advance::Keep };
            }
            other.seen = now;
            return Advance::Keep;
        }
        let twin = Flow { seen: now, ..flow.twin(key) };
        let tier = if flow.state & state::CONFIRMED != 0 { &mut self.confirmed } else { &mut self.embryos };
        tier.insert(twin_key, twin);
        Advance::Repaired
    }

    /// Looks after an embryo that has had a packet; `true` when it was confirmed: TCP by the client's ACK after a reply, UDP by
    /// the reply.
    pub(super) fn hatch(&mut self, key: &Key, flags: u8, now: u64) -> bool {
        let Some(mut flow) = self.embryos.get(key).copied() else { return false };
        let is_third = flags & (2 | 4 | 16) == 16;
        let bits = match flow.direction {
            Direction::Reply if key.proto == Protocol::Udp => state::REPLIED | state::CONFIRMED,
            Direction::Reply => state::REPLIED,
            Direction::Original if flow.state & state::REPLIED != 0 && is_third => state::CONFIRMED,
            _ => return false,
        };
        let twin_key = flow.twin_key(key);
        if bits & state::CONFIRMED == 0 {
            if let Some(own) = self.embryos.get_mut(key) {
                own.state |= bits;
            }
            if let Some(other) = self.embryos.get_mut(&twin_key).filter(|other| other.leads_to(key)) {
                other.state |= bits;
            }
            return false;
        }
        flow.state |= bits;
        flow.seen = now;
        self.embryos.remove(key);
        self.embryos.remove(&twin_key);
        // The other half of a flow that began anew with another backend, since this one's was evicted, stays.
        let other = self.confirmed.entry(twin_key).or_insert_with(|| flow.twin(key));
        if other.leads_to(key) {
            other.state |= flow.state;
        }
        self.confirmed.insert(*key, flow);
        true
    }
}
