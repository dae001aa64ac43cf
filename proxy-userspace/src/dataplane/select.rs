//! Which devices get which programs: the operator's patterns, or what netlink says about the devices.

use super::{
    netlink::{Link, NodeNetwork, tunnels},
    options::{DevicePattern, Options, UplinkMode},
    program::ProgramName,
};

/// The devices to attach to.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Selection<'a> {
    /// Devices that lead out of the node.
    pub(super) uplinks: Vec<&'a Link>,
    /// Devices that lead to pods.
    pub(super) pod_devices: Vec<&'a Link>,
    /// Names the operator gave that no device has.
    pub(super) absent: Vec<String>,
}

impl Selection<'_> {
    /// The programs that these uplinks get, and those of every node's pods and sockets, among those that the options ask for.
    pub(super) fn programs(&self, options: &Options) -> Vec<ProgramName> {
        let any = |is_meant: &dyn Fn(&Link) -> bool| self.uplinks.iter().any(|link| is_meant(link));
        let is_needed = |program: &ProgramName| match program {
            ProgramName::UplinkXdp => any(&|link| takes_xdp(options, link)),
            ProgramName::UplinkIn => any(&|link| !link.is_layer3 && !takes_xdp(options, link)),
            ProgramName::UplinkOut | ProgramName::CrossUplinkIn => any(&|link| !link.is_layer3),
            ProgramName::UplinkInL3 | ProgramName::UplinkOutL3 => any(&|link| link.is_layer3),
            _ => true,
        };
        options.programs().filter(is_needed).collect()
    }
}

/// Whether XDP is to be tried at an uplink: no tunnel takes it in its driver, and nothing is gained by it anywhere else.
pub(super) fn takes_xdp(options: &Options, link: &Link) -> bool {
    options.uplink_mode != UplinkMode::Tc && link.has_ethernet && !link.is_layer3 && !link.is_overlay()
}

/// What a device is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    Uplink,
    Pod,
}

/// Sorts the node's devices. A device named or matched by a pattern is what the pattern says; what both options match is
/// an uplink.
pub(super) fn select<'a>(options: &Options, network: &'a NodeNetwork) -> Selection<'a> {
    let mut selection = Selection::default();
    let bridge = options.pod_bridge.as_deref().and_then(|name| network.link(name));
    for link in &network.links {
        match role(options, link, bridge, network) {
            Some(Role::Uplink) => selection.uplinks.push(link),
            Some(Role::Pod) => selection.pod_devices.push(link),
            None => {}
        }
    }
    let names = options.uplinks.iter().chain(&options.pod_devices).filter_map(DevicePattern::as_name);
    let names = names.chain(options.pod_bridge.as_deref());
    selection.absent = names.filter(|name| network.link(name).is_none()).map(str::to_owned).collect();
    selection
}

/// Whether packets leave the node by a device, or come to it, when nobody says so: by a default route, in a tunnel, or because it is a
/// card, or a bond of some, with an address of its own: other nodes may be behind a second one. The same of a VLAN, unless it is one of
/// such a device, whose programs see its frames.
fn leads_out(link: &Link, network: &NodeNetwork) -> bool {
    const CARDS: [&str; 4] = ["", "bond", "team", "vlan"];
    let has_address = || network.addresses.iter().any(|address| address.ifindex == link.ifindex && address.is_global);
    let is_card = link.has_ethernet && !link.is_loopback && CARDS.contains(&link.kind.as_str());
    link.has_default_route
        || link.is_overlay()
        || is_card
            && link.master.is_none()
            && has_address()
            && !parents(link, network).any(|parent| leads_out(parent, network))
}

/// Of a VLAN the device whose frames bear its tag, of a VLAN in a VLAN its, and so on.
fn parents<'a>(link: &Link, network: &'a NodeNetwork) -> impl Iterator<Item = &'a Link> {
    let parent = |link: &Link| {
        let parent = link.vlan.as_ref()?.parent;
        network.links.iter().find(|other| other.ifindex == parent)
    };
    // No more deep than there are devices, whatever the kernel says.
    std::iter::successors(parent(link), move |link| parent(link)).take(network.links.len())
}

fn role(options: &Options, link: &Link, bridge: Option<&Link>, network: &NodeNetwork) -> Option<Role> {
    if is_listed(&options.uplinks, link) || (options.tunnels && tunnels::is_tunnel(&link.name)) {
        Some(Role::Uplink)
    } else if is_listed(&options.pod_devices, link) {
        Some(Role::Pod)
    } else if options.uplinks.is_empty() && leads_out(link, network) {
        Some(Role::Uplink)
    } else if options.pod_bridge.is_some() {
        bridge.is_some_and(|bridge| link.master == Some(bridge.ifindex)).then_some(Role::Pod)
    } else if options.pod_devices.is_empty() && link.is_pod_veth && !link.has_default_route {
        Some(Role::Pod)
    } else {
        None
    }
}

/// The loopback device has to be named to be meant: `*` is not it.
fn is_listed(patterns: &[DevicePattern], link: &Link) -> bool {
    patterns.iter().any(|pattern| match pattern.as_name() {
        Some(name) => name == link.name,
        None => !link.is_loopback && pattern.matches(&link.name),
    })
}

#[cfg(test)]
mod tests {
    use proxy_common::node::Vlan;

    use super::{Link, NodeNetwork, Options, ProgramName, Selection, UplinkMode, select};
    use crate::dataplane::netlink::LinkAddress;

    fn network() -> NodeNetwork {
        let link = |ifindex, name: &str| Link { ifindex, name: name.into(), has_ethernet: true, ..Link::default() };
        NodeNetwork {
            links: vec![
                Link { is_loopback: true, ..link(1, "lo") },
                Link { has_default_route: true, ..link(2, "eth0") },
                link(3, "eth1"),
                Link { is_pod_veth: true, ..link(4, "vetha") },
                Link { is_pod_veth: true, has_default_route: true, ..link(5, "vethup") },
                link(6, "docker0"),
                Link { kind: "vxlan".into(), ..link(7, "overlay") },
            ],
            addresses: Vec::new(),
        }
    }

    fn names(uplinks: &[&str], pod_devices: &[&str]) -> (Vec<String>, Vec<String>, Vec<String>) {
        let mut options = Options::new("/sys/fs/bpf/sluice");
        options.uplinks = uplinks.iter().map(|text| text.parse().unwrap()).collect();
        options.pod_devices = pod_devices.iter().map(|text| text.parse().unwrap()).collect();
        let network = network();
        let selection = select(&options, &network);
        let names = |links: Vec<&Link>| links.into_iter().map(|link| link.name.clone()).collect();
        (names(selection.uplinks), names(selection.pod_devices), selection.absent)
    }

    #[test]
    fn devices_are_sorted_by_patterns_and_else_by_what_they_are() {
        let cases = [
            ("defaults", names(&[], &[]), "eth0 vethup overlay | vetha |"),
            ("uplinks named", names(&["eth1"], &[]), "eth1 | vetha |"),
            ("patterns", names(&["eth*"], &["veth*"]), "eth0 eth1 | vetha vethup |"),
            ("a default uplink claimed as a pod's", names(&[], &["vethup"]), "eth0 overlay | vethup |"),
            ("both match", names(&["veth*"], &["vetha"]), "vetha vethup | |"),
            ("absent", names(&["eth9", "wlan*"], &["pod0"]), "| | eth9 pod0"),
        ];
        for (name, (uplinks, pods, absent), expected) in cases {
            let found = format!("{} | {} | {}", uplinks.join(" "), pods.join(" "), absent.join(" "));
            let words: Vec<&str> = found.split_whitespace().collect();
            assert_eq!(words, expected.split_whitespace().collect::<Vec<_>>(), "{name}");
        }
    }

    fn address(ifindex: u32) -> LinkAddress {
        LinkAddress {
            ifindex,
            net: "192.0.2.9/24".parse().unwrap(),
            is_global: true,
            is_secondary: false,
            is_usable: true,
            is_deprecated: false,
        }
    }

    #[test]
    fn cards_with_addresses_and_tunnels_that_are_up_lead_out() {
        let link = |kind: &str, is_up| Link {
            ifindex: 2,
            name: "it".into(),
            kind: kind.into(),
            has_ethernet: ["", "vlan", "dummy", "veth", "bridge"].contains(&kind),
            is_up,
            ..Link::default()
        };
        let cases = [
            ("a second card", link("", true), 2, true),
            ("a card without an address", link("", true), 3, false),
            ("a card in a bridge or bond", Link { master: Some(9), ..link("", true) }, 2, false),
            ("a VLAN", link("vlan", true), 2, true),
            ("a dummy", link("dummy", true), 2, false),
            ("a bridge of containers", link("bridge", true), 2, false),
            ("a veth within the node", link("veth", true), 2, false),
            ("a tunnel", link("ipip", true), 3, true),
            ("WireGuard", link("wireguard", true), 3, true),
            ("the tunnel that every namespace has", link("ipip", false), 3, false),
        ];
        for (name, link, ifindex, is_uplink) in cases {
            let network = NodeNetwork { links: vec![link], addresses: vec![address(ifindex)] };
            let selection = select(&Options::new("/nowhere"), &network);
            assert_eq!(selection.uplinks.len(), usize::from(is_uplink), "{name}");
        }
    }

    #[test]
    fn programs_of_a_card_see_the_frames_of_its_vlans() {
        let vlan = |ifindex, parent| Link {
            ifindex,
            name: format!("vlan{ifindex}"),
            kind: "vlan".into(),
            has_ethernet: true,
            vlan: Some(Vlan { parent, protocol: 0x81, number: 5 }),
            ..Link::default()
        };
        let card = Link { ifindex: 2, name: "card".into(), has_ethernet: true, ..Link::default() };
        let links = vec![card, vlan(3, 2), vlan(4, 3)];
        for (with_address, expected) in [
            (vec![2, 3, 4], vec!["card"]),
            (vec![3, 4], vec!["vlan3"]),
            (vec![4], vec!["vlan4"]),
            (vec![2, 4], vec!["card"]),
        ] {
            let addresses = with_address.iter().copied().map(address).collect();
            let network = NodeNetwork { links: links.clone(), addresses };
            let selection = select(&Options::new("/nowhere"), &network);
            let names: Vec<&str> = selection.uplinks.iter().map(|link| link.name.as_str()).collect();
            assert_eq!(names, expected, "{with_address:?}");
        }
    }

    #[test]
    fn the_ports_of_the_bridge_of_pods_are_pod_devices_but_for_uplinks() {
        let mut network = network();
        for link in network.links.iter_mut().filter(|link| ["eth0", "eth1", "vetha"].contains(&link.name.as_str())) {
            link.master = Some(6);
        }
        let mut options = Options::new("/sys/fs/bpf/sluice");
        options.pod_bridge = Some("docker0".into());
        let selection = select(&options, &network);
        let names: Vec<&str> = selection.pod_devices.iter().map(|link| link.name.as_str()).collect();
        assert_eq!((names, selection.absent), (vec!["eth1", "vetha"], vec![]));
        options.pod_bridge = Some("cbr0".into());
        let selection = select(&options, &network);
        assert_eq!((selection.pod_devices, selection.absent), (vec![], vec!["cbr0".to_owned()]));
    }

    #[test]
    fn devices_of_our_tunnels_are_uplinks_if_there_are_to_be_any() {
        let mut network = network();
        network.links.push(Link { name: "sluice_ipip".into(), is_layer3: true, ..Link::default() });
        let mut options = Options::new("/sys/fs/bpf/sluice");
        options.uplinks = vec!["eth0".parse().unwrap()];
        for (tunnels, expected) in [(false, vec!["eth0"]), (true, vec!["eth0", "sluice_ipip"])] {
            options.tunnels = tunnels;
            let selection = select(&options, &network);
            let names: Vec<&str> = selection.uplinks.iter().map(|link| link.name.as_str()).collect();
            assert_eq!(names, expected);
        }
    }

    #[test]
    fn loopback_is_not_meant_by_a_pattern() {
        assert!(!names(&["*"], &[]).0.contains(&"lo".into()));
        assert_eq!(names(&["lo"], &[]).0, ["lo"]);
    }

    #[test]
    fn programs_of_uplinks_are_those_of_the_kinds_that_there_are() {
        let ethernet = Link { name: "eth0".into(), has_ethernet: true, ..Link::default() };
        let layer3 = Link { name: "wg0".into(), is_layer3: true, ..Link::default() };
        let overlay = Link { kind: "vxlan".into(), ..ethernet.clone() };
        let cases: [(&str, &[&Link], UplinkMode, &[&str]); 5] = [
            ("none", &[], UplinkMode::Xdp, &[]),
            ("Ethernet", &[&ethernet], UplinkMode::Xdp, &["uplink_xdp", "uplink_out"]),
            ("Ethernet, without XDP", &[&ethernet], UplinkMode::Tc, &["uplink_in", "uplink_out"]),
            ("WireGuard", &[&layer3], UplinkMode::Xdp, &["uplink_in_l3", "uplink_out_l3"]),
            ("both of Ethernet", &[&ethernet, &overlay], UplinkMode::Xdp, &["uplink_xdp", "uplink_in", "uplink_out"]),
        ];
        for (name, uplinks, uplink_mode, expected) in cases {
            let options = Options { uplink_mode, ..Options::new("/nowhere") };
            let selection = Selection { uplinks: uplinks.to_vec(), ..Selection::default() };
            let programs = selection.programs(&options);
            let of_uplinks: Vec<&str> =
                programs.iter().map(|program| program.as_str()).filter(|name| name.starts_with("uplink")).collect();
            assert_eq!(of_uplinks, expected, "{name}");
            assert!(programs.contains(&ProgramName::PodIn) && programs.contains(&ProgramName::Connect4), "{name}");
        }
    }
}
