//! Scenarios of upgrades: to a version whose maps have another layout and back, under load; to one that must not be taken over from; and
//! stopped in the middle. The other version is this one built with the feature `other-layout`, in which the same types are laid out
//! differently. Needs root.

use std::{
    fs,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use aya::maps::{Array, Map, MapData};
use caps::{CapSet, Capability};
use proxy_common::{
    description::Description,
    node::{self, LAYOUT, newcomers},
};
use tests::{
    lab::{
        LabOptions, Node,
        address::Family,
        agent::{AgentOptions, SocketLb, other_layout_program, sluice_program},
        cluster::Cluster,
        manifest::Service,
    },
    patience::{patience, slowness, wait_until},
    sandbox::Sandbox,
    scenario::note,
    testbed::Testbed,
    traffic::{
        Ask, Protocol, RatePlan, StreamPlan, Target,
        place::{Activity, Place},
    },
};

/// What an agent says once it has taken over.
const TOOK_OVER: &str = "took over the maps of another layout";

/// From which slowness on a machine is taken for an emulated one.
const EMULATED: f64 = 10.0;

/// Pods' connections go by the flow table, and the nodes' own by their sockets.
fn cluster() -> Result<(Cluster, Service)> {
    let service = Service::new("echo", 10, &["a1", "b1", "b2"]);
    let options = AgentOptions { socket_lb: SocketLb::Host, ..AgentOptions::default() };
    let cluster = Cluster::start(LabOptions::default(), options, std::slice::from_ref(&service))?;
    Ok((cluster, service))
}

/// This version with another layout.
fn other(cluster: &Cluster) -> Result<AgentOptions> {
    Ok(AgentOptions { program: Some(other_layout_program()?), ..cluster.options.clone() })
}

/// Where a test's connections go: ClusterIPs from pods of both nodes, NodePorts of both nodes from outside, in both families.
fn ways<'a>(cluster: &'a Cluster, service: &Service, protocol: Protocol) -> Result<Vec<(&'a Place, Target)>> {
    let mut ways = Vec::new();
    for family in Family::ALL {
        for client in ["client-a", "client-b"] {
            ways.push((cluster.lab.place(client)?, service.cluster(family, protocol)));
        }
        for node in &cluster.lab.nodes {
            ways.push((&cluster.lab.client, service.at_node(node.addresses(), family, protocol)));
        }
    }
    Ok(ways)
}

/// Connections that stay open, with the pod that each has.
struct Connections<'a>(Vec<(Activity<'a>, String)>);

impl<'a> Connections<'a> {
    fn open(ways: &[(&'a Place, Target)], each: usize) -> Result<Self> {
        let open = |(client, target): &(&'a Place, Target)| {
            let connection = client.open(Ask::new(*target))?;
            let pod = connection.ask()?.pod;
            Ok((connection, pod))
        };
        Ok(Self(ways.iter().flat_map(|way| std::iter::repeat_n(way, each)).map(open).collect::<Result<_>>()?))
    }

    /// Asks on each; every one must have the pod that it had.
    fn ask_all(&self, when: &str) -> Result<()> {
        for (number, (connection, pod)) in self.0.iter().enumerate() {
            let answer = connection.ask().with_context(|| format!("{when}: connection {number} to {pod}"))?;
            assert_eq!(answer.pod, *pod, "{when}: connection {number}");
        }
        Ok(())
    }
}

fn second_directory(node: &Node) -> PathBuf {
    node.pins().join("maps-second")
}

/// What the maps of a node say of themselves, for a change.
fn description(node: &Node) -> Result<Array<MapData, Description>> {
    Ok(Map::Array(MapData::from_pin(node.pins().join("maps/DESCRIPTION"))?).try_into()?)
}

fn text(description: &Description) -> String {
    String::from_utf8_lossy(&description.octets).trim_end_matches('\0').to_owned()
}

/// Whether flows are held on a node. What says so is the same in both layouts.
fn is_held(node: &Node) -> bool {
    let map = MapData::from_pin(node.pins().join("maps/NODE")).ok();
    let map = map.and_then(|map| Array::<_, node::Node>::try_from(Map::Array(map)).ok());
    map.and_then(|map| map.get(&0, 0).ok()).is_some_and(|node| node.flags & newcomers::HOLD != 0)
}

/// Has the programs of a node open no flows for so many seconds.
fn hold(node: &Node, seconds: u32) -> Result<()> {
    let mut clock = Testbed::new()?;
    let until = clock.jiffies()?.wrapping_add(seconds * clock.jiffies_per_second());
    node.edit_node(|node| (node.flags, node.held_until) = (node.flags | newcomers::HOLD, until))
}

/// The number of a node's layout, by its maps.
fn layout(node: &Node) -> Result<u32> {
    let text = text(&Box::new(description(node)?.get(&0, 0)?));
    let number = text.lines().find_map(|line| line.strip_prefix("layout ")).context("no layout")?;
    Ok(number.parse()?)
}

fn replace_agents(cluster: &Cluster, options: &AgentOptions, expected: u32) -> Result<()> {
    for node in &cluster.lab.nodes {
        node.start_agent(cluster.source(), options)?;
        let agent = node.agent()?;
        ensure!(agent.says(TOOK_OVER), "{} did not take over:\n{}", node.plan.name, agent.log());
        let log = agent.log();
        eprintln!("{}: {}", node.plan.name, log.lines().find(|line| line.contains(TOOK_OVER)).unwrap_or_default());
        assert_eq!(layout(node)?, expected, "{}", node.plan.name);
        assert!(!second_directory(node).exists(), "{}: something is left", node.plan.name);
    }
    Ok(())
}

/// As many per second as this machine manages of what a developer's does.
fn per_second(usual: u32) -> u32 {
    (Duration::from_secs(1).div_f64(slowness()).as_millis() as u32 * usual).div_ceil(1_000)
}

#[test]
fn scenario_13_an_upgrade_to_another_layout_and_the_way_back_lose_no_connection() -> Result<()> {
    let (cluster, service) = cluster()?;
    let other = other(&cluster)?;
    let (tcp, mut udp) = (ways(&cluster, &service, Protocol::Tcp)?, ways(&cluster, &service, Protocol::Udp)?);
    // One processor that is emulated has no time for an agent beside them: it takes over while connections are opened and asked.
    if slowness() >= EMULATED {
        note(13, "an emulated machine: without streams of datagrams");
        udp.clear();
    }
    let connections = Connections::open(&tcp, 25)?;
    ensure!(connections.0.len() == 200, "{} connections", connections.0.len());
    // Some that were opened, and silent since.
    let silent = Connections::open(&tcp, 1)?;
    let rates = tcp.iter().map(|(client, target)| {
        let plan = RatePlan { target: *target, per_second: per_second(50), timeout: patience(Duration::from_secs(10)) };
        client.rate(plan)
    });
    let rates = rates.collect::<Result<Vec<_>>>()?;
    // Fewer would be sent not one by one, but none.
    let datagrams = per_second(1_000).max(300);
    let streams = udp.iter().map(|(client, target)| {
        let linger = patience(Duration::from_secs(2));
        client.stream(StreamPlan { target: *target, per_second: datagrams, linger })
    });
    let streams = streams.collect::<Result<Vec<_>>>()?;
    let pause = Duration::from_secs(2);
    thread::sleep(pause);
    for (name, options, expected) in
        [("upgrade", &other, LAYOUT + 1), ("downgrade", &cluster.options, LAYOUT), ("again", &other, LAYOUT + 1)]
    {
        replace_agents(&cluster, options, expected)?;
        connections.ask_all(name)?;
        thread::sleep(pause);
    }
    silent.ask_all("after all")?;
    for ((client, target), rate) in tcp.iter().zip(rates) {
        let report = rate.finish_rate()?;
        let name = format!("{} to {target}", client.name());
        eprintln!("{name}: {report:?}");
        assert!(report.failures.is_empty(), "{name}: {:?}", report.failures);
        assert_eq!(report.answered, report.begun, "{name}");
    }
    for ((client, target), stream) in udp.iter().zip(streams) {
        let report = stream.finish_stream()?;
        let name = format!("{} to {target}", client.name());
        eprintln!("{name}: {report:?}");
        assert_eq!((report.lost(), report.duplicated, report.errors), (0, 0, 0), "{name}: {report:?}");
        assert_eq!(report.pods.len(), 1, "{name}: it has changed its backend");
        ensure!(report.sent > u64::from(datagrams), "{name}: {report:?}");
    }
    Ok(())
}

#[test]
fn scenario_13_maps_that_only_later_versions_understand_are_left_alone() -> Result<()> {
    let (cluster, service) = cluster()?;
    let node = &cluster.lab.nodes[0];
    node.start_agent(cluster.source(), &other(&cluster)?)?;
    let open = Connections::open(&ways(&cluster, &service, Protocol::Tcp)?, 1)?;
    node.kill_agent();
    let mut description = description(node)?;
    let mut changed = Box::new(description.get(&0, 0)?);
    let said = text(&changed);
    let says = said.replace("\nreadable-by 7\n", "\nreadable-by 8\n");
    ensure!(says != said, "{said}");
    changed.octets[..says.len()].copy_from_slice(says.as_bytes());
    description.set(0, *changed, 0)?;

    node.launch_agent(cluster.source(), &cluster.options)?;
    let agent = node.agent()?;
    assert_eq!(agent.ended()?, Some(78), "{}", agent.log());
    let log = agent.log();
    let advice = format!("have layout {}, which only versions with layout {0} or later understand", LAYOUT + 1);
    assert!(log.contains(&advice) && log.contains("sluice cleanup"), "{log}");
    assert_eq!(layout(node)?, LAYOUT + 1);
    assert!(!second_directory(node).exists());
    open.ask_all("refused")?;
    Connections::open(&ways(&cluster, &service, Protocol::Tcp)?, 1)?;

    node.start_agent(cluster.source(), &other(&cluster)?)?;
    open.ask_all("the version that understands them")
}

/// Whoever is stopped in the middle leaves a second directory, whatever the moment.
#[test]
fn scenario_13_an_upgrade_that_is_stopped_in_the_middle_loses_no_connection() -> Result<()> {
    let (cluster, service) = cluster()?;
    let other = other(&cluster)?;
    let node = &cluster.lab.nodes[0];
    let ways = ways(&cluster, &service, Protocol::Tcp)?;
    let open = Connections::open(&ways, 5)?;
    let (mut interrupted, mut held) = (0, 0);
    // While maps are filled; and in the instant in which links are given other programs.
    let moments = [0, 400, 1_600].map(|delay| (false, delay)).into_iter();
    for (turn, (when_held, delay)) in moments.chain([0, 4, 8, 12, 16, 24, 32].map(|delay| (true, delay))).enumerate() {
        let options = if turn % 2 == 0 { &other } else { &cluster.options };
        node.launch_agent(cluster.source(), options)?;
        let second = second_directory(node);
        let agent = node.agent()?;
        wait_until("a take-over to begin", Duration::from_secs(20), || {
            let has_come = if when_held { is_held(node) } else { second.exists() };
            (has_come || agent.says("in sync")).then_some(())
        })?;
        thread::sleep(Duration::from_millis(delay));
        node.kill_agent();
        interrupted += u32::from(second.exists());
        held += u32::from(is_held(node));
        open.ask_all(&format!("turn {turn}"))?;
    }
    eprintln!("{interrupted} of 10 were interrupted, {held} while flows were held");
    ensure!(interrupted > held && held > 0, "none was stopped where it was to be");
    node.start_agent(cluster.source(), &cluster.options)?;
    assert_eq!(layout(node)?, LAYOUT);
    open.ask_all("in the end")?;
    Connections::open(&ways, 1)?.ask_all("opened in the end")
}

/// What was stopped after flows were held is taken up by the version that was there before.
#[test]
fn scenario_13_flows_that_are_held_are_let_go_by_the_next_start() -> Result<()> {
    let (cluster, service) = cluster()?;
    let node = &cluster.lab.nodes[0];
    let open = Connections::open(&ways(&cluster, &service, Protocol::Tcp)?, 1)?;
    node.kill_agent();
    let second = second_directory(node);
    fs::create_dir(&second)?;
    MapData::from_pin(node.pins().join("maps/NODE"))?.pin(second.join("NODE"))?;
    hold(node, 600)?;
    let client = cluster.lab.place("client-a")?;
    let ask = Ask::new(service.cluster(Family::V4, Protocol::Tcp));
    let began = Instant::now();
    assert!(client.ask(ask.within(patience(Duration::from_millis(500)))).is_err(), "it opens flows after all");
    ensure!(began.elapsed() >= patience(Duration::from_millis(500)), "it was refused, and not held");
    open.ask_all("held")?;

    node.start_agent(cluster.source(), &cluster.options)?;
    assert!(!second.exists());
    client.ask(ask)?;
    open.ask_all("let go")
}

/// An agent that is killed in the instant, and does not come back: for want of memory, say.
#[test]
fn scenario_13_flows_that_are_held_are_opened_after_a_while_without_an_agent() -> Result<()> {
    let (cluster, service) = cluster()?;
    let node = &cluster.lab.nodes[0];
    let open = Connections::open(&ways(&cluster, &service, Protocol::Tcp)?, 1)?;
    node.kill_agent();
    let patient = patience(Duration::from_secs(4));
    let began = Instant::now();
    hold(node, patient.as_secs() as u32)?;
    let client = cluster.lab.place("client-a")?;
    let ask = Ask::new(service.cluster(Family::V4, Protocol::Tcp));
    assert!(client.ask(ask.within(patience(Duration::from_millis(500)))).is_err(), "it opens flows after all");
    open.ask_all("held")?;
    wait_until("a connection", Duration::from_secs(10), || client.ask(ask).ok())?;
    ensure!(began.elapsed() + Duration::from_secs(1) > patient, "{:?}", began.elapsed());
    open.ask_all("let go")?;
    Connections::open(&ways(&cluster, &service, Protocol::Tcp)?, 1)?.ask_all("opened without an agent")
}

/// Programs that the calling thread executes have what the manifest gives, and no other privileges.
fn lose_privileges() -> Result<()> {
    let kept = [
        Capability::CAP_BPF,
        Capability::CAP_NET_ADMIN,
        Capability::CAP_PERFMON,
        // The agent's binary may lie in a directory that only another user may enter.
        Capability::CAP_DAC_READ_SEARCH,
    ];
    let others = caps::all().into_iter().filter(|one| !kept.contains(one));
    let known = others.filter(|one| caps::has_cap(None, CapSet::Bounding, *one).is_ok());
    known.into_iter().try_for_each(|one| Ok(caps::drop(None, CapSet::Bounding, one)?))
}

#[test]
fn scenario_13_a_confined_agent_takes_over() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let objects = tempfile::tempdir()?;
    Service::new("echo", 10, &["a1"]).write(objects.path())?;
    let source = format!("file:{}", objects.path().display());
    for (turn, program) in [sluice_program()?, other_layout_program()?, sluice_program()?].iter().enumerate() {
        let start = || {
            lose_privileges()?;
            let mut command = sandbox.command_of(program, &["--source", &source])?;
            command.arg("--cgroup").arg(sandbox.cgroup.path());
            sandbox.start(command)
        };
        let agent = thread::scope(|scope| scope.spawn(start).join())
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        agent.wait_for("in sync")?;
        agent.wait_for("writes only to pins, network settings")?;
        assert_eq!(agent.count(TOOK_OVER), usize::from(turn > 0), "{}", agent.log());
        assert!(!sandbox.pins.path().join("maps-second").exists());
    }
    sandbox.wait_for_services("the Service", |services| !services.is_empty())?;
    Ok(())
}
