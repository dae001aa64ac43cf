//! Pings of Services, from sockets that take and give ICMP as it is.

use std::{
    io::Read as _,
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use proxy_common::outcome::{Hook, Outcome};
use serde_json::json;
use socket2::{Domain, Protocol, Socket, Type};
use tests::{
    lab::{
        LabOptions, UplinkMode,
        address::{Family, of_balancer, of_service},
        agent::AgentOptions,
        cluster::Cluster,
        manifest::{Service, write_documents},
    },
    patience::patience,
    traffic::place::Place,
};

const SERVICE: u8 = 31;
const BALANCER: u8 = 20;

fn cluster() -> Result<Cluster> {
    let lab = LabOptions { uplinks: [UplinkMode::Xdp, UplinkMode::Tc], ..LabOptions::default() };
    Cluster::start_with(lab, AgentOptions::default(), |source| {
        let service = Service::new("pinged", SERVICE, &["a1", "b1"]);
        let mut documents = service.documents();
        let vip = of_balancer(BALANCER);
        documents[0]["spec"]["type"] = "LoadBalancer".into();
        documents[0]["status"] = json!({ "loadBalancer": { "ingress": [{ "ip": vip.v4 }, { "ip": vip.v6 }] } });
        write_documents(source, "pinged.yaml", &documents)
    })
}

/// RFC 1071, by its definition.
fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 =
        bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// Sends an echo request, and waits for its reply from that very address.
fn is_answered(place: &Place, target: IpAddr, wait: Duration) -> Result<bool> {
    let (domain, protocol, [request, reply]) = match target {
        IpAddr::V4(_) => (Domain::IPV4, Protocol::ICMPV4, [8, 0]),
        IpAddr::V6(_) => (Domain::IPV6, Protocol::ICMPV6, [128, 129]),
    };
    let socket = place.namespace().run(|| Socket::new(domain, Type::RAW, Some(protocol)))??;
    let body = b"\x12\x34\x00\x01are you there?";
    let mut message = [&[request, 0, 0, 0][..], body].concat();
    if target.is_ipv4() {
        // Over IPv6 the kernel does it.
        let sum = checksum(&message);
        message[2..4].copy_from_slice(&sum.to_be_bytes());
    }
    // From now on it hears nobody else.
    socket.connect(&SocketAddr::new(target, 0).into())?;
    socket.send(&message)?;
    let deadline = Instant::now() + patience(wait);
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(false);
        }
        socket.set_read_timeout(Some(left))?;
        let mut buffer = [0; 2_000];
        let Ok(length) = (&socket).read(&mut buffer) else { return Ok(false) };
        // IPv4 shows its header.
        let message = if target.is_ipv4() { &buffer[20..length] } else { &buffer[..length] };
        if message[0] == reply && message[4..] == body[..] {
            return Ok(true);
        }
    }
}

/// Leads the addresses of Services to a node.
fn route(cluster: &Cluster, node: usize) -> Result<()> {
    let via = cluster.lab.nodes[node].addresses();
    for address in [of_service(SERVICE), of_balancer(BALANCER), of_service(SERVICE + 1)] {
        cluster.lab.client.namespace().ip(&format!(
            "route replace {}/32 via {}\nroute replace {}/128 via {}",
            address.v4, via.v4, address.v6, via.v6
        ))?;
    }
    Ok(())
}

const SOON: Duration = Duration::from_secs(3);
/// Long enough for an answer that must not come.
const MOMENT: Duration = Duration::from_millis(300);

#[test]
fn addresses_of_services_answer_pings_from_pods_and_from_outside() -> Result<()> {
    let cluster = cluster()?;
    for family in Family::ALL {
        for vip in [of_service(SERVICE), of_balancer(BALANCER)] {
            let vip = vip.of(family);
            for pod in ["client-a", "client-b"] {
                assert!(is_answered(cluster.lab.place(pod)?, vip, SOON)?, "{vip} to {pod}");
            }
            for (index, node) in cluster.lab.nodes.iter().enumerate() {
                route(&cluster, index)?;
                assert!(is_answered(&cluster.lab.client, vip, SOON)?, "{vip} by {}", node.plan.name);
            }
        }
        for node in &cluster.lab.nodes {
            let own = node.addresses().of(family);
            assert!(is_answered(&cluster.lab.client, own, SOON)?, "{own}: the kernel answers");
        }
    }
    let [a, b] = &cluster.lab.nodes;
    // Two addresses of two families, from one pod and from one client each.
    for (node, hook) in [(a, Hook::PodIn), (a, Hook::UplinkXdp), (b, Hook::PodIn), (b, Hook::UplinkIn)] {
        assert_eq!(node.counted(hook, Outcome::Echoed)?, 4, "{hook:?} at {}", node.plan.name);
    }
    Ok(())
}

#[test]
fn what_no_service_has_does_not_answer_and_the_nodes_own_ping_goes_elsewhere() -> Result<()> {
    let cluster = cluster()?;
    for family in Family::ALL {
        let nobody = of_service(SERVICE + 1).of(family);
        for (index, place) in [(0, "client-a"), (0, "client"), (1, "client")] {
            route(&cluster, index)?;
            let place = cluster.lab.place(place)?;
            assert!(!is_answered(place, nobody, MOMENT)?, "{nobody} to {}", place.name());
        }
        // No hook sees what the node sends on its way in: it goes by the default route, where nobody has the address.
        let vip = of_service(SERVICE).of(family);
        let node = &cluster.lab.nodes[0];
        assert!(!is_answered(&node.host, vip, MOMENT).context("the node's own ping")?, "{vip} to the node");
    }
    Ok(())
}
