//! The maps. All are BTF-typed, so that `bpftool map dump` prints field names; sizes are defaults that the agent may
//! change when it loads the object.

use aya_ebpf::{
    bindings::BPF_F_NO_PREALLOC,
    btf_maps::{Array, HashMap, LruHashMap, PerCpuArray},
    macros::btf_map,
};
use proxy_common::{
    addr::{Ipv4, Ipv6},
    backend::{Backend, BackendId},
    filter::Filter,
    flow::{Draft, Flow},
    node::Node,
    outcome,
    service::{Frontend, Service},
    socket::{SocketPeer, SocketTarget},
    tuple::Tuple,
};

const SERVICES: usize = 65_536;
const BACKENDS: usize = 131_072;
const SLOTS_: usize = 1_048_576;
const LOCAL_ADDRS: usize = 4_096;
const FLOWS: usize = 262_144;
const EMBRYOS: usize = 65_536;
const SOCKETS: usize = 131_072;
const UPLINKS_: usize = 256;

/// Elements of a hash table that are written anew are never reused under a reader's feet: without preallocation the
/// kernel frees the old one after a grace period.
const NO_PREALLOC: usize = BPF_F_NO_PREALLOC as usize;

/// A table of frontends.
pub(crate) type Services<A> = HashMap<Frontend<A>, Service, SERVICES, NO_PREALLOC>;
/// A table of backends by id.
pub(crate) type Backends<A> = Array<Backend<A>, BACKENDS>;
/// A table of the node's addresses.
pub(crate) type LocalAddrs<A> = HashMap<A, u32, LOCAL_ADDRS, NO_PREALLOC>;
/// A table of confirmed flows.
pub(crate) type Flows<A> = LruHashMap<Tuple<A>, Flow<A>, FLOWS>;
/// A table of flows not yet confirmed.
pub(crate) type Embryos<A> = LruHashMap<Tuple<A>, Flow<A>, EMBRYOS>;
/// Room for a pair in the making.
pub(crate) type Drafts<A> = PerCpuArray<Draft<A>, 1>;
/// A table of translated sockets.
pub(crate) type Sockets<A> = LruHashMap<SocketPeer<A>, SocketTarget<A>, SOCKETS>;

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
pub(crate) static SOCKETS_V4: Sockets<Ipv4> = LruHashMap::new();
#[btf_map]
pub(crate) static SOCKETS_V6: Sockets<Ipv6> = LruHashMap::new();
/// Could a packet to this address be ours?
#[btf_map]
pub(crate) static INBOUND: Array<Filter, 1> = Array::new();
/// Could a packet from this address, on its way out, be ours?
#[btf_map]
pub(crate) static OUTBOUND: Array<Filter, 1> = Array::new();
#[btf_map]
pub(crate) static NODE: Array<Node, 1> = Array::new();
/// Devices, by index, that take frames from XDP. The value is 1.
#[btf_map]
pub(crate) static UPLINKS: HashMap<u32, u32, UPLINKS_, NO_PREALLOC> = HashMap::new();
#[btf_map]
pub(crate) static COUNTERS: PerCpuArray<u64, { outcome::COUNTERS as usize }> = PerCpuArray::new();
