//! What whoever watches is told: one record of each thing that is counted, with the packet as it came; and nothing when nobody
//! watches, or of packets of known flows.

use std::net::{IpAddr, Ipv6Addr};

use anyhow::{Context as _, Result};
use proxy_common::{
    addr::Protocol,
    backend::BackendState,
    event::{Event, ROOM},
    outcome::{Hook, Outcome},
};
use tests::{
    between::tagged,
    fragments::fragment,
    frame::{Family, Flags, Frame, Transport},
    testbed::{CLIENT, NODE, NODE_PORT, OTHER_SERVICE, POD, POD2, PORT, REMOTE, SERVICE, Testbed, action, told},
};

const SYN: Transport = Transport::Tcp(Flags::SYN);
const SYN_ACK: Transport = Transport::Tcp(Flags::SYN_ACK);
const ACK: Transport = Transport::Tcp(Flags::ACK);

/// Hooks that admit new flows.
const HOOKS: [Hook; 3] = [Hook::UplinkXdp, Hook::UplinkIn, Hook::PodIn];

/// 802.1Q, number 300, for which there is no device.
const UNKNOWN_VLAN: [u8; 4] = [0x81, 0, 1, 44];

/// A bed with a Service that has a backend on the node, and one that has none; watched.
fn bed(family: Family) -> Result<Testbed> {
    let mut bed = Testbed::new()?;
    let backend = bed.add_backend(POD2.address(family), true)?;
    for proto in [Protocol::Tcp, Protocol::Udp] {
        bed.add_service(SERVICE.address(family), PORT, proto, &[backend])?;
        bed.add_service(OTHER_SERVICE.address(family), PORT, proto, &[])?;
    }
    bed.watch()?;
    Ok(bed)
}

/// From a pod, or from outside.
fn client(hook: Hook, family: Family) -> (IpAddr, u16) {
    let host = if hook == Hook::PodIn { POD } else { CLIENT };
    (host.address(family), 4_000)
}

fn to_service(hook: Hook, family: Family, transport: Transport) -> Frame {
    Frame::new(client(hook, family), (SERVICE.address(family), PORT), transport)
}

fn to_nobody(hook: Hook, family: Family) -> Frame {
    Frame::new(client(hook, family), (OTHER_SERVICE.address(family), PORT), Transport::Udp)
}

/// An address as records have it.
fn recorded(address: IpAddr) -> Ipv6Addr {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped(),
        IpAddr::V6(address) => address,
    }
}

/// Who sent the packet that a record is of, and to whom.
fn ends(event: &Event) -> [(Ipv6Addr, u16); 2] {
    let end = |address: proxy_common::addr::Ipv6, port: proxy_common::addr::Port| {
        (Ipv6Addr::from(address.octets), port.number())
    };
    [end(event.saddr, event.sport), end(event.daddr, event.dport)]
}

fn ends_of(frame: &Frame) -> [(Ipv6Addr, u16); 2] {
    [frame.source, frame.destination].map(|(address, port)| (recorded(address), port))
}

fn number(family: Family) -> u8 {
    if family == Family::V4 { 4 } else { 6 }
}

/// The only record there is.
fn only(bed: &mut Testbed) -> Result<Event> {
    let events = bed.events()?;
    assert_eq!(events.len(), 1, "{events:?}");
    events.into_iter().next().context("no record")
}

fn for_each_hook(test: impl Fn(&mut Testbed, Hook, Family) -> Result<()>) -> Result<()> {
    for family in Family::BOTH {
        for hook in HOOKS {
            test(&mut bed(family)?, hook, family).with_context(|| format!("{hook:?} {family:?}"))?;
        }
    }
    Ok(())
}

#[test]
fn a_new_connection_is_told_of_as_it_came_with_its_backend() -> Result<()> {
    for_each_hook(|bed, hook, family| {
        let request = to_service(hook, family, SYN);
        bed.run(hook, &request)?;
        let event = only(bed)?;
        assert_eq!((event.hook, event.outcome), (hook as u8, Outcome::Opened as u8));
        assert_eq!(ends(&event), ends_of(&request));
        assert_eq!((event.proto, event.family, event.ifindex), (6, number(family), bed.uplink()));
        assert_eq!((event.service, event.backend, event.backend_generation), (1, 1, 1));
        Ok(())
    })
}

#[test]
fn records_follow_each_other_in_time() -> Result<()> {
    let mut bed = bed(Family::V4)?;
    let since_boot = || nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME);
    let before = since_boot()?;
    for port in 1..3 {
        let mut request = to_service(Hook::PodIn, Family::V4, SYN);
        request.source.1 = port;
        bed.run(Hook::PodIn, &request)?;
    }
    let after = since_boot()?;
    let nanoseconds = |time: nix::sys::time::TimeSpec| (time.tv_sec() * 1_000_000_000 + time.tv_nsec()).cast_unsigned();
    let times: Vec<u64> = bed.events()?.iter().map(|event| event.at).collect();
    assert!(nanoseconds(before) < times[0] && times[0] < times[1] && times[1] < nanoseconds(after), "{times:?}");
    Ok(())
}

#[test]
fn packets_of_a_known_flow_are_not_told_of() -> Result<()> {
    for_each_hook(|bed, hook, family| {
        bed.run(hook, &to_service(hook, family, SYN))?;
        let backend = (POD2.address(family), tests::testbed::TARGET);
        let out = if hook == Hook::PodIn { Hook::PodOut } else { Hook::UplinkOut };
        bed.run(out, &Frame::new(backend, client(hook, family), SYN_ACK))?;
        bed.run(hook, &to_service(hook, family, ACK))?;
        let expected = [(hook, Outcome::Opened, 1), (hook, Outcome::Confirmed, 1)];
        assert_eq!(told(&bed.events()?), expected);
        for _ in 0..3 {
            bed.run(hook, &to_service(hook, family, ACK))?;
            bed.run(out, &Frame::new(backend, client(hook, family), ACK))?;
        }
        assert_eq!(bed.events()?, []);
        Ok(())
    })
}

#[test]
fn a_rejected_packet_is_told_of_before_it_becomes_its_answer() -> Result<()> {
    for_each_hook(|bed, hook, family| {
        let request = to_nobody(hook, family);
        bed.run(hook, &request)?;
        let event = only(bed)?;
        assert_eq!((event.hook, event.outcome), (hook as u8, Outcome::RejectNoEndpoint as u8));
        assert_eq!(ends(&event), ends_of(&request));
        assert_eq!((event.proto, event.family, event.ifindex, event.backend), (17, number(family), bed.uplink(), 0));
        Ok(())
    })
}

#[test]
fn a_dropped_packet_is_told_of() -> Result<()> {
    for_each_hook(|bed, hook, family| {
        let mut forged = to_service(hook, family, SYN);
        forged.source.0 = if family == Family::V4 { "127.0.0.1".parse()? } else { "::1".parse()? };
        bed.run(hook, &forged)?;
        let event = only(bed)?;
        assert_eq!((event.hook, event.outcome), (hook as u8, Outcome::DropMartian as u8));
        assert_eq!(ends(&event), ends_of(&forged));
        Ok(())
    })
}

#[test]
fn a_flow_that_moves_is_told_of_with_the_backend_it_leaves() -> Result<()> {
    for_each_hook(|bed, hook, family| {
        let datagram = to_service(hook, family, Transport::Udp);
        bed.run(hook, &datagram)?;
        bed.events()?;
        let other = bed.add_backend(POD.address(family), true)?;
        bed.set_backend(1, POD2.address(family), true, BackendState::NotServing, 1)?;
        bed.add_service(SERVICE.address(family), PORT, Protocol::Udp, &[other])?;
        bed.run(hook, &datagram)?;
        let events = bed.events()?;
        let kinds: Vec<_> = events.iter().map(|event| (event.outcome, event.backend)).collect();
        assert_eq!(kinds, [(Outcome::Moved as u8, 1), (Outcome::Opened as u8, other)]);
        assert!(events.iter().all(|event| ends(event) == ends_of(&datagram)), "{events:?}");
        Ok(())
    })
}

#[test]
fn what_is_not_understood_is_told_of_as_far_as_it_is() -> Result<()> {
    for_each_hook(|bed, hook, family| {
        let request = to_service(hook, family, Transport::Udp);
        let bytes = request.bytes();
        bed.run_bytes(hook, &tagged(&bytes, &[UNKNOWN_VLAN]))?;
        let event = only(bed)?;
        assert_eq!((event.outcome, event.family, event.ifindex), (Outcome::PassVlan as u8, 0, bed.uplink()));

        // Of a later fragment there are no ports.
        let node = Frame { destination: (NODE.address(family), NODE_PORT), ..request.clone() };
        bed.run_bytes(hook, &fragment(&node.bytes(), 7, 8, 8))?;
        let event = only(bed)?;
        assert_eq!(event.outcome, Outcome::PassFragment as u8);
        assert_eq!(ends(&event), ends_of(&node).map(|(address, _)| (address, 0)));

        // One that is shorter than its IP header says.
        bed.run_bytes(hook, &bytes[..bytes.len() - 1])?;
        let event = only(bed)?;
        assert_eq!((event.outcome, ends(&event)), (Outcome::PassMalformed as u8, ends_of(&request)));
        Ok(())
    })
}

#[test]
fn nothing_is_told_when_nobody_watches_any_more_and_the_programs_do_the_same() -> Result<()> {
    for_each_hook(|bed, hook, family| {
        let watched = bed.run(hook, &to_service(hook, family, SYN))?;
        bed.events()?;
        for until in [-1, -3_600] {
            bed.watch_for(until)?;
            let mut other = to_service(hook, family, SYN);
            other.source.1 += 1;
            assert_eq!(bed.run(hook, &other)?.action, watched.action);
            bed.run(hook, &to_nobody(hook, family))?;
        }
        assert_eq!((bed.events()?, bed.lost()?), (vec![], 0));
        Ok(())
    })
}

#[test]
fn nobody_has_watched_before_somebody_says_so() -> Result<()> {
    let mut bed = Testbed::new()?;
    bed.add_service(OTHER_SERVICE.address(Family::V4), PORT, Protocol::Udp, &[])?;
    bed.run(Hook::PodIn, &to_nobody(Hook::PodIn, Family::V4))?;
    assert_eq!((bed.events()?, bed.lost()?), (vec![], 0));
    assert_eq!(bed.counter(Hook::PodIn, Outcome::RejectNoEndpoint)?, 1);
    Ok(())
}

#[test]
fn what_there_is_no_room_for_is_counted_and_its_packet_goes_its_way() -> Result<()> {
    let mut bed = bed(Family::V4)?;
    let backend = bed.add_backend(REMOTE.address(Family::V4), false)?;
    bed.add_service(SERVICE.address(Family::V4), PORT, Protocol::Udp, &[backend])?;
    // Each has a header of eight bytes.
    let fit = ROOM / (size_of::<Event>() + 8);
    let mut request = to_nobody(Hook::PodIn, Family::V4);
    for index in 0..fit + 10 {
        request.source.1 = index as u16;
        let ran = bed.run(Hook::PodIn, &request)?;
        assert_eq!(ran.action, action::TC_REDIRECT, "{index}");
    }
    let (events, lost) = (bed.events()?, bed.lost()?);
    assert_eq!(events.len() + lost as usize, fit + 10);
    assert!((1..=11).contains(&lost), "{lost}");
    Ok(())
}
