//! Scenario 31: neighbours and pods who send from, or to, addresses that cannot be where they are (CVE-2020-8558). The nodes'
//! kernels are told to let everything through, so that nothing but the programs is in the way.

use std::{
    collections::BTreeMap,
    fs,
    net::{IpAddr, SocketAddr, UdpSocket},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use proxy_common::outcome::{Hook, Outcome};
use tests::{
    frame::{Frame, Transport},
    lab::{
        LabOptions, Node,
        address::{CLIENT, Family, on_wire, pod},
        agent::{AgentOptions, SocketLb},
        cluster::Cluster,
        manifest::Service,
    },
    netns::Namespace,
    patience::{patience, wait_until},
    traffic::{
        Protocol,
        place::Place,
        wire::{Wire, mac},
    },
};

/// What the backend of the Services listens on, and so does everybody else who should not hear anything.
const SINK: u16 = 9_999;

/// Of each packet.
const TIMES: u64 = 3;

/// `route_localnet` of every device of a namespace.
fn route_localnet(namespace: &Namespace) -> Result<BTreeMap<String, String>> {
    namespace.run(|| {
        let devices = fs::read_dir("/proc/sys/net/ipv4/conf")?;
        devices
            .map(|device| {
                let device = device?;
                let value = fs::read_to_string(device.path().join("route_localnet"))?;
                Ok((device.file_name().to_string_lossy().into_owned(), value.trim().to_owned()))
            })
            .collect()
    })?
}

fn services() -> [Service; 2] {
    let sink = |name, host, pod| Service { target_port: SINK, ..Service::new(name, host, &[pod]) };
    [sink("here", 31, "a1"), sink("there", 32, "b1")]
}

fn start() -> Result<Cluster> {
    // Packets are what this is about: pods' sockets are left alone.
    let options = AgentOptions { socket_lb: SocketLb::Host, ..AgentOptions::default() };
    Cluster::start(LabOptions::default(), options, &services())
}

#[test]
fn scenario_31_no_namespace_is_told_to_route_loopback_addresses() -> Result<()> {
    let cluster = start()?;
    let untouched = route_localnet(&Namespace::new("untouched")?)?;
    let default = &untouched["default"];
    for place in cluster.lab.places().chain([&cluster.lab.gateway]) {
        let found = route_localnet(place.namespace())?;
        ensure!(found.len() > 3, "{}: {found:?}", place.name());
        ensure!(found.values().all(|value| value == default), "{}: {found:?}", place.name());
    }
    Ok(())
}

/// Listens to datagrams for both families.
fn sink(place: &Place, own: IpAddr) -> Result<UdpSocket> {
    let socket = place.namespace().run(|| UdpSocket::bind((own, SINK)))??;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

fn loopback(family: Family) -> IpAddr {
    match family {
        Family::V4 => [127, 0, 0, 1].into(),
        Family::V6 => std::net::Ipv6Addr::LOCALHOST.into(),
    }
}

/// Somebody who sends frames to a node.
struct Sender<'lab> {
    name: &'lab str,
    wire: Wire,
    node: &'lab Node,
    dmac: [u8; 6],
    hook: Hook,
    own: [IpAddr; 2],
}

impl<'lab> Sender<'lab> {
    fn new(place: &'lab Place, node: &'lab Node, device: &str, hook: Hook) -> Result<Self> {
        let addresses = pod(place.name()).map_or_else(|| on_wire(CLIENT), |(_, addresses)| addresses);
        let (name, own) = (place.name(), Family::ALL.map(|family| addresses.of(family)));
        let wire = Wire::of(place.namespace(), "eth0")?;
        Ok(Self { name, wire, node, dmac: mac(node.host.namespace(), device)?, hook, own })
    }

    fn send(&self, source: IpAddr, destination: SocketAddr) -> Result<()> {
        let destination = (destination.ip(), destination.port());
        let mut frame = Frame::new((source, 45_000), destination, Transport::Udp);
        frame.macs.0 = self.dmac;
        Ok(self.wire.send(&frame.bytes())?)
    }

    fn own(&self, family: Family) -> IpAddr {
        self.own[usize::from(family == Family::V6)]
    }

    /// Each is dropped, and counted as what it is.
    fn must_be_dropped(&self, source: IpAddr, destination: SocketAddr) -> Result<()> {
        let counted = || self.node.counted(self.hook, Outcome::DropMartian);
        let (before, case) = (counted()?, format!("{} from {source} to {destination}", self.name));
        for _ in 0..TIMES {
            self.send(source, destination)?;
        }
        let waited =
            wait_until("the drops", Duration::from_secs(2), || (counted().ok()? >= before + TIMES).then_some(()));
        waited.with_context(|| format!("{:?}: {case}", self.hook))?;
        ensure!(counted()? == before + TIMES, "{case}: each once");
        Ok(())
    }
}

fn let_everything_through(cluster: &Cluster) -> Result<()> {
    for node in &cluster.lab.nodes {
        for setting in ["route_localnet", "accept_local"] {
            node.host.namespace().sysctl(&format!("net/ipv4/conf/all/{setting}"), "1")?;
        }
        for device in ["all", "uplink"] {
            node.host.namespace().sysctl(&format!("net/ipv4/conf/{device}/rp_filter"), "0")?;
        }
    }
    Ok(())
}

#[test]
fn scenario_31_martians_reach_nobody_and_each_is_counted() -> Result<()> {
    let cluster = start()?;
    let_everything_through(&cluster)?;
    let lab = &cluster.lab;
    let [a, b] = &lab.nodes;
    let senders = [
        Sender::new(&lab.client, a, "uplink", Hook::UplinkXdp)?,
        Sender::new(&lab.client, b, "uplink", Hook::UplinkIn)?,
        Sender::new(lab.place("client-a")?, a, "pod-client-a", Hook::PodIn)?,
        Sender::new(lab.place("client-b")?, b, "cni0", Hook::PodIn)?,
    ];
    for family in Family::ALL {
        let backends = ["a1", "b1"].map(|name| (name, pod(name).map(|(_, addresses)| addresses.of(family))));
        let mut sinks = Vec::new();
        for (name, own) in backends {
            sinks.push((name, sink(lab.place(name)?, own.context("a pod of the lab")?)?));
        }
        for node in [a, b] {
            sinks.push((node.plan.name, sink(&node.host, loopback(family))?));
        }
        for sender in &senders {
            for service in services() {
                let node_port = service.at_node(sender.node.addresses(), family, Protocol::Udp).address;
                let cluster_ip = service.cluster(family, Protocol::Udp).address;
                let at_loopback = [service.node_port, SINK].map(|port| SocketAddr::new(loopback(family), port));
                for destination in [node_port, cluster_ip, at_loopback[0], at_loopback[1]] {
                    sender.must_be_dropped(loopback(family), destination)?;
                }
                for destination in at_loopback {
                    sender.must_be_dropped(sender.own(family), destination)?;
                }
                // What nobody beyond an uplink can have. Whether a pod sends as itself is known to its network.
                if sender.hook != Hook::PodIn {
                    for source in [sender.node.addresses().of(family), cluster_ip.ip()] {
                        sender.must_be_dropped(source, node_port)?;
                        sender.must_be_dropped(source, cluster_ip)?;
                    }
                }
            }
        }
        for (name, sink) in &sinks {
            let heard = sink.recv_from(&mut [0; 64]);
            ensure!(heard.is_err(), "{name} heard something: {heard:?}");
        }
        // The sinks hear what is honest.
        for sender in &senders {
            for (service, (name, sink)) in services().iter().zip(&sinks) {
                sender.send(
                    sender.own(family),
                    service.at_node(sender.node.addresses(), family, Protocol::Udp).address,
                )?;
                sink.set_nonblocking(false)?;
                sink.set_read_timeout(Some(patience(Duration::from_secs(3))))?;
                sink.recv_from(&mut [0; 64]).with_context(|| format!("{} to {name}", sender.name))?;
                sink.set_nonblocking(true)?;
            }
        }
    }
    Ok(())
}
