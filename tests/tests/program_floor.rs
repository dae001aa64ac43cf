//! The floor, which the datapath is measured against, is honest: it translates new and known flows and their replies, and
//! passes on what is not its own.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result};
use tests::{
    bench::yardstick::{NextHop, Place, Role, Yardstick},
    frame::{Family, Flags, Frame, MACS, Transport},
    testbed::{
        CLIENT, NODE, OTHER_NODE_MAC, OTHER_SERVICE, PORT, REMOTE, Ran, SERVICE, TARGET, Testbed, UPLINK_MAC, action,
    },
};

const TRANSPORTS: [Transport; 3] = [Transport::Tcp(Flags::SYN), Transport::Udp, Transport::UdpUnchecked];
const CLIENT_PORT: u16 = 40_000;
const FLOWS: u32 = 32_768;

/// What differs between the ways through the floor.
#[derive(Clone, Copy, Debug)]
struct Way {
    place: Place,
    family: Family,
    transport: Transport,
    /// The Service's port: one for each way, so that all can share one floor.
    port: u16,
    /// The backend's port.
    target: u16,
    /// Where the Service is counted.
    index: u32,
}

impl Way {
    fn all(floor: &mut Yardstick) -> Result<Vec<Self>> {
        let mut ways = Vec::new();
        for (place, family) in Place::BOTH.into_iter().flat_map(|place| Family::BOTH.map(|family| (place, family))) {
            let next_hop = NextHop { dmac: OTHER_NODE_MAC, smac: UPLINK_MAC };
            let target = TARGET + ways.len() as u16;
            let backend = floor.add_backend(REMOTE.address(family), target, next_hop)?;
            for transport in TRANSPORTS {
                // Without a checksum there is no UDP over IPv6.
                if (family, transport) != (Family::V6, Transport::UdpUnchecked) {
                    let port = PORT + 2 * ways.len() as u16;
                    let proto = if matches!(transport, Transport::Tcp(_)) { 6 } else { 17 };
                    let index = floor.add_service((SERVICE.address(family), port), proto, &[backend], 7)?;
                    ways.push(Self { place, family, transport, port, target, index });
                }
            }
        }
        Ok(ways)
    }

    fn request(self) -> Frame {
        let destination = (SERVICE.address(self.family), self.port);
        Frame::new((CLIENT.address(self.family), CLIENT_PORT), destination, self.transport)
    }
}

/// Runs a test for each way, where the uplink is.
fn everywhere(test: impl Fn(&mut Yardstick, Way, u32) -> Result<()> + Send + Sync) -> Result<()> {
    Testbed::new()?.inside(|bed| {
        let mut floor = Yardstick::new(NODE, FLOWS)?;
        for way in Way::all(&mut floor)? {
            test(&mut floor, way, bed.uplink()).with_context(|| format!("{way:?}"))?;
        }
        Ok(())
    })
}

fn sent(place: Place) -> i32 {
    if place == Place::Xdp { action::XDP_TX } else { action::TC_REDIRECT }
}

fn passed(place: Place) -> i32 {
    if place == Place::Xdp { action::XDP_PASS } else { action::TC_NEXT }
}

/// It must leave, and look like this.
fn expect(ran: &Ran, place: Place, expected: &Frame) {
    assert_eq!(ran.action, sent(place), "{place:?} {expected:?}");
    assert_eq!(&Frame::read(&ran.bytes), expected, "{place:?}");
}

#[test]
fn the_floor_translates_a_new_flow_a_known_one_and_the_reply() -> Result<()> {
    everywhere(|floor, way, uplink| {
        let Way { place, family, transport, .. } = way;
        let before = floor.flows(family)?;
        let request = way.request();
        let first = floor.run(Role::Floor, place, &request.bytes(), uplink)?;
        let port = Frame::read(&first.bytes).source.1;
        assert!((10_000..26_384).contains(&port), "{port} is no source port of the floor's");
        let mut translated = Frame::new((NODE.address(family), port), (REMOTE.address(family), way.target), transport);
        translated.macs = (OTHER_NODE_MAC, UPLINK_MAC);
        translated.hop_limit = 63;
        expect(&first, place, &translated);
        assert_eq!(floor.flows(family)?, before + 2, "one entry per direction");

        let known = floor.run(Role::Floor, place, &request.bytes(), uplink)?;
        expect(&known, place, &translated);

        let mut answer = Frame::new(translated.destination, translated.source, transport);
        answer.macs = (UPLINK_MAC, OTHER_NODE_MAC);
        let reply = floor.run(Role::Floor, place, &answer.bytes(), uplink)?;
        let mut expected = Frame::new(request.destination, request.source, transport);
        expected.macs = (MACS.1, UPLINK_MAC);
        expected.hop_limit = 63;
        expect(&reply, place, &expected);

        let count = floor.counted(way.index)?;
        let bytes = request.bytes().len() as u64 - 14;
        assert_eq!((count.packets, count.bytes), (3, 3 * bytes));
        assert_eq!(floor.flows(family)?, before + 2, "a known flow makes no entry");
        Ok(())
    })
}

#[test]
fn the_floor_passes_on_what_is_not_its_own() -> Result<()> {
    everywhere(|floor, way, uplink| {
        let Way { place, family, port, .. } = way;
        let mut dying = way.request();
        dying.hop_limit = 1;
        let strangers = [
            Frame { destination: (OTHER_SERVICE.address(family), port), ..way.request() },
            Frame { destination: (SERVICE.address(family), port + 1), ..way.request() },
            Frame { destination: (NODE.address(family), 10_000), ..way.request() },
            dying,
        ];
        for stranger in strangers {
            let ran = floor.run(Role::Floor, place, &stranger.bytes(), uplink)?;
            assert_eq!(ran, Ran { action: passed(place), bytes: stranger.bytes() }, "{stranger:?}");
        }
        Ok(())
    })
}

#[test]
fn the_floor_keeps_clients_of_one_backend_apart() -> Result<()> {
    everywhere(|floor, way, uplink| {
        let mut ends = BTreeSet::new();
        for port in 0..500 {
            let mut request = way.request();
            request.source.1 = 1_024 + port;
            let ran = floor.run(Role::Floor, way.place, &request.bytes(), uplink)?;
            assert_eq!(ran.action, sent(way.place), "{request:?}");
            assert!(ends.insert(Frame::read(&ran.bytes).source.1), "two flows have one source port");
        }
        Ok(())
    })
}
