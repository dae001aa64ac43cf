//! What two processors do to one flow at the same moment: both confirm it, and its memory goes to the next flow while one of
//! them still looks at it. Chance decides how close they come, so that there are many rounds of each.

use std::{
    hint,
    net::Ipv4Addr,
    ops::Range,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    thread,
};

use anyhow::{Context as _, Result, ensure};
use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    unistd::Pid,
};
use proxy_common::{
    addr::Protocol,
    node::masquerade,
    outcome::{Hook, Outcome},
};
use tests::{
    frame::{Flags, Frame, Transport},
    testbed::{CLIENT, NODE, NODE_PORT, Runner, Testbed, action},
};

const SYN: Transport = Transport::Tcp(Flags::SYN);
const SYN_ACK: Transport = Transport::Tcp(Flags::SYN_ACK);
const ACK: Transport = Transport::Tcp(Flags::ACK);
const UDP: Transport = Transport::Udp;

/// Connections, each from a port of its own.
const ROUNDS: u16 = 8_000;
const FIRST_PORT: u16 = 2_000;
/// No flow is evicted.
const ENTRIES: [(&str, u32); 2] = [("EMBRYOS_V4", 1 << 17), ("FLOWS_V4", 1 << 17)];
/// Clients that come by when a flow has been confirmed, each of whom is given the memory of its embryo.
const NEWCOMERS: Range<u8> = 1..4;
const BACKENDS: u8 = 16;

/// Addresses and ports, in the order of the frame.
type Tuple = [u8; 12];
/// Where they stand in a frame with a plain IPv4 header.
const TUPLE: Range<usize> = 26..38;

/// Who sends a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum From {
    Client,
    Backend,
}

/// Two packets of a connection at the same moment.
struct Encounter {
    name: &'static str,
    /// What has been sent before.
    first: &'static [(From, Transport)],
    by_one: (From, Transport),
    by_other: (From, Transport),
}

const ENCOUNTERS: [Encounter; 3] = [
    Encounter {
        name: "a handshake's last ACK beside the first bytes",
        first: &[(From::Client, SYN), (From::Backend, SYN_ACK)],
        by_one: (From::Client, ACK),
        by_other: (From::Client, ACK),
    },
    Encounter {
        name: "two answers to a datagram",
        first: &[(From::Client, UDP)],
        by_one: (From::Backend, UDP),
        by_other: (From::Backend, UDP),
    },
    Encounter {
        name: "an answer beside the next question",
        first: &[(From::Client, UDP)],
        by_one: (From::Client, UDP),
        by_other: (From::Backend, UDP),
    },
];

#[test]
fn a_flow_that_two_processors_confirm_at_once_is_confirmed_once_and_stays_what_it_was() -> Result<()> {
    for encounter in &ENCOUNTERS {
        Testbed::with_entries(&ENTRIES)?.inside(|bed| {
            bed.set_node(|node| node.flags = masquerade::ALL)?;
            let backends: Vec<_> = (1..=BACKENDS)
                .map(|last| bed.add_backend(Ipv4Addr::new(10, 244, 2, last).into(), false))
                .collect::<Result<_>>()?;
            for proto in [Protocol::Tcp, Protocol::Udp] {
                bed.add_service(Ipv4Addr::UNSPECIFIED.into(), NODE_PORT, proto, &backends)?;
            }
            play(bed.runner(Hook::UplinkIn)?, encounter).context(encounter.name)?;
            let confirmed = bed.counter(Hook::UplinkIn, Outcome::Confirmed)?;
            assert_eq!(confirmed, u64::from(ROUNDS), "{}: by one of the two, each of them", encounter.name);
            Ok(())
        })?;
    }
    Ok(())
}

/// All rounds, on two threads. What is wrong first is the error.
fn play(runner: Runner<'_>, encounter: &Encounter) -> Result<()> {
    let processors = two_processors()?;
    let first: Vec<_> = encounter.first.iter().copied().map(Packet::new).collect();
    let (by_one, by_other) = (Packet::new(encounter.by_one), Packet::new(encounter.by_other));
    let (opened, arrivals) = (Mutex::new(Tuple::default()), AtomicU32::new(0));
    let opened = || opened.lock().unwrap_or_else(PoisonError::into_inner);
    thread::scope(|scope| {
        let other = scope.spawn(|| {
            stay_on(processors[1])?;
            let mut meeting = Meeting::new(&arrivals);
            let mut seen = Ok(());
            for round in 0..ROUNDS {
                let connection = Connection { runner, client: 0, port: FIRST_PORT + round };
                let newcomers = NEWCOMERS.map(|client| Connection { client, ..connection });
                let newcomers: Vec<_> =
                    newcomers.map(|newcomer| newcomer.packet(&first[0], Tuple::default())).collect();
                let sent = connection.open(&first);
                *opened() = *sent.as_ref().unwrap_or(&Tuple::default());
                let packet = connection.packet(&by_other, *opened());
                meeting.hold();
                meeting.hold();
                // They come at another distance in each round.
                pause(u32::from(round) % 64 * 2);
                let during = connection.must_go_on(&packet, *opened());
                let others = newcomers.iter().try_for_each(|packet| connection.send(packet).map(drop));
                meeting.hold();
                meeting.hold();
                seen = seen.and(sent.and(during)).and(others);
            }
            seen
        });
        stay_on(processors[0])?;
        let mut meeting = Meeting::new(&arrivals);
        let mut seen = Ok(());
        for round in 0..ROUNDS {
            let connection = Connection { runner, client: 0, port: FIRST_PORT + round };
            meeting.hold();
            let sent = *opened();
            let packets = [&by_one, &by_other].map(|packet| connection.packet(packet, sent));
            meeting.hold();
            pause(64);
            let during = connection.must_go_on(&packets[0], sent);
            meeting.hold();
            let after = packets.iter().try_for_each(|packet| connection.must_go_on(packet, sent));
            meeting.hold();
            seen = seen.and(during).and(after.context("later"));
        }
        seen.and(other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}

/// A packet, whose addresses and ports may have to be put in.
struct Packet {
    from: From,
    bytes: Vec<u8>,
}

impl Packet {
    fn new((from, transport): (From, Transport)) -> Self {
        let bytes = Frame::new((CLIENT.v4.into(), 0), (NODE.v4.into(), NODE_PORT), transport).bytes();
        Self { from, bytes }
    }
}

/// A client's, to the NodePort.
#[derive(Clone, Copy)]
struct Connection<'a> {
    runner: Runner<'a>,
    client: u8,
    port: u16,
}

impl Connection<'_> {
    /// Sends the first packets; returns as what those of the client reach the backend.
    fn open(&self, packets: &[Packet]) -> Result<Tuple> {
        let mut sent = Tuple::default();
        for packet in packets {
            let seen = self.send(&self.packet(packet, sent))?;
            if packet.from == From::Client {
                sent = seen;
            }
        }
        Ok(sent)
    }

    /// The same of this connection. A backend answers what it was sent.
    fn packet(&self, packet: &Packet, sent: Tuple) -> Packet {
        let (from, mut bytes) = (packet.from, packet.bytes.clone());
        bytes[TUPLE].copy_from_slice(&match from {
            From::Client => self.asks(),
            From::Backend => turned(sent),
        });
        Packet { from, bytes }
    }

    /// Sends a packet of a connection that is known: whom it reaches must be who it was.
    fn must_go_on(&self, packet: &Packet, sent: Tuple) -> Result<()> {
        let seen = self.send(packet)?;
        let expected = match packet.from {
            From::Client => sent,
            From::Backend => turned(self.asks()),
        };
        ensure!(seen == expected, "port {}: the {:?}'s became {seen:?} and not {expected:?}", self.port, packet.from);
        Ok(())
    }

    /// Sends one; the addresses and ports that it leaves with.
    fn send(&self, Packet { from, bytes }: &Packet) -> Result<Tuple> {
        let ran = self.runner.run(bytes)?;
        ensure!(ran.action == action::TC_REDIRECT, "port {}: {} to the {from:?}'s packet", self.port, ran.action);
        Ok(ran.bytes.get(TUPLE).context("a frame without addresses")?.try_into()?)
    }

    /// As what the client sends.
    fn asks(&self) -> Tuple {
        let (mut client, node) = (CLIENT.v4.octets(), NODE.v4.octets());
        client[3] += self.client;
        let mut tuple = Tuple::default();
        tuple[..4].copy_from_slice(&client);
        tuple[4..8].copy_from_slice(&node);
        tuple[8..10].copy_from_slice(&self.port.to_be_bytes());
        tuple[10..].copy_from_slice(&NODE_PORT.to_be_bytes());
        tuple
    }
}

/// The way back.
fn turned(mut tuple: Tuple) -> Tuple {
    let (addresses, ports) = tuple.split_at_mut(8);
    addresses.rotate_left(4);
    ports.rotate_left(2);
    tuple
}

/// Where two threads wait for each other without sleeping, so that they go on at the same moment.
struct Meeting<'a> {
    arrivals: &'a AtomicU32,
    expected: u32,
}

impl<'a> Meeting<'a> {
    fn new(arrivals: &'a AtomicU32) -> Self {
        Self { arrivals, expected: 0 }
    }

    fn hold(&mut self) {
        self.expected += 2;
        self.arrivals.fetch_add(1, Ordering::SeqCst);
        while self.arrivals.load(Ordering::SeqCst) < self.expected {
            hint::spin_loop();
        }
    }
}

fn pause(turns: u32) {
    for _ in 0..turns {
        hint::spin_loop();
    }
}

fn two_processors() -> Result<[usize; 2]> {
    let allowed = sched_getaffinity(Pid::from_raw(0))?;
    let mut processors = (0..CpuSet::count()).filter(|cpu| allowed.is_set(*cpu).unwrap_or(false));
    let two = [processors.next(), processors.next()].map(|cpu| cpu.context("this test needs two processors"));
    let [one, other] = two;
    Ok([one?, other?])
}

/// Of the calling thread.
fn stay_on(processor: usize) -> Result<()> {
    let mut one = CpuSet::new();
    one.set(processor)?;
    Ok(sched_setaffinity(Pid::from_raw(0), &one)?)
}
