//! How large the flow table is, and what is taken out of it when it is nearly full.

use anyhow::Result;
use aya::maps::{HashMap, Map, MapData};
use proxy_common::{
    addr::{Ipv4, Port, Protocol},
    flow::{Direction, Flow, NextHop, Output, Rewrite, state},
    node::newcomers,
    tuple::{Stage, Tuple},
};
use proxy_userspace::dataplane::{FlowTableSize, Observer};
use tests::testbed::Testbed;

use crate::fixture::Node;

const TABLES: [&str; 4] = ["FLOWS_V4", "FLOWS_V6", "EMBRYOS_V4", "EMBRYOS_V6"];

#[test]
fn a_flow_table_that_is_there_keeps_its_size() -> Result<()> {
    let mut node = Node::new()?;
    node.options.sizes.retain(|map, _| !TABLES.contains(&map.as_str()));
    node.options.flow_table = FlowTableSize::Flows(16_384);
    node.start(|_, _| Ok(()))?;
    let made = TABLES.map(|map| node.map(map));
    assert_eq!(node.capacity("FLOWS_V6")?, 32_768, "two entries for a flow");
    for size in [FlowTableSize::Flows(32_768), FlowTableSize::Auto] {
        node.options.flow_table = size;
        node.start(|_, _| Ok(()))?;
        for (map, made) in TABLES.iter().zip(&made) {
            assert_eq!(node.map(map)?, *made.as_ref().unwrap(), "{map} with {size}");
        }
    }
    Ok(())
}

type Flows = HashMap<MapData, Tuple<Ipv4>, Flow<Ipv4>>;

fn table(node: &Node, map: &str) -> Result<Flows> {
    Ok(Map::LruHashMap(MapData::from_pin(node.pin("maps").join(map))?).try_into()?)
}

fn key(number: u32, proto: Protocol) -> Tuple<Ipv4> {
    let [_, b, c, d] = number.to_be_bytes();
    let client = Ipv4 { octets: [10, b, c, d] };
    Tuple::new(client, Ipv4 { octets: [10, 96, 0, 1] }, Port::new(4_000), Port::new(80), proto, Stage::FromPod)
}

fn flow(state: u8, last_seen: u32) -> Flow<Ipv4> {
    Flow {
        rewrite: Rewrite::default(),
        next_hop: NextHop::default(),
        backend: 1,
        backend_generation: 1,
        service: 1,
        last_seen,
        output: Output::Stack,
        twin_output: Output::Stack,
        twin_stage: Stage::ToPod,
        direction: Direction::Original,
        state,
        eager: 0,
        packets: 0,
        bytes: 0,
    }
}

#[test]
fn what_is_over_leaves_a_table_that_is_nearly_full_and_nothing_else() -> Result<()> {
    const ENTRIES: u32 = 700;
    let mut node = Node::new()?;
    // An LRU map gives up entries before it is full, by how they are spread over CPUs.
    node.options.sizes.insert("FLOWS_V4".into(), 900);
    node.start(|_, _| Ok(()))?;
    let observer = Observer::open(&node.options.pin_path)?;
    let mut table = table(&node, "FLOWS_V4")?;
    let established = state::REPLIED | state::CONFIRMED;
    let closed = established | state::FIN_ORIGINAL | state::FIN_REPLY;
    let mut clock = Testbed::new()?;
    let (now, hz) = (clock.jiffies()?, clock.jiffies_per_second());
    let kinds = [
        ("idle for an hour", Protocol::Tcp, established, 3_600, true),
        ("closed a moment ago", Protocol::Tcp, closed, 0, true),
        ("closed", Protocol::Tcp, closed, 10, false),
        ("reset", Protocol::Tcp, established | state::RESET, 10, false),
        ("datagrams a minute ago", Protocol::Udp, established, 60, true),
        ("datagrams ten minutes ago", Protocol::Udp, established, 600, false),
        ("silent for two days", Protocol::Tcp, established, 172_800, false),
    ];
    let mut fill = |entries: std::ops::Range<u32>| -> Result<()> {
        for number in entries {
            let (_, proto, bits, silence, _) = kinds[number as usize % kinds.len()];
            table.insert(key(number, proto), flow(bits, now.wrapping_sub(silence * hz)), 0)?;
        }
        Ok(())
    };
    fill(0..ENTRIES / 2)?;
    assert_eq!(observer.expire()?, 0, "there is room");
    fill(ENTRIES / 2..ENTRIES)?;
    let removed = observer.expire()?;
    assert_eq!(removed, u64::from(ENTRIES) / 7 * 4);
    let table = self::table(&node, "FLOWS_V4")?;
    for number in 0..ENTRIES {
        let (name, proto, .., stays) = kinds[number as usize % kinds.len()];
        assert_eq!(table.get(&key(number, proto), 0).is_ok(), stays, "{name}");
    }
    assert_eq!(observer.expire()?, 0, "nothing else is over");
    Ok(())
}

/// Programs of both versions were at work, each over its own maps, because nobody took up what was interrupted before flows that were
/// held were let go.
#[test]
fn flows_of_the_maps_that_an_interrupted_takeover_left_are_kept() -> Result<()> {
    let (node, left) = (Node::new()?, Node::new()?);
    let now = Testbed::new()?.jiffies()?;
    let [then, before] = [1_000, 2_000].map(|jiffies| now.wrapping_sub(jiffies));
    // When each was heard of last, by our maps and by theirs.
    let flows = [(Some(then), None), (None, Some(then)), (Some(then), Some(before)), (Some(before), Some(then))];
    for (node, side) in [(&node, 0), (&left, 1)] {
        node.start(|_, _| Ok(()))?;
        let mut table = table(node, "FLOWS_V4")?;
        for (number, since) in (1..).zip(flows.map(|(ours, theirs)| [ours, theirs][side])) {
            since.map_or(Ok(()), |since| table.insert(key(number, Protocol::Udp), flow(state::REPLIED, since), 0))?;
        }
    }
    let (left, second) = (left.pin("maps"), node.pin("maps-second"));
    std::fs::rename(left, &second)?;
    node.start(|dataplane, _| {
        assert_eq!(dataplane.newcomers() & newcomers::HOLD, 0, "they are let go");
        Ok(())
    })?;
    let table = table(&node, "FLOWS_V4")?;
    for number in 1..=4 {
        assert_eq!(table.get(&key(number, Protocol::Udp), 0)?.last_seen, then, "flow {number}");
    }
    assert!(!second.exists());

    // Whatever has become of the others, the agent starts.
    let other = Node::new()?;
    other.start(|_, _| Ok(()))?;
    std::fs::rename(other.pin("maps"), &second)?;
    std::fs::remove_file(second.join("NODE"))?;
    node.start(|_, _| Ok(()))?;
    assert!(!second.exists());
    Ok(())
}
