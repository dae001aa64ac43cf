//! Loopback addresses on packets: no packet that comes to the node, by a wire or from a pod, may bear one. What listens on
//! 127.0.0.1 trusts whoever reaches it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::Result;
use proxy_common::{
    addr::Protocol,
    outcome::{Hook, Outcome},
};
use tests::{
    frame::{Family, Flags, Frame, Transport},
    testbed::{CLIENT, NODE, NODE_PORT, REMOTE, Testbed, action},
};

/// By which packets come.
const WAYS_IN: [Hook; 3] = [Hook::UplinkXdp, Hook::UplinkIn, Hook::PodIn];
const TRANSPORTS: [(Transport, Protocol); 2] =
    [(Transport::Tcp(Flags::SYN), Protocol::Tcp), (Transport::Udp, Protocol::Udp)];
/// Where nobody has a Service.
const OTHER_PORT: u16 = 22;

fn loopbacks(family: Family) -> Vec<IpAddr> {
    match family {
        Family::V4 => [[127, 0, 0, 1], [127, 0, 0, 5], [127, 255, 255, 254]].map(IpAddr::from).into(),
        Family::V6 => vec![Ipv6Addr::LOCALHOST.into()],
    }
}

fn any(family: Family) -> IpAddr {
    if family == Family::V4 { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() }
}

fn is_drop(hook: Hook, action: i32) -> bool {
    action == if hook == Hook::UplinkXdp { action::XDP_DROP } else { action::TC_DROP }
}

/// A node port that is served on the node's address and, for the node's own sockets, on loopback ones.
fn bed(family: Family, proto: Protocol) -> Result<Testbed> {
    let mut bed = Testbed::new()?;
    let backend = bed.add_backend(REMOTE.address(family), false)?;
    for loopback in loopbacks(family) {
        bed.add_local_addr(loopback)?;
    }
    bed.add_service(any(family), NODE_PORT, proto, &[backend])?;
    Ok(bed)
}

/// Trap 25: CVE-2020-8558.
#[test]
fn loopback_addresses_from_a_wire_or_a_pod_are_a_counted_drop() -> Result<()> {
    for family in Family::BOTH {
        for (transport, proto) in TRANSPORTS {
            let mut bed = bed(family, proto)?;
            for loopback in loopbacks(family) {
                for (source, destination) in [
                    (loopback, NODE.address(family)),
                    (CLIENT.address(family), loopback),
                    (loopback, REMOTE.address(family)),
                    (loopback, loopback),
                ] {
                    for port in [NODE_PORT, OTHER_PORT] {
                        let packet = Frame::new((source, 50_000), (destination, port), transport);
                        for hook in WAYS_IN {
                            let before = bed.counter(hook, Outcome::DropMartian)?;
                            let ran = bed.run(hook, &packet)?;
                            assert!(is_drop(hook, ran.action), "{hook:?} answered {} to {packet:?}", ran.action);
                            assert_eq!(bed.counter(hook, Outcome::DropMartian)?, before + 1, "{hook:?}: {packet:?}");
                        }
                    }
                }
            }
        }
    }
    Ok(())
}

/// It stands for the addresses with node ports where Services are looked up, and must not be taken for one.
#[test]
fn the_unspecified_address_is_no_destination() -> Result<()> {
    for family in Family::BOTH {
        for (transport, proto) in TRANSPORTS {
            let mut bed = bed(family, proto)?;
            let packet = Frame::new((CLIENT.address(family), 50_000), (any(family), NODE_PORT), transport);
            for (hook, untouched) in WAYS_IN.into_iter().zip([action::XDP_PASS, action::TC_NEXT, action::TC_NEXT]) {
                let ran = bed.run(hook, &packet)?;
                assert_eq!((ran.action, ran.bytes), (untouched, packet.bytes()), "{hook:?}: {packet:?}");
                assert_eq!(bed.counter(hook, Outcome::Opened)?, 0);
            }
        }
    }
    Ok(())
}
