//! Where a packet meets the first of our programs. In: the question, the node's devices and what is attached to them. Out: the
//! program, and the device that the packet comes by.

use std::net::IpAddr;

use super::question::{Origin, Question};
use crate::dataplane::{
    Attached, Place, ProgramName,
    netlink::{Link, NodeNetwork},
};

/// Where a packet is met.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Stand {
    /// Never [`Origin::Auto`].
    pub(super) origin: Origin,
    pub(super) program: ProgramName,
    /// None for the node's own processes.
    pub(super) device: Option<Link>,
}

impl Stand {
    pub(super) fn place(&self) -> Place {
        Place { program: self.program, ifindex: self.device.as_ref().map_or(0, |device| device.ifindex) }
    }

    /// Whether packets begin with a header of their link.
    pub(super) fn has_ethernet(&self) -> bool {
        self.program != ProgramName::UplinkInL3
    }
}

/// Why a packet meets no program.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlaceError {
    /// A name that no device has.
    #[error(
        "there is no device {device} in this network namespace: run this where the agent runs, or correct --device"
    )]
    NoDevice {
        /// As given.
        device: String,
    },
    /// Nothing is attached there.
    #[error(
        "no program of Sluice takes what comes in by {device}: `sluice status` says what is attached where; name another --device, or see the agent's --pod-devices and --uplinks"
    )]
    NotAttached {
        /// The device.
        device: String,
    },
    /// The way to it is not one of a pod.
    #[error(
        "{client} is reached by no device with a program for pods: name the pod's device with --device, or say --from uplink or node"
    )]
    NoPod {
        /// The client.
        client: IpAddr,
    },
    /// There is no uplink.
    #[error("no program of Sluice is attached to an uplink: see the agent's --uplinks, or say --from pod or node")]
    NoUplink,
}

/// The programs of an uplink's way in, in the order in which packets meet them.
const UPLINK: [ProgramName; 3] = [ProgramName::UplinkXdp, ProgramName::UplinkIn, ProgramName::UplinkInL3];

/// Finds it. `towards` is the device by which the kernel reaches the client.
pub(super) fn find(
    question: &Question,
    network: &NodeNetwork,
    attached: &Attached,
    towards: Option<u32>,
) -> Result<Stand, PlaceError> {
    let search = Search { network, attached, towards };
    if let Some(name) = &question.device {
        let device = network.link(name).ok_or_else(|| PlaceError::NoDevice { device: name.clone() })?;
        return search.at(question.origin, device).ok_or_else(|| PlaceError::NotAttached { device: name.clone() });
    }
    match question.origin {
        Origin::Node => Ok(NODE),
        Origin::Pod => search.pod().ok_or(PlaceError::NoPod { client: question.client() }),
        Origin::Uplink => search.uplink().ok_or(PlaceError::NoUplink),
        Origin::Auto if is_own(network, question.client()) => Ok(NODE),
        Origin::Auto => search.pod().or_else(|| search.uplink()).ok_or(PlaceError::NoUplink),
    }
}

/// The node's sockets meet programs that cannot be tried; that of pods goes by the same tables.
const NODE: Stand = Stand { origin: Origin::Node, program: ProgramName::PodIn, device: None };

fn is_own(network: &NodeNetwork, address: IpAddr) -> bool {
    address.is_loopback() || network.addresses.iter().any(|own| own.net.addr() == address)
}

struct Search<'a> {
    network: &'a NodeNetwork,
    attached: &'a Attached,
    towards: Option<u32>,
}

impl Search<'_> {
    /// At a device that was named.
    fn at(&self, origin: Origin, device: &Link) -> Option<Stand> {
        match origin {
            Origin::Node => Some(NODE),
            Origin::Pod => self.pod_at(device),
            Origin::Uplink => self.uplink_at(device),
            Origin::Auto => self.pod_at(device).or_else(|| self.uplink_at(device)),
        }
    }

    fn pod_at(&self, device: &Link) -> Option<Stand> {
        let stand = Stand { origin: Origin::Pod, program: ProgramName::PodIn, device: Some(device.clone()) };
        self.attached.has(stand.program, &device.name).then_some(stand)
    }

    fn uplink_at(&self, device: &Link) -> Option<Stand> {
        let program = UPLINK.into_iter().find(|program| self.attached.has(*program, &device.name))?;
        Some(Stand { origin: Origin::Uplink, program, device: Some(device.clone()) })
    }

    /// The device that leads to the client, or a port of the bridge that does: which one does not matter to the programs.
    fn pod(&self) -> Option<Stand> {
        let way = self.way()?;
        let ports = self.network.links.iter().filter(|link| link.master == Some(way.ifindex));
        self.pod_at(way).or_else(|| ports.into_iter().find_map(|port| self.pod_at(port)))
    }

    /// The one that leads to the client, or else any.
    fn uplink(&self) -> Option<Stand> {
        self.way().and_then(|way| self.uplink_at(way)).or_else(|| {
            let links = self.network.links.iter();
            links.into_iter().find_map(|link| self.uplink_at(link))
        })
    }

    fn way(&self) -> Option<&Link> {
        self.network.links.iter().find(|link| Some(link.ifindex) == self.towards)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataplane::netlink::LinkAddress;

    fn link(ifindex: u32, name: &str) -> Link {
        Link { ifindex, name: name.into(), has_ethernet: true, ..Link::default() }
    }

    fn network() -> NodeNetwork {
        let own = LinkAddress {
            ifindex: 2,
            net: "192.0.2.1/24".parse().unwrap(),
            is_global: true,
            is_secondary: false,
            is_usable: true,
            is_deprecated: false,
        };
        let links = vec![
            link(2, "eth0"),
            link(3, "eth1"),
            link(4, "veth0"),
            link(5, "cbr0"),
            Link { master: Some(5), ..link(6, "veth1") },
            link(7, "tun0"),
        ];
        NodeNetwork { links, addresses: vec![own] }
    }

    fn found(client: &str, origin: Origin, device: Option<&str>, towards: u32) -> String {
        let programs = [
            (ProgramName::PodIn, "veth0"),
            (ProgramName::PodIn, "veth1"),
            (ProgramName::UplinkXdp, "eth0"),
            (ProgramName::UplinkIn, "eth1"),
            (ProgramName::UplinkInL3, "tun0"),
        ];
        let programs = programs.map(|(program, device)| (program, device.to_owned())).to_vec();
        let attached = Attached { programs, is_guess: false };
        let destination = "10.96.0.10:80".parse().unwrap();
        let question = Question::new(client.parse().unwrap(), destination, origin, device.map(str::to_owned)).unwrap();
        match find(&question, &network(), &attached, Some(towards)) {
            Ok(Stand { program, device: Some(device), .. }) => format!("{program} {}", device.name),
            Ok(Stand { program, device: None, .. }) => format!("{program} of the node"),
            Err(error) => format!("{error:?}"),
        }
    }

    #[test]
    fn a_packet_is_met_where_its_client_is() {
        let cases = [
            ("the node itself", found("192.0.2.1", Origin::Auto, None, 1), "pod_in of the node"),
            ("its loopback", found("127.0.0.1", Origin::Auto, None, 1), "pod_in of the node"),
            ("a pod", found("10.244.1.5", Origin::Auto, None, 4), "pod_in veth0"),
            ("a pod behind a bridge", found("10.244.1.6", Origin::Auto, None, 5), "pod_in veth1"),
            ("outside", found("198.51.100.7", Origin::Auto, None, 2), "uplink_xdp eth0"),
            ("outside, by TC", found("198.51.100.7", Origin::Auto, None, 3), "uplink_in eth1"),
            ("a tunnel", found("198.51.100.7", Origin::Auto, None, 7), "uplink_in_l3 tun0"),
            ("no route", found("198.51.100.7", Origin::Auto, None, 0), "uplink_xdp eth0"),
            ("a pod, as if from outside", found("10.244.1.5", Origin::Uplink, None, 4), "uplink_xdp eth0"),
            ("by a device", found("10.244.1.5", Origin::Auto, Some("eth1"), 4), "uplink_in eth1"),
            ("no such device", found("10.244.1.5", Origin::Auto, Some("x"), 4), "NoDevice { device: \"x\" }"),
            ("another kind", found("10.244.1.5", Origin::Pod, Some("eth0"), 4), "NotAttached { device: \"eth0\" }"),
            ("no pod", found("198.51.100.7", Origin::Pod, None, 2), "NoPod { client: 198.51.100.7 }"),
        ];
        for (name, found, expected) in cases {
            assert_eq!(found, expected, "{name}");
        }
    }
}
