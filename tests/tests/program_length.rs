//! A packet ends where it says, not where its frame does: what follows in the frame is none of it, and what would have to
//! follow and does not makes it one that is passed on.

use std::net::IpAddr;

use anyhow::Result;
use etherparse::{SlicedPacket, TransportSlice};
use proxy_common::{
    addr::Protocol,
    outcome::{Hook, Outcome},
};
use tests::{
    frame::{ETHERNET, Family, Flags, Frame, Transport},
    fuzz::packet::{Blueprint, icmp},
    testbed::{CLIENT, POD, PORT, REMOTE, SERVICE, Testbed, action},
};

/// A node on which a pod has sent a SYN to a Service, and what became of it.
fn bed(family: Family) -> Result<(Testbed, Vec<u8>)> {
    let mut bed = Testbed::new()?;
    let backend = bed.add_backend(REMOTE.address(family), false)?;
    bed.add_service(SERVICE.address(family), PORT, Protocol::Tcp, &[backend])?;
    let pod = (POD.address(family), 4_000);
    let request = Frame::new(pod, (SERVICE.address(family), PORT), Transport::Tcp(Flags::SYN));
    let sent = bed.run(Hook::PodIn, &request)?.bytes;
    Ok((bed, sent))
}

/// "Packet too big" or "fragmentation needed" about a frame, of which so many bytes behind the IP header are quoted.
fn error(family: Family, about: &[u8], quoted: usize) -> Vec<u8> {
    let (header, kind) = if family == Family::V4 { (20, [3, 4]) } else { (40, [2, 0]) };
    let quote = &about[ETHERNET..ETHERNET + header + quoted];
    icmp(CLIENT.address(family), POD.address(family), 61, kind, quote)
}

/// The sum over an ICMP message, by etherparse.
fn is_right(bytes: &[u8]) -> Result<bool> {
    let sliced = SlicedPacket::from_ethernet(bytes)?;
    let addresses = |bytes: &[u8], at| -> Result<[u8; 16]> { Ok(bytes[at..at + 16].try_into()?) };
    Ok(match sliced.transport {
        Some(TransportSlice::Icmpv4(icmp)) => icmp.checksum() == icmp.icmp_type().calc_checksum(icmp.payload()),
        Some(TransportSlice::Icmpv6(icmp)) => {
            let (from, to) = (addresses(bytes, 22)?, addresses(bytes, 38)?);
            icmp.checksum() == icmp.icmp_type().calc_checksum(from, to, icmp.payload())?
        }
        _ => false,
    })
}

/// Found by fuzzing: padding was taken for the quoted TCP checksum, and the error's own sum followed it.
#[test]
fn an_error_that_quotes_no_checksum_leaves_what_follows_it_in_the_frame() -> Result<()> {
    for family in Family::BOTH {
        for quoted in [8, 16, 17] {
            let (mut bed, sent) = bed(family)?;
            let mut bytes = error(family, &sent, quoted);
            let length = bytes.len();
            bytes.extend([0xa5; 30]);
            let ran = bed.run_bytes(Hook::PodOut, &bytes)?;
            assert_eq!(bed.counter(Hook::PodOut, Outcome::Related)?, 1);
            assert_ne!(ran.bytes[..length], bytes[..length], "it is translated");
            assert!(is_right(&ran.bytes[..length])?, "{family:?}, {quoted} bytes quoted");
            assert_eq!(ran.bytes[length..], [0xa5; 30], "{family:?}, {quoted} bytes quoted");
        }
    }
    Ok(())
}

/// Found by fuzzing: only the frame was asked whether it had the ports.
#[test]
fn an_error_that_is_longer_than_its_frame_or_too_short_for_its_quote_is_left_alone() -> Result<()> {
    for family in Family::BOTH {
        let (mut bed, sent) = bed(family)?;
        let whole = error(family, &sent, 20);
        let (at, room) = if family == Family::V4 { (17, 20 + 8 + 20 + 8) } else { (19, 8 + 40 + 8) };
        for length in [0, 7, room - 1, whole[at] + 1, 0xff] {
            let mut bytes = whole.clone();
            bytes[at] = length;
            let ran = bed.run_bytes(Hook::PodOut, &bytes)?;
            assert_eq!((ran.action, &ran.bytes), (action::TC_NEXT, &bytes), "{family:?}, a length of {length}");
        }
        assert_eq!(bed.counter(Hook::PodOut, Outcome::Related)?, 0);
        bed.run_bytes(Hook::PodOut, &whole)?;
        assert_eq!(bed.counter(Hook::PodOut, Outcome::Related)?, 1, "{family:?}: the true length");
    }
    Ok(())
}

/// Found by writing the model: its first fragment is known, so that it would be translated.
#[test]
fn a_later_fragment_that_is_shorter_than_its_header_is_left_alone() -> Result<()> {
    let source: IpAddr = POD.address(Family::V4);
    let whole = Blueprint {
        source: (source, 4_000),
        destination: (SERVICE.address(Family::V4), PORT),
        proto: Protocol::Tcp,
        flags: 16,
        life: 64,
        is_checked: true,
        payload: vec![7; 60],
    };
    let (mut bed, _) = bed(Family::V4)?;
    let pieces = whole.fragments(7, 24);
    bed.run_bytes(Hook::PodIn, &pieces[0])?;
    for length in [0, 19] {
        let mut bytes = pieces[1].clone();
        bytes[17] = length;
        let ran = bed.run_bytes(Hook::PodIn, &bytes)?;
        assert_eq!((ran.action, &ran.bytes), (action::TC_NEXT, &bytes), "a length of {length}");
    }
    assert_eq!(bed.counter(Hook::PodIn, Outcome::PassMalformed)?, 2);
    assert_ne!(bed.run_bytes(Hook::PodIn, &pieces[1])?.bytes, pieces[1], "the true length");
    Ok(())
}
