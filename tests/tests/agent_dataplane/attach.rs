//! What is attached where, and stays so when devices come and go.

use anyhow::{Context as _, Result};
use proxy_userspace::dataplane::{
    AttachProblem, ClassifierMode, Dataplane, Mechanism, ProgramName, Removed, Side, SocketLb, UplinkMode, cleanup,
};

use crate::fixture::{Node, Stranger, filters, network, tcx_chain};

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
pub(crate) fn every_link() -> Vec<String> {
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
fn devices_that_swap_their_names_keep_their_links_and_both_are_pinned() -> Result<()> {
    let node = Node::new()?;
    node.start(|dataplane, _| {
        let links = ["pod_in-pod0", "pod_out-pod0", "pod_in-pod1", "pod_out-pod1"].map(|name| node.link(name).unwrap());
        node.namespace.ip("link set pod0 down\nlink set pod1 down\nlink set pod0 name podx
            link set pod1 name pod0\nlink set podx name pod1")?;
        let report = dataplane.attach(&network()?)?;
        assert!(report.problems.is_empty(), "{:?}", report.problems);
        let swapped =
            ["pod_in-pod1", "pod_out-pod1", "pod_in-pod0", "pod_out-pod0"].map(|name| node.link(name).unwrap());
        assert_eq!(swapped, links);
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
        let removed = cleanup(&node.options.pin_path)?.removed;
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
