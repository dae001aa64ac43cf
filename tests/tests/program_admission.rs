//! Who may have a new flow, and what becomes of the packets that may not: the tables of answers, on the real verifier.

use std::net::{Ipv4Addr, Ipv6Addr};

use anyhow::Result;
use proxy_common::{
    addr::{Ipv4, Ipv6, Protocol},
    node::{Cidr, ServiceCidrs},
    outcome::{Hook, Outcome},
    service::{Service, flag},
};
use tests::{
    frame::{Family, Flags, Frame, Host, Transport},
    testbed::{CLIENT, NODE, OTHER_SERVICE, POD, PORT, REMOTE, SERVICE, Testbed, action},
};

/// Another client beyond the router.
const OTHER_CLIENT: Host =
    Host { v4: Ipv4Addr::new(198, 51, 100, 8), v6: Ipv6Addr::new(0x2001, 0xdb8, 0xfe01, 0, 0, 0, 0, 8) };
const SYN: Transport = Transport::Tcp(Flags::SYN);

/// Where new flows come from.
const WAYS_IN: [Hook; 3] = [Hook::PodIn, Hook::UplinkIn, Hook::UplinkXdp];

/// A client whose packets come this way; another for each, because two of the ways see the same flows.
fn client_at(hook: Hook) -> Host {
    match hook {
        Hook::PodIn => POD,
        Hook::UplinkXdp => OTHER_CLIENT,
        _ => CLIENT,
    }
}

/// Runs a packet for which one thing must be counted, once.
fn must_count(bed: &mut Testbed, hook: Hook, frame: &Frame, outcome: Outcome) -> Result<()> {
    let before = bed.counter(hook, outcome)?;
    bed.run(hook, frame)?;
    assert_eq!(bed.counter(hook, outcome)?, before + 1, "{outcome:?} at {hook:?} for {frame:?}");
    Ok(())
}

/// Ranges that hold [`SERVICE`].
fn around_services() -> ServiceCidrs {
    let mut cidrs = ServiceCidrs::NONE;
    let (v4, v6) = (SERVICE.v4.octets(), SERVICE.v6.octets());
    cidrs.v4[1] = Cidr { addr: Ipv4 { octets: [v4[0], v4[1], 0, 0] }, mask: Ipv4 { octets: [255, 255, 0, 0] } };
    let mut mask = [0; 16];
    mask[..6].fill(255);
    cidrs.v6[1] = Cidr {
        addr: Ipv6 { octets: std::array::from_fn(|index| v6[index] & mask[index]) },
        mask: Ipv6 { octets: mask },
    };
    cidrs
}

#[test]
fn a_port_of_a_cluster_ip_that_nobody_defined_is_rejected_and_defined_ones_are_served() -> Result<()> {
    for family in Family::BOTH {
        for (transport, proto) in [(SYN, Protocol::Tcp), (Transport::Udp, Protocol::Udp)] {
            let mut bed = Testbed::new()?;
            let backend = bed.add_backend(REMOTE.address(family), false)?;
            bed.add_service(SERVICE.address(family), PORT, proto, &[backend])?;
            bed.set_service(SERVICE.address(family), 0, Protocol::Any, Service::default())?;
            for hook in WAYS_IN {
                let client = client_at(hook).address(family);
                let to = |port| Frame::new((client, 4_000), (SERVICE.address(family), port), transport);
                must_count(&mut bed, hook, &to(PORT + 1), Outcome::RejectNoPort)?;
                must_count(&mut bed, hook, &to(PORT), Outcome::Opened)?;
            }
        }
    }
    Ok(())
}

/// Trap 22: what may become a ClusterIP a moment later goes nowhere, not even by a default route.
#[test]
fn an_address_that_could_be_a_cluster_ip_and_is_none_is_dropped() -> Result<()> {
    for family in Family::BOTH {
        for transport in [SYN, Transport::Tcp(Flags::ACK), Transport::Udp] {
            let mut bed = Testbed::new()?;
            bed.add_service(OTHER_SERVICE.address(family), PORT, Protocol::Tcp, &[])?;
            // At last the node has the address itself, as that of a DNS cache.
            for (cidrs, dropped, is_own) in
                [(around_services(), 1, false), (ServiceCidrs::NONE, 0, false), (around_services(), 0, true)]
            {
                bed.set_service_cidrs(cidrs)?;
                if is_own {
                    bed.add_local_addr(SERVICE.address(family))?;
                }
                for (hook, port) in WAYS_IN.into_iter().flat_map(|hook| [(hook, PORT), (hook, 30_000)]) {
                    let client = client_at(hook).address(family);
                    let before = bed.counter(hook, Outcome::DropUnallocated)?;
                    bed.run(hook, &Frame::new((client, 4_000), (SERVICE.address(family), port), transport))?;
                    let counted = bed.counter(hook, Outcome::DropUnallocated)? - before;
                    assert_eq!(counted, dropped, "{family:?} {transport:?} at {hook:?}, port {port}");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn a_service_with_source_ranges_serves_clients_in_them_and_drops_the_others() -> Result<()> {
    for family in Family::BOTH {
        for (transport, proto) in [(SYN, Protocol::Tcp), (Transport::Udp, Protocol::Udp)] {
            let mut bed = Testbed::new()?;
            let backend = bed.add_backend(REMOTE.address(family), false)?;
            let range = bed.add_slots(&[backend])?;
            let ranged = Service {
                index: 3,
                flags: flag::EXTERNAL | flag::SOURCE_RANGES,
                internal: range,
                external: range,
                ..Service::default()
            };
            bed.set_service(SERVICE.address(family), PORT, proto, ranged)?;
            let (len, host_len) = if family == Family::V4 { (24, 32) } else { (64, 128) };
            for hook in WAYS_IN {
                let client = client_at(hook).address(family);
                let from = |sport| Frame::new((client, sport), (SERVICE.address(family), PORT), transport);
                must_count(&mut bed, hook, &from(1), Outcome::DropSource)?;
                // The ranges of another Service are not this one's.
                bed.add_source(4, client, 0)?;
                bed.add_source(3, OTHER_SERVICE.address(family), host_len)?;
                must_count(&mut bed, hook, &from(2), Outcome::DropSource)?;
            }
            for hook in WAYS_IN {
                let client = client_at(hook).address(family);
                bed.add_source(3, client, if hook == Hook::PodIn { host_len } else { len })?;
                let from = |sport| Frame::new((client, sport), (SERVICE.address(family), PORT), transport);
                must_count(&mut bed, hook, &from(3), Outcome::Opened)?;
            }
        }
    }
    Ok(())
}

#[test]
fn a_flow_that_was_let_in_goes_on_without_its_range_and_a_new_one_does_not_begin() -> Result<()> {
    for family in Family::BOTH {
        let cases = [(SYN, Transport::Tcp(Flags::ACK), Protocol::Tcp), (Transport::Udp, Transport::Udp, Protocol::Udp)];
        for (first, later, proto) in cases {
            let mut bed = Testbed::new()?;
            let backend = bed.add_backend(REMOTE.address(family), false)?;
            let range = bed.add_slots(&[backend])?;
            let flags = flag::EXTERNAL | flag::SOURCE_RANGES | flag::SOURCE_KEPT;
            let ranged = Service { index: 3, flags, internal: range, external: range, ..Service::default() };
            bed.set_service(SERVICE.address(family), PORT, proto, ranged)?;
            let (client, bits) = (POD.address(family), if family == Family::V4 { 24 } else { 64 });
            let from = |sport, transport| Frame::new((client, sport), (SERVICE.address(family), PORT), transport);
            bed.add_source(3, client, bits)?;
            must_count(&mut bed, Hook::PodIn, &from(1, first), Outcome::Opened)?;
            bed.remove_source(3, client, bits)?;
            must_count(&mut bed, Hook::PodIn, &from(2, first), Outcome::DropSource)?;
            let sent = bed.expect(Hook::PodIn, &from(1, later), action::TC_NEXT)?;
            assert_eq!(sent.destination.0, REMOTE.address(family), "{family:?} {proto:?}");
        }
    }
    Ok(())
}

#[test]
fn a_frontends_own_address_is_a_source_where_the_node_is_one() -> Result<()> {
    let mut bed = Testbed::new()?;
    let backend = bed.add_backend(REMOTE.v4.into(), false)?;
    let range = bed.add_slots(&[backend])?;
    let service =
        Service { index: 3, flags: flag::SOURCE_RANGES, internal: range, external: range, ..Service::default() };
    bed.set_service(SERVICE.v4.into(), PORT, Protocol::Tcp, service)?;
    let from = |host: Host, sport| Frame::new((host.v4.into(), sport), (SERVICE.v4.into(), PORT), SYN);
    must_count(&mut bed, Hook::PodIn, &from(SERVICE, 1), Outcome::DropSource)?;
    bed.add_source(3, NODE.v4.into(), 32)?;
    must_count(&mut bed, Hook::PodIn, &from(SERVICE, 2), Outcome::Opened)?;
    must_count(&mut bed, Hook::PodIn, &from(POD, 3), Outcome::DropSource)
}
