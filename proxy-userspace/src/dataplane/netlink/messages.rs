//! What netlink's messages say, as far as it matters here.

use std::{
    collections::{BTreeSet, HashMap},
    net::IpAddr,
};

use ipnet::IpNet;
use proxy_common::node::Vlan;
use rtnetlink::packet_route::{
    RouteNetlinkMessage,
    address::{AddressAttribute, AddressFlags, AddressMessage, AddressScope},
    link::{
        InfoData, InfoKind, InfoVlan, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage, LinkXdp,
        VlanProtocol, XdpAttached,
    },
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage},
    route::{RouteAttribute, RouteMessage, RouteType},
};

use super::{Link, LinkAddress};

/// Neighbours remembered. Beyond it all are forgotten: then the next change of any of them counts as one.
const NEIGHBOURS: usize = 16_384;

pub(super) fn link(message: &LinkMessage) -> Link {
    let mut link = Link {
        ifindex: message.header.index,
        is_up: message.header.flags.contains(LinkFlags::Up),
        is_loopback: message.header.flags.contains(LinkFlags::Loopback),
        has_ethernet: message.header.link_layer_type == LinkLayerType::Ether,
        is_layer3: is_layer3(message.header.link_layer_type),
        ..Link::default()
    };
    let mut peer_is_elsewhere = false;
    let (mut parent, mut tag) = (0, None);
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Controller(master) if *master != 0 => link.master = Some(*master),
            LinkAttribute::Link(ifindex) => parent = *ifindex,
            LinkAttribute::Address(octets) => link.mac = octets.as_slice().try_into().ok(),
            LinkAttribute::LinkNetNsId(_) => peer_is_elsewhere = true,
            LinkAttribute::LinkInfo(information) => {
                link.kind = kind(information);
                tag = vlan(information);
            }
            LinkAttribute::Xdp(xdp) => {
                link.xdp_program = xdp_program(xdp);
                link.has_generic_xdp = xdp.contains(&LinkXdp::Attached(XdpAttached::SocketBuffer));
            }
            _ => {}
        }
    }
    link.vlan = tag.filter(|_| !peer_is_elsewhere).map(|(protocol, number)| Vlan { parent, protocol, number });
    link.is_pod_veth = peer_is_elsewhere && link.kind == InfoKind::Veth.to_string();
    link
}

/// What the kernel says of itself (`dev_is_mac_header_xmit` of `include/linux/if_arp.h`).
fn is_layer3(kind: LinkLayerType) -> bool {
    use LinkLayerType::{Ip6gre, Ipgre, None, Pimreg, Ppp, Rawip, Sit, Tunnel, Tunnel6, Void};
    matches!(kind, Tunnel | Tunnel6 | Sit | Ipgre | Ip6gre | Void | None | Pimreg | Ppp | Rawip)
}

fn kind(information: &[LinkInfo]) -> String {
    let kind = information.iter().find_map(|part| if let LinkInfo::Kind(kind) = part { Some(kind) } else { None });
    kind.map(ToString::to_string).unwrap_or_default()
}

/// Protocol, in network order, and number of a VLAN's device.
fn vlan(information: &[LinkInfo]) -> Option<(u16, u16)> {
    let parts = information.iter().find_map(|part| match part {
        LinkInfo::Data(InfoData::Vlan(parts)) => Some(parts),
        _ => None,
    })?;
    let number = parts.iter().find_map(|part| if let InfoVlan::Id(number) = part { Some(*number) } else { None })?;
    let is_outer = parts.contains(&InfoVlan::Protocol(VlanProtocol::Ieee8021Ad));
    Some((if is_outer { 0x88a8_u16 } else { 0x8100 }.to_be(), number))
}

fn xdp_program(xdp: &[LinkXdp]) -> Option<u32> {
    xdp.iter().find_map(|part| match part {
        LinkXdp::ProgId(id) | LinkXdp::DrvProgId(id) | LinkXdp::SkbProgId(id) if *id != 0 => Some(*id),
        _ => None,
    })
}

pub(super) fn address(message: &AddressMessage) -> Option<LinkAddress> {
    let (mut local, mut peer) = (None, None);
    let mut flags = AddressFlags::from_bits_retain(message.header.flags.bits().into());
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(address) => local = Some(*address),
            AddressAttribute::Address(address) => peer = Some(*address),
            AddressAttribute::Flags(all) => flags = *all,
            _ => {}
        }
    }
    // On a point-to-point link `Address` is the other end's.
    let address: IpAddr = local.or(peer)?;
    let net = IpNet::new(address, message.header.prefix_len).ok()?;
    let is_checked = !flags.contains(AddressFlags::Tentative) || flags.contains(AddressFlags::Optimistic);
    Some(LinkAddress {
        ifindex: message.header.index,
        net,
        is_global: matches!(message.header.scope, AddressScope::Universe | AddressScope::Site),
        is_secondary: flags.contains(AddressFlags::Secondary),
        is_usable: is_checked && !flags.contains(AddressFlags::Dadfailed),
        is_deprecated: flags.contains(AddressFlags::Deprecated),
    })
}

/// The links that a route for everything leads out of.
pub(super) fn default_route_links(message: &RouteMessage, links: &mut BTreeSet<u32>) {
    if !is_default(message) {
        return;
    }
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(ifindex) => drop(links.insert(*ifindex)),
            RouteAttribute::MultiPath(hops) => links.extend(hops.iter().map(|hop| hop.interface_index)),
            _ => {}
        }
    }
}

fn is_default(message: &RouteMessage) -> bool {
    message.header.destination_prefix_length == 0 && message.header.kind == RouteType::Unicast
}

/// What a notification calls for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Effect {
    /// Links, addresses or default routes may be others.
    pub(super) network: bool,
    /// A next hop found before may be wrong.
    pub(super) routes: bool,
}

impl Effect {
    pub(super) const NOTHING: Self = Self { network: false, routes: false };
    pub(super) const ROUTES: Self = Self { network: false, routes: true };
    pub(super) const ALL: Self = Self { network: true, routes: true };

    pub(super) fn or(self, other: Self) -> Self {
        Self { network: self.network || other.network, routes: self.routes || other.routes }
    }
}

/// The link-layer addresses of neighbours as last heard. The kernel tells of every step of its own bookkeeping; only
/// another link-layer address makes a next hop wrong.
#[derive(Debug, Default)]
pub(super) struct Neighbours(HashMap<(u32, IpAddr), Vec<u8>>);

impl Neighbours {
    /// What a notification calls for.
    pub(super) fn effect(&mut self, message: &RouteNetlinkMessage) -> Effect {
        match message {
            RouteNetlinkMessage::NewLink(_)
            | RouteNetlinkMessage::DelLink(_)
            | RouteNetlinkMessage::NewAddress(_)
            | RouteNetlinkMessage::DelAddress(_) => Effect::ALL,
            RouteNetlinkMessage::NewRoute(route) | RouteNetlinkMessage::DelRoute(route) => {
                Effect { network: is_default(route), routes: true }
            }
            RouteNetlinkMessage::NewRule(_) | RouteNetlinkMessage::DelRule(_) => Effect::ROUTES,
            RouteNetlinkMessage::NewNeighbour(neighbour) if self.has_moved(neighbour) => Effect::ROUTES,
            _ => Effect::NOTHING,
        }
    }

    fn has_moved(&mut self, message: &NeighbourMessage) -> bool {
        let (mut destination, mut link_address) = (None, None);
        for attribute in &message.attributes {
            match attribute {
                NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) => {
                    destination = Some(IpAddr::from(*address));
                }
                NeighbourAttribute::Destination(NeighbourAddress::Inet6(address)) => {
                    destination = Some(IpAddr::from(*address));
                }
                NeighbourAttribute::LinkLayerAddress(address) => link_address = Some(address.clone()),
                _ => {}
            }
        }
        let (Some(destination), Some(link_address)) = (destination, link_address) else { return false };
        if self.0.len() >= NEIGHBOURS {
            self.0.clear();
        }
        let before = self.0.insert((message.header.ifindex, destination), link_address.clone());
        before.is_some_and(|before| before != link_address)
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use super::*;

    fn neighbour(mac: [u8; 6]) -> RouteNetlinkMessage {
        let mut message = NeighbourMessage::default();
        message.header.ifindex = 3;
        message.attributes = vec![
            NeighbourAttribute::Destination(NeighbourAddress::Inet(Ipv4Addr::new(10, 0, 0, 2))),
            NeighbourAttribute::LinkLayerAddress(mac.into()),
        ];
        RouteNetlinkMessage::NewNeighbour(message)
    }

    #[test]
    fn only_another_link_layer_address_makes_a_next_hop_wrong() {
        let mut neighbours = Neighbours::default();
        assert_eq!(neighbours.effect(&neighbour([2, 0, 0, 0, 0, 1])), Effect::NOTHING);
        assert_eq!(neighbours.effect(&neighbour([2, 0, 0, 0, 0, 1])), Effect::NOTHING);
        assert_eq!(neighbours.effect(&neighbour([2, 0, 0, 0, 0, 9])), Effect::ROUTES);
    }

    #[test]
    fn a_default_route_changes_the_network_and_another_only_next_hops() {
        let mut route = RouteMessage::default();
        route.header.kind = RouteType::Unicast;
        route.attributes = vec![RouteAttribute::Oif(2)];
        let mut links = BTreeSet::new();
        default_route_links(&route, &mut links);
        assert_eq!(links, BTreeSet::from([2]));
        assert_eq!(Neighbours::default().effect(&RouteNetlinkMessage::NewRoute(route.clone())), Effect::ALL);

        route.header.destination_prefix_length = 24;
        links.clear();
        default_route_links(&route, &mut links);
        assert_eq!(links, BTreeSet::new());
        assert_eq!(Neighbours::default().effect(&RouteNetlinkMessage::NewRoute(route)), Effect::ROUTES);
    }

    #[test]
    fn a_veth_is_a_pods_only_when_its_peer_is_in_another_namespace() {
        let mut message = LinkMessage::default();
        message.header.index = 7;
        message.header.link_layer_type = LinkLayerType::Ether;
        message.attributes =
            vec![LinkAttribute::IfName("vetha".into()), LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Veth)])];
        let same = link(&message);
        assert_eq!((same.name.as_str(), same.kind.as_str(), same.is_pod_veth), ("vetha", "veth", false));
        message.attributes.push(LinkAttribute::LinkNetNsId(0));
        assert!(link(&message).is_pod_veth);
    }

    #[test]
    fn an_address_is_told_with_whether_it_can_be_used() {
        let mut message = AddressMessage::default();
        message.header.index = 2;
        message.header.prefix_len = 64;
        message.attributes = vec![
            AddressAttribute::Address(IpAddr::from(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1))),
            AddressAttribute::Flags(AddressFlags::Tentative),
        ];
        let tentative = address(&message).unwrap();
        assert_eq!(tentative.net, "fd00::1/64".parse().unwrap());
        assert!(tentative.is_global && !tentative.is_usable);
        message.attributes.truncate(1);
        assert!(address(&message).unwrap().is_usable);
        message.attributes.push(AddressAttribute::Flags(AddressFlags::Deprecated));
        let deprecated = address(&message).unwrap();
        assert!(deprecated.is_usable && deprecated.is_deprecated);
    }
}
