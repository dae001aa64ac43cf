//! Every reason to drop or to refuse, reached by a packet of its own. A new outcome does not compile until it has its place in
//! [`case`].

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use aya::util::KernelVersion;
use proxy_common::{
    addr::{Ipv4, Ipv6, Protocol},
    backend::BackendState,
    node::{Cidr, ServiceCidrs, newcomers},
    outcome::{Hook, Outcome},
    service::{Service, WhenEmpty, flag},
};
use tests::{
    fragments::{cut, fragment},
    frame::{Chunk, Family, Flags, Frame, Transport},
    patience::wait_until,
    testbed::{CLIENT, NODE, NODE_PORT, Nature, POD, POD2, PORT, REMOTE, SERVICE, Testbed, action, told},
};

/// What leads to an outcome: the map sizes it needs, and what is done to a bed whose last packet must be counted so.
type Case = (&'static [(&'static str, u32)], fn(&mut Testbed, Family) -> Result<(Hook, i32)>);

/// How an outcome is shown.
enum Shown {
    /// It is neither a drop nor a refusal.
    Elsewhere,
    /// By a packet.
    Here(Case),
    /// A test run cannot make the socket: by this test, in this text of a file.
    By(&'static str, &'static str),
}

fn case(outcome: Outcome) -> Shown {
    use Outcome as O;
    let of: Case = match outcome {
        O::Opened
        | O::Confirmed
        | O::Moved
        | O::Repaired
        | O::PortChanged
        | O::Related
        | O::Echoed
        | O::Dispatched
        | O::NotDispatched
        | O::Returned
        | O::PassVlan
        | O::PassMalformed
        | O::PassFragment
        | O::PassOptions
        | O::PassExtension
        | O::PassProtocol
        | O::PassOtherHost
        | O::PassForeign => return Shown::Elsewhere,
        O::DropNoBackend => (&[], no_backend),
        O::DropNoPort => (&[], no_port),
        O::DropNotWritable => (&[], not_writable),
        O::DropNoMasquerade => (&[], no_masquerade),
        O::DropNoLocalEndpoint => (&[], no_local_endpoint),
        O::DropTableFull => (&[("EMBRYOS_V4", 1), ("EMBRYOS_V6", 1)], table_full),
        O::DropMartian => (&[], martian),
        O::DropSource => (&[], source),
        O::DropUnallocated => (&[], unallocated),
        O::DropFragment => (&[], late_fragment),
        O::DropOverlap => (&[], overlap),
        O::DropNotDispatched => (&[], not_dispatched),
        O::DropNotCrossed => (&[], not_crossed),
        O::DropTooLong => (&[], too_long),
        O::DropHeld => (&[], held),
        O::RejectNoEndpoint => (&[], no_endpoint),
        O::RejectNoPort => (&[], undefined_port),
        O::ResetGone => (&[], gone),
        O::RefuseBind => {
            return Shown::By(include_str!("netns_bind.rs"), "a_process_of_the_node_is_refused_a_node_port");
        }
    };
    Shown::Here(of)
}

/// Since then, frames may have more than 32 bytes of metadata.
const METADATA: KernelVersion = KernelVersion::new(6, 9, 0);

#[test]
fn every_reason_to_drop_or_to_refuse_is_reached_by_a_packet() -> Result<()> {
    for outcome in Outcome::ALL {
        match case(outcome) {
            Shown::Elsewhere => {
                let name = format!("{outcome:?}");
                assert!(!["Drop", "Reject", "Reset", "Refuse"].iter().any(|word| name.starts_with(word)), "{name}");
            }
            Shown::Here(_) if outcome == Outcome::DropNotWritable && KernelVersion::current()? < METADATA => {
                eprintln!("{outcome:?} is not shown: Linux before 6.9 lets no frame have so much metadata");
            }
            Shown::Here(case) => {
                reach(outcome, case).with_context(|| format!("{outcome:?}"))?;
            }
            Shown::By(content, test) => {
                assert!(content.contains(&format!("fn {test}(")), "there is no test {test}");
                assert!(content.contains(&format!("Outcome::{outcome:?}")), "{test} does not look for {outcome:?}");
            }
        }
    }
    Ok(())
}

fn reach(outcome: Outcome, (entries, act): Case) -> Result<()> {
    let mut bed = Testbed::with_entries(entries)?;
    bed.watch()?;
    let mut events = Vec::new();
    for (family, count) in Family::BOTH.into_iter().zip(1..) {
        let (hook, action) = act(&mut bed, family)?;
        ensure!(bed.counter(hook, outcome)? == count, "{family:?}: counted was {:?}", bed.counters()?);
        let dropped = if hook == Hook::UplinkXdp { action::XDP_DROP } else { action::TC_DROP };
        let is_drop = format!("{outcome:?}").starts_with("Drop");
        ensure!((action == dropped) == is_drop, "{family:?}: the program answered {action}");
        events.extend(bed.events()?);
        // Of an answer that cannot be made it was told before that it is to be made.
        events.retain(|event| outcome != Outcome::DropNotWritable || event.outcome == outcome as u8);
        ensure!(told(&events) == bed.counters()?, "{family:?}: told was {:?}", told(&events));
    }
    Ok(())
}

fn any(family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::UNSPECIFIED.into(),
        Family::V6 => Ipv6Addr::UNSPECIFIED.into(),
    }
}

fn from_pod(family: Family) -> Frame {
    Frame::new((POD.address(family), 4_000), (SERVICE.address(family), PORT), Transport::Udp)
}

fn from_outside(family: Family, port: u16) -> Frame {
    Frame::new((CLIENT.address(family), port), (NODE.address(family), NODE_PORT), Transport::Udp)
}

/// Runs a packet of a pod.
fn pod_in(bed: &mut Testbed, frame: &Frame) -> Result<(Hook, i32)> {
    Ok((Hook::PodIn, bed.run(Hook::PodIn, frame)?.action))
}

/// Runs a packet from outside.
fn uplink_xdp(bed: &mut Testbed, frame: &Frame) -> Result<(Hook, i32)> {
    Ok((Hook::UplinkXdp, bed.run(Hook::UplinkXdp, frame)?.action))
}

/// A NodePort whose backend is elsewhere.
fn serve_remotely(bed: &mut Testbed, family: Family) -> Result<()> {
    let backend = bed.add_backend(REMOTE.address(family), false)?;
    bed.add_service(any(family), NODE_PORT, Protocol::Udp, &[backend])
}

/// A ClusterIP as the agent writes it, with a backend on this node.
fn serve_locally(bed: &mut Testbed, family: Family) -> Result<()> {
    let backend = bed.add_backend(POD2.address(family), true)?;
    bed.set_service(SERVICE.address(family), 0, Protocol::Any, Service::default())?;
    bed.add_service(SERVICE.address(family), PORT, Protocol::Udp, &[backend])
}

fn no_backend(bed: &mut Testbed, family: Family) -> Result<(Hook, i32)> {
    bed.add_service(SERVICE.address(family), PORT, Protocol::Udp, &[99])?;
    pod_in(bed, &from_pod(family))
}

fn no_port(bed: &mut Testbed, family: Family) -> Result<(Hook, i32)> {
    serve_remotely(bed, family)?;
    bed.set_node(|node| node.source_port_last = node.source_port_first)?;
    uplink_xdp(bed, &from_outside(family, 50_000))?;
    uplink_xdp(bed, &from_outside(family, 50_001))
}

/// A frame whose head room is taken has no place for the headers of an ICMP error. Nothing else that a test run can make is
/// not writable.
fn not_writable(bed: &mut Testbed, family: Family) -> Result<(Hook, i32)> {
    bed.set_service(any(family), NODE_PORT, Protocol::Udp, Service::default())?;
    let nature = Nature { metadata: 212, ..Nature::default() };
    let ran = bed.run_as(Hook::UplinkXdp, &from_outside(family, 50_000).bytes(), nature)?;
    Ok((Hook::UplinkXdp, ran.action))
}

fn no_masquerade(bed: &mut Testbed, family: Family) -> Result<(Hook, i32)> {
    serve_remotely(bed, family)?;
    bed.set_node(|node| {
        node.masquerade_v4 = Ipv4::default();
        node.masquerade_v6 = Ipv6::default();
    })?;
    uplink_xdp(bed, &from_outside(family, 50_000))
}

/// Another version takes over.
fn held(bed: &mut Testbed, family: Family) -> Result<(Hook, i32)> {
    serve_remotely(bed, family)?;
    let soon = bed.jiffies()?.wrapping_add(10 * bed.jiffies_per_second());
    bed.set_node(|node| (node.flags, node.held_until) = (node.flags | newcomers::HOLD, soon))?;
    uplink_xdp(bed, &from_outside(family, 50_000))
}

fn no_local_endpoint(bed: &mut Testbed, family: Family) -> Result<(Hook, i32)> {
    let service = Service { external_empty: WhenEmpty::Drop, ..Service::default() };
    bed.set_service(any(family), NODE_PORT, Protocol::Udp, service)?;
    uplink_xdp(bed, &from_outside(family, 50_000))
}

/// The life of a packet ends on its way to the node that its flow was given to.
fn not_dispatched(bed: &mut Testbed, family: Family) -> Result<(Hook, i32)> {
    let other_node = if family == Family::V4 { "192.0.2.2" } else { "2001:db8:1::2" };
    let backend = bed.add_backend_of(REMOTE.address(family), other_node.parse()?)?;
    bed.add_dispatched((any(family), NODE_PORT), Protocol::Udp, &[backend], &[])?;
    let request = from_outside(family, 50_000);
    bed.run(Hook::UplinkXdp, &request)?;
    uplink_xdp(bed, &Frame { hop_limit: 1, ..request })
}

/// A backend of the other family that is the node itself.
fn not_crossed(bed: &mut Testbed, family: Family) -> Result<(Hook, i32)> {
    let (node, any): (IpAddr, IpAddr) = match family {
        Family::V4 => (NODE.v6.into(), Ipv4Addr::UNSPECIFIED.to_ipv6_mapped().into()),
        Family::V6 => (NODE.v4.to_ipv6_mapped().into(), Ipv6Addr::UNSPECIFIED.into()),
    };
    bed.add_local_addr(NODE.v4.to_ipv6_mapped().into())?;
    let backend = bed.add_backend(node, true)?;
    let range = bed.add_slots(&[backend])?;
    let flags = flag::EXTERNAL | flag::CROSS;
    let service = Service { flags, internal: range, external: range, ..Service::default() };
    bed.set_service(any, NODE_PORT, Protocol::Udp, service)?;
    let ran = bed.run(Hook::CrossUplinkIn, &from_outside(family, 50_000))?;
    Ok((Hook::CrossUplinkIn, ran.action))
}

/// SCTP is not told of it.
fn too_long(bed: &mut Testbed, family: Family) -> Result<(Hook, i32)> {
    let other_node = if family == Family::V4 { "192.0.2.2" } else { "2001:db8:1::2" };
    let backend = bed.add_backend_of(REMOTE.address(family), other_node.parse()?)?;
    bed.add_dispatched((any(family), NODE_PORT), Protocol::Sctp, &[backend], &[])?;
    let request = Frame { transport: Transport::Sctp(Chunk::INIT), ..from_outside(family, 50_000) };
    uplink_xdp(bed, &Frame { payload: vec![7; 1_500], ..request })
}

/// With room for one entry, the pair that replaces a flow's source evicts the pair that was there first.
fn table_full(bed: &mut Testbed, family: Family) -> Result<(Hook, i32)> {
    let backend = bed.add_backend(REMOTE.address(family), false)?;
    let range = bed.add_slots(&[backend])?;
    let service = Service { flags: flag::EXTERNAL, internal: range, external: range, ..Service::default() };
    bed.set_service(any(family), NODE_PORT, Protocol::Udp, service)?;
    let request = Frame { destination: (NODE.address(family), NODE_PORT), ..from_pod(family) };
    pod_in(bed, &request)
}

fn martian(bed: &mut Testbed, family: Family) -> Result<(Hook, i32)> {
    let loopback = match family {
        Family::V4 => Ipv4Addr::LOCALHOST.into(),
        Family::V6 => Ipv6Addr::LOCALHOST.into(),
    };
    pod_in(bed, &Frame { destination: (loopback, NODE_PORT), ..from_pod(family) })
}

fn source(bed: &mut Testbed, family: Family) -> Result<(Hook, i32)> {
    let service = Service { index: 7, flags: flag::EXTERNAL | flag::SOURCE_RANGES, ..Service::default() };
    bed.set_service(any(family), NODE_PORT, Protocol::Udp, service)?;
    uplink_xdp(bed, &from_outside(family, 50_000))
}

fn unallocated(bed: &mut Testbed, family: Family) -> Result<(Hook, i32)> {
    let mut cidrs = ServiceCidrs::NONE;
    cidrs.v4[0] = Cidr { addr: SERVICE.v4.into(), mask: Ipv4 { octets: [255; 4] } };
    cidrs.v6[0] = Cidr { addr: SERVICE.v6.into(), mask: Ipv6 { octets: [255; 16] } };
    bed.set_service_cidrs(cidrs)?;
    pod_in(bed, &from_pod(family))
}

fn long(family: Family) -> Vec<u8> {
    Frame { payload: vec![7; 71], ..from_pod(family) }.bytes()
}

fn late_fragment(bed: &mut Testbed, family: Family) -> Result<(Hook, i32)> {
    serve_locally(bed, family)?;
    Ok((Hook::PodIn, bed.run_bytes(Hook::PodIn, &cut(&long(family), 7, 24)[1])?.action))
}

fn overlap(bed: &mut Testbed, family: Family) -> Result<(Hook, i32)> {
    serve_locally(bed, family)?;
    bed.run_bytes(Hook::PodIn, &fragment(&long(family), 7, 0, 24))?;
    Ok((Hook::PodIn, bed.run_bytes(Hook::PodIn, &fragment(&long(family), 7, 16, 24))?.action))
}

fn no_endpoint(bed: &mut Testbed, family: Family) -> Result<(Hook, i32)> {
    bed.set_service(SERVICE.address(family), PORT, Protocol::Udp, Service::default())?;
    pod_in(bed, &from_pod(family))
}

fn undefined_port(bed: &mut Testbed, family: Family) -> Result<(Hook, i32)> {
    serve_locally(bed, family)?;
    pod_in(bed, &Frame { destination: (SERVICE.address(family), PORT + 1), ..from_pod(family) })
}

/// It is looked for once in a flow's second, which lasts one jiffy here.
fn gone(bed: &mut Testbed, family: Family) -> Result<(Hook, i32)> {
    let backend = bed.add_backend(POD2.address(family), true)?;
    bed.add_service(SERVICE.address(family), PORT, Protocol::Tcp, &[backend])?;
    let segment = |flags| Frame { transport: Transport::Tcp(flags), ..from_pod(family) };
    bed.run(Hook::PodIn, &segment(Flags::SYN))?;
    bed.set_backend(backend, POD2.address(family), true, BackendState::Gone, 1)?;
    bed.set_node(|node| node.jiffies_per_second = 1)?;
    let before = bed.jiffies()?;
    wait_until("the next jiffy", Duration::from_secs(1), || {
        bed.jiffies().is_ok_and(|now| now != before).then_some(())
    })?;
    pod_in(bed, &segment(Flags::ACK))
}
