//! What restores packets for the bench: every run sees a whole packet of the flow whose turn it is.

use std::collections::BTreeSet;

use anyhow::Result;
use bench_ebpf::contract::Ends;
use proxy_common::addr::Port;
use tests::{
    bench::{
        course::{STRANGERS, ends},
        restored::Traffic,
        yardstick::{NextHop, Place, Role, Yardstick},
    },
    frame::{Family, Flags, Frame, Host, Transport},
    testbed::{CLIENT, NODE, OTHER_NODE_MAC, PORT, REMOTE, SERVICE, TARGET, Testbed, UPLINK_MAC},
};

const FLOWS: u32 = 32_768;

fn frame(family: Family, client: &Host, port: u16) -> Frame {
    let destination = (SERVICE.address(family), PORT);
    let frame = Frame::new((client.address(family), port), destination, Transport::Tcp(Flags::ACK));
    Frame { payload: vec![7; 80], ..frame }
}

fn everywhere(test: impl Fn(&mut Yardstick, Place, Family, u32) -> Result<()> + Send + Sync) -> Result<()> {
    Testbed::new()?.inside(|bed| {
        let mut yardstick = Yardstick::new(NODE, FLOWS)?;
        for (place, family) in Place::BOTH.into_iter().flat_map(|place| Family::BOTH.map(|family| (place, family))) {
            test(&mut yardstick, place, family, bed.uplink())?;
        }
        Ok(())
    })
}

#[test]
fn every_flow_has_its_turn_and_then_the_first_again() -> Result<()> {
    everywhere(|yardstick, place, family, uplink| {
        let frames: Vec<Frame> = (0..3).map(|number| frame(family, &CLIENT, 50_000 + number)).collect();
        let null = yardstick.descriptor(Role::Null, place)?;
        yardstick.call(place, &null)?;
        let traffic = yardstick.traffic(&frames[0], &frames.iter().map(ends).collect::<Vec<Ends>>())?;
        for (count, expected) in [(1, &frames[0]), (2, &frames[1]), (3, &frames[2]), (4, &frames[0]), (8, &frames[1])] {
            let mut whole = frames[0].bytes();
            // Addresses and ports alone: the checksum stays that of the first, which no program looks at.
            let start = if family == Family::V4 { 26..38 } else { 22..58 };
            whole[start.clone()].copy_from_slice(&expected.bytes()[start]);
            let runs = yardstick.repeat(place, &traffic, uplink, count)?;
            assert_eq!(runs.last.bytes, whole, "{place:?} {family:?} {count}");
        }
        Ok(())
    })
}

#[test]
fn a_balancer_sees_a_restored_packet_every_time() -> Result<()> {
    everywhere(|yardstick, place, family, uplink| {
        let next_hop = NextHop { dmac: OTHER_NODE_MAC, smac: UPLINK_MAC };
        let backend = yardstick.add_backend(REMOTE.address(family), TARGET, next_hop)?;
        let index = yardstick.add_service((SERVICE.address(family), PORT), 6, &[backend], 1)?;
        let floor = yardstick.descriptor(Role::Floor, place)?;
        yardstick.call(place, &floor)?;
        // Flows of one place are known at the other, and counted where they began.
        let frame = frame(family, &CLIENT, 50_000 + place as u16);
        let traffic = yardstick.traffic(&frame, &[ends(&frame)])?;
        let runs = yardstick.repeat(place, &traffic, uplink, 100)?;
        assert_eq!(Frame::read(&runs.last.bytes).hop_limit, 63, "once and not a hundred times");
        assert_eq!(yardstick.counted(index)?.packets, 100, "{place:?} {family:?}");
        Ok(())
    })
}

/// Whether the words of an IPv4 header add up (RFC 1071).
fn is_whole(header: &[u8]) -> bool {
    let sum: u32 = header.chunks(2).map(|word| u32::from(word[0]) << 8 | u32::from(word[1])).sum();
    (sum & 0xffff) + (sum >> 16) == 0xffff
}

#[test]
fn new_flows_are_never_seen_twice() -> Result<()> {
    everywhere(|yardstick, place, family, uplink| {
        let null = yardstick.descriptor(Role::Null, place)?;
        yardstick.call(place, &null)?;
        let mut first = ends(&frame(family, &STRANGERS, 0));
        first.sport = Port::new(0xc000);
        let traffic = yardstick.traffic(&frame(family, &STRANGERS, 1), &[first])?;
        let traffic = Traffic { is_new: true, ..traffic };
        let (source, port) = if family == Family::V4 { (26..30, 34..36) } else { (22..38, 54..56) };
        let (mut flows, mut sources) = (BTreeSet::new(), BTreeSet::new());
        for _ in 0..40 {
            // In all so many that ports do not suffice.
            let last = yardstick.repeat(place, &traffic, uplink, 1_000)?.last.bytes;
            assert!(flows.insert((last[source.clone()].to_vec(), last[port.clone()].to_vec())), "a flow came again");
            sources.insert(last[source.clone()].to_vec());
            assert!(family == Family::V6 || is_whole(&last[14..34]), "the kernel would not take {last:02x?}");
        }
        assert!(sources.len() >= 3, "{place:?} {family:?}: 40,000 flows of {} addresses", sources.len());
        Ok(())
    })
}
