//! Pings of Services: the datapath answers for addresses that no host has.

use std::net::IpAddr;

use anyhow::{Context as _, Result};
use etherparse::{IcmpEchoHeader, Icmpv4Type, Icmpv6Type, NetSlice, PacketBuilder, SlicedPacket, TransportSlice};
use proxy_common::{
    addr::{Ipv4, Ipv6, Protocol},
    node::{Cidr, ServiceCidrs},
    outcome::{Hook, Outcome},
    service::{Service, flag},
};
use tests::{
    frame::{ETHERNET, Family, Host, MACS},
    testbed::{CLIENT, NODE, OTHER_SERVICE, POD, REMOTE, SERVICE, Testbed, action, told},
};

/// Who asks where; and what becomes of a packet that is answered, let go, dropped.
const HOOKS: [(Hook, Host, [i32; 3]); 3] = [
    (Hook::PodIn, POD, [action::TC_REDIRECT, action::TC_NEXT, action::TC_DROP]),
    (Hook::UplinkIn, CLIENT, [action::TC_REDIRECT, action::TC_NEXT, action::TC_DROP]),
    (Hook::UplinkXdp, CLIENT, [action::XDP_TX, action::XDP_PASS, action::XDP_DROP]),
];

const ECHO: IcmpEchoHeader = IcmpEchoHeader { id: 0x1234, seq: 7 };

/// An echo request with a hop limit and a payload of odd length.
fn request(from: IpAddr, to: IpAddr, hop_limit: u8) -> Vec<u8> {
    let ethernet = PacketBuilder::ethernet2(MACS.1, MACS.0);
    let mut bytes = Vec::new();
    let written = match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => ethernet
            .ipv4(from.octets(), to.octets(), hop_limit)
            .icmpv4(Icmpv4Type::EchoRequest(ECHO))
            .write(&mut bytes, &[0xa5; 57]),
        (IpAddr::V6(from), IpAddr::V6(to)) => ethernet
            .ipv6(from.octets(), to.octets(), hop_limit)
            .icmpv6(Icmpv6Type::EchoRequest(ECHO))
            .write(&mut bytes, &[0xa5; 57]),
        _ => unreachable!("both are of one family"),
    };
    written.map(|()| bytes).unwrap_or_default()
}

/// Reads an echo reply with all its checksums: source, destination, hop limit.
fn read(bytes: &[u8]) -> Result<(IpAddr, IpAddr, u8)> {
    let sliced = SlicedPacket::from_ethernet(bytes)?;
    match (sliced.net.context("no IP")?, sliced.transport.context("no ICMP")?) {
        (NetSlice::Ipv4(ip), TransportSlice::Icmpv4(icmp)) => {
            let header = ip.header();
            assert_eq!(header.header_checksum(), header.to_header().calc_header_checksum(), "IPv4 header");
            assert_eq!(icmp.icmp_type(), Icmpv4Type::EchoReply(ECHO));
            assert_eq!(icmp.checksum(), icmp.icmp_type().calc_checksum(icmp.payload()), "ICMP");
            assert_eq!(icmp.payload(), [0xa5; 57]);
            Ok((header.source_addr().into(), header.destination_addr().into(), header.ttl()))
        }
        (NetSlice::Ipv6(ip), TransportSlice::Icmpv6(icmp)) => {
            let header = ip.header();
            let computed = icmp.icmp_type().calc_checksum(header.source(), header.destination(), icmp.payload())?;
            assert_eq!(icmp.icmp_type(), Icmpv6Type::EchoReply(ECHO));
            assert_eq!(icmp.checksum(), computed, "ICMPv6");
            assert_eq!(icmp.payload(), [0xa5; 57]);
            Ok((header.source_addr().into(), header.destination_addr().into(), header.hop_limit()))
        }
        other => anyhow::bail!("no echo reply: {other:?}"),
    }
}

/// Two addresses of Services, one inside and one outside; and one that is the node's as well.
fn bed(family: Family) -> Result<Testbed> {
    let mut bed = Testbed::new()?;
    let external = Service { flags: flag::EXTERNAL, ..Service::default() };
    bed.set_service(SERVICE.address(family), 0, Protocol::Any, Service::default())?;
    bed.set_service(OTHER_SERVICE.address(family), 0, Protocol::Any, external)?;
    bed.set_service(NODE.address(family), 0, Protocol::Any, external)?;
    Ok(bed)
}

#[test]
fn a_ping_to_an_address_of_a_service_is_answered_where_it_comes_in() -> Result<()> {
    for family in Family::BOTH {
        let mut bed = bed(family)?;
        bed.watch()?;
        for (hook, client, [answered, ..]) in HOOKS {
            for frontend in [SERVICE, OTHER_SERVICE] {
                for hop_limit in [1, 64, 255] {
                    let (client, frontend) = (client.address(family), frontend.address(family));
                    let ran = bed.run_bytes(hook, &request(client, frontend, hop_limit))?;
                    assert_eq!(ran.action, answered, "{hook:?} {family:?}");
                    assert_eq!(read(&ran.bytes)?, (frontend, client, 64), "{hook:?} {family:?}");
                    assert_eq!((&ran.bytes[..6], &ran.bytes[6..12]), (&MACS.1[..], &MACS.0[..]), "{hook:?}");
                }
            }
            assert_eq!(bed.counter(hook, Outcome::Echoed)?, 6, "{hook:?} {family:?}");
        }
        let events = bed.events()?;
        assert_eq!(told(&events), bed.counters()?);
        // As they came, and not as they left.
        let frontends = [SERVICE, OTHER_SERVICE].map(|host| match host.address(family) {
            IpAddr::V4(address) => Ipv6::mapped(address.into()),
            IpAddr::V6(address) => address.into(),
        });
        assert!(events.iter().all(|event| frontends.contains(&event.daddr)), "{events:?}");
    }
    Ok(())
}

#[test]
fn other_pings_are_the_kernels_to_answer() -> Result<()> {
    for family in Family::BOTH {
        let mut bed = bed(family)?;
        let message = ETHERNET + if family == Family::V4 { 20 } else { 40 };
        for (hook, client, [_, passed, _]) in HOOKS {
            let client = client.address(family);
            let mut odd_code = request(client, SERVICE.address(family), 64);
            odd_code[message + 1] = 1;
            let mut to_many = request(client, SERVICE.address(family), 64);
            to_many[0] |= 1;
            let mut reply = request(client, SERVICE.address(family), 64);
            reply[message] = if family == Family::V4 { 0 } else { 129 };
            let nobody = match family {
                Family::V4 => "0.0.0.0".parse()?,
                Family::V6 => "::".parse()?,
            };
            let cases = [
                ("the node's own address", request(client, NODE.address(family), 64)),
                ("an address of nobody we know", request(client, REMOTE.address(family), 64)),
                ("a code that means nothing", odd_code),
                ("a frame to many", to_many),
                ("a reply", reply),
                ("from nobody", request(nobody, SERVICE.address(family), 64)),
            ];
            for (name, bytes) in cases {
                let ran = bed.run_bytes(hook, &bytes)?;
                assert_eq!((ran.action, &ran.bytes), (passed, &bytes), "{hook:?} {family:?}: {name}");
            }
            assert_eq!(bed.counter(hook, Outcome::Echoed)?, 0, "{hook:?} {family:?}");
        }
    }
    Ok(())
}

/// Whoever has the address on the way out has sent the ping: it is let go.
#[test]
fn a_ping_on_its_way_out_is_let_go() -> Result<()> {
    for family in Family::BOTH {
        let mut bed = bed(family)?;
        let bytes = request(NODE.address(family), SERVICE.address(family), 64);
        for hook in [Hook::UplinkOut, Hook::PodOut] {
            let ran = bed.run_bytes(hook, &bytes)?;
            assert_eq!((ran.action, &ran.bytes), (action::TC_NEXT, &bytes), "{hook:?}");
        }
    }
    Ok(())
}

#[test]
fn a_ping_to_an_address_that_no_service_has_stays_unanswered() -> Result<()> {
    let mut cidrs = ServiceCidrs::NONE;
    cidrs.v4[0] = Cidr { addr: Ipv4 { octets: [10, 96, 0, 0] }, mask: Ipv4 { octets: [255, 255, 0, 0] } };
    let mut mask = [0; 16];
    mask[..8].fill(0xff);
    let IpAddr::V6(service) = SERVICE.address(Family::V6) else { anyhow::bail!("not IPv6") };
    let mut network = service.octets();
    network[8..].fill(0);
    cidrs.v6[0] = Cidr { addr: Ipv6 { octets: network }, mask: Ipv6 { octets: mask } };
    for family in Family::BOTH {
        let mut bed = bed(family)?;
        bed.set_service_cidrs(cidrs)?;
        bed.remove_service(SERVICE.address(family), 0, Protocol::Any)?;
        for (hook, client, [_, _, dropped]) in HOOKS {
            let ran = bed.run_bytes(hook, &request(client.address(family), SERVICE.address(family), 64))?;
            assert_eq!(ran.action, dropped, "{hook:?} {family:?}");
            assert_eq!(bed.counter(hook, Outcome::DropUnallocated)?, 1, "{hook:?} {family:?}");
        }
    }
    Ok(())
}
