//! Scenario 26: packets that are odd, cut up, late or lying, made by hand and sent to nodes by XDP and by TC. What the rules have an
//! answer for is answered; what they do not understand is left alone, dropped or passed on, and counted; and whoever comes next
//! is served. Each shape by itself is the program suite's, and what nobody thought of is the fuzzer's.

use std::{net::SocketAddr, path::Path, slice, time::Duration};

use anyhow::{Context as _, Result, ensure};
use proxy_common::outcome::{Hook, Outcome};
use tests::{
    between::{Between, sum_up, tagged},
    fragments::{cut, fragment},
    frame::{self, ETHERNET, Frame, Transport},
    fuzz::{self, Until},
    lab::{
        LabOptions, Node,
        address::{CLIENT, Family, on_wire},
        agent::AgentOptions,
        cluster::Cluster,
        device::{Offload, set_offload},
        manifest::Service,
    },
    patience::{patience, wait_until},
    scenario::note,
    traffic::{
        Ask, Failure, Protocol,
        wire::{Wire, mac},
    },
};

/// How long an answer may take, and how long one waits who expects none.
const USUAL: Duration = Duration::from_secs(3);
const MOMENT: Duration = Duration::from_millis(200);

/// Bytes of an IP packet in a fragment.
const PIECE: usize = 1_400;

/// Packets that go through the programs and the model here.
const FUZZED: u64 = 20_000;

/// The client, and the node that it asks.
struct Stage<'lab> {
    cluster: &'lab Cluster,
    wire: Wire,
    node: &'lab Node,
    hook: Hook,
    dmac: [u8; 6],
    service: Service,
    port: u16,
}

impl<'lab> Stage<'lab> {
    fn new(cluster: &'lab Cluster, node: &'lab Node, hook: Hook, service: &Service) -> Result<Self> {
        let wire = Wire::listening(cluster.lab.client.namespace(), "eth0")?;
        let dmac = mac(node.host.namespace(), "uplink")?;
        Ok(Self { cluster, wire, node, hook, dmac, service: service.clone(), port: 45_000 })
    }

    /// The next request of the client, from a port that no other one is from.
    fn request(&mut self, family: Family, text: &str) -> Frame {
        self.port += 1;
        let target = self.service.at_node(self.node.addresses(), family, Protocol::Udp).address;
        let source = (on_wire(CLIENT).of(family), self.port);
        let mut frame = Frame::new(source, (target.ip(), target.port()), Transport::Udp);
        (frame.macs.0, frame.payload) = (self.dmac, text.into());
        frame
    }

    fn counted(&self, outcome: Outcome) -> Result<u64> {
        self.node.counted(self.hook, outcome)
    }

    /// Whether the request is answered, by who is asked.
    fn is_answered(&self, request: &Frame, within: Duration) -> Result<bool> {
        let is_answer =
            |bytes: &[u8]| is_from(bytes, request.destination.into()) && port_at(bytes, 2) == request.source.1;
        Ok(self.wire.receive(within, is_answer)?.is_some())
    }

    /// What is sent is counted as often, and nobody answers it.
    fn must_count(&self, name: &str, frames: &[Vec<u8>], request: &Frame, outcome: Outcome, times: u64) -> Result<()> {
        let before = self.counted(outcome)?;
        frames.iter().try_for_each(|frame| self.wire.send(frame))?;
        let waited = wait_until("the count", USUAL, || (self.counted(outcome).ok()? >= before + times).then_some(()));
        waited.with_context(|| format!("{:?}: {name} is {outcome:?}", self.hook))?;
        ensure!(self.counted(outcome)? == before + times, "{:?}: {name} is {outcome:?} {times} times", self.hook);
        ensure!(!self.is_answered(request, patience(MOMENT))?, "{:?}: {name} is answered", self.hook);
        Ok(())
    }

    /// Whoever comes next is served.
    fn must_serve(&self) -> Result<()> {
        for family in Family::ALL {
            for protocol in Protocol::ALL {
                let ask = Ask::new(self.service.at_node(self.node.addresses(), family, protocol));
                ensure!(self.cluster.lab.client.ask(ask)?.pod == self.service.pods[0]);
            }
        }
        Ok(())
    }
}

/// Length of the IP header, without what may stand behind it.
fn header(bytes: &[u8]) -> usize {
    if bytes[12..14] == [8, 0] { 20 } else { 40 }
}

/// Whether a frame is a datagram from there.
fn is_from(bytes: &[u8], sender: SocketAddr) -> bool {
    let (address, protocol) = match sender {
        SocketAddr::V4(sender) if bytes[12..14] == [8, 0] => (sender.ip().octets().to_vec(), 23),
        SocketAddr::V6(sender) if bytes[12..14] == [0x86, 0xdd] => (sender.ip().octets().to_vec(), 20),
        _ => return false,
    };
    let end = ETHERNET + header(bytes) - address.len();
    bytes[protocol] == 17 && bytes[end - address.len()..end] == address && port_at(bytes, 0) == sender.port()
}

fn port_at(bytes: &[u8], offset: usize) -> u16 {
    let at = ETHERNET + header(bytes) + offset;
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

/// On each node a Service with a backend on it, so that one is asked by XDP and the other by TC; packets bear their client's address.
fn with_stages(test: impl Fn(&mut Stage<'_>) -> Result<()>) -> Result<()> {
    let services = [Service::new("at-a", 31, &["a1"]), Service::new("at-b", 32, &["b1"])];
    let cluster = Cluster::start(LabOptions::default(), AgentOptions::default(), &services)?;
    // The switch must leave tags where they are, and not look into packets, for members of groups or for a firewall: it drops
    // what lies.
    let switch = cluster.lab.gateway.namespace();
    set_offload(switch, "port-node-a", Offload::VlanTags, false)?;
    switch.ip("link set wire type bridge mcast_snooping 0")?;
    for setting in ["net/bridge/bridge-nf-call-iptables", "net/bridge/bridge-nf-call-ip6tables"] {
        if Path::new("/proc/sys").join(setting).exists() {
            switch.sysctl(setting, "0")?;
        }
    }
    let hooks = [Hook::UplinkXdp, Hook::UplinkIn];
    for ((node, hook), service) in cluster.lab.nodes.iter().zip(hooks).zip(&services) {
        let mut stage = Stage::new(&cluster, node, hook, service)?;
        // Neighbours are known from then on.
        stage.must_serve()?;
        test(&mut stage)?;
        stage.must_serve()?;
    }
    Ok(())
}

/// What the pod's own kernel does not take: padding of more than seven bytes, and a header of mobile hosts.
const NOT_FOR_LINUX: [&str; 3] = ["a routing header without segments", "long destination options", "three of them"];

#[test]
fn scenario_26_what_stands_behind_an_ip_header_is_walked_and_who_sends_it_answered() -> Result<()> {
    with_stages(|stage| {
        for (family, of_frames) in [(Family::V4, frame::Family::V4), (Family::V6, frame::Family::V6)] {
            for (name, between) in Between::usual(of_frames) {
                let (request, before) = (stage.request(family, "who"), stage.counted(Outcome::Opened)?);
                stage.wire.send(&between.put_into(&request.bytes()))?;
                let is_opened = || (stage.counted(Outcome::Opened).ok()? == before + 1).then_some(());
                wait_until(&format!("a flow behind {name}"), USUAL, is_opened)?;
                if !NOT_FOR_LINUX.contains(&name) {
                    ensure!(stage.is_answered(&request, patience(USUAL))?, "{:?}: {name} is not answered", stage.hook);
                }
            }
        }
        Ok(())
    })
}

#[test]
fn scenario_26_fragments_come_in_any_order_behind_their_first_and_do_not_write_over_it() -> Result<()> {
    with_stages(|stage| {
        for family in Family::ALL {
            let request = stage.request(family, &format!("who {}", "abcdefgh".repeat(500)));
            let pieces = cut(&request.bytes(), stage.port, PIECE);
            ensure!(pieces.len() == 3);
            for piece in [0, 2, 1] {
                stage.wire.send(&pieces[piece])?;
            }
            // The first fragment of the answer has its ports.
            let is_fragment_of_answer = |bytes: &[u8]| {
                let address = match request.destination.0 {
                    std::net::IpAddr::V4(address) => address.octets().to_vec(),
                    std::net::IpAddr::V6(address) => address.octets().to_vec(),
                };
                let end = ETHERNET + header(bytes) - address.len();
                bytes.len() > 1_000 && bytes[end - address.len()..end] == address
            };
            let answer = stage.wire.receive(patience(USUAL), is_fragment_of_answer)?;
            ensure!(answer.is_some(), "{:?}, {family:?}: a request in pieces is not answered", stage.hook);

            let request = stage.request(family, &format!("who {}", "abcdefgh".repeat(500)));
            let pieces = cut(&request.bytes(), stage.port, PIECE);
            stage.wire.send(&pieces[0])?;
            let over_its_ports = fragment(&request.bytes(), stage.port, 8, PIECE);
            let overlap = slice::from_ref(&over_its_ports);
            stage.must_count("what would write over the first piece", overlap, &request, Outcome::DropOverlap, 1)?;
        }
        Ok(())
    })
}

/// A name, and what is done to a request.
type Lie = (&'static str, fn(&mut Vec<u8>));

const OF_V4: [Lie; 5] = [
    ("a total length beyond the frame", |b| {
        b[16..18].copy_from_slice(&1_000_u16.to_be_bytes());
        sum_up(b);
    }),
    ("a UDP length beyond the packet", |b| b[ETHERNET + 20 + 5] += 9),
    ("a UDP length shorter than its header", |b| b[ETHERNET + 20 + 4..ETHERNET + 20 + 6].copy_from_slice(&[0, 7])),
    ("a packet that ends within its UDP header", |b| {
        b[16..18].copy_from_slice(&24_u16.to_be_bytes());
        sum_up(b);
    }),
    ("another version", |b| b[ETHERNET] = 0x65),
];

const OF_V6: [Lie; 4] = [
    ("a payload length beyond the frame", |b| b[18..20].copy_from_slice(&1_000_u16.to_be_bytes())),
    ("a payload length of nothing", |b| b[18..20].copy_from_slice(&[0, 0])),
    ("a UDP length beyond the packet", |b| b[ETHERNET + 40 + 5] += 9),
    ("a UDP length shorter than its header", |b| b[ETHERNET + 40 + 4..ETHERNET + 40 + 6].copy_from_slice(&[0, 7])),
];

#[test]
fn scenario_26_what_lies_about_its_length_or_is_for_no_vlan_here_is_counted_and_answered_by_nobody() -> Result<()> {
    with_stages(|stage| {
        for (family, lies) in [(Family::V4, &OF_V4[..]), (Family::V6, &OF_V6)] {
            for (name, lie) in lies {
                let request = stage.request(family, "who");
                let mut bytes = request.bytes();
                // Short frames are padded on the way, which hides that they end early.
                bytes.resize(bytes.len().max(64), 0);
                lie(&mut bytes);
                stage.must_count(name, &vec![bytes; 3], &request, Outcome::PassMalformed, 3)?;
            }
            let request = stage.request(family, "who");
            for tags in [&[[0x81, 0, 0, 5]][..], &[[0x88, 0xa8, 0, 5], [0x81, 0, 0, 6]]] {
                let frames = vec![tagged(&request.bytes(), tags); 3];
                stage.must_count(&format!("{} tags", tags.len()), &frames, &request, Outcome::PassVlan, 3)?;
            }
        }
        Ok(())
    })
}

/// The path MTU is `netns_mtu`'s: transfers that find their size.
#[test]
fn scenario_26_icmp_errors_come_to_who_they_are_about_with_the_names_he_knows() -> Result<()> {
    // Nobody listens at that port: the pod's kernel says so.
    let closed = Service { target_port: 9, ..Service::new("closed", 33, &["b1"]) };
    let cluster = Cluster::start(LabOptions::default(), AgentOptions::default(), slice::from_ref(&closed))?;
    let client = &cluster.lab.client;
    for (node, hook) in cluster.lab.nodes.iter().zip([Hook::UplinkXdp, Hook::UplinkIn]) {
        // A redirect, which the kernel sends as well, would use up what there is of errors for one host.
        for setting in ["net/ipv4/icmp_ratelimit", "net/ipv6/icmp/ratelimit"] {
            node.host.namespace().sysctl(setting, "0")?;
        }
        for family in Family::ALL {
            let target = closed.at_node(node.addresses(), family, Protocol::Udp);
            wait_until("the error", USUAL, || {
                let answer = client.ask_times(Ask::new(target).within(patience(MOMENT)), 1).ok()?;
                (answer == [Err(Failure::Refused)]).then_some(())
            })
            .with_context(|| format!("{hook:?}: unreachable"))?;

            let mut stage = Stage::new(&cluster, node, hook, &closed)?;
            let mut request = stage.request(family, "who");
            request.hop_limit = 1;
            stage.wire.send(&request.bytes())?;
            let (protocol, kind, exceeded) =
                if family == Family::V4 { (23, ETHERNET + 20, [1, 11]) } else { (20, ETHERNET + 40, [58, 3]) };
            let about = |bytes: &[u8]| {
                let is_exceeded = bytes.len() > kind + 8 && [bytes[protocol], bytes[kind]] == exceeded;
                // What is quoted begins with its IP header, as behind an Ethernet header.
                is_exceeded && quotes(&bytes[kind + 8..], &request.bytes()[ETHERNET..])
            };
            let heard = stage.wire.receive(patience(USUAL), about)?;
            ensure!(heard.is_some(), "{hook:?}, {family:?}: nobody says that the packet's life has ended");
        }
    }
    Ok(())
}

/// Whether somebody quotes the addresses and ports of a packet.
fn quotes(quote: &[u8], packet: &[u8]) -> bool {
    let (addresses, ports) = if packet[0] >> 4 == 4 { (12..20, 20..24) } else { (8..40, 40..44) };
    quote.len() >= ports.end && quote[addresses.clone()] == packet[addresses] && quote[ports.clone()] == packet[ports]
}

#[test]
fn scenario_26_packets_at_random_are_what_the_model_of_the_rules_says() -> Result<()> {
    let (summary, finding) = fuzz::run(20_261_122, Until::Packets(FUZZED), |_| {})?;
    note(
        26,
        &format!(
            "{} packets at random through programs and model, {} each second; 100,000,000 are `cargo xtask fuzz --packets 100000000`",
            summary.packets(),
            summary.pace()
        ),
    );
    ensure!(summary.packets() >= FUZZED);
    match finding {
        Some(finding) => anyhow::bail!("{finding}"),
        None => Ok(()),
    }
}
