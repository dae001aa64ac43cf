//! The maps. All are BTF-typed, so that `bpftool map dump` prints field names; sizes are defaults that the agent may
//! change when it loads the object.

use aya_ebpf::{
    bindings::BPF_F_NO_PREALLOC,
    btf_maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, RingBuf},
    macros::btf_map,
};
use proxy_common::{
    addr::{Ipv4, Ipv6, Mac},
    backend::{Backend, BackendId},
    description::Description,
    event::{self, Event},
    filter::Filter,
    flow::{Draft, Flow, TIERS, Turnover},
    fragment::{Fragmented, Ports},
    names::{Agent, ServiceName},
    node::{Node, ServiceCidrs, Vlan},
    outcome,
    service::{Affinity, Client, Frontend, Service, Source},
    socket::{SocketPeer, SocketTarget},
    stats::Stats,
    tuple::Tuple,
};

const SERVICES: usize = 131_072;
const BACKENDS: usize = 131_072;
const SLOTS_: usize = 1_048_576;
const LOCAL_ADDRS: usize = 4_096;
const FLOWS: usize = 262_144;
const EMBRYOS: usize = 65_536;
const FRAGMENTS: usize = 16_384;
const SOCKETS: usize = 131_072;
const UPLINKS_: usize = 256;
const VLANS_: usize = 4_096;
const PEERS_: usize = 16_384;
const PEER_ADDRS: usize = 16_384;
const LOCAL_MACS_: usize = 16_384;
const AFFINITY: usize = 131_072;
const SOURCES: usize = 65_536;
const FOREIGN: usize = 262_144;

/// Elements of a hash table that are written anew are never reused under a reader's feet: without preallocation the
/// kernel frees the old one after a grace period.
const NO_PREALLOC: usize = BPF_F_NO_PREALLOC as usize;

/// A table of frontends.
pub(crate) type Services<A> = HashMap<Frontend<A>, Service, SERVICES, NO_PREALLOC>;
/// A table of backends by id.
pub(crate) type Backends<A> = Array<Backend<A>, BACKENDS>;
/// A table of the node's addresses.
pub(crate) type LocalAddrs<A> = HashMap<A, u32, LOCAL_ADDRS, NO_PREALLOC>;
/// A table of the other nodes' addresses.
pub(crate) type PeerAddrs<A> = HashMap<A, u32, PEER_ADDRS, NO_PREALLOC>;
/// A table of confirmed flows.
pub(crate) type Flows<A> = LruHashMap<Tuple<A>, Flow<A>, FLOWS>;
/// A table of flows not yet confirmed.
pub(crate) type Embryos<A> = LruHashMap<Tuple<A>, Flow<A>, EMBRYOS>;
/// Room for a pair in the making; and, in the second one, for the key of one that is made for a flow already drafted.
pub(crate) type Drafts<A> = PerCpuArray<Draft<A>, 2>;
/// A table of fragmented packets and their ports.
pub(crate) type Fragments<A> = LruHashMap<Fragmented<A>, Ports, FRAGMENTS>;
/// A table of translated sockets.
pub(crate) type Sockets<A> = LruHashMap<SocketPeer<A>, SocketTarget<A>, SOCKETS>;
/// A table of tuples of connections that another proxy of this node translates; the stage is
/// [`proxy_common::tuple::Stage::FromPod`]. The value is one of [`proxy_common::node::foreign`].
pub(crate) type Foreign<A> = HashMap<Tuple<A>, u32, FOREIGN, NO_PREALLOC>;
/// A table of prefixes from which Services may be used.
pub(crate) type Sources<A> = LpmTrie<Source<A>, u32, SOURCES, NO_PREALLOC>;
/// A table of clients and the backends they stay with.
pub(crate) type Affinities<A> = LruHashMap<Client<A>, Affinity, AFFINITY>;
/// Counts by service index.
pub(crate) type ServiceStats = Array<Stats, SERVICES>;
/// Counts by backend id.
pub(crate) type BackendStats = Array<Stats, BACKENDS>;
/// Active flows by backend id. The agent counts anew now and then, because flows that end in silence are not seen.
pub(crate) type Active = Array<u32, BACKENDS>;
/// What Service ports are called, by index.
pub(crate) type Names = HashMap<u32, ServiceName, SERVICES, NO_PREALLOC>;
/// How often a Service port was picked from in turns, by its index. Of all CPUs together: a large node would have as many
/// copies of it as it has CPUs.
pub(crate) type Turns = Array<u64, SERVICES>;

#[btf_map]
pub(crate) static SERVICES_V4: Services<Ipv4> = HashMap::new();
#[btf_map]
pub(crate) static SERVICES_V6: Services<Ipv6> = HashMap::new();
#[btf_map]
pub(crate) static SLOTS: Array<BackendId, SLOTS_> = Array::new();
#[btf_map]
pub(crate) static BACKENDS_V4: Backends<Ipv4> = Array::new();
#[btf_map]
pub(crate) static BACKENDS_V6: Backends<Ipv6> = Array::new();
#[btf_map]
pub(crate) static LOCAL_ADDRS_V4: LocalAddrs<Ipv4> = HashMap::new();
#[btf_map]
pub(crate) static LOCAL_ADDRS_V6: LocalAddrs<Ipv6> = HashMap::new();
#[btf_map]
pub(crate) static FLOWS_V4: Flows<Ipv4> = LruHashMap::new();
#[btf_map]
pub(crate) static FLOWS_V6: Flows<Ipv6> = LruHashMap::new();
#[btf_map]
pub(crate) static EMBRYOS_V4: Embryos<Ipv4> = LruHashMap::new();
#[btf_map]
pub(crate) static EMBRYOS_V6: Embryos<Ipv6> = LruHashMap::new();
#[btf_map]
pub(crate) static DRAFTS_V4: Drafts<Ipv4> = PerCpuArray::new();
#[btf_map]
pub(crate) static DRAFTS_V6: Drafts<Ipv6> = PerCpuArray::new();
#[btf_map]
pub(crate) static FRAGMENTS_V4: Fragments<Ipv4> = LruHashMap::new();
#[btf_map]
pub(crate) static FRAGMENTS_V6: Fragments<Ipv6> = LruHashMap::new();
#[btf_map]
pub(crate) static SOCKETS_V4: Sockets<Ipv4> = LruHashMap::new();
#[btf_map]
pub(crate) static SOCKETS_V6: Sockets<Ipv6> = LruHashMap::new();
#[btf_map]
pub(crate) static FOREIGN_V4: Foreign<Ipv4> = HashMap::new();
#[btf_map]
pub(crate) static FOREIGN_V6: Foreign<Ipv6> = HashMap::new();
/// Could a packet to this address be ours?
#[btf_map]
pub(crate) static INBOUND: Array<Filter, 1> = Array::new();
/// Could a packet from this address, on its way out, be ours?
#[btf_map]
pub(crate) static OUTBOUND: Array<Filter, 1> = Array::new();
/// Could a packet from this address to a pod have to bear the node's? Written by the programs.
#[btf_map]
pub(crate) static MASKED: Array<Filter, 1> = Array::new();
#[btf_map]
pub(crate) static NODE: Array<Node, 1> = Array::new();
/// Devices, by index, that take frames from XDP. The value is 1.
#[btf_map]
pub(crate) static UPLINKS: HashMap<u32, u32, UPLINKS_, NO_PREALLOC> = HashMap::new();
/// The devices of VLANs, by what tags say.
#[btf_map]
pub(crate) static VLANS: HashMap<Vlan, u32, VLANS_, NO_PREALLOC> = HashMap::new();
/// Addresses of other nodes on links of this one. The value is 1.
#[btf_map]
pub(crate) static PEERS: HashMap<Mac, u32, PEERS_, NO_PREALLOC> = HashMap::new();
/// Addresses of other nodes. The value is 1.
#[btf_map]
pub(crate) static PEER_ADDRS_V4: PeerAddrs<Ipv4> = HashMap::new();
#[btf_map]
pub(crate) static PEER_ADDRS_V6: PeerAddrs<Ipv6> = HashMap::new();
/// MACs of the node's devices. The value is 1.
#[btf_map]
pub(crate) static LOCAL_MACS: HashMap<Mac, u32, LOCAL_MACS_, NO_PREALLOC> = HashMap::new();
#[btf_map]
pub(crate) static COUNTERS: PerCpuArray<u64, { outcome::COUNTERS as usize }> = PerCpuArray::new();
/// What whoever watches is told.
#[btf_map]
pub(crate) static EVENTS: RingBuf<Event, { event::ROOM }> = RingBuf::new();
/// By the constants of [`event::watch`].
#[btf_map]
pub(crate) static WATCH: Array<u32, { event::watch::ENTRIES }> = Array::new();
/// By [`Turnover::index`].
#[btf_map]
pub(crate) static TURNOVER: PerCpuArray<Turnover, { TIERS as usize }> = PerCpuArray::new();
/// Entries of the flow table that the agent took out, in the same order. Written by the agent alone.
#[btf_map]
pub(crate) static EXPIRED: Array<u64, { TIERS as usize }> = Array::new();
#[btf_map]
pub(crate) static SERVICE_CIDRS: Array<ServiceCidrs, 1> = Array::new();
#[btf_map]
pub(crate) static SOURCES_V4: Sources<Ipv4> = LpmTrie::new();
#[btf_map]
pub(crate) static SOURCES_V6: Sources<Ipv6> = LpmTrie::new();
#[btf_map]
pub(crate) static AFFINITY_V4: Affinities<Ipv4> = LruHashMap::new();
#[btf_map]
pub(crate) static AFFINITY_V6: Affinities<Ipv6> = LruHashMap::new();
#[btf_map]
pub(crate) static SERVICE_STATS_4: ServiceStats = Array::new();
#[btf_map]
pub(crate) static SERVICE_STATS_6: ServiceStats = Array::new();
#[btf_map]
pub(crate) static BACKEND_STATS_4: BackendStats = Array::new();
#[btf_map]
pub(crate) static BACKEND_STATS_6: BackendStats = Array::new();
#[btf_map]
pub(crate) static ACTIVE_V4: Active = Array::new();
#[btf_map]
pub(crate) static ACTIVE_V6: Active = Array::new();
#[btf_map]
pub(crate) static TURNS_V4: Turns = Array::new();
#[btf_map]
pub(crate) static TURNS_V6: Turns = Array::new();
/// Written by the agent for people, as what follows.
#[btf_map]
pub(crate) static NAMES_V4: Names = HashMap::new();
#[btf_map]
pub(crate) static NAMES_V6: Names = HashMap::new();
#[btf_map]
pub(crate) static AGENT: Array<Agent, 1> = Array::new();
#[btf_map]
pub(crate) static DESCRIPTION: Array<Description, 1> = Array::new();
