//! SCTP: how associations begin and end, what of their packets is changed and what is not, and who is told what. Every
//! checksum is computed anew over the whole packet.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::Result;
use proxy_common::{
    addr::Protocol,
    backend::BackendState,
    outcome::{Hook, Outcome},
    service::{Service, WhenEmpty},
};
use tests::{
    frame::{
        Chunk, ETHERNET, Family, Frame, MACS, Transport,
        sctp::{self, TAG},
    },
    testbed::{CLIENT, NODE, NODE_PORT, POD, POD2, PORT, REMOTE, SERVICE, TARGET, Testbed, action},
};

/// Ways in, with the verdict on what goes up the stack, what is answered, and what is dropped.
const HOOKS: [(Hook, i32, i32, i32); 3] = [
    (Hook::UplinkXdp, action::XDP_PASS, action::XDP_TX, action::XDP_DROP),
    (Hook::UplinkIn, action::TC_NEXT, action::TC_REDIRECT, action::TC_DROP),
    (Hook::PodIn, action::TC_NEXT, action::TC_REDIRECT, action::TC_DROP),
];

/// Tag, window, streams and first number of an INIT.
const INIT: [u8; 16] = [0xca, 0xfe, 0xf0, 0x0d, 0, 0, 0xff, 0xff, 0, 10, 0, 10, 0, 0, 0, 1];
const INITIATE_TAG: [u8; 4] = [0xca, 0xfe, 0xf0, 0x0d];

fn any(family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::UNSPECIFIED.into(),
        Family::V6 => Ipv6Addr::UNSPECIFIED.into(),
    }
}

/// Where the SCTP header is.
fn transport(family: Family) -> usize {
    ETHERNET + if family == Family::V4 { 20 } else { 40 }
}

/// A packet of a client as it comes in at a hook.
fn request(hook: Hook, family: Family, chunk: Chunk) -> Frame {
    let (client, frontend) = match hook {
        Hook::PodIn => ((POD.address(family), 4_000), (SERVICE.address(family), PORT)),
        _ => ((CLIENT.address(family), 50_000), (NODE.address(family), NODE_PORT)),
    };
    let payload = if chunk == Chunk::INIT { INIT.to_vec() } else { b"eleven char".to_vec() };
    Frame { payload, ..Frame::new(client, frontend, Transport::Sctp(chunk)) }
}

/// A Service with these backends, at a ClusterIP and a NodePort.
fn bed(family: Family, backends: &[IpAddr]) -> Result<Testbed> {
    let mut bed = Testbed::new()?;
    let backends = backends.iter().map(|backend| bed.add_backend(*backend, true)).collect::<Result<Vec<_>>>()?;
    let range = bed.add_slots(&backends)?;
    let service = Service {
        index: 1,
        internal: range,
        external: range,
        internal_empty: WhenEmpty::Reject,
        external_empty: WhenEmpty::Reject,
        ..Service::default()
    };
    bed.set_service(SERVICE.address(family), PORT, Protocol::Sctp, service)?;
    bed.set_service(any(family), NODE_PORT, Protocol::Sctp, service)?;
    Ok(bed)
}

/// A pod's association with one of two backends.
struct Talk {
    bed: Testbed,
}

impl Talk {
    fn new() -> Result<Self> {
        Ok(Self { bed: bed(Family::V4, &[POD2.v4.into(), REMOTE.v4.into()])? })
    }

    /// The pod speaks; returns who gets it.
    fn ask(&mut self, chunk: Chunk) -> Result<IpAddr> {
        let request = request(Hook::PodIn, Family::V4, chunk);
        Ok(self.bed.expect(Hook::PodIn, &request, action::TC_NEXT)?.destination.0)
    }

    /// A backend answers, and the pod must see the Service.
    fn answer(&mut self, from: IpAddr, chunk: Chunk) -> Result<()> {
        let reply = Frame::new((from, TARGET), (POD.v4.into(), 4_000), Transport::Sctp(chunk));
        let seen = self.bed.expect(Hook::PodOut, &reply, action::TC_NEXT)?;
        assert_eq!(seen, Frame { source: (SERVICE.v4.into(), PORT), ..reply });
        Ok(())
    }

    fn establish(&mut self) -> Result<IpAddr> {
        let backend = self.ask(Chunk::INIT)?;
        self.answer(backend, Chunk::INIT_ACK)?;
        assert_eq!(self.ask(Chunk::COOKIE_ECHO)?, backend);
        self.answer(backend, Chunk::COOKIE_ACK)?;
        Ok(backend)
    }

    /// Confirmed flows and others.
    fn sizes(&mut self) -> Result<(usize, usize)> {
        Ok((self.bed.flows("FLOWS_V4")?.len(), self.bed.flows("EMBRYOS_V4")?.len()))
    }

    fn age(&mut self, seconds: u32) -> Result<()> {
        self.bed.age_flows(seconds)
    }

    fn opened(&mut self) -> Result<u64> {
        self.bed.counter(Hook::PodIn, Outcome::Opened)
    }
}

#[test]
fn an_association_is_confirmed_by_the_cookie_that_comes_back() -> Result<()> {
    let mut talk = Talk::new()?;
    let backend = talk.ask(Chunk::INIT)?;
    assert_eq!(talk.ask(Chunk::INIT)?, backend, "again, because nobody answered");
    assert_eq!(talk.sizes()?, (0, 2));
    talk.answer(backend, Chunk::INIT_ACK)?;
    assert_eq!(talk.sizes()?, (0, 2));
    assert_eq!(talk.ask(Chunk::COOKIE_ECHO)?, backend);
    assert_eq!(talk.sizes()?, (2, 0));
    talk.answer(backend, Chunk::COOKIE_ACK)?;
    assert_eq!(talk.ask(Chunk::DATA)?, backend);
    assert_eq!((talk.opened()?, talk.bed.counter(Hook::PodIn, Outcome::Confirmed)?), (1, 1));
    Ok(())
}

#[test]
fn a_cookie_that_answers_nothing_confirms_nothing() -> Result<()> {
    let mut talk = Talk::new()?;
    talk.ask(Chunk::INIT)?;
    talk.ask(Chunk::COOKIE_ECHO)?;
    assert_eq!(talk.sizes()?, (0, 2));
    Ok(())
}

/// RFC 9260 §5.2: a host that has started anew opens an association that its peer still has.
#[test]
fn an_init_on_a_live_association_stays_with_its_backend() -> Result<()> {
    let mut talk = Talk::new()?;
    let backend = talk.establish()?;
    for _ in 0..8 {
        assert_eq!(talk.ask(Chunk::INIT)?, backend);
    }
    assert_eq!(talk.opened()?, 1);
    Ok(())
}

#[test]
fn an_init_after_the_end_of_an_association_begins_another() -> Result<()> {
    type End = fn(&mut Talk, IpAddr) -> Result<()>;
    let ends: [(&str, End); 4] = [
        ("the client aborts", |talk, _| talk.ask(Chunk::ABORT).map(drop)),
        ("the backend aborts", |talk, backend| talk.answer(backend, Chunk::ABORT)),
        ("the client shuts down", |talk, backend| {
            talk.ask(Chunk::SHUTDOWN)?;
            talk.answer(backend, Chunk::SHUTDOWN_ACK)?;
            talk.ask(Chunk::SHUTDOWN_COMPLETE).map(drop)
        }),
        ("the backend shuts down", |talk, backend| {
            talk.answer(backend, Chunk::SHUTDOWN)?;
            talk.ask(Chunk::SHUTDOWN_ACK).map(drop)
        }),
    ];
    for (name, end) in ends {
        let mut talk = Talk::new()?;
        let backend = talk.establish()?;
        assert_eq!(talk.bed.active(1)? + talk.bed.active(2)?, 1, "{name}");
        end(&mut talk, backend)?;
        assert_eq!(talk.bed.active(1)? + talk.bed.active(2)?, 0, "{name}");
        talk.ask(Chunk::INIT)?;
        assert_eq!(talk.opened()?, 2, "{name}");
        assert_eq!(talk.sizes()?, (0, 2), "{name}");
    }
    Ok(())
}

#[test]
fn associations_live_as_long_as_the_kernels_own() -> Result<()> {
    let mut talk = Talk::new()?;
    talk.establish()?;
    for (silence, opened) in [(209, 1), (211, 2)] {
        talk.age(silence)?;
        talk.ask(Chunk::DATA)?;
        assert_eq!(talk.opened()?, opened, "established and silent for {silence} s");
    }
    let mut talk = Talk::new()?;
    talk.ask(Chunk::INIT)?;
    for (silence, opened) in [(9, 1), (11, 2)] {
        talk.age(silence)?;
        talk.ask(Chunk::INIT)?;
        assert_eq!(talk.opened()?, opened, "opening and silent for {silence} s");
    }
    Ok(())
}

/// Addresses of a multi-homed host: parameters of types 5 and 6 (RFC 9260 §3.3.2.1).
#[test]
fn the_addresses_a_multi_homed_host_tells_of_are_left_alone() -> Result<()> {
    let mut parameters = vec![0, 5, 0, 8, 10, 244, 1, 5, 0, 5, 0, 8, 172, 16, 0, 5, 0, 6, 0, 20];
    parameters.extend("2001:db8:9::5".parse::<Ipv6Addr>()?.octets());
    for family in Family::BOTH {
        for (hook, passed, ..) in HOOKS {
            let target = (POD2.address(family), TARGET);
            let mut bed = bed(family, &[target.0])?;
            let mut init = request(hook, family, Chunk::INIT);
            init.payload.extend(&parameters);
            let sent = bed.expect(hook, &init, passed)?;
            assert_eq!(sent, Frame { destination: target, ..init.clone() }, "{hook:?} {family:?}");

            let out = if hook == Hook::PodIn { Hook::PodOut } else { Hook::UplinkOut };
            let mut ack = Frame::new(target, init.source, Transport::Sctp(Chunk::INIT_ACK));
            ack.payload = init.payload;
            let seen = bed.expect(out, &ack, action::TC_NEXT)?;
            assert_eq!(seen, Frame { source: init.destination, ..ack }, "{hook:?} {family:?}");
        }
    }
    Ok(())
}

/// Trap 14: a device or the kernel computes it later, over everything, or there is none (RFC 9653).
#[test]
fn a_checksum_of_zero_stays_zero() -> Result<()> {
    for family in Family::BOTH {
        for (hook, passed, ..) in HOOKS {
            let mut bed = bed(family, &[POD2.address(family)])?;
            let request = request(hook, family, Chunk::DATA);
            let mut bytes = request.bytes();
            let start = transport(family);
            bytes[start + 8..start + 12].fill(0);
            let ran = bed.run_bytes(hook, &bytes)?;
            assert_eq!(ran.action, passed);
            assert_eq!(ran.bytes[start + 8..start + 12], [0; 4], "{hook:?} {family:?}");
            let mut completed = ran.bytes;
            let sum = sctp::checksum(&completed[start..]);
            completed[start + 8..start + 12].copy_from_slice(&sum);
            let expected = Frame { destination: (POD2.address(family), TARGET), ..request };
            assert_eq!(Frame::read(&completed), expected, "{hook:?} {family:?}");
        }
    }
    Ok(())
}

#[test]
fn long_packets_and_packets_with_padding_behind_them_keep_a_right_checksum() -> Result<()> {
    for family in Family::BOTH {
        let mut bed = bed(family, &[POD2.address(family)])?;
        for length in [0_u32, 1, 2, 3, 4, 230, 231, 232, 236, 240, 255, 256, 1_000, 1_400] {
            for (hook, passed, ..) in HOOKS {
                let mut request = request(hook, family, Chunk::DATA);
                request.payload = (0..length).map(|index| index as u8).collect();
                let expected = Frame { destination: (POD2.address(family), TARGET), ..request.clone() };
                let mut bytes = request.bytes();
                bytes.extend([0xee; 6]);
                let ran = bed.run_bytes(hook, &bytes)?;
                assert_eq!((ran.action, ran.bytes.len()), (passed, bytes.len()), "{hook:?} {family:?} {length}");
                assert_eq!(Frame::read(&ran.bytes), expected, "{hook:?} {family:?} {length}");
            }
        }
    }
    Ok(())
}

#[test]
fn chunks_that_lie_about_their_length_are_passed_on() -> Result<()> {
    for family in Family::BOTH {
        let mut bed = bed(family, &[POD2.address(family)])?;
        for (hook, passed, ..) in HOOKS {
            // A chunk has four bytes at least, and this one has twenty.
            for length in [0_u16, 1, 3, 21, 22, 1_000, u16::MAX] {
                let mut bytes = request(hook, family, Chunk::INIT).bytes();
                let start = transport(family);
                bytes[start + 14..start + 16].copy_from_slice(&length.to_be_bytes());
                let before = bed.counter(hook, Outcome::PassMalformed)?;
                let ran = bed.run_bytes(hook, &bytes)?;
                assert_eq!((ran.action, &ran.bytes), (passed, &bytes), "{hook:?} {family:?} {length}");
                assert_eq!(bed.counter(hook, Outcome::PassMalformed)?, before + 1, "{hook:?} {family:?} {length}");
            }
        }
        assert_eq!(bed.flows("EMBRYOS_V4")?.len() + bed.flows_v6("EMBRYOS_V6")?.len(), 0);
    }
    Ok(())
}

/// Its checksum covers all fragments, whose length nobody knows before the last.
#[test]
fn a_first_fragment_is_passed_on() -> Result<()> {
    let mut bed = bed(Family::V4, &[POD2.v4.into()])?;
    for (hook, passed, ..) in HOOKS {
        let mut bytes = request(hook, Family::V4, Chunk::DATA).bytes();
        bytes[20] = 0x20;
        let header = etherparse::Ipv4HeaderSlice::from_slice(&bytes[14..34])?.to_header();
        bytes[24..26].copy_from_slice(&header.calc_header_checksum().to_be_bytes());
        let ran = bed.run_bytes(hook, &bytes)?;
        assert_eq!((ran.action, &ran.bytes), (passed, &bytes), "{hook:?}");
        assert_eq!(bed.counter(hook, Outcome::PassProtocol)?, 1, "{hook:?}");
    }
    Ok(())
}

/// The answer to a packet, read and checked but for flags and tag, which it returns.
fn aborted(request: &Frame, family: Family, bytes: &[u8]) -> (u8, [u8; 4]) {
    let start = transport(family);
    assert_eq!(bytes.len(), start + 24);
    assert_eq!(bytes[start + 16..start + 20], [0, 12, 0, 8], "user-initiated, eight bytes");
    let seen = Frame::read(bytes);
    let expected = Frame {
        macs: (MACS.1, MACS.0),
        payload: bytes[start + 16..].to_vec(),
        ..Frame::new(request.destination, request.source, Transport::Sctp(Chunk::ABORT))
    };
    assert_eq!(seen, expected);
    // As the kernel completes a partial one, over what stands in its place (`skb_crc32c_csum_help`).
    assert_eq!(crc32c::crc32c(&bytes[start..]).to_le_bytes(), bytes[start + 8..start + 12], "completing changes it");
    let mut tag = [0; 4];
    tag.copy_from_slice(&bytes[start + 4..start + 8]);
    (bytes[start + 13], tag)
}

/// RFC 9260 §8.4: the tag of who opens is in its INIT; of anybody else only the own one is known, and that is said.
#[test]
fn a_packet_to_nobody_is_answered_with_an_abort() -> Result<()> {
    for family in Family::BOTH {
        let mut bed = bed(family, &[])?;
        for (hook, _, sent, _) in HOOKS {
            for (chunk, expected) in [
                (Chunk::INIT, (0, INITIATE_TAG)),
                (Chunk::DATA, (1, TAG)),
                (Chunk::COOKIE_ECHO, (1, TAG)),
                (Chunk::SHUTDOWN_ACK, (1, TAG)),
            ] {
                let mut request = request(hook, family, chunk);
                if chunk == Chunk::SHUTDOWN_ACK {
                    request.payload.clear();
                }
                let before = bed.counter(hook, Outcome::RejectNoEndpoint)?;
                let ran = bed.run(hook, &request)?;
                assert_eq!(ran.action, sent, "{hook:?} {family:?} {chunk:?}");
                assert_eq!(aborted(&request, family, &ran.bytes), expected, "{hook:?} {family:?} {chunk:?}");
                assert_eq!(bed.counter(hook, Outcome::RejectNoEndpoint)?, before + 1);
            }
        }
    }
    Ok(())
}

#[test]
fn what_ends_an_association_is_not_answered() -> Result<()> {
    let mut bed = bed(Family::V4, &[])?;
    for (hook, _, _, dropped) in HOOKS {
        for chunk in [Chunk::ABORT, Chunk::SHUTDOWN_COMPLETE] {
            assert_eq!(bed.run(hook, &request(hook, Family::V4, chunk))?.action, dropped, "{hook:?} {chunk:?}");
        }
    }
    Ok(())
}

#[test]
fn an_association_whose_backend_has_gone_is_aborted_with_its_own_tag() -> Result<()> {
    let mut talk = Talk::new()?;
    let backend = talk.establish()?;
    let id = if backend == POD2.v4 { 1 } else { 2 };
    talk.bed.set_backend(id, backend, true, BackendState::Gone, 1)?;
    talk.age(1)?;
    let request = request(Hook::PodIn, Family::V4, Chunk::DATA);
    let ran = talk.bed.run(Hook::PodIn, &request)?;
    assert_eq!(ran.action, action::TC_REDIRECT);
    assert_eq!(aborted(&request, Family::V4, &ran.bytes), (1, TAG));
    assert_eq!(talk.bed.counter(Hook::PodIn, Outcome::ResetGone)?, 1);
    Ok(())
}

/// Path MTU discovery: the quote's ports and addresses are what the client sent; its checksum nobody can check.
#[test]
fn an_icmp_error_about_a_packet_names_what_its_sender_knows() -> Result<()> {
    let mut talk = Talk::new()?;
    let backend = talk.establish()?;
    let sent = Frame::new((POD.v4.into(), 4_000), (backend, TARGET), Transport::Sctp(Chunk::DATA));
    let quote = &sent.bytes()[ETHERNET..ETHERNET + 28];
    let kind = etherparse::Icmpv4Type::DestinationUnreachable(
        etherparse::icmpv4::DestUnreachableHeader::FragmentationNeeded { next_hop_mtu: 1_400 },
    );
    let mut error = Vec::new();
    etherparse::PacketBuilder::ethernet2(MACS.1, MACS.0)
        .ipv4([203, 0, 113, 9], POD.v4.octets(), 61)
        .icmpv4(kind.clone())
        .write(&mut error, quote)?;
    let ran = talk.bed.run_bytes(Hook::PodOut, &error)?;
    let known = Frame { destination: (SERVICE.v4.into(), PORT), ..sent };
    let mut expected = Vec::new();
    etherparse::PacketBuilder::ethernet2(MACS.1, MACS.0)
        .ipv4([203, 0, 113, 9], POD.v4.octets(), 61)
        .icmpv4(kind)
        .write(&mut expected, &known.bytes()[ETHERNET..ETHERNET + 28])?;
    assert_eq!((ran.action, ran.bytes), (action::TC_NEXT, expected));
    assert_eq!(talk.bed.counter(Hook::PodOut, Outcome::Related)?, 1);
    Ok(())
}
