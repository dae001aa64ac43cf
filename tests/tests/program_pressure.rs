//! The flow table under pressure: more flows than it has room for, most of them nobody's.

use std::net::Ipv4Addr;

use anyhow::Result;
use proxy_common::{
    addr::Protocol,
    flow::{Direction, Tier, state},
    outcome::{Hook, Outcome},
};
use tests::{
    frame::{Flags, Frame, Transport},
    testbed::{CLIENT, POD, PORT, SERVICE, TARGET, Testbed, action},
};

/// Entries of each tier in the testbed.
const ROOM: usize = 4_096;

const SYN: Transport = Transport::Tcp(Flags::SYN);
const SYN_ACK: Transport = Transport::Tcp(Flags::SYN_ACK);
const ACK: Transport = Transport::Tcp(Flags::ACK);

/// A Service with one backend, which is on this node.
fn bed(proto: Protocol) -> Result<Testbed> {
    let mut bed = Testbed::new()?;
    let backend = bed.add_backend(POD.v4.into(), true)?;
    bed.add_service(SERVICE.v4.into(), PORT, proto, &[backend])?;
    Ok(bed)
}

/// From a client outside, whose address is kept: no node's address takes part.
fn ask(bed: &mut Testbed, client: Ipv4Addr, port: u16, transport: Transport) -> Result<()> {
    let request = Frame::new((client.into(), port), (SERVICE.v4.into(), PORT), transport);
    bed.expect(Hook::PodIn, &request, action::TC_NEXT)?;
    Ok(())
}

/// Whether the client sees the Service's address.
fn answer(bed: &mut Testbed, client: Ipv4Addr, port: u16, transport: Transport) -> Result<bool> {
    let reply = Frame::new((POD.v4.into(), TARGET), (client.into(), port), transport);
    let seen = bed.expect(Hook::PodOut, &reply, action::TC_NEXT)?.source;
    Ok(seen == (SERVICE.v4.into(), PORT))
}

fn establish(bed: &mut Testbed, port: u16) -> Result<()> {
    ask(bed, CLIENT.v4, port, SYN)?;
    assert!(answer(bed, CLIENT.v4, port, SYN_ACK)?);
    ask(bed, CLIENT.v4, port, ACK)
}

/// Somebody whose packets nobody answers.
fn stranger(number: u32) -> Ipv4Addr {
    Ipv4Addr::from(0x1400_0000 + number)
}

/// Scenario 21.
#[test]
fn first_packets_of_strangers_evict_each_other_and_no_confirmed_flow() -> Result<()> {
    const CONFIRMED: u16 = 200;
    let mut bed = bed(Protocol::Tcp)?;
    for port in 0..CONFIRMED {
        establish(&mut bed, 4_000 + port)?;
    }
    for number in 0..4 * ROOM as u32 {
        ask(&mut bed, stranger(number), 1_024, SYN)?;
    }
    assert_eq!(bed.flows("FLOWS_V4")?.len(), 2 * usize::from(CONFIRMED));
    assert_eq!(bed.counter(Hook::PodIn, Outcome::Opened)?, u64::from(CONFIRMED) + 4 * ROOM as u64);
    for port in 0..CONFIRMED {
        ask(&mut bed, CLIENT.v4, 4_000 + port, ACK)?;
        assert!(answer(&mut bed, CLIENT.v4, 4_000 + port, ACK)?);
    }
    assert_eq!(bed.counter(Hook::PodIn, Outcome::Opened)?, u64::from(CONFIRMED) + 4 * ROOM as u64, "none began anew");
    Ok(())
}

#[test]
fn what_was_evicted_is_what_has_entered_and_neither_left_nor_stayed() -> Result<()> {
    let mut bed = bed(Protocol::Udp)?;
    let flows = 100_u16;
    for port in 0..flows {
        ask(&mut bed, CLIENT.v4, 4_000 + port, Transport::Udp)?;
        assert!(answer(&mut bed, CLIENT.v4, 4_000 + port, Transport::Udp)?);
    }
    let entries = 2 * u64::from(flows);
    let embryos = bed.turnover(Tier::Embryos)?;
    assert_eq!((embryos.entered, embryos.left), (entries, entries), "all were confirmed");
    let confirmed = bed.turnover(Tier::Flows)?;
    assert_eq!((confirmed.entered, confirmed.left), (entries, 0));

    for number in 0..4 * ROOM as u32 {
        ask(&mut bed, stranger(number), 1_024, Transport::Udp)?;
    }
    let embryos = bed.turnover(Tier::Embryos)?;
    let present = bed.flows("EMBRYOS_V4")?.len() as u64;
    assert_eq!(embryos.entered, entries + 8 * ROOM as u64, "two for each stranger");
    assert!(
        present <= ROOM as u64 && embryos.entered - embryos.left - present >= 7 * ROOM as u64,
        "{present} are left"
    );
    assert_eq!(bed.turnover(Tier::Flows)?, confirmed);
    Ok(())
}

#[test]
fn no_half_of_a_pair_outlives_its_flow() -> Result<()> {
    let mut bed = bed(Protocol::Tcp)?;
    establish(&mut bed, 4_000)?;
    for transport in [Transport::Tcp(Flags::FIN), ACK] {
        ask(&mut bed, CLIENT.v4, 4_000, transport)?;
        answer(&mut bed, CLIENT.v4, 4_000, transport)?;
    }
    let closed = state::FIN_ORIGINAL | state::FIN_REPLY;
    assert!(bed.flows("FLOWS_V4")?.iter().all(|(_, flow)| flow.state & closed == closed));
    // The half that the client's packets are known by is evicted; its next connection takes the place of both.
    bed.change_flows("FLOWS_V4", |_, flow| (flow.direction == Direction::Reply).then_some(flow))?;
    ask(&mut bed, CLIENT.v4, 4_000, SYN)?;
    assert_eq!(bed.flows("FLOWS_V4")?.len(), 0, "the old half is gone");
    assert_eq!(bed.flows("EMBRYOS_V4")?.len(), 2);
    Ok(())
}
