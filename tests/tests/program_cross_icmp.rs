//! ICMP between the families: errors about translated packets become errors of the other one, and what is too long for its way,
//! or at the end of its life, is told to its sender.
#![allow(clippy::unwrap_used, reason = "packets that a helper builds or reads are part of the test")]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context as _, Result};
use etherparse::{Icmpv4Type, Icmpv6Type, NetSlice, PacketBuilder, SlicedPacket, TransportSlice};
use proxy_common::{
    addr::Protocol,
    outcome::{Hook, Outcome},
    service::{Service, flag},
};
use tests::{
    frame::{ETHERNET, Family, Flags, Frame, MACS, Transport},
    testbed::{self, CLIENT, NODE, NODE_PORT, Nature, OTHER_NODE_MAC, REMOTE, ROUTER_MAC, TARGET, Testbed, action},
};

const UPLINK: Hook = Hook::CrossUplinkIn;
const TRANSPORTS: [(Transport, Protocol); 2] =
    [(Transport::Tcp(Flags::ACK), Protocol::Tcp), (Transport::Udp, Protocol::Udp)];

/// What the four bytes behind an error's checksum and its type say, by family.
type Words = (u8, u8, u32);

fn other(family: Family) -> Family {
    if family == Family::V4 { Family::V6 } else { Family::V4 }
}

fn router(family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(203, 0, 113, 9).into(),
        Family::V6 => Ipv6Addr::new(0x2001, 0xdb8, 0xaaaa, 0, 0, 0, 0, 9).into(),
    }
}

fn header(family: Family) -> usize {
    if family == Family::V4 { 20 } else { 40 }
}

/// A NodePort for clients of a family, with a backend of the other one.
struct Crossing {
    bed: Testbed,
    request: Frame,
}

impl Crossing {
    fn new(family: Family, (transport, proto): (Transport, Protocol)) -> Result<Self> {
        let mut bed = Testbed::new()?;
        bed.add_local_addr(NODE.v4.to_ipv6_mapped().into())?;
        let (backend, any): (IpAddr, IpAddr) = match family {
            Family::V4 => (REMOTE.v6.into(), Ipv4Addr::UNSPECIFIED.to_ipv6_mapped().into()),
            Family::V6 => (REMOTE.v4.to_ipv6_mapped().into(), Ipv6Addr::UNSPECIFIED.into()),
        };
        let id = bed.add_backend(backend, false)?;
        let range = bed.add_slots(&[id])?;
        let flags = flag::EXTERNAL | flag::CROSS;
        let service = Service { index: 1, flags, internal: range, external: range, ..Service::default() };
        bed.set_service(any, NODE_PORT, proto, service)?;
        let request = Frame::new((CLIENT.address(family), 4_000), (NODE.address(family), NODE_PORT), transport);
        Ok(Self { bed, request })
    }

    /// The client's packet, as the backend gets it.
    fn ask(&mut self) -> Result<Frame> {
        self.bed.expect(UPLINK, &self.request.clone(), action::TC_REDIRECT)
    }

    /// The backend's reply to that, and as the client gets it.
    fn reply(&mut self) -> Result<[Frame; 2]> {
        let asked = self.ask()?;
        let reply = Frame::new(asked.destination, asked.source, self.request.transport);
        let sent = self.bed.expect(UPLINK, &reply, action::TC_REDIRECT)?;
        Ok([reply, sent])
    }

    /// A request whose IP packet is so long.
    fn long(&self, length: usize) -> Frame {
        let headers = self.request.bytes().len() - ETHERNET - self.request.payload.len();
        Frame { payload: vec![7; length - headers], ..self.request.clone() }
    }
}

/// An error of a router about a packet, to its sender, which quotes so many bytes behind the IP header.
fn error(words: Words, about: &Frame, quoted: usize) -> Vec<u8> {
    let family = if about.source.0.is_ipv4() { Family::V4 } else { Family::V6 };
    let bytes = about.bytes();
    let quote = &bytes[ETHERNET..(ETHERNET + header(family) + quoted).min(bytes.len())];
    let ethernet = PacketBuilder::ethernet2(MACS.1, MACS.0);
    let (kind, code, rest) = (words.0, words.1, words.2.to_be_bytes());
    let mut packet = Vec::new();
    match (router(family), about.source.0) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let kind = Icmpv4Type::Unknown { type_u8: kind, code_u8: code, bytes5to8: rest };
            ethernet.ipv4(from.octets(), to.octets(), 61).icmpv4(kind).write(&mut packet, quote).unwrap();
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let kind = Icmpv6Type::Unknown { type_u8: kind, code_u8: code, bytes5to8: rest };
            ethernet.ipv6(from.octets(), to.octets(), 61).icmpv6(kind).write(&mut packet, quote).unwrap();
        }
        _ => unreachable!("a router has both"),
    }
    packet
}

/// What an error says.
#[derive(Debug)]
struct Told {
    from: IpAddr,
    to: IpAddr,
    words: Words,
    quote: Vec<u8>,
}

/// Reads an error, after every checksum was computed anew.
fn read(bytes: &[u8]) -> Result<Told> {
    let sliced = SlicedPacket::from_ethernet(bytes)?;
    let (from, to, icmp): (IpAddr, IpAddr, &[u8]) =
        match (sliced.net.context("no IP")?, sliced.transport.context("no ICMP")?) {
            (NetSlice::Ipv4(ip), TransportSlice::Icmpv4(icmp)) => {
                let header = ip.header();
                assert_eq!(header.header_checksum(), header.to_header().calc_header_checksum(), "IPv4 header");
                assert_eq!(icmp.checksum(), icmp.icmp_type().calc_checksum(icmp.payload()), "ICMP");
                assert_eq!(usize::from(header.total_len()), bytes.len() - ETHERNET);
                (header.source_addr().into(), header.destination_addr().into(), icmp.slice())
            }
            (NetSlice::Ipv6(ip), TransportSlice::Icmpv6(icmp)) => {
                let header = ip.header();
                let computed = icmp.icmp_type().calc_checksum(header.source(), header.destination(), icmp.payload())?;
                assert_eq!(icmp.checksum(), computed, "ICMPv6");
                assert_eq!(usize::from(header.payload_length()) + 40, bytes.len() - ETHERNET);
                (header.source_addr().into(), header.destination_addr().into(), icmp.slice())
            }
            other => anyhow::bail!("no error: {other:?}"),
        };
    let rest = u32::from_be_bytes([icmp[4], icmp[5], icmp[6], icmp[7]]);
    Ok(Told { from, to, words: (icmp[0], icmp[1], rest), quote: icmp[8..].to_vec() })
}

/// What an IP header and eight bytes of the transport say, without what differs on the way: the hop limit, IPv4's checksum, and
/// that of UDP, which nobody can check.
fn gist(quote: &[u8]) -> Vec<u8> {
    let mut gist = quote.to_vec();
    let (hop_limit, transport, protocol) = if quote[0] >> 4 == 4 { (8, 20, quote[9]) } else { (7, 40, quote[6]) };
    gist.truncate(transport + 8);
    gist[hop_limit] = 0;
    if transport == 20 {
        gist[10..12].fill(0);
        gist[4..6].fill(0);
    }
    if protocol == 17 {
        gist[transport + 6..transport + 8].fill(0);
    }
    gist
}

/// By family of who complains: what it says, and what it means in the other one.
fn errors(family: Family) -> [(Words, Words); 3] {
    match family {
        Family::V4 => [((3, 4, 1_400), (2, 0, 1_420)), ((3, 3, 0), (1, 4, 0)), ((11, 0, 0), (3, 0, 0))],
        Family::V6 => [((2, 0, 1_400), (3, 4, 1_380)), ((1, 4, 0), (3, 3, 0)), ((3, 0, 0), (11, 0, 0))],
    }
}

#[test]
fn an_error_about_a_request_is_told_to_the_client_in_its_own_family() -> Result<()> {
    for family in Family::BOTH {
        for kind in TRANSPORTS {
            let mut crossing = Crossing::new(family, kind)?;
            crossing.bed.watch()?;
            let sent = crossing.ask()?;
            for (said, meant) in errors(other(family)) {
                for quoted in [8, 20, 2_000] {
                    let ran = crossing.bed.run_bytes(UPLINK, &error(said, &sent, quoted))?;
                    assert_eq!(ran.action, action::TC_REDIRECT, "{family:?} {said:?}");
                    assert_eq!(ran.bytes[..6], ROUTER_MAC);
                    let told = read(&ran.bytes)?;
                    assert_eq!((told.from, told.to), (crossing.request.destination.0, crossing.request.source.0));
                    assert_eq!(told.words, meant, "{said:?}");
                    assert_eq!(gist(&told.quote), gist(&crossing.request.bytes()[ETHERNET..]));
                }
            }
            assert_eq!(crossing.bed.counter(UPLINK, Outcome::Related)?, 9);
            let events = crossing.bed.events()?;
            assert_eq!(testbed::told(&events), crossing.bed.counters()?);
        }
    }
    Ok(())
}

#[test]
fn an_error_about_a_reply_is_told_to_the_backend_in_its_own_family() -> Result<()> {
    for family in Family::BOTH {
        for kind in TRANSPORTS {
            let mut crossing = Crossing::new(family, kind)?;
            let [reply, sent] = crossing.reply()?;
            for (said, meant) in errors(family) {
                let ran = crossing.bed.run_bytes(UPLINK, &error(said, &sent, 20))?;
                assert_eq!(ran.action, action::TC_REDIRECT, "{family:?} {said:?}");
                assert_eq!(ran.bytes[..6], OTHER_NODE_MAC);
                let told = read(&ran.bytes)?;
                assert_eq!((told.from, told.to), (reply.destination.0, reply.source.0));
                assert_eq!(told.words, meant, "{said:?}");
                assert_eq!(gist(&told.quote), gist(&reply.bytes()[ETHERNET..]));
            }
        }
    }
    Ok(())
}

#[test]
fn an_error_about_somebody_elses_packet_is_passed_on() -> Result<()> {
    for family in Family::BOTH {
        let mut crossing = Crossing::new(family, TRANSPORTS[0])?;
        let sent = crossing.ask()?;
        let strange = Frame { source: (sent.source.0, sent.source.1 ^ 1), ..sent.clone() };
        let redirect = (if family == Family::V6 { 5 } else { 137 }, 0, 0);
        let (said, _) = errors(other(family))[0];
        for packet in [error(said, &strange, 20), error(redirect, &sent, 20), error(said, &sent, 7)] {
            let ran = crossing.bed.run_bytes(UPLINK, &packet)?;
            assert_eq!((ran.action, ran.bytes), (action::TC_NEXT, packet));
        }
    }
    Ok(())
}

/// IPv6's header is the longer one: what just fits is told by how much less there is room for.
#[test]
fn a_packet_too_long_for_its_way_is_told_to_its_sender() -> Result<()> {
    const MTU: usize = 1_400;
    for family in Family::BOTH {
        for kind in TRANSPORTS {
            let mut crossing = Crossing::new(family, kind)?;
            crossing.bed.ip(&format!("link set uplink mtu {MTU}"))?;
            let longest = if family == Family::V4 { MTU - 20 } else { MTU + 20 };
            let fits = crossing.long(longest);
            let sent = crossing.bed.expect(UPLINK, &fits, action::TC_REDIRECT)?;
            assert_eq!(sent.bytes().len(), MTU + ETHERNET);
            let too_long = crossing.long(longest + 1);
            let ran = crossing.bed.run(UPLINK, &too_long)?;
            assert_eq!(ran.action, action::TC_REDIRECT);
            let told = read(&ran.bytes)?;
            assert_eq!((told.from, told.to), (too_long.destination.0, too_long.source.0));
            let number = u32::try_from(longest)?;
            assert_eq!(told.words, if family == Family::V4 { (3, 4, number) } else { (2, 0, number) });
            assert_eq!(gist(&told.quote), gist(&too_long.bytes()[ETHERNET..]));
            assert_eq!(crossing.bed.counter(UPLINK, Outcome::Returned)?, 1);
        }
    }
    Ok(())
}

/// What is cut into segments later may be as long as it likes, if they are not.
#[test]
fn segments_are_measured_and_not_what_they_are_cut_from() -> Result<()> {
    const MTU: u32 = 1_400;
    for family in Family::BOTH {
        let mut crossing = Crossing::new(family, TRANSPORTS[0])?;
        crossing.bed.ip(&format!("link set uplink mtu {MTU}"))?;
        let bytes = crossing.long(1_480).bytes();
        let most = MTU - 20 - u32::try_from(header(other(family)))?;
        for (segment, is_sent) in [(most, true), (most + 1, false)] {
            let ran = crossing.bed.run_as(UPLINK, &bytes, Nature { segment, ..Nature::default() })?;
            assert_eq!(ran.action, action::TC_REDIRECT);
            if is_sent {
                assert_eq!(Frame::read(&ran.bytes).destination, (REMOTE.address(other(family)), TARGET), "{family:?}");
            } else {
                assert_eq!(read(&ran.bytes)?.to, crossing.request.source.0, "{family:?}");
            }
        }
    }
    Ok(())
}

#[test]
fn a_packet_at_the_end_of_its_life_is_told_to_its_sender() -> Result<()> {
    for family in Family::BOTH {
        for kind in TRANSPORTS {
            let mut crossing = Crossing::new(family, kind)?;
            let last = Frame { hop_limit: 1, ..crossing.request.clone() };
            let ran = crossing.bed.run(UPLINK, &last)?;
            assert_eq!(ran.action, action::TC_REDIRECT);
            let told = read(&ran.bytes)?;
            assert_eq!((told.from, told.to), (last.destination.0, last.source.0));
            assert_eq!(told.words, if family == Family::V4 { (11, 0, 0) } else { (3, 0, 0) });
            assert_eq!(gist(&told.quote), gist(&last.bytes()[ETHERNET..]));
        }
    }
    Ok(())
}
