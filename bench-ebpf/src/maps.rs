//! The maps, of the sizes that those of the datapath have.

use aya_ebpf::{
    bindings::BPF_F_NO_PREALLOC,
    btf_maps::{Array, HashMap, LruHashMap, PerCpuArray, ProgramArray},
    macros::btf_map,
};
use proxy_common::addr::{Ipv4, Ipv6};

use crate::contract::{Backend, Count, Ends, Flow, Frontend, Node, Plan, Service, Tuple};

const SERVICES: usize = 131_072;
const BACKENDS: usize = 131_072;
const SLOTS_: usize = 1_048_576;
const FLOWS: usize = 262_144;
const CLIENTS_: usize = 524_288;
const NO_PREALLOC: usize = BPF_F_NO_PREALLOC as usize;

pub(crate) type Services<A> = HashMap<Frontend<A>, Service, SERVICES, NO_PREALLOC>;
pub(crate) type Backends<A> = Array<Backend<A>, BACKENDS>;
pub(crate) type Flows<A> = LruHashMap<Tuple<A>, Flow<A>, FLOWS>;

#[btf_map]
pub(crate) static NODE: Array<Node, 1> = Array::new();
#[btf_map]
pub(crate) static SERVICES_V4: Services<Ipv4> = HashMap::new();
#[btf_map]
pub(crate) static SERVICES_V6: Services<Ipv6> = HashMap::new();
#[btf_map]
pub(crate) static SLOTS: Array<u32, SLOTS_> = Array::new();
#[btf_map]
pub(crate) static BACKENDS_V4: Backends<Ipv4> = Array::new();
#[btf_map]
pub(crate) static BACKENDS_V6: Backends<Ipv6> = Array::new();
#[btf_map]
pub(crate) static FLOWS_V4: Flows<Ipv4> = LruHashMap::new();
#[btf_map]
pub(crate) static FLOWS_V6: Flows<Ipv6> = LruHashMap::new();
#[btf_map]
pub(crate) static COUNTERS: PerCpuArray<Count, SERVICES> = PerCpuArray::new();

/// Frames that have arrived.
#[btf_map]
pub(crate) static ARRIVED: PerCpuArray<u64, 1> = PerCpuArray::new();
/// How the packet is restored.
#[btf_map]
pub(crate) static PLAN: Array<Plan, 1> = Array::new();
/// The flows it is of, in the order they are taken.
#[btf_map]
pub(crate) static CLIENTS: Array<Ends, CLIENTS_> = Array::new();
/// The XDP program under test.
#[btf_map]
pub(crate) static XDP_TARGET: ProgramArray<1> = ProgramArray::new();
/// The classifier under test.
#[btf_map]
pub(crate) static TC_TARGET: ProgramArray<1> = ProgramArray::new();
