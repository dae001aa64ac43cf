//! Whom a frame is for: one that is addressed to another host opens no flow and gets no answer.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::Result;
use proxy_common::{
    addr::Protocol,
    outcome::{Hook, Outcome},
};
use tests::{
    frame::{Family, Flags, Frame, Transport},
    testbed::{CLIENT, NODE, NODE_PORT, OTHER_NODE_MAC, POD, PORT, REMOTE, SERVICE, Testbed, action},
};

const TRANSPORTS: [Transport; 2] = [Transport::Tcp(Flags::SYN), Transport::Udp];
/// Hooks, and what they answer to a packet that is passed on, and to one that is sent on.
const HOOKS: [(Hook, i32, i32); 2] =
    [(Hook::UplinkXdp, action::XDP_PASS, action::XDP_TX), (Hook::UplinkIn, action::TC_NEXT, action::TC_REDIRECT)];

fn any(family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::UNSPECIFIED.into(),
        Family::V6 => Ipv6Addr::UNSPECIFIED.into(),
    }
}

/// A NodePort with a backend elsewhere, and one without any.
fn bed(family: Family) -> Result<Testbed> {
    let mut bed = Testbed::new()?;
    let backend = bed.add_backend(REMOTE.address(family), false)?;
    for proto in [Protocol::Tcp, Protocol::Udp] {
        bed.add_service(any(family), NODE_PORT, proto, &[backend])?;
        bed.add_service(any(family), NODE_PORT + 1, proto, &[])?;
        bed.add_service(SERVICE.address(family), PORT, proto, &[backend])?;
    }
    Ok(bed)
}

fn request(family: Family, port: u16, transport: Transport) -> Frame {
    Frame::new((CLIENT.address(family), 4_000), (NODE.address(family), port), transport)
}

#[test]
fn a_frame_for_another_host_is_passed_on_as_it_is() -> Result<()> {
    for family in Family::BOTH {
        for (hook, passed, _) in HOOKS {
            let mut bed = bed(family)?;
            let mut count = 0;
            for transport in TRANSPORTS {
                for port in [NODE_PORT, NODE_PORT + 1] {
                    let mut frame = request(family, port, transport);
                    frame.macs.0 = OTHER_NODE_MAC;
                    let ran = bed.run(hook, &frame)?;
                    count += 1;
                    assert_eq!((ran.action, &ran.bytes), (passed, &frame.bytes()), "{family:?} {hook:?} {transport:?}");
                    assert_eq!(bed.counter(hook, Outcome::PassOtherHost)?, count);
                }
            }
            assert_eq!(bed.counter(hook, Outcome::Opened)?, 0);
        }
    }
    Ok(())
}

#[test]
fn a_frame_for_this_host_or_for_a_group_is_sent_on_and_so_are_the_others_of_its_flow() -> Result<()> {
    for family in Family::BOTH {
        for (hook, _, sent) in HOOKS {
            let mut bed = bed(family)?;
            for (port, macs) in (4_000..).zip([None, Some([0xff; 6]), Some([0x01, 0, 0x5e, 0, 0, 1])]) {
                let mut frame = request(family, NODE_PORT, Transport::Udp);
                frame.source.1 = port;
                frame.macs.0 = macs.unwrap_or(frame.macs.0);
                assert_eq!(bed.run(hook, &frame)?.action, sent, "{family:?} {hook:?} {macs:?}");
                frame.macs.0 = OTHER_NODE_MAC;
                assert_eq!(bed.run(hook, &frame)?.action, sent, "of a flow of this node");
            }
            assert_eq!(bed.counter(hook, Outcome::PassOtherHost)?, 0);
        }
    }
    Ok(())
}

/// At the edge of a pod it does not matter: whatever its device takes the pod has sent.
#[test]
fn what_a_pod_sends_is_looked_at_whomever_it_is_for() -> Result<()> {
    for family in Family::BOTH {
        let mut bed = bed(family)?;
        let mut frame =
            Frame::new((POD.address(family), 4_000), (SERVICE.address(family), PORT), Transport::Tcp(Flags::SYN));
        frame.macs.0 = OTHER_NODE_MAC;
        assert_ne!(bed.run(Hook::PodIn, &frame)?.bytes, frame.bytes());
        assert_eq!(bed.counter(Hook::PodIn, Outcome::Opened)?, 1);
    }
    Ok(())
}
