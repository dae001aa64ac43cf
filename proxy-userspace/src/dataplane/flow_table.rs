//! How large the flow table is made, and what the agent takes out of it when it is nearly full. The kernel evicts what was
//! looked up least recently, which may be a connection that is idle; so what is over is taken out before.

use std::{
    fmt,
    str::FromStr,
    sync::{Mutex, PoisonError},
};

use aya::Pod;
use proxy_common::{
    addr::{Ipv4, Ipv6, Protocol},
    flow::{Flow, Tier},
    lifetime,
    tuple::Tuple,
};

use super::{error::Error, load::jiffies_per_second, table::Table};

/// Flows in the node's memory: bytes of an entry with its key and what the kernel adds, for both halves, in both families.
const BYTES_PER_FLOW: u64 = 2 * (entry::<Ipv4>() + entry::<Ipv6>());

/// What the kernel keeps beside key and value: `struct htab_elem` with its LRU node (kernel/bpf/hashtab.c), and a bucket.
const OVERHEAD: usize = 48 + 16;

const fn entry<A>() -> u64 {
    (size_of::<Tuple<A>>() + size_of::<Flow<A>>() + OVERHEAD) as u64
}

/// The share of the node's memory that flows get, unless told otherwise: one in that many bytes.
const SHARE: u64 = 200;

/// Flows that the table has room for at least, and at most.
const BOUNDS: (u64, u64) = (16_384, 4_194_304);

/// Confirmed flows for one that is not.
const CONFIRMED_PER_EMBRYO: u32 = 4;

/// How many flows of one family are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FlowTableSize {
    /// As many as half a percent of the node's memory holds.
    #[default]
    Auto,
    /// That many.
    Flows(u32),
}

/// Why text is no [`FlowTableSize`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a size of the flow table: `auto`, or a number of flows from {low} to {high}", low = BOUNDS.0, high = BOUNDS.1)]
pub struct SizeError(String);

impl FromStr for FlowTableSize {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        if text == "auto" {
            return Ok(Self::Auto);
        }
        let flows = text.parse().ok().filter(|flows| (BOUNDS.0..=BOUNDS.1).contains(&u64::from(*flows)));
        flows.map(Self::Flows).ok_or_else(|| SizeError(text.to_owned()))
    }
}

impl fmt::Display for FlowTableSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Flows(flows) => flows.fmt(f),
        }
    }
}

impl FlowTableSize {
    /// Entries of `EMBRYOS_*` and of `FLOWS_*` on a node with that many bytes of memory. A flow has two entries.
    pub(super) fn entries(self, memory: u64) -> [u32; 2] {
        let flows = match self {
            Self::Flows(flows) => flows,
            Self::Auto => (memory / SHARE / BYTES_PER_FLOW).clamp(BOUNDS.0, BOUNDS.1) as u32,
        };
        let entries = flows * 2;
        [(entries / CONFIRMED_PER_EMBRYO).max(2 * BOUNDS.0 as u32), entries]
    }
}

/// Bytes of memory that the node has.
pub(super) fn memory() -> u64 {
    let info = rustix::system::sysinfo();
    info.totalram * u64::from(info.mem_unit)
}

/// From which fill on flows that are over are taken out: three quarters.
const NEARLY_FULL: (usize, usize) = (3, 4);

/// Takes flows out that are over, if the table is nearly full; returns how many entries that were. A packet that comes at
/// this very instant, after all the silence, begins a flow that is lost if it comes between the second look and the removal:
/// its next packet begins it again.
pub(super) fn expire<A>(table: &Table<Tuple<A>, Flow<A>>) -> Result<u64, Error>
where
    Tuple<A>: Pod,
    Flow<A>: Pod,
{
    let (mut entries, mut over) = (0, Vec::new());
    table.visit(|key, flow| {
        entries += 1;
        if is_over(key.proto, &flow) {
            over.push(key);
        }
        true
    })?;
    if entries * NEARLY_FULL.1 < table.capacity() as usize * NEARLY_FULL.0 {
        return Ok(0);
    }
    let mut removed = 0;
    for key in over {
        // One that is not there any more needs nobody to take it out.
        if table.read(&key).is_ok_and(|flow| is_over(key.proto, &flow)) {
            table.remove(&key)?;
            removed += 1;
        }
    }
    Ok(removed)
}

/// Notes that entries of a map of the flow table, by [`Turnover::index`](proxy_common::flow::Turnover::index), were taken out and not
/// evicted. Two threads may at once.
pub(super) fn note_expired(expired: &Table<u32, u64>, index: u32, count: u64) -> Result<(), Error> {
    static NOTING: Mutex<()> = Mutex::new(());
    if count == 0 {
        return Ok(());
    }
    let _one_by_one = NOTING.lock().unwrap_or_else(PoisonError::into_inner);
    expired.put(&index, &(expired.read(&index)? + count))
}

fn is_over<A>(proto: Protocol, flow: &Flow<A>) -> bool {
    silence(flow.last_seen) > lifetime::seconds_to_be_over(proto, flow.state)
}

/// Seconds since a time in jiffies.
pub fn silence(last_seen: u32) -> u32 {
    lifetime::silence(jiffies(), last_seen) / jiffies_per_second()
}

/// The low 32 bits of the kernel's jiffies, which began five minutes before they overflowed (`INITIAL_JIFFIES` in
/// include/linux/jiffies.h) and follow the monotonic clock since.
pub fn jiffies() -> u32 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let frequency = jiffies_per_second();
    let (seconds, nanoseconds) = (now.tv_sec.cast_unsigned(), now.tv_nsec.cast_unsigned());
    let ticks = seconds * u64::from(frequency) + nanoseconds * u64::from(frequency) / 1_000_000_000;
    (ticks as u32).wrapping_sub(300 * frequency)
}

/// Whether a flow counts as a connection: neither closed nor silent for longer than its state allows.
pub fn goes_on(proto: Protocol, bits: u8, silence: u32) -> bool {
    silence <= lifetime::seconds(proto, bits) && (proto == Protocol::Udp || !lifetime::is_closing(bits))
}

/// The names of the maps that are made as large, with the tier they are.
pub(super) const MAPS: [(&str, Tier); 4] = [
    ("EMBRYOS_V4", Tier::Embryos),
    ("FLOWS_V4", Tier::Flows),
    ("EMBRYOS_V6", Tier::Embryos),
    ("FLOWS_V6", Tier::Flows),
];

#[cfg(test)]
mod tests {
    use proxy_common::{addr::Protocol, flow::state};

    use super::{BYTES_PER_FLOW, FlowTableSize, goes_on};

    #[test]
    fn a_connection_goes_on_until_it_is_closed_or_silent_for_too_long() {
        let established = state::CONFIRMED | state::REPLIED;
        let cases = [
            ("established and silent for hours", Protocol::Tcp, established, 80_000, true),
            ("half closed", Protocol::Tcp, established | state::FIN_REPLY, 0, true),
            ("closed", Protocol::Tcp, established | state::FIN_REPLY | state::FIN_ORIGINAL, 0, false),
            ("reset", Protocol::Tcp, established | state::RESET, 0, false),
            ("never answered", Protocol::Tcp, 0, 121, false),
            ("datagrams that were answered", Protocol::Udp, established, 119, true),
            ("datagrams that were not", Protocol::Udp, 0, 31, false),
            ("an association that is asked after", Protocol::Sctp, established, 200, true),
            ("an association that nobody asks after", Protocol::Sctp, established, 211, false),
        ];
        for (name, proto, bits, silence, expected) in cases {
            assert_eq!(goes_on(proto, bits, silence), expected, "{name}");
        }
    }

    #[test]
    fn the_table_follows_memory_within_bounds() {
        let size = |gigabytes: u64| FlowTableSize::Auto.entries(gigabytes << 30);
        assert_eq!(size(1), [32_768, 32_768], "the least");
        let [embryos, flows] = size(16);
        assert!(u64::from(flows) / 2 * BYTES_PER_FLOW <= (16 << 30) / 200, "half a percent");
        assert!(flows > 150_000 && embryos == flows / 4, "{embryos} and {flows}");
        assert_eq!(size(4_096), [2_097_152, 8_388_608], "the most");
        assert_eq!(FlowTableSize::Flows(131_072).entries(1 << 30), [65_536, 262_144], "as told");
    }

    #[test]
    fn a_size_is_auto_or_a_number_within_bounds() {
        assert_eq!("auto".parse(), Ok(FlowTableSize::Auto));
        assert_eq!("65536".parse(), Ok(FlowTableSize::Flows(65_536)));
        for text in ["", "16383", "4194305", "1M", "-1"] {
            let error = text.parse::<FlowTableSize>().unwrap_err().to_string();
            assert!(error.contains(&format!("`{text}`")) && error.contains("from 16384 to 4194304"), "{error}");
        }
    }
}
