//! A road: a node in a namespace of its own whose uplink leads to another namespace, where all that arrives is counted and dropped.
//! What comes in by the uplink leaves by it, as it does where a balancer sends packets to another node.

use anyhow::Result;

use crate::{
    bench::yardstick::Yardstick,
    lab::device::XdpPass,
    netns::Namespace,
    testbed::{OTHER_NODE_MAC, ROUTER_MAC, Testbed, UPLINK_MAC},
};

/// The two namespaces.
#[derive(Debug)]
pub struct Road {
    /// The node.
    pub namespace: Namespace,
    /// Index of its uplink.
    pub uplink: u32,
    _end: End,
}

/// The other end of an uplink.
#[derive(Debug)]
pub struct End {
    _namespace: Namespace,
    // A device that has no program itself is sent no frames without an skb.
    _pass: XdpPass,
}

impl Road {
    /// A node that forwards: to pods of another node (10.128.0.0/9), and to a router.
    pub fn new(name: &str, sink: &mut Yardstick) -> Result<Self> {
        let (namespace, end) = (Namespace::new(name)?, Namespace::new("end")?);
        namespace.sysctl("net/ipv4/ip_forward", "1")?;
        // What comes in leaves where it came in, and nobody is told of a shorter way.
        namespace.sysctl("net/ipv4/conf/all/send_redirects", "0")?;
        namespace.sysctl("net/ipv4/conf/default/send_redirects", "0")?;
        let (own, other, router) = (mac(UPLINK_MAC), mac(OTHER_NODE_MAC), mac(ROUTER_MAC));
        namespace.ip(&format!(
            "link add uplink address {own} type veth peer name wire
             link set uplink up
             addr add 192.0.2.1/24 dev uplink
             neigh add 192.0.2.2 lladdr {other} dev uplink
             neigh add 192.0.2.254 lladdr {router} dev uplink
             route add default via 192.0.2.254
             route add 10.128.0.0/9 via 192.0.2.2"
        ))?;
        let uplink = namespace.device_index("uplink")?;
        let end = End::new(&namespace, end, sink)?;
        Ok(Self { namespace, uplink, _end: end })
    }
}

impl End {
    /// The same for a test bed.
    pub fn of(bed: &Testbed, sink: &mut Yardstick) -> Result<Self> {
        Self::new(bed.namespace(), Namespace::new("end")?, sink)
    }

    fn new(node: &Namespace, end: Namespace, sink: &mut Yardstick) -> Result<Self> {
        node.ip(&format!("link set wire netns {}", end.path().display()))?;
        end.ip("link set wire up")?;
        sink.sink(&end, "wire")?;
        Ok(Self { _pass: XdpPass::attach(node, "uplink")?, _namespace: end })
    }
}

fn mac(octets: [u8; 6]) -> String {
    octets.map(|octet| format!("{octet:02x}")).join(":")
}
