//! The agent's dataplane on the real kernel: what it attaches, what outlives it, what it adopts, and what it leaves alone.

mod attach;
mod fixture;
mod flow_table;
mod reserved;
mod write;

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use caps::{CapSet, Capability};
use proxy_common::node::{self, newcomers};
use proxy_userspace::dataplane::{
    Dataplane, Options, Removed, cleanup,
    netlink::{self, NetworkEvent},
};
use tests::patience::patience;

use self::{
    attach::every_link,
    fixture::{Node, Stranger, network, runtime, tcx_chain},
    write::small_plan,
};

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
fn cleanup_removes_everything_of_ours_and_nothing_else() -> Result<()> {
    let node = Node::new()?;
    let foreign_pin = node.pin("links/theirs");
    node.run(|| {
        let mut stranger = Stranger::new()?;
        let (_link, id) = stranger.tcx("pod0")?;
        drop(Dataplane::open(&node.options)?.attach(&network()?)?);
        stranger.pin(&foreign_pin)?;
        assert_eq!(tcx_chain("pod0")?.len(), 2);

        let removed = cleanup(&node.options.pin_path)?.removed;
        let links = removed.iter().filter(|one| matches!(one, Removed::Link { .. })).count();
        assert_eq!(links, every_link().len());
        assert!(removed.contains(&Removed::Map { path: node.pin("maps/NODE") }), "{removed:?}");
        assert_eq!(tcx_chain("pod0")?, [id]);
        assert!(foreign_pin.exists() && !node.pin("maps").exists());

        std::fs::remove_file(&foreign_pin)?;
        cleanup(&node.options.pin_path)?;
        assert!(!node.options.pin_path.exists());
        assert_eq!(cleanup(&node.options.pin_path)?.removed, []);
        Ok(())
    })
}

#[test]
fn an_agent_that_ends_before_it_looked_for_another_proxy_leaves_that_to_the_next() -> Result<()> {
    let node = Node::new()?;
    node.run(|| {
        drop(Dataplane::open(&node.options)?);
        let mut dataplane = Dataplane::open(&node.options)?;
        assert_eq!(dataplane.newcomers(), newcomers::UNDECIDED);
        dataplane.put_newcomers(newcomers::LOOK)?;
        drop(dataplane);
        assert_eq!(Dataplane::open(&node.options)?.newcomers(), newcomers::LOOK);
        Ok(())
    })
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
        (
            "no BPF file system",
            with(&|options| options.pin_path = ordinary.path().join("pins")),
            "mount -t bpf -o mode=0700",
        ),
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
