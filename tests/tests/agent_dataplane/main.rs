//! The agent's dataplane on the real kernel: what it attaches, what outlives it, what it adopts, and what it leaves alone.

mod fixture;
mod flow_table;
mod reserved;

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use caps::{CapSet, Capability};
use fixture::{Node, Stranger, filters, network, runtime, tcx_chain};
use proxy_common::{
    addr::{Ipv4, Ipv6, Port, Protocol},
    backend::{Backend, BackendState},
    flow::{Direction, Flow, NextHop, Output, Rewrite},
    node::{self, Cidr, ServiceCidrs, local},
    service::{Frontend, Range, Service},
    tuple::{Stage, Tuple},
};
use proxy_userspace::{
    dataplane::{
        AttachProblem, ClassifierMode, Dataplane, Mechanism, NodeSettings, Options, ProgramName, Removed, Side,
        SocketLb, UplinkMode, cleanup,
        netlink::{self, NetworkEvent},
    },
    desired::Prefix,
    diff::{KernelState, Plan, Step},
};
use tests::patience::patience;

const SOCKET_PROGRAMS: [&str; 11] = [
    "connect4",
    "connect6",
    "getpeername4",
    "getpeername6",
    "post_bind4",
    "post_bind6",
    "recvmsg4",
    "recvmsg6",
    "sendmsg4",
    "sendmsg6",
    "sock_release",
];

/// Every pin of the node with its devices as they are.
fn every_link() -> Vec<String> {
    let mut links: Vec<String> = SOCKET_PROGRAMS.map(|program| format!("{program}-cgroup")).into();
    for device in ["pod0", "pod1"] {
        links.extend([format!("pod_in-{device}"), format!("pod_out-{device}")]);
    }
    for device in ["up0", "up1"] {
        links.extend([format!("uplink_xdp-{device}"), format!("uplink_out-{device}")]);
    }
    links.sort();
    links
}

fn v4(third: u8, fourth: u8) -> Ipv4 {
    Ipv4 { octets: [10, 96, third, fourth] }
}

/// One range, of IPv4.
fn service_cidrs() -> ServiceCidrs {
    let mut cidrs = ServiceCidrs::NONE;
    cidrs.v4[0] = Cidr { addr: v4(0, 0), mask: Ipv4 { octets: [255, 255, 0, 0] } };
    cidrs
}

/// A Service with one backend, and the node's address.
fn small_plan() -> Plan {
    let backend = Backend {
        addr: Ipv4 { octets: [10, 244, 1, 2] },
        node: Ipv4::default(),
        port: Port::new(8080),
        state: BackendState::Serving,
        is_local: 1,
        generation: 1,
    };
    let range = Range { first: 3, count: 1 };
    let service = Service { index: 1, internal: range, external: range, ..Service::default() };
    Plan {
        v4: vec![
            Step::PutLocalAddr(Ipv4 { octets: [192, 0, 2, 1] }, local::NODE_PORTS),
            Step::PutBackend(1, backend),
            Step::PutSlots(3, vec![1]),
            Step::PutSource(1, Prefix { addr: Ipv4 { octets: [198, 51, 100, 0] }, bits: 24 }),
            Step::PutService(Frontend::new(v4(0, 10), Port::new(80), Protocol::Tcp), service),
            Step::PutService(Frontend::new(Ipv4::default(), Port::new(30_080), Protocol::Tcp), service),
        ],
        v6: vec![
            Step::PutSource(2, Prefix { addr: Ipv6 { octets: [0x20; 16] }, bits: 128 }),
            Step::PutSource(2, Prefix { addr: Ipv6::default(), bits: 0 }),
            Step::PutLocalAddr(Ipv6 { octets: [0x20; 16] }, 0),
        ],
        service_cidrs: Some(service_cidrs()),
    }
}

#[test]
fn a_first_start_attaches_every_program_where_it_belongs() -> Result<()> {
    let node = Node::new()?;
    let report = node.start(|_, report| Ok(report))?;
    assert!(report.problems.is_empty(), "{:?}", report.problems);
    assert_eq!(node.links()?, every_link());
    let mechanism = |program, target: &str| {
        let found = report.attachments.iter().find(|one| one.program == program && one.target == target);
        found.map(|one| one.mechanism)
    };
    assert_eq!(mechanism(ProgramName::UplinkXdp, "up0"), Some(Mechanism::Xdp));
    assert_eq!(mechanism(ProgramName::UplinkOut, "up1"), Some(Mechanism::Tcx));
    assert_eq!(mechanism(ProgramName::PodIn, "pod1"), Some(Mechanism::Tcx));
    Ok(())
}

/// Trap 19: nothing is detached to be attached again.
#[test]
fn a_restarted_agent_adopts_maps_and_links_and_replaces_the_programs() -> Result<()> {
    let node = Node::new()?;
    let before = node.start(|dataplane, _| {
        dataplane.apply(&small_plan())?;
        Ok(dataplane.read()?)
    })?;
    let maps = ["SERVICES_V4", "FLOWS_V6", "NODE"].map(|map| node.map(map).unwrap());
    let links: BTreeMap<String, (u32, u32)> =
        node.links()?.into_iter().map(|name| Ok((name.clone(), node.link(&name)?))).collect::<Result<_>>()?;

    let after = node.start(|dataplane, _| Ok(dataplane.read()?))?;
    assert_eq!(after, before);
    assert_eq!(["SERVICES_V4", "FLOWS_V6", "NODE"].map(|map| node.map(map).unwrap()), maps);
    assert_eq!(node.links()?, links.keys().cloned().collect::<Vec<_>>());
    for (name, (link, program)) in links {
        let (link_now, program_now) = node.link(&name)?;
        assert_eq!(link_now, link, "{name} is the same link");
        assert_ne!(program_now, program, "{name} has the new program");
    }
    Ok(())
}

#[test]
fn ranges_of_clients_and_of_cluster_ips_are_read_back_as_they_were_written() -> Result<()> {
    let node = Node::new()?;
    node.start(|dataplane, _| {
        assert_eq!(dataplane.read()?.service_cidrs, ServiceCidrs::NONE, "zeros would hold every address");
        dataplane.apply(&small_plan())?;
        let mut kernel = KernelState::default();
        kernel.carry_out(&small_plan());
        let state = dataplane.read()?;
        assert_eq!((&state.v4.sources, &state.v6.sources), (&kernel.v4.sources, &kernel.v6.sources));
        assert_eq!(state.service_cidrs, kernel.service_cidrs);
        let removal = |&(service, prefix): &(u32, Prefix<Ipv6>)| Step::RemoveSource(service, prefix);
        let v6 = kernel.v6.sources.iter().map(removal).collect();
        dataplane.apply(&Plan { v6, service_cidrs: Some(ServiceCidrs::NONE), ..Plan::default() })?;
        let state = dataplane.read()?;
        assert_eq!((state.v4.sources.len(), state.v6.sources.len()), (1, 0));
        assert_eq!(state.service_cidrs, ServiceCidrs::NONE);
        Ok(())
    })
}

#[test]
fn attaching_again_changes_nothing() -> Result<()> {
    let node = Node::new()?;
    node.start(|dataplane, _| {
        let before = node.links()?.iter().map(|name| node.link(name)).collect::<Result<Vec<_>>>()?;
        dataplane.attach(&network()?)?;
        let after = node.links()?.iter().map(|name| node.link(name)).collect::<Result<Vec<_>>>()?;
        assert_eq!(before, after);
        Ok(())
    })
}

#[test]
fn an_incompatible_pin_is_left_alone_with_advice() -> Result<()> {
    let mut node = Node::new()?;
    node.start(|dataplane, _| Ok(dataplane.apply(&small_plan())?))?;
    let (map, link) = (node.map("SOCKETS_V4")?, node.link("pod_in-pod0")?);

    node.options.sizes.insert("SOCKETS_V4".into(), 2_048);
    let error = node.run(|| Ok(Dataplane::open(&node.options).unwrap_err()))?;
    assert_eq!(error.exit_code(), 78);
    let message = error.to_string();
    assert!(message.contains("SOCKETS_V4") && message.contains("1024, not 2048"), "{message}");
    assert!(message.contains("sluice cleanup"), "{message}");
    assert_eq!(node.map("SOCKETS_V4")?, map);
    assert_eq!(node.link("pod_in-pod0")?, link);
    Ok(())
}

#[test]
fn maps_of_another_layout_are_left_alone() -> Result<()> {
    let node = Node::new()?;
    node.start(|_, _| Ok(()))?;
    let map = aya::maps::MapData::from_pin(node.pin("maps/NODE"))?;
    let mut array: aya::maps::Array<_, node::Node> = aya::maps::Map::Array(map).try_into()?;
    let entry = array.get(&0, 0)?;
    assert_eq!(entry.layout, node::LAYOUT);
    array.set(0, node::Node { layout: node::LAYOUT + 1, ..entry }, 0)?;

    let error = node.run(|| Ok(Dataplane::open(&node.options).unwrap_err()))?;
    assert_eq!(error.exit_code(), 78);
    let expected = format!("its layout is {}, not {}", node::LAYOUT + 1, node::LAYOUT);
    assert!(error.to_string().contains(&expected), "{error}");
    assert_eq!(array.get(&0, 0)?.layout, node::LAYOUT + 1);
    Ok(())
}

#[test]
fn an_occupied_xdp_hook_is_named_and_its_device_gets_tc() -> Result<()> {
    let node = Node::new()?;
    node.run(|| {
        let mut stranger = Stranger::new()?;
        let (link, id) = stranger.xdp("up0")?;
        let mut dataplane = Dataplane::open(&node.options)?;
        let report = dataplane.attach(&network()?)?;
        let [AttachProblem::XdpOccupied { device, program }] = report.problems.as_slice() else {
            panic!("{:?}", report.problems)
        };
        assert_eq!((device.as_str(), *program), ("up0", Some(id)));
        let message = report.problems[0].to_string();
        assert!(message.contains("up0") && message.contains(&format!("id {id}")), "{message}");
        let links = node.links()?;
        assert!(links.contains(&"uplink_in-up0".into()) && !links.contains(&"uplink_xdp-up0".into()), "{links:?}");
        assert!(links.contains(&"uplink_xdp-up1".into()), "{links:?}");

        drop(link);
        let report = dataplane.attach(&network()?)?;
        assert!(report.problems.is_empty(), "{:?}", report.problems);
        assert_eq!(node.links()?, every_link());
        Ok(())
    })
}

#[test]
fn the_programs_know_which_devices_take_frames_from_xdp() -> Result<()> {
    let mut node = Node::new()?;
    let [up0, up1] = ["up0", "up1"].map(|device| node.namespace.device_index(device).unwrap());
    let mut known = Vec::new();
    for (pattern, mode) in [("up*", UplinkMode::Xdp), ("up1", UplinkMode::Xdp), ("up*", UplinkMode::Tc)] {
        node.options.uplinks = vec![pattern.parse()?];
        node.options.uplink_mode = mode;
        node.start(|_, _| Ok(()))?;
        known.push((node.uplinks()?, node.entry()?.route_generation));
    }
    let (devices, generations): (Vec<_>, Vec<_>) = known.into_iter().unzip();
    assert_eq!(devices, [vec![up0, up1], vec![up1], vec![]]);
    assert!(generations.is_sorted_by(|before, after| before < after), "next hops are looked up anew: {generations:?}");
    Ok(())
}

#[test]
fn the_head_of_a_chain_is_ours_and_the_rest_stays() -> Result<()> {
    let node = Node::new()?;
    node.run(|| {
        let (_link, stranger) = Stranger::new()?.tcx("pod0")?;
        let mut dataplane = Dataplane::open(&node.options)?;
        dataplane.attach(&network()?)?;
        assert_eq!(tcx_chain("pod0")?, [node.link("pod_in-pod0")?.1, stranger]);
        Ok(())
    })
}

#[test]
fn cleanup_removes_everything_of_ours_and_nothing_else() -> Result<()> {
    let node = Node::new()?;
    let foreign_pin = node.pin("links/theirs");
    node.run(|| {
        let mut stranger = Stranger::new()?;
        let (_link, id) = stranger.tcx("pod0")?;
        drop(Dataplane::open(&node.options)?.attach(&network()?)?);
        stranger.pin(&foreign_pin)?;
        assert_eq!(tcx_chain("pod0")?.len(), 2);

        let removed = cleanup(&node.options.pin_path)?;
        let links = removed.iter().filter(|one| matches!(one, Removed::Link { .. })).count();
        assert_eq!(links, every_link().len());
        assert!(removed.contains(&Removed::Map { path: node.pin("maps/NODE") }), "{removed:?}");
        assert_eq!(tcx_chain("pod0")?, [id]);
        assert!(foreign_pin.exists() && !node.pin("maps").exists());

        std::fs::remove_file(&foreign_pin)?;
        cleanup(&node.options.pin_path)?;
        assert!(!node.options.pin_path.exists());
        assert_eq!(cleanup(&node.options.pin_path)?, []);
        Ok(())
    })
}

#[test]
fn a_device_made_anew_under_its_old_name_is_attached_again() -> Result<()> {
    let node = Node::new()?;
    node.start(|dataplane, _| {
        let before = node.link("pod_in-pod0")?;
        node.namespace.ip("link delete pod0\nlink add pod0 type veth peer name other0")?;
        let mut network = network()?;
        network.links.iter_mut().filter(|link| link.name == "pod0").for_each(|link| link.is_pod_veth = true);
        let report = dataplane.attach(&network)?;
        assert!(report.problems.is_empty(), "{:?}", report.problems);
        assert_ne!(node.link("pod_in-pod0")?.0, before.0);
        assert_eq!(tcx_chain("pod0")?, [before.1]);
        Ok(())
    })
}

#[test]
fn the_pins_of_a_device_go_with_it_and_move_with_its_name() -> Result<()> {
    let node = Node::new()?;
    node.start(|dataplane, _| {
        let link = node.link("pod_in-pod0")?;
        node.namespace.ip("link delete pod1\nlink set pod0 down\nlink set pod0 name pod.7")?;
        dataplane.attach(&network()?)?;
        let links = node.links()?;
        assert!(!links.iter().any(|name| name.ends_with("pod1") || name.ends_with("pod0")), "{links:?}");
        assert_eq!(node.link("pod_in-pod:7")?, link);
        Ok(())
    })
}

#[test]
fn a_device_that_is_not_there_yet_is_named_and_attached_when_it_appears() -> Result<()> {
    let mut node = Node::new()?;
    node.options.pod_devices = vec!["pod0".parse()?, "later0".parse()?];
    node.start(|dataplane, report| {
        let messages: Vec<String> = report.problems.iter().map(ToString::to_string).collect();
        assert_eq!(messages.len(), 1, "{messages:?}");
        assert!(messages[0].contains("later0"), "{messages:?}");
        assert!(!node.links()?.contains(&"pod_in-pod1".into()));

        node.namespace.ip("link add later0 type veth peer name other0")?;
        let report = dataplane.attach(&network()?)?;
        assert!(report.problems.is_empty(), "{:?}", report.problems);
        assert!(node.links()?.contains(&"pod_in-later0".into()));
        Ok(())
    })
}

#[test]
fn filters_take_the_place_of_links_on_older_kernels() -> Result<()> {
    let mut node = Node::new()?;
    node.options.classifiers = ClassifierMode::Clsact;
    node.options.uplink_mode = UplinkMode::Tc;
    for _start in ["first", "second"] {
        let report = node.start(|_, report| Ok(report))?;
        assert!(report.problems.is_empty(), "{:?}", report.problems);
        for (device, side, program) in
            [("pod0", "ingress", "pod_in"), ("pod1", "egress", "pod_out"), ("up0", "ingress", "uplink_in")]
        {
            let found = filters(&node.namespace, device, side)?;
            assert_eq!(found.matches("handle").count(), 1, "{device} {side}: {found}");
            assert!(found.contains(program), "{device} {side}: {found}");
        }
        assert!(node.links()?.iter().all(|name| name.ends_with("cgroup")), "{:?}", node.links()?);
    }
    node.run(|| {
        let _filter = Stranger::new()?.filter("pod0")?;
        let removed = cleanup(&node.options.pin_path)?;
        let filter = Removed::Filter { device: "up0".into(), side: Side::Egress };
        assert!(removed.contains(&filter), "{removed:?}");
        let found = filters(&node.namespace, "pod0", "ingress")?;
        assert!(found.contains("pref 77") && found.matches("handle").count() == 1, "{found}");
        Ok(())
    })?;
    assert_eq!(filters(&node.namespace, "up0", "egress")?, "");
    Ok(())
}

#[test]
fn a_filter_whose_device_got_another_role_is_replaced_and_not_removed() -> Result<()> {
    let mut node = Node::new()?;
    node.options.classifiers = ClassifierMode::Clsact;
    node.options.uplink_mode = UplinkMode::Tc;
    node.start(|dataplane, _| {
        let mut network = network()?;
        for (is_uplink, program) in [(false, "pod_in"), (true, "uplink_in")] {
            network.links.iter_mut().filter(|link| link.name == "up0").for_each(|link| {
                link.has_default_route = is_uplink;
                link.is_pod_veth = !is_uplink;
            });
            let report = dataplane.attach(&network)?;
            assert!(report.problems.is_empty(), "{:?}", report.problems);
            let found = filters(&node.namespace, "up0", "ingress")?;
            assert!(found.matches("handle").count() == 1 && found.contains(program), "{program}: {found}");
        }
        Ok(())
    })
}

#[test]
fn what_the_options_no_longer_ask_for_is_detached() -> Result<()> {
    let mut node = Node::new()?;
    node.start(|_, _| Ok(()))?;
    node.options.socket_lb = SocketLb::Off;
    node.options.uplink_mode = UplinkMode::Tc;
    node.options.uplinks = vec!["up0".parse()?];
    node.start(|_, _| Ok(()))?;
    let expected = ["pod_in-pod0", "pod_in-pod1", "pod_out-pod0", "pod_out-pod1", "uplink_in-up0", "uplink_out-up0"];
    assert_eq!(node.links()?, expected);
    Ok(())
}

#[test]
fn xdp_changes_its_mode_when_asked_to() -> Result<()> {
    let mut node = Node::new()?;
    let generic = |node: &Node| node.run(|| Ok(network()?.link("up0").context("up0 is gone")?.has_generic_xdp));
    node.start(|_, _| Ok(()))?;
    assert!(!generic(&node)?);
    node.options.uplink_mode = UplinkMode::XdpGeneric;
    node.run(|| {
        let mut dataplane = Dataplane::open(&node.options)?;
        let before = network()?;
        dataplane.attach(&before)?;
        let link = node.link("uplink_xdp-up0")?;
        dataplane.attach(&before)?;
        assert_eq!(node.link("uplink_xdp-up0")?, link, "an old word of netlink's does not detach it again");
        Ok(())
    })?;
    assert!(generic(&node)?);
    Ok(())
}

#[test]
fn a_second_agent_on_the_same_pins_is_refused() -> Result<()> {
    let node = Node::new()?;
    node.start(|_, _| {
        let error = Dataplane::open(&node.options).unwrap_err();
        assert!(error.to_string().contains("an agent"), "{error}");
        Ok(())
    })
}

#[test]
fn an_address_is_in_the_filters_once_it_is_written_and_until_it_is_pruned() -> Result<()> {
    let node = Node::new()?;
    node.start(|dataplane, _| {
        dataplane.apply(&small_plan())?;
        dataplane.put_node(&NodeSettings {
            masquerade_v4: Ipv4 { octets: [192, 0, 2, 77] },
            masquerade_v6: Ipv6::default(),
            further: vec!["192.0.2.78".parse()?],
            node_ports: 30_000..=32_767,
            source_ports: 61_000..=65_535,
            cross_ports: 60_000..=60_999,
            masquerade_all: false,
            masquerade_local_backends: true,
        })?;
        let filter = |map, address| node.filter(map, address);
        let (frontend, backend) = (v4(0, 10), Ipv4 { octets: [10, 244, 1, 2] });
        let (local, masquerade) = (Ipv4 { octets: [192, 0, 2, 1] }, Ipv4 { octets: [192, 0, 2, 77] });
        let further = Ipv4 { octets: [192, 0, 2, 78] };
        for address in [frontend, local, masquerade, further] {
            assert!(filter("INBOUND", address)?, "{address}");
        }
        assert!(filter("OUTBOUND", backend)? && !filter("OUTBOUND", frontend)? && !filter("INBOUND", backend)?);
        assert!(!filter("INBOUND", Ipv4::default())?, "a NodePort's frontend has no address");

        let free = Backend { state: BackendState::Free, ..Backend::default() };
        let gone = Frontend::new(frontend, Port::new(80), Protocol::Tcp);
        dataplane.apply(&Plan { v4: vec![Step::RemoveService(gone), Step::PutBackend(1, free)], ..Plan::default() })?;
        assert!(filter("INBOUND", frontend)?, "bits stay until they are pruned");
        dataplane.prune_filters()?;
        assert!(!filter("INBOUND", frontend)? && !filter("OUTBOUND", backend)?);
        assert!(filter("INBOUND", local)? && filter("INBOUND", masquerade)?);
        Ok(())
    })
}

#[test]
fn pruning_keeps_what_a_live_flow_needs() -> Result<()> {
    let node = Node::new()?;
    let (client, frontend, pod) = (Ipv4 { octets: [10, 244, 1, 9] }, v4(0, 20), Ipv4 { octets: [10, 244, 1, 3] });
    let (sport, port, dport) = (Port::new(40_000), Port::new(80), Port::new(8080));
    node.start(|dataplane, _| {
        let original = Tuple::new(client, frontend, sport, port, Protocol::Tcp, Stage::FromPod);
        let reply = Tuple::new(pod, client, dport, sport, Protocol::Tcp, Stage::ToPod);
        let rewrite = Rewrite { saddr: client, daddr: pod, sport, dport, ..Rewrite::default() };
        let flow = Flow {
            rewrite,
            next_hop: NextHop::default(),
            backend: 1,
            backend_generation: 1,
            service: 1,
            last_seen: 0,
            output: Output::Stack,
            twin_output: Output::Stack,
            twin_stage: Stage::ToPod,
            direction: Direction::Original,
            state: 0,
            eager: 0,
            packets: 0,
            bytes: 0,
        };
        let map = aya::maps::MapData::from_pin(node.pin("maps/FLOWS_V4"))?;
        let mut flows: aya::maps::HashMap<_, Tuple<Ipv4>, Flow<Ipv4>> = aya::maps::Map::LruHashMap(map).try_into()?;
        flows.insert(original, flow, 0)?;
        dataplane.prune_filters()?;
        assert!(node.filter("INBOUND", frontend)? && node.filter("OUTBOUND", pod)?);

        flows.remove(&original)?;
        flows.insert(reply, Flow { direction: Direction::Reply, ..flow }, 0)?;
        dataplane.prune_filters()?;
        assert!(!node.filter("INBOUND", frontend)? && node.filter("OUTBOUND", pod)?);

        flows.remove(&reply)?;
        dataplane.prune_filters()?;
        assert!(!node.filter("OUTBOUND", pod)?);
        Ok(())
    })
}

#[test]
fn what_the_node_lacks_is_said_with_advice_and_exit_code_78() -> Result<()> {
    let node = Node::new()?;
    let with = |change: &dyn Fn(&mut Options)| {
        let mut options = node.options.clone();
        change(&mut options);
        options
    };
    let ordinary = tempfile::tempdir()?;
    std::fs::write(ordinary.path().join("file"), "")?;
    let cases = [
        ("not a cgroup", with(&|options| options.cgroup = Some(ordinary.path().into())), "--cgroup"),
        ("no such cgroup", with(&|options| options.cgroup = Some("/nowhere".into())), "/nowhere"),
        ("no BPF file system", with(&|options| options.pin_path = ordinary.path().join("pins")), "mount -t bpf"),
        ("no such map", with(&|options| options.sizes = [("FLOWS".into(), 7)].into()), "`FLOWS`"),
    ];
    for (name, options, advice) in cases {
        let error = node.run(|| Ok(Dataplane::open(&options).unwrap_err()))?;
        assert_eq!(error.exit_code(), 78, "{name}: {error}");
        assert!(error.to_string().contains(advice), "{name}: {error}");
    }
    for (lost, name) in [(Capability::CAP_NET_ADMIN, "CAP_NET_ADMIN"), (Capability::CAP_BPF, "CAP_BPF")] {
        // Capabilities are a thread's own, and this one ends with the closure.
        let error = node.run(|| {
            caps::drop(None, CapSet::Effective, Capability::CAP_SYS_ADMIN)?;
            caps::drop(None, CapSet::Effective, lost)?;
            Ok(Dataplane::open(&node.options).unwrap_err())
        })?;
        assert_eq!(error.exit_code(), 78);
        assert!(error.to_string().contains(name), "{error}");
    }
    Ok(())
}

#[test]
fn ten_thousand_services_are_written_and_read_back_the_same() -> Result<()> {
    const SERVICES: u32 = 10_000;
    const ENDPOINTS: u32 = 10;
    let node = Node::new()?;
    let (mut backends, mut slots, mut services) = (Vec::new(), Vec::new(), Vec::new());
    for index in 0..SERVICES {
        let first = index * ENDPOINTS;
        let ids: Vec<u32> = (first + 1..=first + ENDPOINTS).collect();
        for &id in &ids {
            let addr = Ipv4 { octets: (0x0af4_0000 + id).to_be_bytes() };
            let backend = Backend {
                addr,
                port: Port::new(8080),
                state: BackendState::Serving,
                generation: 1,
                ..Backend::default()
            };
            backends.push(Step::PutBackend(id, backend));
        }
        slots.push(Step::PutSlots(first, ids));
        let range = Range { first, count: ENDPOINTS };
        let frontend = Frontend::new(v4((index >> 8) as u8, index as u8), Port::new(80), Protocol::Tcp);
        services.push(Step::PutService(
            frontend,
            Service { index, internal: range, external: range, ..Service::default() },
        ));
    }
    let removals = services.iter().map(|step| match step {
        Step::PutService(frontend, _) => Step::RemoveService(*frontend),
        other => other.clone(),
    });
    let removal = Plan { v4: removals.collect(), ..Plan::default() };
    let plan = Plan { v4: [backends, slots, services].concat(), ..Plan::default() };
    node.start(|dataplane, _| {
        let start = Instant::now();
        dataplane.apply(&plan)?;
        let written = start.elapsed();
        let start = Instant::now();
        let state = dataplane.read()?;
        println!("written in {written:?}, read in {:?}", start.elapsed());
        assert!(written < patience(Duration::from_secs(2)), "{written:?}");
        assert_eq!(state.v4.services.len(), SERVICES as usize);
        assert_eq!(state.v4.backends.len(), (SERVICES * ENDPOINTS + 1) as usize);
        assert_eq!(state.slots, (1..=SERVICES * ENDPOINTS).collect::<Vec<_>>());
        for step in &plan.v4 {
            match step {
                Step::PutService(frontend, service) => assert_eq!(state.v4.services.get(frontend), Some(service)),
                Step::PutBackend(id, backend) => assert_eq!(state.v4.backends.get(*id as usize), Some(backend)),
                _ => {}
            }
        }
        dataplane.apply(&removal)?;
        dataplane.apply(&removal).context("removing what is gone")?;
        assert!(dataplane.read()?.v4.services.is_empty());
        Ok(())
    })
}

#[test]
fn a_full_map_is_named_with_its_size() -> Result<()> {
    let mut node = Node::new()?;
    node.options.sizes.insert("SERVICES_V4".into(), 4);
    node.start(|dataplane, _| {
        let step =
            |index: u8| Step::PutService(Frontend::new(v4(0, index), Port::new(80), Protocol::Tcp), Service::default());
        let error = dataplane.apply(&Plan { v4: (0..8).map(step).collect(), ..Plan::default() }).unwrap_err();
        assert_eq!(error.to_string(), "map SERVICES_V4 is full: it holds 4 entries");
        assert_eq!(dataplane.read()?.v4.services.len(), 4);
        Ok(())
    })
}

#[test]
fn a_second_has_as_many_jiffies_as_the_agent_says() -> Result<()> {
    let node = Node::new()?;
    node.start(|_, _| Ok(()))?;
    let said = f64::from(node.entry()?.jiffies_per_second);

    let mut stranger = Stranger::new()?;
    let (start, first) = (Instant::now(), stranger.jiffies()?);
    tests::patience::wait_until("a tenth of a second", Duration::from_secs(5), || {
        (start.elapsed() > Duration::from_millis(100)).then_some(())
    })?;
    let passed = f64::from(stranger.jiffies()?.wrapping_sub(first)) / start.elapsed().as_secs_f64();
    assert!((passed / said - 1.0).abs() < 0.15, "{passed} jiffies in a second, not {said}");
    Ok(())
}

#[test]
fn a_watcher_tells_of_devices_addresses_and_routes() -> Result<()> {
    let node = Node::new()?;
    node.run(|| {
        runtime()?.block_on(async {
            let mut events = netlink::watch();
            let first = changed(&mut events, |_| true).await?;
            let up0 = first.link("up0").context("no up0")?;
            assert!(up0.has_default_route && up0.is_pod_veth && up0.has_ethernet, "{up0:?}");
            assert!(first.link("up1").is_some_and(|link| link.has_default_route), "by IPv6");
            assert!(first.link("pod0").is_some_and(|link| link.is_pod_veth && !link.has_default_route));
            assert!(first.link("lo").is_some_and(|link| link.is_loopback));

            node.namespace.ip("link add new0 type veth peer name new1\naddress add 198.51.100.7/24 dev new0")?;
            let network = changed(&mut events, |network| network.addresses.len() > first.addresses.len()).await?;
            assert!(network.link("new0").is_some_and(|link| !link.is_pod_veth && link.kind == "veth"));
            let net = "198.51.100.7/24".parse()?;
            assert!(
                network.addresses.iter().any(|address| address.net == net && address.is_global && address.is_usable)
            );

            node.namespace.ip("route delete default dev up0")?;
            changed(&mut events, |network| network.link("up0").is_some_and(|link| !link.has_default_route)).await?;
            drain(&mut events).await;
            node.namespace.ip("route add 203.0.113.0/24 via 192.0.2.254")?;
            let event = tokio::time::timeout(patience(Duration::from_secs(5)), events.recv()).await?;
            assert_eq!(event, Some(NetworkEvent::RoutesChanged));
            Ok(())
        })
    })
}

type Events = tokio::sync::mpsc::Receiver<NetworkEvent>;

/// The first change to a network that has something.
async fn changed(events: &mut Events, has: impl Fn(&netlink::NodeNetwork) -> bool) -> Result<netlink::NodeNetwork> {
    let search = async {
        while let Some(event) = events.recv().await {
            if let NetworkEvent::Changed(network) = event
                && has(&network)
            {
                return Ok(network);
            }
        }
        anyhow::bail!("the watcher has ended")
    };
    tokio::time::timeout(patience(Duration::from_secs(5)), search).await.context("waited in vain for a change")?
}

/// Takes what is queued, until nothing has come for a while.
async fn drain(events: &mut Events) {
    while let Ok(Some(_)) = tokio::time::timeout(Duration::from_millis(300), events.recv()).await {}
}
