//! What the programs should do to a packet, as plain Rust: the rules of a Service on a node, written from the documents and
//! not from the datapath, of which no code is used. In go a hook and a packet; out come the verdict, the packet's bytes, and
//! what was counted.
//!
//! Fields are read, changed and written; checksums are computed in full over what they cover. One that was wrong before stays
//! as wrong as it was. What the programs leave to chance (a backend, a source port) is asked of an [`Oracle`] afterwards, and
//! must be something they were allowed to choose; everything after it has to be consistent with it.

mod admission;
mod answer;
mod choice;
mod conversation;
mod echo;
mod fragment;
mod related;
mod table;
mod walk;
mod wire;
mod world;

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
};

use proxy_common::{
    addr::Protocol,
    filter::{Filter, Hashed as _},
    flow::Output,
    outcome::{Hook, Outcome},
    tuple::Stage,
};

pub use choice::Affinity;
pub use fragment::{First, Fragmented};
pub use table::{Flow, Key, Table};
pub use wire::Expected;
pub use world::{Hop, Target, World, address_v4, address_v6};

use wire::{Header, Rewriting};

/// The internet checksum of parts that are whole words long, but for the last.
pub fn checksum(parts: &[&[u8]]) -> u16 {
    !wire::sum(parts)
}

/// Where an end of a connection is.
pub type End = (IpAddr, u16);

/// What was chosen by chance, read from the maps after the packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chosen {
    /// The backend of the new flow.
    pub backend: u32,
    /// The source port its packets get.
    pub source_port: u16,
}

/// Tells what the programs have chosen.
pub trait Oracle {
    /// Of a flow that is in the table.
    fn chosen(&mut self, key: &Key) -> Option<Chosen>;
    /// The backend and the slot a client stays with.
    fn affinity(&mut self, service: u32, client: IpAddr) -> Option<(u32, u32)>;
    /// The next hop of a flow to an address the model knows no route to.
    fn next_hop(&mut self, key: &Key) -> Option<Hop>;
    /// How often something was counted.
    fn count(&mut self, hook: Hook, outcome: Outcome) -> u64;
}

/// Why the model has no answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Objection {
    /// The programs have done what they may not.
    Wrong(String),
    /// What they did by chance left no trace that would tell.
    Unknowable,
}

impl Objection {
    fn wrong<T>(what: impl Into<String>) -> Result<T, Self> {
        Err(Self::Wrong(what.into()))
    }
}

/// What becomes of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It goes on through the kernel.
    Pass,
    /// It is dropped.
    Drop,
    /// It leaves by a device, which is the one it is at: there is no other.
    SendOut,
}

/// Everything the programs know, and what they have counted.
pub struct Model {
    /// What the agent has told them.
    pub world: World,
    /// The clock, in jiffies.
    pub now: u64,
    /// The flows.
    pub table: Table,
    /// Whom clients stay with: backend, its generation, slot, time.
    pub affinities: HashMap<(u32, IpAddr), Affinity>,
    /// First fragments.
    pub fragmented: HashMap<Fragmented, First>,
    /// What was counted.
    pub counted: BTreeMap<(Hook, Outcome), u64>,
    masked: Box<Filter>,
    turns: HashMap<(bool, u32), u64>,
    hashed: HashMap<choice::Hashed, Vec<u32>>,
}

/// A packet on its way.
struct Packet<'a> {
    hook: Hook,
    stage: Stage,
    bytes: &'a [u8],
    ip: Header,
}

impl Packet<'_> {
    fn is_way_in(&self) -> bool {
        matches!(self.stage, Stage::FromPod | Stage::UplinkIn)
    }
}

/// The stage of a hook that sees packets.
pub fn stage(hook: Hook) -> Stage {
    match hook {
        Hook::PodIn => Stage::FromPod,
        Hook::PodOut => Stage::ToPod,
        Hook::UplinkOut => Stage::UplinkOut,
        _ => Stage::UplinkIn,
    }
}

impl Model {
    /// Before the first packet.
    pub fn new(world: World) -> Self {
        Self {
            world,
            now: 0,
            table: Table::default(),
            affinities: HashMap::new(),
            fragmented: HashMap::new(),
            counted: BTreeMap::new(),
            masked: Box::new(Filter::EMPTY),
            turns: HashMap::new(),
            hashed: HashMap::new(),
        }
    }

    fn count(&mut self, hook: Hook, outcome: Outcome) {
        *self.counted.entry((hook, outcome)).or_default() += 1;
    }

    fn pass(&mut self, hook: Hook, bytes: &[u8], outcome: Outcome) -> Expected {
        self.count(hook, outcome);
        Expected::untouched(bytes)
    }

    fn drop(&mut self, hook: Hook, outcome: Outcome) -> Expected {
        self.count(hook, outcome);
        Expected::dropped()
    }

    /// What becomes of a packet at a hook.
    pub fn run(&mut self, hook: Hook, bytes: &[u8], oracle: &mut dyn Oracle) -> Result<Expected, Objection> {
        let is_v4 = match bytes.get(12..14) {
            Some([0x08, 0x00]) => true,
            Some([0x86, 0xdd]) => false,
            Some([0x81, 0x00] | [0x88, 0xa8]) => {
                return match walk::tags(bytes) {
                    walk::Tagged::Foreign => Ok(self.pass(hook, bytes, Outcome::PassVlan)),
                    // Its tag may be hidden from a test run after it.
                    _ => Err(Objection::Unknowable),
                };
            }
            Some(_) => return Ok(Expected::untouched(bytes)),
            None => return Ok(self.pass(hook, bytes, Outcome::PassMalformed)),
        };
        let Some(ip) = Header::read(bytes, wire::ETHERNET, is_v4) else {
            return Ok(self.pass(hook, bytes, Outcome::PassMalformed));
        };
        self.internet(&Packet { hook, stage: stage(hook), bytes, ip }, oracle)
    }

    fn internet(&mut self, packet: &Packet<'_>, oracle: &mut dyn Oracle) -> Result<Expected, Objection> {
        let (hook, bytes, ip) = (packet.hook, packet.bytes, packet.ip);
        // No loopback address is let in, and nothing goes in circles: whatever else the packet is.
        if packet.is_way_in() && (is_loopback(ip.source) || is_loopback(ip.destination)) {
            return Ok(self.drop(hook, Outcome::DropMartian));
        }
        let may_be_ours = self.may_be_ours(packet);
        if packet.is_way_in() && (ip.is_icmp() || !may_be_ours) && self.world.is_unallocated(ip.destination) {
            return Ok(self.drop(hook, Outcome::DropUnallocated));
        }
        if ip.is_icmp() {
            return Ok(self.echo(packet).unwrap_or_else(|| self.relate(packet)));
        }
        if !may_be_ours {
            return Ok(Expected::untouched(bytes));
        }
        let payload = match ip.payload() {
            Ok(payload) if bytes.len() < ip.end(payload.length) => {
                return Ok(self.pass(hook, bytes, Outcome::PassMalformed));
            }
            Ok(payload) => payload,
            Err(Outcome::PassMalformed) => return Ok(self.pass(hook, bytes, Outcome::PassMalformed)),
            Err(_) => match walk::walk(bytes, &ip) {
                Ok(payload) if payload.protocol == walk::FRAGMENT => return self.fragment(packet, payload, oracle),
                Ok(payload) => payload,
                Err(reason) => return Ok(self.pass(hook, bytes, reason)),
            },
        };
        if payload.protocol == Protocol::Sctp as u8 {
            return Err(Objection::Unknowable);
        }
        let Some(proto) = ported(payload.protocol) else {
            return Ok(self.pass(hook, bytes, Outcome::PassProtocol));
        };
        let Some(segment) = wire::Segment::read(bytes, payload, proto) else {
            return Ok(self.pass(hook, bytes, Outcome::PassMalformed));
        };
        self.converse(packet, segment, oracle)
    }

    /// Whether a frame is addressed to a host that is not this one. Addresses of groups are everybody's.
    fn is_for_another_host(&self, packet: &Packet<'_>) -> bool {
        let mac = &packet.bytes[..6];
        packet.stage == Stage::UplinkIn && mac[0] & 1 == 0 && !self.world.macs.iter().any(|own| own == mac)
    }

    /// Sends what follows a known flow where the flow goes; what has no next hop is left to the kernel.
    fn send_on(
        &self,
        packet: &Packet<'_>,
        mut rewriting: Rewriting,
        output: Output,
        next_hop: Option<Hop>,
    ) -> Expected {
        match (output, next_hop) {
            (Output::Hairpin, _) => rewriting.swap_macs(),
            (Output::Forward, Some(hop)) => rewriting.set_macs(hop.mac, self.world.uplink_mac),
            _ => return rewriting.into_expected(Verdict::Pass),
        }
        rewriting.shorten_life(&packet.ip);
        rewriting.into_expected(Verdict::SendOut)
    }

    /// On the way in the destination is a frontend or a node's address; on the way out the source is a backend or somebody
    /// masqueraded, and at an uplink the destination may be a backend, too.
    fn may_be_ours(&self, packet: &Packet<'_>) -> bool {
        let (source, destination) = (bit(packet.ip.source), bit(packet.ip.destination));
        let world = &self.world;
        match packet.stage {
            Stage::FromPod | Stage::UplinkIn | Stage::Cross => world.inbound.may_have(destination),
            Stage::ToPod => world.outbound.may_have(source) || self.masked.may_have(source),
            Stage::UplinkOut => world.outbound.may_have(source) || world.outbound.may_have(destination),
        }
    }
}

/// Protocols whose ports are translated. SCTP's are, too, which the model does not know yet: it has no answer to one.
fn ported(number: u8) -> Option<Protocol> {
    match number {
        6 => Some(Protocol::Tcp),
        17 => Some(Protocol::Udp),
        _ => None,
    }
}

fn is_loopback(address: IpAddr) -> bool {
    address.is_loopback()
}

/// An address's place in the filters, which is part of the kernel contract.
fn bit(address: IpAddr) -> u16 {
    match address {
        IpAddr::V4(address) => address_v4(address).bit(),
        IpAddr::V6(address) => address_v6(address).bit(),
    }
}
