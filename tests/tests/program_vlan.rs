//! VLAN tags: what is behind them is translated where it stands, if the node has a device for them, and nothing leaves by
//! another way than the one it came by, or the kernel's.

use std::net::{Ipv4Addr, Ipv6Addr};

use anyhow::{Context as _, Result};
use proxy_common::{
    addr::Protocol,
    outcome::{Hook, Outcome},
};
use tests::{
    between::{Between, tagged},
    frame::{Family, Flags, Frame, Host, Transport},
    testbed::{CLIENT, NODE, NODE_PORT, POD, PORT, REMOTE, SERVICE, TARGET, Testbed, action},
};

/// 802.1Q, number 100, priority 5.
const TAG: [u8; 4] = [0x81, 0, 0xa0, 100];
/// 802.1ad, number 200.
const OUTER: [u8; 4] = [0x88, 0xa8, 0, 200];
/// 802.1Q, number 100, in the VLAN of [`OUTER`].
const INNER: [u8; 4] = [0x81, 0, 0, 100];
/// 802.1Q, a priority and no number.
const PRIORITY: [u8; 4] = [0x81, 0, 0xe0, 0];
/// 802.1Q, number 300, for which there is no device.
const UNKNOWN: [u8; 4] = [0x81, 0, 1, 44];

/// Tags as they come; and those of them that a classifier leaves in the frame, while the kernel keeps the first.
type Tags = (&'static [[u8; 4]], &'static [[u8; 4]]);

/// One, of either protocol, and two.
const TAGS: [Tags; 4] = [(&[TAG], &[]), (&[OUTER], &[]), (&[OUTER, INNER], &[INNER]), (&[PRIORITY, TAG], &[TAG])];

const TRANSPORTS: [Transport; 3] = [Transport::Tcp(Flags::SYN), Transport::Udp, Transport::UdpUnchecked];

/// What stands for the node's addresses.
const ANY: Host = Host { v4: Ipv4Addr::UNSPECIFIED, v6: Ipv6Addr::UNSPECIFIED };

/// Hooks, what they answer to a packet that goes on through the kernel, and to one that goes back.
const HOOKS: [(Hook, i32, i32); 3] = [
    (Hook::UplinkXdp, action::XDP_PASS, action::XDP_TX),
    (Hook::UplinkIn, action::TC_NEXT, action::TC_REDIRECT),
    (Hook::PodIn, action::TC_NEXT, action::TC_REDIRECT),
];

/// A testbed whose uplink has VLANs 100 and 200, and 100 in 200.
fn bed(family: Family) -> Result<Testbed> {
    let mut bed = Testbed::new()?;
    let uplink = bed.uplink();
    bed.add_vlan(uplink, 0x8100, 100, 1_000)?;
    bed.add_vlan(uplink, 0x88a8, 200, 2_000)?;
    bed.add_vlan(2_000, 0x8100, 100, 2_100)?;
    let (here, elsewhere) =
        (bed.add_backend(POD.address(family), true)?, bed.add_backend(REMOTE.address(family), false)?);
    for proto in [Protocol::Tcp, Protocol::Udp] {
        bed.add_service(SERVICE.address(family), PORT, proto, &[here])?;
        bed.add_service(SERVICE.address(family), PORT + 1, proto, &[])?;
        bed.add_service(ANY.address(family), NODE_PORT, proto, &[elsewhere])?;
    }
    Ok(bed)
}

fn for_each_kind(test: impl Fn(&mut Testbed, Family, Transport, u16) -> Result<()>) -> Result<()> {
    for family in Family::BOTH {
        let mut bed = bed(family)?;
        for (port, transport) in (4_000..).zip(TRANSPORTS) {
            test(&mut bed, family, transport, port * 10).with_context(|| format!("{family:?} {transport:?}"))?;
        }
    }
    Ok(())
}

/// The tags that are in the frame after a hook.
fn left(hook: Hook, (whole, standing): Tags) -> &'static [[u8; 4]] {
    if hook == Hook::UplinkXdp { whole } else { standing }
}

#[test]
fn a_tagged_packet_to_a_pod_here_is_translated_and_keeps_its_tags() -> Result<()> {
    for_each_kind(|bed, family, transport, port| {
        for (hook, passed, _) in HOOKS {
            for (port, tags) in (port..).zip(TAGS) {
                let request = Frame::new((CLIENT.address(family), port), (SERVICE.address(family), PORT), transport);
                let wanted = Frame { destination: (POD.address(family), TARGET), ..request.clone() };
                let ran = bed.run_bytes(hook, &tagged(&request.bytes(), tags.0))?;
                assert_eq!(
                    (ran.action, ran.bytes),
                    (passed, tagged(&wanted.bytes(), left(hook, tags))),
                    "{hook:?} {tags:02x?}"
                );
            }
        }
        Ok(())
    })
}

#[test]
fn options_and_extensions_behind_tags_are_walked() -> Result<()> {
    for_each_kind(|bed, family, transport, port| {
        for (name, between) in Between::usual(family) {
            let request = Frame::new((CLIENT.address(family), port), (SERVICE.address(family), PORT), transport);
            let wanted = Frame { destination: (POD.address(family), TARGET), ..request.clone() };
            let ran = bed.run_bytes(Hook::UplinkXdp, &tagged(&between.put_into(&request.bytes()), &[OUTER, INNER]))?;
            let wanted = tagged(&between.put_into(&wanted.bytes()), &[OUTER, INNER]);
            assert_eq!((ran.action, ran.bytes), (action::XDP_PASS, wanted), "{name}");
        }
        Ok(())
    })
}

/// The kernel knows which tags the way out has, so it finds that: the destination is replaced here, the source there.
#[test]
fn a_tagged_packet_to_a_pod_elsewhere_is_left_to_the_kernel_to_route() -> Result<()> {
    for_each_kind(|bed, family, transport, port| {
        for (hook, passed, sent_out) in &HOOKS[..2] {
            for (port, tags) in (port..).zip(TAGS) {
                let client = (CLIENT.address(family), port);
                let target = (REMOTE.address(family), TARGET);
                let frontend = (NODE.address(family), NODE_PORT);
                let request = Frame::new(client, frontend, transport);
                let routed = Frame { destination: target, ..request.clone() };
                let ran = bed.run_bytes(*hook, &tagged(&request.bytes(), tags.0))?;
                assert_eq!(
                    (ran.action, ran.bytes),
                    (*passed, tagged(&routed.bytes(), left(*hook, tags))),
                    "{hook:?} {tags:02x?}"
                );
                let sent = bed.expect(Hook::UplinkOut, &routed, action::TC_NEXT)?;
                assert_eq!((sent.source.0, sent.destination), (NODE.address(family), target));

                let reply = Frame::new(target, sent.source, transport);
                let routed = Frame { destination: client, ..reply.clone() };
                let ran = bed.run_bytes(*hook, &tagged(&reply.bytes(), tags.0))?;
                assert_eq!(
                    (ran.action, ran.bytes),
                    (*passed, tagged(&routed.bytes(), left(*hook, tags))),
                    "{hook:?} {tags:02x?}"
                );
                let seen = bed.expect(Hook::UplinkOut, &routed, action::TC_NEXT)?;
                assert_eq!((seen.source, seen.destination), (frontend, client));

                // One without tags takes the short way, and does not spoil it for those with.
                let sent = bed.expect(*hook, &request, *sent_out)?;
                assert_eq!((sent.source.0, sent.destination), (NODE.address(family), target));
                let ran = bed.run_bytes(*hook, &tagged(&request.bytes(), tags.0))?;
                assert_eq!(ran.action, *passed);
            }
        }
        Ok(())
    })
}

#[test]
fn who_is_refused_is_told_behind_the_same_tags() -> Result<()> {
    for_each_kind(|bed, family, transport, port| {
        for (hook, _, sent_back) in HOOKS {
            for tags in TAGS {
                let client = (CLIENT.address(family), port);
                let request = Frame::new(client, (SERVICE.address(family), PORT + 1), transport).bytes();
                let plain = bed.run_bytes(hook, &request)?;
                assert_eq!(plain.action, sent_back);
                let ran = bed.run_bytes(hook, &tagged(&request, tags.0))?;
                assert_eq!(
                    (ran.action, ran.bytes),
                    (sent_back, tagged(&plain.bytes, left(hook, tags))),
                    "{hook:?} {tags:02x?}"
                );
            }
        }
        Ok(())
    })
}

#[test]
fn tags_that_no_device_is_for_and_more_than_two_are_passed_on() -> Result<()> {
    let cases: [(&str, &[[u8; 4]]); 5] = [
        ("a VLAN the node does not have", &[UNKNOWN]),
        ("one in a VLAN that has none", &[TAG, INNER]),
        ("the other protocol's number", &[[0x88, 0xa8, 0, 100]]),
        ("the inner one alone is known", &[UNKNOWN, TAG]),
        ("three", &[OUTER, INNER, INNER]),
    ];
    for_each_kind(|bed, family, transport, port| {
        let request = Frame::new((CLIENT.address(family), port), (SERVICE.address(family), PORT), transport).bytes();
        for (hook, passed, _) in HOOKS {
            for (name, tags) in cases {
                let bytes = tagged(&request, tags);
                let before = bed.counter(hook, Outcome::PassVlan)?;
                let ran = bed.run_bytes(hook, &bytes)?;
                assert_eq!((ran.action, ran.bytes), (passed, bytes), "{hook:?}: {name}");
                assert_eq!(bed.counter(hook, Outcome::PassVlan)?, before + 1, "{hook:?}: {name}");
            }
        }
        Ok(())
    })
}

/// Cut anywhere, and ARP: nothing but XDP's frames can be compared to the byte, because the kernel itself takes tags out.
#[test]
fn what_is_not_understood_behind_tags_keeps_them() -> Result<()> {
    for_each_kind(|bed, family, transport, port| {
        let request = Frame::new((CLIENT.address(family), port), (SERVICE.address(family), PORT), transport).bytes();
        let whole = tagged(&request, &[OUTER, INNER]);
        for length in 14..whole.len() {
            let ran = bed.run_bytes(Hook::UplinkXdp, &whole[..length])?;
            assert_eq!((ran.action, ran.bytes.as_slice()), (action::XDP_PASS, &whole[..length]), "{length}");
        }
        let mut arp = tagged(&request, &[TAG]);
        arp[16..18].copy_from_slice(&[8, 6]);
        let before = bed.counters()?;
        for (hook, passed, _) in HOOKS {
            let ran = bed.run_bytes(hook, &arp)?;
            assert_eq!((ran.action, &ran.bytes), (passed, &arp), "{hook:?}");
        }
        assert_eq!(bed.counters()?, before);
        Ok(())
    })
}
