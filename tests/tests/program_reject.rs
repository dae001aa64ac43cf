//! Answers in the place of nobody: every one is read byte by byte, and every checksum in it computed anew, as it stands
//! and as it would be if the kernel had still to complete it.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use anyhow::Result;
use proxy_common::{
    addr::Protocol,
    backend::BackendState,
    outcome::{Hook, Outcome},
    service::{Service, WhenEmpty},
};
use tests::{
    frame::{ETHERNET, Family, Flags, Frame, MACS, Transport},
    patience::wait_until,
    testbed::{CLIENT, NODE, NODE_PORT, POD, PORT, REMOTE, SERVICE, Testbed, action},
};

/// Hooks that admit new flows, with the way an answer leaves and what a packet without one meets.
const HOOKS: [(Hook, i32, i32); 3] = [
    (Hook::UplinkXdp, action::XDP_TX, action::XDP_DROP),
    (Hook::UplinkIn, action::TC_REDIRECT, action::TC_DROP),
    (Hook::PodIn, action::TC_REDIRECT, action::TC_DROP),
];

const SYN: Transport = Transport::Tcp(Flags::SYN);
const REASON: Outcome = Outcome::RejectNoEndpoint;

/// A Service without endpoints, in TCP and UDP.
fn bed(family: Family, when_empty: WhenEmpty) -> Result<Testbed> {
    let mut bed = Testbed::new()?;
    for proto in [Protocol::Tcp, Protocol::Udp] {
        let service = Service { internal_empty: when_empty, external_empty: when_empty, ..Service::default() };
        bed.set_service(SERVICE.address(family), PORT, proto, service)?;
        bed.set_service(any(family), NODE_PORT, proto, service)?;
    }
    Ok(bed)
}

fn any(family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::UNSPECIFIED.into(),
        Family::V6 => Ipv6Addr::UNSPECIFIED.into(),
    }
}

fn request(hook: Hook, family: Family, transport: Transport) -> Frame {
    match hook {
        Hook::PodIn => Frame::new((POD.address(family), 4_000), (SERVICE.address(family), PORT), transport),
        _ => Frame::new((CLIENT.address(family), 50_000), (NODE.address(family), NODE_PORT), transport),
    }
}

/// Runs a packet that must be answered, and counted so.
fn answer(bed: &mut Testbed, (hook, sent, _): (Hook, i32, i32), bytes: &[u8]) -> Result<Vec<u8>> {
    let before = bed.counter(hook, REASON)?;
    let ran = bed.run_bytes(hook, bytes)?;
    assert_eq!(ran.action, sent, "{hook:?}");
    assert_eq!(bed.counter(hook, REASON)?, before + 1, "{hook:?}");
    Ok(ran.bytes)
}

/// Length of an IP header.
fn header(family: Family) -> usize {
    if family == Family::V4 { 20 } else { 40 }
}

fn word(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn long(bytes: &[u8], at: usize) -> u32 {
    u32::from(word(bytes, at)) << 16 | u32::from(word(bytes, at + 2))
}

/// RFC 1071, by its definition.
fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// What whoever sends an skb with a partial checksum makes of it (`skb_checksum_help`).
fn completed(bytes: &[u8], start: usize, field: usize) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    let sum = match checksum(&bytes[start..]) {
        0 => 0xffff,
        sum => sum,
    };
    bytes[start + field..start + field + 2].copy_from_slice(&sum.to_be_bytes());
    bytes
}

/// The addresses, the length of what follows and its protocol, as they enter a checksum.
fn pseudo_header(family: Family, bytes: &[u8], protocol: u8) -> Vec<u8> {
    let ip = &bytes[ETHERNET..ETHERNET + header(family)];
    let addresses = if family == Family::V4 { &ip[12..20] } else { &ip[8..40] };
    let length = (bytes.len() - ETHERNET - header(family)) as u32;
    [addresses, &length.to_be_bytes(), &[0, 0, 0, protocol]].concat()
}

#[test]
fn a_segment_to_nobody_is_answered_with_its_reset() -> Result<()> {
    // RFC 9293 §3.10.7.1. Built segments have sequence number 1000, acknowledge 2000, and carry eleven bytes.
    let cases = [
        ("SYN", Flags::SYN, (0, 1_012, 4 | 16)),
        ("nothing but data", Flags(0), (0, 1_011, 4 | 16)),
        ("SYN and FIN", Flags(1 | 2), (0, 1_013, 4 | 16)),
        ("ACK", Flags::ACK, (2_000, 0, 4)),
        ("SYN and ACK", Flags::SYN_ACK, (2_000, 0, 4)),
        ("FIN and ACK", Flags::FIN, (2_000, 0, 4)),
    ];
    for family in Family::BOTH {
        let mut bed = bed(family, WhenEmpty::Reject)?;
        for hook in HOOKS {
            for (name, flags, (sequence, acknowledged, bits)) in cases {
                let case = format!("{name} at {:?} in {family:?}", hook.0);
                let request = request(hook.0, family, Transport::Tcp(flags));
                let bytes = answer(&mut bed, hook, &request.bytes())?;
                let tcp = ETHERNET + header(family);
                assert_eq!(bytes.len(), tcp + 20, "{case}");
                let numbers = (long(&bytes, tcp + 4), long(&bytes, tcp + 8), bytes[tcp + 13]);
                assert_eq!(numbers, (sequence, acknowledged, bits), "{case}");
                let expected = Frame {
                    macs: (MACS.1, MACS.0),
                    payload: Vec::new(),
                    ..Frame::new(request.destination, request.source, Transport::Tcp(Flags(bits)))
                };
                assert_eq!(Frame::read(&bytes), expected, "{case}");
                assert_eq!(completed(&bytes, tcp, 16), bytes, "{case}: completing changes it");
            }
        }
    }
    Ok(())
}

/// Trap 14: a checksum may be partial, and nobody says so.
#[test]
fn no_port_makes_a_reset_that_completing_would_spoil() -> Result<()> {
    let mut bed = bed(Family::V4, WhenEmpty::Reject)?;
    for port in (1..=u16::MAX).step_by(257) {
        let mut request = request(Hook::PodIn, Family::V4, SYN);
        request.source.1 = port;
        let bytes = answer(&mut bed, HOOKS[2], &request.bytes())?;
        assert_eq!(Frame::read(&bytes).destination.1, port);
        assert_eq!(completed(&bytes, ETHERNET + 20, 16), bytes, "port {port}");
    }
    Ok(())
}

#[test]
fn a_datagram_to_nobody_is_answered_with_the_error_that_quotes_it() -> Result<()> {
    for family in Family::BOTH {
        let mut bed = bed(family, WhenEmpty::Reject)?;
        for hook in HOOKS {
            for transport in [Transport::Udp, Transport::UdpUnchecked] {
                for length in [0, 11, 1_400] {
                    let case = format!("{transport:?} of {length} at {:?} in {family:?}", hook.0);
                    let mut request = request(hook.0, family, transport);
                    request.payload = vec![0xa5; length];
                    let bytes = answer(&mut bed, hook, &request.bytes())?;
                    is_port_unreachable(family, &request, &bytes, hook.0 == Hook::UplinkXdp, &case);
                }
            }
        }
    }
    Ok(())
}

fn is_port_unreachable(family: Family, request: &Frame, bytes: &[u8], is_quoted_exactly: bool, case: &str) {
    let header = header(family);
    let icmp = ETHERNET + header;
    let quote = icmp + 8;
    assert_eq!(bytes.len(), quote + header + 8, "{case}");
    assert_eq!((&bytes[..6], &bytes[6..12]), (&MACS.1[..], &MACS.0[..]), "{case}");

    let ip = etherparse::IpHeaders::from_slice(&bytes[ETHERNET..]).expect("an IP header").0;
    let (source, destination, protocol) = match &ip {
        etherparse::IpHeaders::Ipv4(ip, _) => {
            assert_eq!(ip.header_checksum, ip.calc_header_checksum(), "{case}");
            assert_eq!((ip.total_len as usize, ip.time_to_live), (bytes.len() - ETHERNET, 64), "{case}");
            (IpAddr::from(ip.source), IpAddr::from(ip.destination), 1)
        }
        etherparse::IpHeaders::Ipv6(ip, _) => {
            assert_eq!((ip.payload_length as usize, ip.hop_limit), (bytes.len() - icmp, 64), "{case}");
            (IpAddr::from(ip.source), IpAddr::from(ip.destination), 58)
        }
    };
    assert_eq!((source, destination), (request.destination.0, request.source.0), "{case}");
    assert_eq!(bytes[ETHERNET + if family == Family::V4 { 9 } else { 6 }], protocol, "{case}");

    let kind = if family == Family::V4 { [3, 3] } else { [1, 4] };
    assert_eq!((&bytes[icmp..icmp + 2], &bytes[icmp + 4..quote]), (&kind[..], &[0; 4][..]), "{case}");
    let covered = match family {
        Family::V4 => bytes[icmp..].to_vec(),
        Family::V6 => [pseudo_header(family, bytes, protocol), bytes[icmp..].to_vec()].concat(),
    };
    assert_eq!(checksum(&covered), 0, "{case}: checksum of ICMP");

    // The quoted UDP checksum is what an skb's completion may write into; nobody reads it.
    let original = request.bytes();
    let quoted = &original[ETHERNET..ETHERNET + header + 8];
    assert_eq!(bytes[quote..quote + header + 6], quoted[..header + 6], "{case}: the quote");
    if is_quoted_exactly {
        assert_eq!(bytes[quote..], *quoted, "{case}: the quote");
    } else {
        assert_eq!(completed(bytes, quote + header, 6), bytes, "{case}: completing changes it");
    }
}

#[test]
fn padding_is_not_part_of_an_answer() -> Result<()> {
    for family in Family::BOTH {
        let mut bed = bed(family, WhenEmpty::Reject)?;
        for hook in HOOKS {
            for (transport, length) in [(SYN, header(family) + 20), (Transport::Udp, 2 * header(family) + 16)] {
                let mut bytes = request(hook.0, family, transport).bytes();
                bytes.extend([0xee; 30]);
                assert_eq!(answer(&mut bed, hook, &bytes)?.len(), ETHERNET + length, "{transport:?} at {:?}", hook.0);
            }
        }
    }
    Ok(())
}

#[test]
fn what_must_not_be_answered_is_dropped_and_counted_for_the_same_reason() -> Result<()> {
    type Change = fn(&mut Frame);
    let cases: [(&str, Change); 5] = [
        ("a RST", |frame| frame.transport = Transport::Tcp(Flags::RST)),
        ("a RST that acknowledges", |frame| frame.transport = Transport::Tcp(Flags(4 | 16))),
        ("to everybody", |frame| frame.macs.0 = [0xff; 6]),
        ("to a group", |frame| frame.macs.0 = [0x01, 0, 0x5e, 0, 0, 1]),
        ("from nobody", |frame| match frame.source.0 {
            IpAddr::V4(_) => frame.source.0 = Ipv4Addr::UNSPECIFIED.into(),
            IpAddr::V6(_) => frame.source.0 = Ipv6Addr::UNSPECIFIED.into(),
        }),
    ];
    for family in Family::BOTH {
        let mut bed = bed(family, WhenEmpty::Reject)?;
        for (hook, _, dropped) in HOOKS {
            for transport in [SYN, Transport::Udp] {
                for (name, change) in cases {
                    let mut request = request(hook, family, transport);
                    change(&mut request);
                    let before = bed.counter(hook, REASON)?;
                    assert_eq!(bed.run(hook, &request)?.action, dropped, "{name} at {hook:?}");
                    assert_eq!(bed.counter(hook, REASON)?, before + 1, "{name} at {hook:?}");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn who_comes_from_a_group_is_not_answered() -> Result<()> {
    let sources: [(Family, IpAddr); 3] = [
        (Family::V4, Ipv4Addr::new(224, 0, 0, 1).into()),
        (Family::V4, Ipv4Addr::BROADCAST.into()),
        (Family::V6, Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1).into()),
    ];
    for (family, source) in sources {
        let mut bed = bed(family, WhenEmpty::Reject)?;
        let mut request = request(Hook::UplinkIn, family, Transport::Udp);
        request.source.0 = source;
        assert_eq!(bed.run(Hook::UplinkIn, &request)?.action, action::TC_DROP, "{source}");
    }
    Ok(())
}

#[test]
fn a_service_that_is_to_be_silent_is_silent() -> Result<()> {
    for family in Family::BOTH {
        let mut bed = bed(family, WhenEmpty::Drop)?;
        for (hook, _, dropped) in HOOKS {
            for transport in [SYN, Transport::Udp] {
                assert_eq!(bed.run(hook, &request(hook, family, transport))?.action, dropped, "{hook:?}");
            }
            assert_eq!(bed.counter(hook, Outcome::DropNoLocalEndpoint)?, 2);
        }
    }
    Ok(())
}

/// A connection through a hook to a backend elsewhere, confirmed.
struct Connection {
    bed: Testbed,
    hook: (Hook, i32, i32),
    family: Family,
    sent: Frame,
}

impl Connection {
    fn new(hook: (Hook, i32, i32), family: Family) -> Result<Self> {
        let mut bed = Testbed::new()?;
        let backend = bed.add_backend(REMOTE.address(family), false)?;
        bed.add_service(SERVICE.address(family), PORT, Protocol::Tcp, &[backend])?;
        bed.add_service(any(family), NODE_PORT, Protocol::Tcp, &[backend])?;
        let sent = Frame::read(&bed.run(hook.0, &request(hook.0, family, SYN))?.bytes);
        let mut connection = Self { bed, hook, family, sent };
        connection.answer(Flags::SYN_ACK)?;
        assert_eq!(connection.ask(Flags::ACK)?.destination, connection.sent.destination);
        Ok(connection)
    }

    fn ask(&mut self, flags: Flags) -> Result<Frame> {
        let request = request(self.hook.0, self.family, Transport::Tcp(flags));
        Ok(Frame::read(&self.bed.run(self.hook.0, &request)?.bytes))
    }

    fn answer(&mut self, flags: Flags) -> Result<Frame> {
        let reply = Frame::new(self.sent.destination, self.sent.source, Transport::Tcp(flags));
        let hook = if self.hook.0 == Hook::PodIn { Hook::PodOut } else { self.hook.0 };
        Ok(Frame::read(&self.bed.run(hook, &reply)?.bytes))
    }

    /// Lets the flow's second go by. It lasts one jiffy for it.
    fn wait_a_second(&mut self) -> Result<()> {
        self.bed.set_node(|node| node.jiffies_per_second = 1)?;
        let before = self.bed.jiffies()?;
        wait_until("the next jiffy", Duration::from_secs(1), || {
            self.bed.jiffies().is_ok_and(|now| now != before).then_some(())
        })
    }

    fn is_reset(&mut self) -> Result<bool> {
        let answer = self.ask(Flags::ACK)?;
        Ok(answer.transport == Transport::Tcp(Flags::RST))
    }
}

/// Trap 7: a connection is neither cut off while its endpoint drains, nor left hanging once it has gone.
#[test]
fn a_connection_is_reset_when_its_backend_has_left_every_slice_and_not_before() -> Result<()> {
    let cases = [
        ("serving", BackendState::Serving, 1, false),
        ("draining", BackendState::NotServing, 1, false),
        ("gone", BackendState::Gone, 1, true),
        ("gone, and its id given to another", BackendState::Serving, 2, true),
    ];
    for family in Family::BOTH {
        for hook in HOOKS {
            for (name, state, generation, is_reset) in cases {
                let case = format!("{name} at {:?} in {family:?}", hook.0);
                let mut connection = Connection::new(hook, family)?;
                connection.bed.set_backend(1, REMOTE.address(family), false, state, generation)?;
                connection.wait_a_second()?;
                assert_eq!(connection.is_reset()?, is_reset, "{case}");
                let count = connection.bed.counter(hook.0, Outcome::ResetGone)?;
                assert_eq!(count, u64::from(is_reset), "{case}");
            }
        }
    }
    Ok(())
}

#[test]
fn the_reset_of_a_connection_says_what_its_client_expects_and_the_flow_is_forgotten() -> Result<()> {
    for hook in HOOKS {
        let mut connection = Connection::new(hook, Family::V4)?;
        assert_eq!(connection.bed.flows("FLOWS_V4")?.len(), 2);
        connection.bed.set_backend(1, REMOTE.v4.into(), false, BackendState::Gone, 1)?;
        connection.wait_a_second()?;
        let request = request(hook.0, Family::V4, Transport::Tcp(Flags::ACK));
        let ran = connection.bed.run(hook.0, &request)?;
        assert_eq!(ran.action, hook.1);
        let reset = Frame::read(&ran.bytes);
        assert_eq!((reset.source, reset.destination), (request.destination, request.source));
        assert_eq!(long(&ran.bytes, ETHERNET + 24), 2_000, "what the client acknowledged");
        assert_eq!(connection.bed.flows("FLOWS_V4")?.len(), 0);
    }
    Ok(())
}

#[test]
fn a_backend_that_talks_on_does_not_keep_the_connection_from_being_reset() -> Result<()> {
    let mut connection = Connection::new(HOOKS[2], Family::V6)?;
    connection.bed.set_backend(1, REMOTE.v6.into(), false, BackendState::Gone, 1)?;
    connection.wait_a_second()?;
    assert_eq!(connection.answer(Flags::ACK)?.source.0, SERVICE.v6, "what it sends is translated");
    assert!(connection.is_reset()?);
    Ok(())
}
