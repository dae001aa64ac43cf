//! Uplinks of other kinds: a client behind a VLAN of the wire, or behind a tunnel that the kernel makes. Node Ports are served
//! there as on any uplink. A kind that a kernel does not know is ignored by name.

use std::{fs, net::Ipv4Addr, net::Ipv6Addr};

use anyhow::{Context as _, Result, ensure};
use libtest_mimic::{Arguments, Trial};
use tests::{
    lab::{
        Lab, LabOptions, Node, UplinkMode,
        address::{Addresses, CLIENT, Family, on_wire},
        agent::{AgentOptions, SocketLb},
        device::{Offload, set_offload},
        manifest::{Service, write_nodes},
    },
    netns::Namespace,
    traffic::{Ask, Failure, Protocol},
};

/// The ends: the node's, and the client's.
const ENDS: [Addresses; 2] = [
    Addresses { v4: Ipv4Addr::new(192, 168, 78, 1), v6: Ipv6Addr::new(0xfd00, 0x78, 0, 0, 0, 0, 0, 1) },
    Addresses { v4: Ipv4Addr::new(192, 168, 78, 2), v6: Ipv6Addr::new(0xfd00, 0x78, 0, 0, 0, 0, 0, 2) },
];

/// What every kind of device is called in the end.
const DEVICE: &str = "special";

/// A kind of device.
struct Kind {
    name: &'static str,
    /// What it is of `ip link add`, so that a kernel can be asked.
    link: &'static str,
    /// What its packets can be.
    families: &'static [Family],
    /// Makes one on a device, from an address to another.
    make: fn(&Namespace, &str, Addresses, Addresses) -> Result<()>,
    /// Whether its frames are the uplink's own with something in between, so that the uplink sees them first.
    is_of_uplink: bool,
}

const KINDS: [Kind; 6] = [
    Kind { name: "a_vlan", link: "vlan", families: &Family::ALL, make: vlan, is_of_uplink: true },
    Kind { name: "a_vlan_in_a_vlan", link: "vlan", families: &Family::ALL, make: vlan_in_vlan, is_of_uplink: true },
    Kind { name: "ipip", link: "ipip", families: &[Family::V4], make: ipip, is_of_uplink: false },
    Kind { name: "ip6tnl", link: "ip6tnl", families: &Family::ALL, make: ip6tnl, is_of_uplink: false },
    Kind { name: "geneve", link: "geneve", families: &Family::ALL, make: geneve, is_of_uplink: false },
    Kind { name: "wireguard", link: "wireguard", families: &Family::ALL, make: wireguard, is_of_uplink: false },
];

fn main() {
    let arguments = Arguments::from_args();
    let trials = KINDS.map(|kind| {
        let is_missing = !is_known(&kind).unwrap_or_default();
        if is_missing {
            let (name, link) = (kind.name, kind.link);
            eprintln!(
                "IGNORED: {name}: this kernel makes no {link}; \
                 `cargo xtask vm 6.12 --suite netns --test netns_devices` has one that does"
            );
        }
        let name = format!("clients_behind_{}_reach_node_ports", kind.name);
        let run = move || test(&kind).map_err(|error| format!("{error:?}").into());
        Trial::test(name, run).with_ignored_flag(is_missing)
    });
    libtest_mimic::run(&arguments, trials.into()).exit();
}

/// Whether the kernel can make one.
fn is_known(kind: &Kind) -> Result<bool> {
    let namespace = Namespace::new("kinds")?;
    namespace.ip("link add uplink type veth peer name wire\nlink set uplink up")?;
    Ok((kind.make)(&namespace, "uplink", on_wire(1), on_wire(2)).is_ok())
}

fn vlan(namespace: &Namespace, device: &str, _: Addresses, _: Addresses) -> Result<()> {
    namespace.ip(&format!("link add link {device} name {DEVICE} type vlan id 5"))
}

fn vlan_in_vlan(namespace: &Namespace, device: &str, _: Addresses, _: Addresses) -> Result<()> {
    namespace.ip(&format!(
        "link add link {device} name outer type vlan protocol 802.1ad id 7
         link set outer up
         link add link outer name {DEVICE} type vlan id 5"
    ))
}

fn ipip(namespace: &Namespace, _: &str, own: Addresses, peer: Addresses) -> Result<()> {
    namespace.ip(&format!("link add {DEVICE} type ipip local {} remote {}", own.v4, peer.v4))
}

fn ip6tnl(namespace: &Namespace, _: &str, own: Addresses, peer: Addresses) -> Result<()> {
    namespace.ip(&format!("link add {DEVICE} type ip6tnl mode any local {} remote {}", own.v6, peer.v6))
}

fn geneve(namespace: &Namespace, _: &str, _: Addresses, peer: Addresses) -> Result<()> {
    namespace.ip(&format!("link add {DEVICE} type geneve id 9 remote {} dstport 6081", peer.v4))
}

/// The keys are told apart by whose address is lower.
fn wireguard(namespace: &Namespace, _: &str, own: Addresses, peer: Addresses) -> Result<()> {
    let directory = tempfile::tempdir()?;
    // 32 bytes in base64; any will do.
    let secret = |end: Addresses, other: Addresses| -> Result<_> {
        let path = directory.path().join(end.v4.to_string());
        let last = if end.v4 < other.v4 { "AAE=" } else { "AAI=" };
        fs::write(&path, "A".repeat(40) + last)?;
        Ok(path)
    };
    namespace.ip(&format!("link add {DEVICE} type wireguard"))?;
    let public = namespace.command("wg")?.arg("pubkey").stdin(fs::File::open(secret(peer, own)?)?).output()?;
    let public = String::from_utf8(public.stdout)?;
    let status = namespace
        .command("wg")?
        .args(["set", DEVICE, "listen-port", "51820", "private-key"])
        .arg(secret(own, peer)?)
        .args(["peer", public.trim(), "allowed-ips", "0.0.0.0/0,::/0", "endpoint", &format!("{}:51820", peer.v4)])
        .status()?;
    ensure!(status.success(), "wg: {status}");
    Ok(())
}

/// Makes a device at the node and at the client, and gives them addresses.
fn connect(kind: &Kind, lab: &Lab, node: &Node) -> Result<()> {
    let wire = [node.addresses(), on_wire(CLIENT)];
    let places = [(node.host.namespace(), "uplink"), (lab.client.namespace(), "eth0")];
    for (index, (namespace, device)) in places.into_iter().enumerate() {
        (kind.make)(namespace, device, wire[index], wire[1 - index])?;
        let own = ENDS[index];
        namespace.ip(&format!(
            "addr add {}/24 dev {DEVICE}\naddr add {}/64 dev {DEVICE} nodad\nlink set {DEVICE} up",
            own.v4, own.v6
        ))?;
    }
    if kind.is_of_uplink {
        // As on a card: tags are in the frame where XDP looks.
        set_offload(lab.gateway.namespace(), "port-node-a", Offload::VlanTags, false)?;
    }
    Ok(())
}

/// A Service whose backend is on the node, one whose is not, and one that has none.
fn services() -> [Service; 3] {
    [Service::new("at-a", 31, &["a1"]), Service::new("at-b", 32, &["b1"]), Service::new("nobody", 33, &[])]
}

fn test(kind: &Kind) -> Result<()> {
    for uplink in [UplinkMode::Xdp, UplinkMode::Tc] {
        let source = tempfile::tempdir()?;
        write_nodes(source.path())?;
        services().iter().try_for_each(|service| service.write(source.path()))?;
        let lab = Lab::new(LabOptions { uplinks: [uplink; 2], ..LabOptions::default() })?;
        connect(kind, &lab, lab.node("node-a")?)?;
        let mut more = ["--nodeport-addresses", "all"].map(str::to_owned).to_vec();
        if !kind.is_of_uplink {
            more.extend(["--uplinks", DEVICE].map(str::to_owned));
        }
        lab.start_agents(source.path(), &AgentOptions { socket_lb: SocketLb::Host, more, ..AgentOptions::default() })?;
        for family in kind.families {
            for protocol in Protocol::ALL {
                reach(&lab, *family, protocol).with_context(|| format!("uplink {}", uplink.name()))?;
            }
        }
    }
    Ok(())
}

fn reach(lab: &Lab, family: Family, protocol: Protocol) -> Result<()> {
    let [here, elsewhere, nobody] = services();
    let node = lab.node("node-a")?;
    for (service, peer) in [(&here, ENDS[1].of(family)), (&elsewhere, node.addresses().of(family))] {
        let target = service.at_node(ENDS[0], family, protocol);
        for answer in lab.client.ask_times(Ask::new(target), 3)? {
            let answer = answer.with_context(|| format!("{target} of {}", service.name))?;
            assert_eq!((answer.pod.as_str(), answer.from, answer.peer.ip()), (service.pods[0], target.address, peer));
        }
        if protocol == Protocol::Tcp {
            let length = 1 << 19;
            let report = lab.client.transfer(Ask::new(target), length)?;
            assert_eq!((report.pod.as_str(), report.bytes), (service.pods[0], length), "{target}");
        }
    }
    let target = nobody.at_node(ENDS[0], family, protocol);
    let answer = lab.client.ask_times(Ask::new(target), 1)?.remove(0);
    assert!(matches!(answer, Err(Failure::Refused)), "{target}: {answer:?}");
    Ok(())
}
