//! A TCP segment's or a UDP datagram's way: a known flow is followed, a new one admitted, and what nobody serves refused.

use proxy_common::{
    addr::Protocol,
    flow::{Direction, Output},
    outcome::Outcome,
    tuple::Stage,
};

use super::{
    Expected, Flow, Hop, Key, Model, Objection, Oracle, Packet, Verdict,
    admission::Admission,
    table::Advance,
    wire::{Header, Rewriting, Segment},
};

impl Model {
    pub(super) fn converse(
        &mut self,
        packet: &Packet<'_>,
        segment: Segment,
        oracle: &mut dyn Oracle,
    ) -> Result<Expected, Objection> {
        let key = Key {
            source: (packet.ip.source, segment.source),
            destination: (packet.ip.destination, segment.destination),
            proto: segment.proto,
            stage: packet.stage,
        };
        let mut known = Advance::Afresh;
        if self.table.half(&key).is_some() {
            known = self.advance(packet, &key, segment.flags);
            if known == Advance::Keep {
                let is_embryo = !self.table.confirmed.contains_key(&key);
                let expected = self.send(packet, &key, &segment, oracle)?;
                if is_embryo && self.table.hatch(&key, segment.flags, self.now) {
                    self.count(packet.hook, Outcome::Confirmed);
                }
                return Ok(expected);
            }
        }
        // On the way out nobody is new.
        if matches!(packet.stage, Stage::ToPod | Stage::UplinkOut) {
            return Ok(Expected::untouched(packet.bytes));
        }
        if self.is_for_another_host(packet) {
            return Ok(self.pass(packet.hook, packet.bytes, Outcome::PassOtherHost));
        }
        if known == Advance::Gone {
            return Ok(self.refuse(packet, &segment, Outcome::ResetGone));
        }
        match self.admit(packet.hook, &key, oracle)? {
            Admission::NotOurs => Ok(Expected::untouched(packet.bytes)),
            Admission::Refused(reason) => Ok(self.refuse(packet, &segment, reason)),
            Admission::Admitted => self.send(packet, &key, &segment, oracle),
        }
    }

    /// What the packet means for its flow, which is forgotten unless it is kept.
    fn advance(&mut self, packet: &Packet<'_>, key: &Key, flags: u8) -> Advance {
        let mut known = self.table.advance(key, flags, self.now, &self.world);
        if known == Advance::Repaired {
            self.count(packet.hook, Outcome::Repaired);
            known = Advance::Keep;
        }
        let Some(flow) = self.table.half(key) else { return known };
        // What has no connection leaves a backend that no longer serves.
        if key.proto == Protocol::Udp
            && known == Advance::Keep
            && flow.direction == Direction::Original
            && !flow.is_mask()
            && !self.world.still_serves(key.is_v4(), flow.backend, flow.generation)
        {
            self.count(packet.hook, Outcome::Moved);
            known = Advance::Afresh;
        }
        if known != Advance::Keep {
            self.table.forget(key);
        }
        known
    }

    /// Rewrites a packet of a flow and sends it where it goes.
    fn send(
        &mut self,
        packet: &Packet<'_>,
        key: &Key,
        segment: &Segment,
        oracle: &mut dyn Oracle,
    ) -> Result<Expected, Objection> {
        let Some(flow) = self.table.half(key) else { return Objection::wrong("a flow is not in the table") };
        let mut rewriting = Rewriting::of(packet.bytes);
        let verdict = match flow.output {
            Output::Stack => {
                rewriting.translate(&packet.ip, segment, flow.source, flow.destination);
                Verdict::Pass
            }
            Output::Hairpin => {
                rewriting.translate(&packet.ip, segment, flow.source, flow.destination);
                rewriting.swap_macs();
                rewriting.shorten_life(&packet.ip);
                Verdict::SendOut
            }
            // The tables at random ask for none.
            Output::Dispatch | Output::Tunnel => return Objection::wrong("a flow of the model is dispatched"),
            Output::Forward => {
                if let Some(hop) = self.next_hop(packet, key, &flow, oracle) {
                    rewriting.translate(&packet.ip, segment, flow.source, flow.destination);
                    rewriting.set_macs(hop.mac, self.world.uplink_mac);
                    rewriting.shorten_life(&packet.ip);
                    Verdict::SendOut
                } else {
                    // The kernel does not route what bears its own address: the source is replaced where it leaves.
                    self.cut(key, &flow);
                    rewriting.translate(&packet.ip, segment, key.source, flow.destination);
                    Verdict::Pass
                }
            }
        };
        Ok(rewriting.into_expected(verdict))
    }

    /// The next hop of a flow, looked up where it is not known; `None` where the kernel has to route, or to tell the sender
    /// that the packet's life is over or that it is too long.
    fn next_hop(&mut self, packet: &Packet<'_>, key: &Key, flow: &Flow, oracle: &mut dyn Oracle) -> Option<Hop> {
        if packet.ip.life <= 1 {
            return None;
        }
        let generation = self.world.node.route_generation;
        let fits = |hop: &Hop| packet.ip.total() <= usize::from(hop.mtu);
        if let Some((_, hop)) = flow.hop.filter(|hop| hop.0 == generation) {
            return Some(hop).filter(fits);
        }
        let hop = self.world.route(flow.destination.0).unwrap_or_else(|| oracle.next_hop(key))?;
        if let Some(flow) = self.table.half_mut(key) {
            flow.hop = Some((generation, hop));
        }
        Some(hop).filter(fits)
    }

    /// A flow's next hop, if it is known already and the packet may go there.
    pub(super) fn knows_way(&self, flow: &Flow, ip: &Header) -> Option<Hop> {
        let generation = self.world.node.route_generation;
        let known = flow.hop.filter(|hop| hop.0 == generation && ip.life > 1).map(|hop| hop.1);
        known.filter(|hop| ip.total() <= usize::from(hop.mtu))
    }

    /// Enters the second step of a packet that the kernel routes, which replaces its source at the uplink's egress.
    fn cut(&mut self, key: &Key, flow: &Flow) {
        let step = Key { source: key.source, destination: flow.destination, proto: key.proto, stage: Stage::UplinkOut };
        let is_there = |it: &Flow| (it.source, it.destination) == (flow.source, flow.destination);
        if self.table.embryos.get(&step).is_some_and(is_there) {
            return;
        }
        // The hop may have been found just now, for a packet that is too long for it.
        let hop = self.table.half(key).and_then(|flow| flow.hop);
        let (output, direction) = (Output::Stack, Direction::Transit);
        let transit = Flow { hop, output, twin_output: output, direction, ..*flow };
        self.table.embryos.insert(step, transit);
    }
}
