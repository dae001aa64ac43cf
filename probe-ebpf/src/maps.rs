//! The tables, and what is measured with them.

use aya_ebpf::{
    bindings::BPF_F_MMAPABLE,
    btf_maps::{Array, LruHashMap, PerCpuArray},
    macros::btf_map,
};
use flow_table::{Bucket, Table, bucket::Seed, word::Shared};

use crate::contract::{V4, V6, count};

/// Buckets: an eighth of the LRU maps' entries, times four.
const BUCKETS: usize = 32_768;
const ENTRIES: usize = 131_072;
const LOCKS_: usize = 4_096;
const KEYS_: usize = 65_536;
/// So that buckets begin where cache lines do: the kernel puts values that can be mapped at the beginning of a page.
const AT_A_PAGE: usize = BPF_F_MMAPABLE as usize;

/// Random numbers, the test's.
#[unsafe(no_mangle)]
pub(crate) static SEED: Seed = Seed::from_random(0);
/// One less than there are buckets.
#[unsafe(no_mangle)]
pub(crate) static MASK: aya_ebpf::Global<u32> = aya_ebpf::Global::new(BUCKETS as u32 - 1);

#[btf_map]
pub(crate) static TABLE_V4: Array<Bucket<Shared, { V4.0 }, { V4.1 }>, BUCKETS, AT_A_PAGE> = Array::new();
#[btf_map]
pub(crate) static TABLE_V6: Array<Bucket<Shared, { V6.0 }, { V6.1 }>, BUCKETS, AT_A_PAGE> = Array::new();
#[btf_map]
pub(crate) static LOCKS: Array<u64, LOCKS_> = Array::new();
/// A key of the flow table and its value, as they are today.
#[btf_map]
pub(crate) static LRU_V4: LruHashMap<[u64; 2], [u64; 8], ENTRIES> = LruHashMap::new();
#[btf_map]
pub(crate) static LRU_V6: LruHashMap<[u64; 5], [u64; 11], ENTRIES> = LruHashMap::new();
/// The keys to be looked up, in this order.
#[btf_map]
pub(crate) static KEYS: Array<[u64; 5], KEYS_> = Array::new();
/// Which comes next, and how many there are.
#[btf_map]
pub(crate) static NEXT: Array<[u32; 2], 1> = Array::new();
/// How many have claimed.
#[btf_map]
pub(crate) static TURN: Array<u64, 1> = Array::new();
/// So that what was read is of use.
#[btf_map]
pub(crate) static SINK: PerCpuArray<u64, 1> = PerCpuArray::new();
#[btf_map]
pub(crate) static COUNTS: PerCpuArray<u64, { count::ALL }> = PerCpuArray::new();

/// The table of IPv4.
pub(crate) struct TableV4;
/// The table of IPv6.
pub(crate) struct TableV6;

macro_rules! table {
    ($table:ident $map:ident $family:ident) => {
        impl Table<{ $family.0 }, { $family.1 }> for $table {
            type Word = Shared;
            const TRIES: u32 = 64;

            #[inline(always)]
            fn bucket(&self, index: u32) -> Option<&Bucket<Shared, { $family.0 }, { $family.1 }>> {
                $map.get(index)
            }

            #[inline(always)]
            fn lock(&self, first: u32) -> Option<&Shared> {
                // SAFETY: a lock is a word, and shared as such.
                LOCKS.get_ptr_mut(first & (LOCKS_ as u32 - 1)).map(|word| unsafe { &*word.cast::<Shared>() })
            }
        }
    };
}

table!(TableV4 TABLE_V4 V4);
table!(TableV6 TABLE_V6 V6);

const _: () =
    assert!(size_of::<Bucket<Shared, { V4.0 }, { V4.1 }>>() == 5 * 64, "a line for the heads, and one for each entry");
const _: () =
    assert!(size_of::<Bucket<Shared, { V6.0 }, { V6.1 }>>() == 9 * 64, "a line for the heads, and two for each entry");

/// Adds to a count of this CPU's own.
#[inline(always)]
pub(crate) fn add(index: u32, amount: u64) {
    if let Some(count) = COUNTS.get_ptr_mut(index) {
        // SAFETY: the pointer is to this CPU's own value, which stays as long as the map.
        let count = unsafe { &mut *count };
        *count = count.wrapping_add(amount);
    }
}

/// Keeps a number from being taken for useless.
#[inline(always)]
pub(crate) fn sink(number: u64) {
    if let Some(place) = SINK.get_ptr_mut(0) {
        // SAFETY: as in `add`.
        unsafe { *place = number };
    }
}
