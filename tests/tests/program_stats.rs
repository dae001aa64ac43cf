//! Counts per Service port and per backend, to the packet and to the byte.

use std::time::Duration;

use anyhow::Result;
use proxy_common::{
    addr::Protocol,
    outcome::Hook,
    service::{Service, WhenEmpty},
    stats::Stats,
};
use tests::{
    frame::{ETHERNET, Family, Flags, Frame, Transport},
    patience::wait_until,
    testbed::{OTHER_SERVICE, POD, POD2, PORT, SERVICE, TARGET, Testbed},
};

/// [`Service::index`] of Services in the test bed.
const INDEX: u32 = 1;

/// A pod that talks to a Service, and the sum of what it should have been counted for.
struct Talk {
    bed: Testbed,
    family: Family,
    backend: u32,
    expected: Stats,
}

impl Talk {
    fn new(family: Family, proto: Protocol) -> Result<Self> {
        let mut bed = Testbed::new()?;
        let backend = bed.add_backend(POD2.address(family), true)?;
        bed.add_service(SERVICE.address(family), PORT, proto, &[backend])?;
        Ok(Self { bed, family, backend, expected: Stats { opened: 1, ..Stats::default() } })
    }

    /// The pod says so many bytes.
    fn ask(&mut self, transport: Transport, length: usize) -> Result<()> {
        let pod = (POD.address(self.family), 4_000);
        let mut frame = Frame::new(pod, (SERVICE.address(self.family), PORT), transport);
        frame.payload = vec![7; length];
        self.bed.run(Hook::PodIn, &frame)?;
        self.expected.packets += 1;
        self.expected.bytes += (frame.bytes().len() - ETHERNET) as u64;
        Ok(())
    }

    /// The backend says so many bytes.
    fn answer(&mut self, transport: Transport, length: usize) -> Result<()> {
        let pod = (POD.address(self.family), 4_000);
        let mut frame = Frame::new((POD2.address(self.family), TARGET), pod, transport);
        frame.payload = vec![7; length];
        self.bed.run(Hook::PodOut, &frame)?;
        self.expected.reply_packets += 1;
        self.expected.reply_bytes += (frame.bytes().len() - ETHERNET) as u64;
        Ok(())
    }

    fn establish(&mut self) -> Result<()> {
        self.ask(Transport::Tcp(Flags::SYN), 0)?;
        self.answer(Transport::Tcp(Flags::SYN_ACK), 0)?;
        self.ask(Transport::Tcp(Flags::ACK), 0)
    }

    /// What the Service was counted for. The backend must have been counted for the same.
    fn counted(&mut self) -> Result<Stats> {
        let [service, backend] = match self.family {
            Family::V4 => ["SERVICE_STATS_4", "BACKEND_STATS_4"],
            Family::V6 => ["SERVICE_STATS_6", "BACKEND_STATS_6"],
        };
        let counted = self.bed.stats(service, INDEX)?;
        assert_eq!(self.bed.stats(backend, self.backend)?, counted, "the backend's");
        Ok(counted)
    }

    /// Lets the flow's second go by. It lasts one jiffy for it.
    fn wait_a_second(&mut self) -> Result<()> {
        self.bed.set_node(|node| node.jiffies_per_second = 1)?;
        let before = self.bed.jiffies()?;
        wait_until("the next jiffy", Duration::from_secs(1), || {
            self.bed.jiffies().is_ok_and(|now| now != before).then_some(())
        })
    }
}

const ACK: Transport = Transport::Tcp(Flags::ACK);

#[test]
fn a_short_exchange_of_datagrams_is_counted_packet_by_packet() -> Result<()> {
    for family in Family::BOTH {
        let mut talk = Talk::new(family, Protocol::Udp)?;
        for length in [0, 30, 1_200] {
            talk.ask(Transport::Udp, length)?;
            assert_eq!(talk.counted()?, talk.expected, "{family:?}");
            talk.answer(Transport::Udp, length + 100)?;
            assert_eq!(talk.counted()?, talk.expected, "{family:?}");
        }
    }
    Ok(())
}

#[test]
fn a_connection_is_counted_in_full_when_it_closes() -> Result<()> {
    for family in Family::BOTH {
        for end in [Flags::FIN, Flags::RST] {
            let mut talk = Talk::new(family, Protocol::Tcp)?;
            talk.establish()?;
            assert_eq!(talk.counted()?, talk.expected, "the handshake");
            for length in 1..20 {
                talk.ask(ACK, length)?;
                talk.answer(ACK, 3 * length)?;
            }
            talk.ask(Transport::Tcp(end), 0)?;
            talk.answer(ACK, 0)?;
            assert_eq!(talk.counted()?, talk.expected, "{family:?}, {end:?}");
            talk.answer(Transport::Tcp(Flags::FIN), 5)?;
            talk.ask(ACK, 0)?;
            assert_eq!(talk.counted()?, talk.expected, "{family:?}, {end:?} and after");
        }
    }
    Ok(())
}

#[test]
fn an_open_connection_is_added_up_once_a_second_both_ways() -> Result<()> {
    let mut talk = Talk::new(Family::V6, Protocol::Tcp)?;
    talk.bed.set_node(|node| node.jiffies_per_second = 1_000_000)?;
    talk.establish()?;
    let before = talk.counted()?;
    talk.answer(ACK, 1_000)?;
    talk.ask(ACK, 10)?;
    assert_eq!(talk.counted()?, before, "within the second");
    talk.wait_a_second()?;
    talk.ask(ACK, 10)?;
    assert_eq!(talk.counted()?, talk.expected, "after it, and with the packet that ends it");
    Ok(())
}

#[test]
fn a_flow_does_not_lose_count_of_many_packets() -> Result<()> {
    let mut talk = Talk::new(Family::V4, Protocol::Tcp)?;
    talk.bed.set_node(|node| node.jiffies_per_second = 1_000_000)?;
    talk.establish()?;
    talk.bed.change_flows("FLOWS_V4", |_, mut flow| {
        (flow.packets, flow.bytes) = (0x7fff, 0x7fff * 40);
        Some(flow)
    })?;
    talk.ask(ACK, 0)?;
    talk.expected.packets += 0x7fff;
    talk.expected.bytes += 0x7fff * 40;
    assert_eq!(talk.counted()?, talk.expected);
    Ok(())
}

#[test]
fn what_a_flow_had_noted_is_counted_when_its_tuple_begins_anew() -> Result<()> {
    let mut talk = Talk::new(Family::V4, Protocol::Tcp)?;
    talk.bed.set_node(|node| node.jiffies_per_second = 1_000_000)?;
    talk.establish()?;
    talk.ask(ACK, 100)?;
    talk.bed.set_backend(talk.backend, POD2.v4.into(), true, proxy_common::backend::BackendState::NotServing, 1)?;
    talk.ask(Transport::Tcp(Flags::SYN), 0)?;
    talk.expected.opened += 1;
    assert_eq!(talk.counted()?, talk.expected);
    Ok(())
}

#[test]
fn what_is_refused_is_no_traffic_of_the_service() -> Result<()> {
    let mut bed = Testbed::new()?;
    let empty = Service { index: INDEX, internal_empty: WhenEmpty::Reject, ..Service::default() };
    bed.set_service(OTHER_SERVICE.v4.into(), PORT, Protocol::Udp, empty)?;
    bed.run(Hook::PodIn, &Frame::new((POD.v4.into(), 4_000), (OTHER_SERVICE.v4.into(), PORT), Transport::Udp))?;
    assert_eq!(bed.stats("SERVICE_STATS_4", INDEX)?, Stats::default());
    Ok(())
}
