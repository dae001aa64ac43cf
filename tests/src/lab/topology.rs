//! How the lab is wired: one function per kind of namespace.

use anyhow::Result;

use super::{
    Between, UplinkMode,
    address::{CLIENT, GATEWAY, NODES, NodePlan, PodNetwork, TUNNEL, of_pod, on_wire},
    device::{Offload, XdpPass, set_offload},
};
use crate::netns::Namespace;

/// What routed pods take for their gateway: answered by proxy ARP, and by an address on every device.
const POD_GATEWAY_V4: &str = "169.254.1.1";
const POD_GATEWAY_V6: &str = "fe80::1";

/// The switch. Its address is fixed, as is that of `cni0`: a bridge without one of its own takes over that of whichever
/// port is lowest, under the eyes of neighbours that have already learnt another.
///
/// It is also everybody's default gateway, behind which there is nothing.
pub(super) fn wire() -> Result<Namespace> {
    let wire = Namespace::new("wire")?;
    let gateway = on_wire(GATEWAY);
    wire.ip(&format!(
        "link add wire address 02:00:00:00:00:01 type bridge
         addr add {}/24 dev wire
         addr add {}/64 dev wire nodad
         link set wire up",
        gateway.v4, gateway.v6
    ))?;
    Ok(wire)
}

/// The client: one device on the wire.
pub(super) fn client(wire: &Namespace) -> Result<Namespace> {
    let client = Namespace::new("client")?;
    plug_in(wire, "port-client", &client, "eth0", CLIENT)?;
    // Half a minute at 1,000 connections/s must not meet the ports of connections that have just ended.
    client.sysctl("net/ipv4/ip_local_port_range", "10000 65000")?;
    Ok(client)
}

/// A node on the wire, with routes to the other nodes' pods.
pub(super) fn node(plan: &NodePlan, between: Between, wire: &Namespace) -> Result<Namespace> {
    let node = Namespace::new(plan.name)?;
    node.sysctl("net/ipv4/ip_forward", "1")?;
    node.sysctl("net/ipv6/conf/all/forwarding", "1")?;
    plug_in(wire, &wire_port(plan), &node, "uplink", plan.host)?;
    for other in NODES.iter().filter(|other| other.number != plan.number) {
        let (pods, via) = (of_pod(other.number, 0), on_wire(other.host));
        match between {
            Between::Wire => {
                node.ip(&format!("route add {}/24 via {}\nroute add {}/64 via {}", pods.v4, via.v4, pods.v6, via.v6))?;
            }
            Between::Overlay => tunnel(plan, other, &node)?,
        }
    }
    if plan.pod_network == PodNetwork::Bridged {
        let gateway = of_pod(plan.number, GATEWAY);
        node.ip(&format!(
            "link add cni0 address 02:00:00:00:00:02 type bridge
             addr add {}/24 dev cni0
             addr add {}/64 dev cni0 nodad
             link set cni0 up",
            gateway.v4, gateway.v6
        ))?;
    }
    Ok(node)
}

/// A VXLAN device to the only other node, with an address of its own and a neighbour entry for the other one's.
fn tunnel(plan: &NodePlan, other: &NodePlan, node: &Namespace) -> Result<()> {
    let (own, peer) = (of_pod(plan.number, TUNNEL), of_pod(other.number, TUNNEL));
    let (from, to, pods) = (on_wire(plan.host), on_wire(other.host), of_pod(other.number, 0));
    node.ip(&format!(
        "link add overlay address 02:00:00:00:01:0{} type vxlan id 1 local {} remote {} dstport 8472 dev uplink
         addr add {}/32 dev overlay
         addr add {}/128 dev overlay nodad
         link set overlay up
         neigh add {} lladdr 02:00:00:00:01:0{} dev overlay
         neigh add {} lladdr 02:00:00:00:01:0{} dev overlay
         route add {}/24 via {} dev overlay onlink
         route add {}/64 via {} dev overlay onlink",
        plan.number,
        from.v4,
        to.v4,
        own.v4,
        own.v6,
        peer.v4,
        other.number,
        peer.v6,
        other.number,
        pods.v4,
        peer.v4,
        pods.v6,
        peer.v6
    ))
}

/// A pod on its node.
pub(super) fn pod(plan: &NodePlan, name: &str, number: u8, node: &Namespace) -> Result<Namespace> {
    let pod = Namespace::new(name)?;
    node.ip(&format!("link add pod-{name} type veth peer name eth0 netns {}", pod.path().display()))?;
    match plan.pod_network {
        PodNetwork::Routed => hang_on_route(plan, name, number, node, &pod)?,
        PodNetwork::Bridged => hang_on_bridge(plan, name, number, node, &pod)?,
    }
    Ok(pod)
}

fn hang_on_route(plan: &NodePlan, name: &str, number: u8, node: &Namespace, pod: &Namespace) -> Result<()> {
    let (own, source) = (of_pod(plan.number, number), on_wire(plan.host));
    node.sysctl(&format!("net/ipv4/conf/pod-{name}/proxy_arp"), "1")?;
    // Proxy ARP answers after up to 0.8 s otherwise.
    node.sysctl(&format!("net/ipv4/neigh/pod-{name}/proxy_delay"), "0")?;
    node.ip(&format!(
        "addr add {POD_GATEWAY_V6}/64 dev pod-{name} nodad
         link set pod-{name} up
         route add {}/32 dev pod-{name} src {}
         route add {}/128 dev pod-{name} src {}",
        own.v4, source.v4, own.v6, source.v6
    ))?;
    pod.ip(&format!(
        "addr add {}/32 dev eth0
         addr add {}/128 dev eth0 nodad
         link set eth0 up
         route add {POD_GATEWAY_V4} dev eth0 scope link
         route add default via {POD_GATEWAY_V4} dev eth0
         route add default via {POD_GATEWAY_V6} dev eth0",
        own.v4, own.v6
    ))
}

fn hang_on_bridge(plan: &NodePlan, name: &str, number: u8, node: &Namespace, pod: &Namespace) -> Result<()> {
    let (own, gateway) = (of_pod(plan.number, number), of_pod(plan.number, GATEWAY));
    node.ip(&format!("link set pod-{name} master cni0\nlink set pod-{name} up"))?;
    pod.ip(&format!(
        "addr add {}/24 dev eth0
         addr add {}/64 dev eth0 nodad
         link set eth0 up
         route add default via {}
         route add default via {}",
        own.v4, own.v6, gateway.v4, gateway.v6
    ))
}

/// A veth from a port of the switch to a host, with the host's addresses and default routes.
fn plug_in(wire: &Namespace, port: &str, host: &Namespace, device: &str, number: u8) -> Result<()> {
    let (own, gateway) = (on_wire(number), on_wire(GATEWAY));
    wire.ip(&format!(
        "link add {port} type veth peer name {device} netns {}
         link set {port} master wire
         link set {port} up",
        host.path().display()
    ))?;
    host.ip(&format!(
        "addr add {}/24 dev {device}
         addr add {}/64 dev {device} nodad
         link set {device} up
         route add default via {}
         route add default via {}",
        own.v4, own.v6, gateway.v4, gateway.v6
    ))
}

fn wire_port(plan: &NodePlan) -> String {
    format!("port-{}", plan.name)
}

/// Readies the port that a node's uplink is plugged into. With XDP at the uplink, the port completes checksums and takes
/// bare frames; the handle keeps it that way.
pub(super) fn ready_port(plan: &NodePlan, uplink: UplinkMode, wire: &Namespace) -> Result<Option<XdpPass>> {
    if uplink == UplinkMode::Tc {
        return Ok(None);
    }
    // Whatever the client or another node leaves undone is done here, in one place for all senders.
    set_offload(wire, &wire_port(plan), Offload::TransmitChecksum, false)?;
    XdpPass::attach(wire, &wire_port(plan)).map(Some)
}
