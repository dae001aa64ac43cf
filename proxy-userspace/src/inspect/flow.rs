//! Flows: who is translated to whom, for how long, and what is known of the connection.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use proxy_common::{
    addr::{Port, Protocol},
    backend::Backend,
    flow::{self, Direction, Output, Tier, state},
    tuple::{Stage, Tuple},
};
use serde::Serialize;

use super::{InspectError, Names, PortName, State};
use crate::dataplane::{FamilyReader, goes_on, silence};

/// An entry of the flow table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Flow {
    /// The Service port.
    #[serde(flatten)]
    pub service: PortName,
    /// TCP, UDP or SCTP.
    pub protocol: String,
    /// Source of the packets.
    pub client: SocketAddr,
    /// Their destination.
    pub destination: SocketAddr,
    /// Source after the rewrite.
    pub new_source: SocketAddr,
    /// Destination after the rewrite.
    pub new_destination: SocketAddr,
    /// `from_pod`, `to_pod`, `uplink_in`, `uplink_out` or `cross`: the hook that sees them.
    pub stage: &'static str,
    /// `original`, `reply`, or `transit` for the second step of a flow.
    pub direction: &'static str,
    /// Where they go: `stack`, `forward`, `hairpin`, `dispatch`, `tunnel`.
    pub output: &'static str,
    /// The backend's number, and whether it still serves.
    pub backend: u32,
    /// Of the backend.
    pub backend_state: State,
    /// What is known of the connection: `opening`, `established`, `closing`, `reset`.
    pub phase: &'static str,
    /// The connection is neither over nor silent for longer than its phase allows.
    pub goes_on: bool,
    /// Seconds since its last packet, to a second.
    pub idle_seconds: u32,
}

/// Which flows are meant. What is not said fits all.
#[derive(Clone, Debug, Default)]
pub struct FlowFilter {
    /// Namespace and name, or the name alone.
    pub service: Option<String>,
    /// Source or destination, before or after the rewrite.
    pub address: Option<IpNet>,
    /// One of their ports.
    pub port: Option<u16>,
    /// Its protocol.
    pub protocol: Option<Protocol>,
    /// Only those whose backend does not serve any more.
    pub stale: bool,
    /// Replies and second steps, too.
    pub halves: bool,
}

impl FlowFilter {
    /// Whether every flow fits.
    pub fn is_all(&self) -> bool {
        let Self { service, address, port, protocol, stale, halves: _ } = self;
        service.is_none() && address.is_none() && port.is_none() && protocol.is_none() && !stale
    }

    fn fits(&self, flow: &Flow) -> bool {
        let Self { service, address, port, protocol, stale, halves } = self;
        let ends = [flow.client, flow.destination, flow.new_source, flow.new_destination];
        (*halves || flow.direction == "original")
            && service.as_ref().is_none_or(|name| flow.service.is_called(name))
            && address.is_none_or(|net| ends.iter().any(|end| net.contains(&end.ip())))
            && port.is_none_or(|port| ends.iter().any(|end| end.port() == port))
            && protocol.is_none_or(|protocol| flow.protocol == protocol.to_string())
            && (!stale || flow.backend_state != State::Serving)
    }
}

impl PortName {
    /// Whether somebody means it by `name`, `namespace/name` or `namespace/name:port`.
    pub fn is_called(&self, text: &str) -> bool {
        let Self { namespace, name, port } = self;
        *text == **name || text == format!("{namespace}/{name}") || text == format!("{namespace}/{name}:{port}")
    }
}

/// The flows of one family.
pub(super) fn all<R: FamilyReader>(maps: &R, filter: &FlowFilter) -> Result<Vec<Flow>, InspectError> {
    let mut flows = Vec::new();
    visit(maps, filter, |_, _, flow| flows.push(flow))?;
    Ok(flows)
}

/// Tiers and keys.
type Keys<A> = Vec<(Tier, Tuple<A>)>;

/// Their tiers and keys.
pub(super) fn chosen<R: FamilyReader>(maps: &R, filter: &FlowFilter) -> Result<Keys<R::Addr>, InspectError> {
    let mut keys = Vec::new();
    visit(maps, filter, |tier, key, _| keys.push((tier, *key)))?;
    Ok(keys)
}

/// The entries that a packet with these ends meets, and those that belong to them.
pub(super) fn connection<R: FamilyReader>(maps: &R, ends: &Tuple<R::Addr>) -> Result<Vec<Flow>, InspectError> {
    let found = maps.connection(ends)?;
    if found.is_empty() {
        return Ok(Vec::new());
    }
    let names = Names::read(maps)?;
    let backends = maps.all_backends()?;
    Ok(found.iter().map(|(key, flow)| show(&names, serving(&backends, flow), key, flow)).collect())
}

/// Whether the backend of a flow serves: the one that was chosen, not one that has its number now.
fn serving<A>(backends: &[Backend<A>], flow: &flow::Flow<A>) -> State {
    let backend = backends.get(flow.backend as usize);
    let same = backend.filter(|backend| backend.generation == flow.backend_generation);
    same.map_or(State::Gone, |backend| backend.state.into())
}

fn visit<R: FamilyReader>(
    maps: &R,
    filter: &FlowFilter,
    mut each: impl FnMut(Tier, &Tuple<R::Addr>, Flow),
) -> Result<(), InspectError> {
    let names = Names::read(maps)?;
    let backends = maps.all_backends()?;
    Ok(maps.visit_flows(&mut |tier, key, flow| {
        let shown = show(&names, serving(&backends, flow), key, flow);
        if filter.fits(&shown) {
            each(tier, key, shown);
        }
    })?)
}

fn show<A: Copy + Into<IpAddr>>(names: &Names, backend_state: State, key: &Tuple<A>, flow: &flow::Flow<A>) -> Flow {
    // Between the families, addresses of IPv4 stand mapped in the table.
    let end = |address: A, port: Port| SocketAddr::new(address.into().to_canonical(), port.number());
    let idle_seconds = silence(flow.last_seen);
    Flow {
        service: names.of(flow.service),
        protocol: key.proto.to_string(),
        client: end(key.saddr, key.sport),
        destination: end(key.daddr, key.dport),
        new_source: end(flow.rewrite.saddr, flow.rewrite.sport),
        new_destination: end(flow.rewrite.daddr, flow.rewrite.dport),
        stage: stage(key.stage),
        direction: match flow.direction {
            Direction::Original => "original",
            Direction::Reply => "reply",
            Direction::Transit => "transit",
        },
        output: output(flow.output),
        backend: flow.backend,
        backend_state,
        phase: phase(flow.state),
        goes_on: goes_on(key.proto, flow.state, idle_seconds),
        idle_seconds,
    }
}

/// A stage's name.
pub(crate) fn stage(stage: Stage) -> &'static str {
    match stage {
        Stage::FromPod => "from_pod",
        Stage::ToPod => "to_pod",
        Stage::UplinkIn => "uplink_in",
        Stage::UplinkOut => "uplink_out",
        Stage::Cross => "cross",
    }
}

/// An output's name.
pub(crate) fn output(output: Output) -> &'static str {
    match output {
        Output::Stack => "stack",
        Output::Forward => "forward",
        Output::Hairpin => "hairpin",
        Output::Dispatch => "dispatch",
        Output::Tunnel => "tunnel",
    }
}

/// What state bits say of a connection.
pub(crate) fn phase(bits: u8) -> &'static str {
    if bits & state::RESET != 0 {
        "reset"
    } else if bits & (state::FIN_ORIGINAL | state::FIN_REPLY) != 0 {
        "closing"
    } else if bits & state::CONFIRMED != 0 {
        "established"
    } else {
        "opening"
    }
}
