//! Datagrams that are longer than any link takes: cut up by real kernels, and by hand in the wrong order.

use std::{
    net::{IpAddr, SocketAddr, UdpSocket},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use proxy_common::outcome::{Hook, Outcome};
use socket2::{Domain, Socket, Type};
use tests::{
    fragments::cut,
    frame::{ETHERNET, Frame, Transport},
    lab::{
        LabOptions, UplinkMode,
        address::{self, CLIENT, Family},
        agent::{AgentOptions, SocketLb},
        cluster::Cluster,
        manifest::Service,
    },
    patience::{patience, wait_until},
    traffic::{Protocol, place::Place},
};

const LENGTH: usize = 8_000;
/// Bytes of an IP packet in each hand-made fragment.
const PIECE: usize = 1_400;
/// Of the kernel, for raw packets with a header of one's own.
const RAW: i32 = libc::IPPROTO_RAW;

fn services() -> [Service; 2] {
    [Service::new("at-a", 31, &["a1"]), Service::new("at-b", 32, &["b1"])]
}

fn cluster(uplinks: [UplinkMode; 2]) -> Result<Cluster> {
    let options = AgentOptions { socket_lb: SocketLb::Host, ..AgentOptions::default() };
    Cluster::start(LabOptions { uplinks, ..LabOptions::default() }, options, &services())
}

/// From whom to which frontend, with the backend there is: from outside by each node, and from pods.
fn ways(cluster: &Cluster) -> Result<Vec<(&Place, SocketAddr, &'static str)>> {
    let mut ways = Vec::new();
    for service in services() {
        for family in Family::ALL {
            for node in &cluster.lab.nodes {
                let target = service.at_node(node.addresses(), family, Protocol::Udp).address;
                ways.push((&cluster.lab.client, target, service.pods[0]));
            }
            for pod in ["client-a", "client-b"] {
                let target = service.cluster(family, Protocol::Udp).address;
                ways.push((cluster.lab.place(pod)?, target, service.pods[0]));
            }
        }
    }
    Ok(ways)
}

/// A socket of a place that has its own address, as hand-made packets need it.
fn socket(place: &Place, target: SocketAddr) -> Result<UdpSocket> {
    let family = Family::of(target.ip());
    let own: IpAddr = match address::pod(place.name()) {
        Some((_, addresses)) => addresses.of(family),
        None => address::on_wire(CLIENT).of(family),
    };
    let socket = place.namespace().run(|| UdpSocket::bind((own, 0)))??;
    socket.set_read_timeout(Some(patience(Duration::from_secs(3))))?;
    Ok(socket)
}

/// Receives an answer that repeats the whole request.
fn receive(socket: &UdpSocket, target: SocketAddr, backend: &str, request: &str) -> Result<()> {
    let mut buffer = vec![0; 1 << 16];
    let (length, from) = socket.recv_from(&mut buffer)?;
    let answer = String::from_utf8_lossy(&buffer[..length]);
    ensure!(from == target, "the answer is from {from}");
    ensure!(answer.starts_with(backend), "not {backend} answers: {}", &answer[..20]);
    ensure!(answer.trim_end().ends_with(request), "{length} bytes came back, and not those that were sent");
    Ok(())
}

fn request(mark: &str) -> String {
    format!("{mark}{}", "abcdefgh".repeat(LENGTH / 8))
}

fn large_datagrams(uplinks: [UplinkMode; 2]) -> Result<()> {
    let cluster = cluster(uplinks)?;
    for (place, target, backend) in ways(&cluster)? {
        let socket = socket(place, target)?;
        for round in 0..5 {
            let request = request(&format!("{round}-"));
            socket.send_to(request.as_bytes(), target)?;
            receive(&socket, target, backend, &request)
                .with_context(|| format!("{} to {target} at {backend}, {round}", place.name()))?;
        }
    }
    Ok(())
}

#[test]
fn large_datagrams_come_whole_and_are_answered_by_xdp_and_tc() -> Result<()> {
    large_datagrams([UplinkMode::Xdp, UplinkMode::Tc])
}

#[test]
fn large_datagrams_come_whole_and_are_answered_by_tc_and_xdp() -> Result<()> {
    large_datagrams([UplinkMode::Tc, UplinkMode::Xdp])
}

/// The fragments of a datagram as IP packets.
fn by_hand(from: SocketAddr, target: SocketAddr, request: &str, id: u16) -> Vec<Vec<u8>> {
    let frame = Frame::new((from.ip(), from.port()), (target.ip(), target.port()), Transport::Udp);
    let frame = Frame { payload: request.as_bytes().to_vec(), ..frame };
    cut(&frame.bytes(), id, PIECE).into_iter().map(|frame| frame[ETHERNET..].to_vec()).collect()
}

fn raw(place: &Place, target: SocketAddr) -> Result<Socket> {
    let domain = if target.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
    Ok(place.namespace().run(|| Socket::new(domain, Type::RAW, Some(RAW.into())))??)
}

fn send(raw: &Socket, target: SocketAddr, packets: &[&Vec<u8>]) -> Result<()> {
    let to = SocketAddr::new(target.ip(), 0);
    for packet in packets {
        raw.send_to(packet, &to.into())?;
    }
    Ok(())
}

/// As long as the first one is first, the others may come as they like.
#[test]
fn fragments_come_in_any_order_behind_the_first_one() -> Result<()> {
    let cluster = cluster([UplinkMode::Xdp, UplinkMode::Tc])?;
    for (number, (place, target, backend)) in ways(&cluster)?.into_iter().enumerate() {
        let socket = socket(place, target)?;
        let request = request("any-order-");
        let pieces = by_hand(socket.local_addr()?, target, &request, 1_000 + number as u16);
        ensure!(pieces.len() == 6, "{} pieces", pieces.len());
        let order = [0, 5, 2, 4, 1, 3].map(|index| &pieces[index]);
        send(&raw(place, target)?, target, &order)?;
        receive(&socket, target, backend, &request)
            .with_context(|| format!("{} to {target} at {backend}", place.name()))?;
    }
    Ok(())
}

/// What comes before the first one is dropped and counted where nobody would put it together, and its datagram is lost; the
/// next one of the same socket is not.
#[test]
fn a_fragment_before_the_first_one_costs_its_datagram_and_no_other() -> Result<()> {
    let cluster = cluster([UplinkMode::Xdp, UplinkMode::Tc])?;
    let node = &cluster.lab.nodes[0];
    let place = cluster.lab.place("client-a")?;
    for family in Family::ALL {
        let [_, service] = services();
        let target = service.cluster(family, Protocol::Udp).address;
        let socket = socket(place, target)?;
        let lost = by_hand(socket.local_addr()?, target, &request("lost-"), 2_000);
        let before = node.counted(Hook::PodIn, Outcome::DropFragment)?;
        send(&raw(place, target)?, target, &[1, 0, 2, 3, 4, 5].map(|index| &lost[index]))?;
        wait_until("the drop to be counted", Duration::from_secs(3), || {
            (node.counted(Hook::PodIn, Outcome::DropFragment).ok()? == before + 1).then_some(())
        })?;
        let request = request("next-");
        socket.send_to(request.as_bytes(), target)?;
        // The first answer there is, so that the other datagram has none.
        receive(&socket, target, "b1", &request).with_context(|| format!("{family:?}"))?;
    }
    Ok(())
}
