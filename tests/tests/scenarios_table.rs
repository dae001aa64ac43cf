//! Scenarios 22, 23 and 25: tables that are full. What gives way, what does not, and how it comes back.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use aya::{
    Pod,
    maps::{HashMap, Map, MapData},
};
use proxy_common::{
    addr::{Ipv4, Ipv6},
    flow::{self, Direction},
    outcome::{Hook, Outcome},
    tuple::Tuple,
};
use proxy_userspace::inspect::{Flow, FlowFilter, Inspector};
use serde_json::{Value, json};
use tests::{
    http,
    lab::{
        LabOptions, Node,
        address::{CLIENT, Family, on_wire},
        agent::AgentOptions,
        changed::write_changed,
        cluster::Cluster,
        manifest::Service,
    },
    patience::{patience, wait_until},
    traffic::{
        Ask, Failure, Protocol, RatePlan, Target,
        flood::FloodPlan,
        place::{Activity, Place},
        wire::mac,
    },
};

const METRICS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 10_249);

/// The smallest flow table there is.
const FLOWS: u64 = 16_384;

/// By XDP over IPv4, and by TC over IPv6.
const WAYS: [(Family, Hook, &str); 2] = [(Family::V4, Hook::UplinkXdp, "V4"), (Family::V6, Hook::UplinkIn, "V6")];

/// A Service whose object is changed before it is written.
type Written<'a> = (&'a Service, fn(&mut Value));

fn start(more: &[&str], services: &[Written<'_>]) -> Result<Cluster> {
    let more = more.iter().map(ToString::to_string).collect();
    Cluster::start_with(LabOptions::default(), AgentOptions { more, ..AgentOptions::default() }, |source| {
        services.iter().try_for_each(|(service, change)| write_changed(source, service, change))
    })
}

fn metric(node: &Node, series: &str) -> Result<f64> {
    let answer = http::ask(node.host.namespace(), METRICS, "GET", "/metrics")?;
    answer.metric(series).with_context(|| format!("no {series}"))
}

fn flood<'a>(
    cluster: &'a Cluster,
    node: &Node,
    target: Target,
    payload: &'a [u8],
    packets: u64,
) -> Result<FloodPlan<'a>> {
    let dmac = mac(node.host.namespace(), "uplink")?;
    Ok(FloodPlan { namespace: cluster.lab.client.namespace(), device: "eth0", dmac, target, payload, packets })
}

/// The entries of a Service.
fn entries(node: &Node, service: &str) -> Result<Vec<Flow>> {
    let filter = FlowFilter { service: Some(service.into()), halves: true, ..FlowFilter::default() };
    Ok(Inspector::open(node.pins())?.flows(&filter)?)
}

/// How many of them have lost their other half.
fn halves(entries: &[Flow]) -> usize {
    let twins: BTreeSet<_> = entries.iter().map(|flow| (flow.client, flow.destination)).collect();
    entries.iter().filter(|flow| !twins.contains(&(flow.new_destination, flow.new_source))).count()
}

/// Connections that say nothing for a while.
const IDLE: usize = 100;

/// Which backend a connection gets follows from its tuple, as its source port does.
fn by_hash(service: &mut Value) {
    service["metadata"]["annotations"] = json!({ "service.sluice.dev/algorithm": "maglev" });
}

/// Connections and their pods. The client's ports may not stand for the node's, so that each masqueraded one has another.
fn open_idle(client: &Place, target: Target) -> Result<Vec<(String, Activity<'_>)>> {
    let source = on_wire(CLIENT).of(Family::of(target.address.ip()));
    let open = (0..IDLE).map(|number| {
        let connection = client.open(Ask::new(target).from((source, 45_000 + number as u16)))?;
        Ok((connection.ask()?.pod, connection))
    });
    let open: Vec<_> = open.collect::<Result<_>>()?;
    let pods: BTreeSet<_> = open.iter().map(|(pod, _)| pod.as_str()).collect();
    ensure!(pods == ["a1", "b1"].into(), "one backend here, and one elsewhere, and not {pods:?}");
    Ok(open)
}

/// Each has an answer from the pod it is with.
fn go_on(connections: &[(String, Activity<'_>)]) -> Result<()> {
    for (pod, connection) in connections {
        ensure!(connection.ask()?.pod == *pod, "a connection has left {pod}");
    }
    Ok(())
}

#[test]
fn scenario_22_a_crowd_that_overflows_the_table_ends_no_connection_and_the_pressure_is_told() -> Result<()> {
    let web = Service::new("web", 31, &["a1", "b1"]);
    // Strangers whose datagrams are answered by a pod of the node: their flows are confirmed, too.
    let crowds = [Service::new("crowd-a", 41, &["a2"]), Service::new("crowd-b", 42, &["b2"])];
    let cluster =
        start(&["--flow-table-size", "16384"], &[(&web, by_hash), (&crowds[0], |_| ()), (&crowds[1], |_| ())])?;
    for ((node, crowd), (family, hook, map)) in cluster.lab.nodes.iter().zip(&crowds).zip(WAYS) {
        let idle = open_idle(&cluster.lab.client, web.at_node(node.addresses(), family, Protocol::Tcp))?;
        let target = crowd.at_node(node.addresses(), family, Protocol::Udp);
        let took = flood(&cluster, node, target, b"who", 4 * FLOWS)?.send()?;
        let left = entries(node, "web")?.len();
        let of = |name: &str| metric(node, &format!("sluice_{name}{{map=\"FLOWS_{map}\"}}"));
        let evicted = wait_until("the pressure to be told", Duration::from_secs(5), || {
            let is_full = of("map_entries").ok()? >= 0.9 * of("map_capacity").ok()?;
            of("flow_evictions_total").ok().filter(|evicted| is_full && *evicted > 0.0)
        })?;
        eprintln!(
            "{hook:?}: a crowd came in {took:?}: {evicted} entries gave way, {left} of {IDLE} idle connections' are left"
        );
        go_on(&idle).with_context(|| format!("{hook:?}"))?;
    }
    Ok(())
}

/// Takes entries of one direction out of the table, as an eviction does.
fn evict(node: &Node, family: Family, direction: Direction) -> Result<usize> {
    fn from<A: Copy>(node: &Node, map: &str, direction: Direction) -> Result<usize>
    where
        Tuple<A>: Pod,
        flow::Flow<A>: Pod,
    {
        let map = MapData::from_pin(node.pins().join("maps").join(map))?;
        let mut map: HashMap<_, Tuple<A>, flow::Flow<A>> = Map::LruHashMap(map).try_into()?;
        let entries: Vec<_> = map.iter().collect::<Result<_, _>>()?;
        let chosen: Vec<_> = entries.iter().filter(|(_, flow)| flow.direction == direction).collect();
        chosen.iter().try_for_each(|(key, _)| map.remove(key))?;
        Ok(chosen.len())
    }
    match family {
        Family::V4 => from::<Ipv4>(node, "FLOWS_V4", direction),
        Family::V6 => from::<Ipv6>(node, "FLOWS_V6", direction),
    }
}

#[test]
fn scenario_22_a_connection_goes_on_with_its_next_packet_whichever_of_its_entries_were_evicted() -> Result<()> {
    let web = Service::new("web", 31, &["a1", "b1"]);
    let cluster = start(&[], &[(&web, by_hash)])?;
    for (node, (family, hook, _)) in cluster.lab.nodes.iter().zip(WAYS) {
        let idle = open_idle(&cluster.lab.client, web.at_node(node.addresses(), family, Protocol::Tcp))?;
        for directions in [&[Direction::Original][..], &[Direction::Reply], &[Direction::Original, Direction::Reply]] {
            let case = format!("{hook:?}, without {directions:?}");
            // A flow looks after its other half when it has said nothing for a second.
            wait_until("the connections to be idle", Duration::from_secs(5), || {
                entries(node, "web").ok()?.iter().all(|entry| entry.idle_seconds > 1).then_some(())
            })?;
            for direction in directions {
                let evicted = evict(node, family, *direction)?;
                ensure!(evicted >= IDLE, "{case}: only {evicted} entries of {IDLE} connections");
            }
            go_on(&idle).with_context(|| case.clone())?;
            let entries = entries(node, "web")?;
            assert_eq!((entries.len() >= 2 * IDLE, halves(&entries)), (true, 0), "{case}: {} entries", entries.len());
        }
    }
    Ok(())
}

/// How many source ports there are for masqueraded flows.
const PORTS: usize = 16;

/// Of a client who is refused, so many times in a row that hardly a port can be left.
const IN_VAIN: u32 = 8;

/// Opens connections until there is no port left.
fn exhaust(client: &Place, ask: Ask) -> Result<Vec<Activity<'_>>> {
    let (mut open, mut failed) = (Vec::new(), 0);
    while failed < IN_VAIN {
        ensure!(open.len() <= PORTS, "{} connections over {PORTS} ports", open.len());
        match client.open(ask) {
            Ok(connection) => open.push(connection),
            Err(error) => {
                ensure!(error.downcast_ref() == Some(&Failure::TimedOut), "{error:?}");
                failed += 1;
            }
        }
    }
    Ok(open)
}

#[test]
fn scenario_23_without_a_source_port_connections_are_dropped_and_counted_never_misdelivered_and_come_back() -> Result<()>
{
    // To a backend on the other node each flow takes a port.
    let services = [Service::new("at-b", 31, &["b1"]), Service::new("at-a", 32, &["a1"])];
    let cluster = start(&["--source-port-range", "10000-10015"], &[(&services[0], |_| ()), (&services[1], |_| ())])?;
    let client = &cluster.lab.client;
    for ((node, service), (family, hook, _)) in cluster.lab.nodes.iter().zip(&services).zip(WAYS) {
        let ask = Ask::new(service.at_node(node.addresses(), family, Protocol::Tcp));
        let open = exhaust(client, ask.within(patience(Duration::from_millis(300))))?;
        let dropped = node.counted(hook, Outcome::DropNoPort)?;
        eprintln!("{hook:?}: {} connections over {PORTS} ports, then {dropped} drops", open.len());
        assert!(open.len() >= PORTS / 2, "{} connections over {PORTS} ports", open.len());
        assert!(dropped >= u64::from(IN_VAIN), "{dropped} drops of {IN_VAIN} connections");
        let mut peers = BTreeSet::new();
        for _ in 0..2 {
            for connection in &open {
                let answer = connection.ask()?;
                assert_eq!((answer.pod.as_str(), answer.from), (service.pods[0], ask.target.address));
                assert!((10_000..=10_015).contains(&answer.peer.port()), "{answer:?}");
                peers.insert(answer.peer);
            }
        }
        assert_eq!(peers.len(), open.len(), "each connection has a port of its own");
        open.into_iter().try_for_each(Activity::close)?;
        // Two seconds after its end a connection's port is another's.
        wait_until("a port to be free again", Duration::from_secs(10), || {
            client.ask(ask.within(patience(Duration::from_millis(500)))).ok()
        })?;
        assert!(exhaust(client, ask.within(patience(Duration::from_millis(300))))?.len() >= PORTS / 2, "all of them");
    }
    Ok(())
}

/// Of each family.
const CLIENTS: u64 = 131_072;

fn sticky(service: &mut Value) {
    service["spec"]["sessionAffinity"] = json!("ClientIP");
    service["spec"]["sessionAffinityConfig"] = json!({ "clientIP": { "timeoutSeconds": 3_600 } });
}

/// Everything that was dropped at a hook, whatever the reason.
fn dropped(node: &Node, hook: Hook) -> Result<u64> {
    let reasons = Outcome::ALL.into_iter().filter(|outcome| format!("{outcome:?}").starts_with("Drop"));
    reasons.map(|reason| node.counted(hook, reason)).sum()
}

#[test]
fn scenario_25_clients_who_come_back_stay_with_their_backend_while_strangers_fill_the_table() -> Result<()> {
    let service = Service::new("sticky", 31, &["a1", "a2"]);
    let cluster = start(&[], &[(&service, sticky)])?;
    let (client, node) = (&cluster.lab.client, &cluster.lab.nodes[0]);
    let target = service.at_node(node.addresses(), Family::V4, Protocol::Tcp);
    let first = client.ask(Ask::new(target))?.pod;

    let rate = client.rate(RatePlan { target, per_second: 100, timeout: patience(Duration::from_secs(5)) })?;
    let (mut packets, mut opened, mut took) = (0, 0, Duration::ZERO);
    // What the queues of a busy machine drop comes once more, being the same strangers in the same order.
    for _ in 0..4 {
        packets += CLIENTS * 5 / 4;
        took += flood(&cluster, node, target, &[], CLIENTS * 5 / 4)?.send()?;
        opened = node.counted(Hook::UplinkXdp, Outcome::Opened)?;
        if opened > CLIENTS {
            break;
        }
    }
    let report = rate.finish_rate()?;
    let known = node.affinities(Family::V4)?.len() as u64;
    eprintln!("{packets} strangers in {took:?}: {opened} flows, {known} clients are known; {report:?}");
    assert!(opened > CLIENTS, "only {opened} flows: the table was never full");
    assert!(
        opened <= packets + report.begun + 1,
        "{opened} flows of {packets} strangers and {} connections",
        report.begun
    );
    assert!(known <= CLIENTS && known > CLIENTS / 2, "{known} clients are known");
    assert_eq!(dropped(node, Hook::UplinkXdp)?, 0);
    assert_eq!((report.answered, report.failures.len()), (report.begun, 0), "{report:?}");
    assert!(report.pods.keys().eq([&first]), "the client belongs to {first}: {report:?}");

    // What the agent does to the Service takes nobody from his backend.
    write_changed(cluster.source(), &service.with_pods(&["a1", "a2", "b1"]), sticky)?;
    cluster.restart_agents()?;
    assert_eq!(node.affinities(Family::V4)?.len() as u64, known);
    for _ in 0..20 {
        assert_eq!(client.ask(Ask::new(target))?.pod, first);
    }
    Ok(())
}
