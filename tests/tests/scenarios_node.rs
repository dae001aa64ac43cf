//! Scenarios of the node itself: its devices and addresses come, go and change, its processors, and its clocks. Needs root.

use std::{
    fs, io,
    net::{Ipv4Addr, SocketAddr},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use aya::{
    maps::{Map, MapData, PerCpuArray},
    util::nr_cpus,
};
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use nix::time::{ClockId, clock_gettime};
use proxy_common::outcome::{Hook, Outcome};
use proxy_userspace::dataplane::pinned_links;
use serde_json::json;
use tests::{
    api::object::{node, service, slice},
    http::{ask, wait_for_answer},
    lab::{
        LabOptions, Node,
        address::{Addresses, Family, GATEWAY, of_pod, on_wire},
        agent::AgentOptions,
        cluster::Cluster,
        load::Load,
        manifest::Service,
        succession::Successor,
    },
    patience::{patience, wait_until},
    sandbox::Sandbox,
    scenario::note,
    traffic::{Ask, Protocol, Target},
};

/// How soon what is served must follow.
const SOON: Duration = Duration::from_secs(1);
const USUAL: Duration = Duration::from_secs(20);

fn echo() -> Service {
    Service::new("echo", 10, &["a1", "b1", "b2"])
}

/// A lab whose agents take every device by these names for an uplink, and every address for one of NodePorts.
fn cluster(lab: LabOptions) -> Result<Cluster> {
    let more = ["--nodeport-addresses=all", "--uplinks=up*,nic*"].map(str::to_owned).to_vec();
    Cluster::start(lab, AgentOptions { more, ..AgentOptions::default() }, &[echo()])
}

fn try_ask(cluster: &Cluster, target: Target) -> Option<()> {
    let ask = Ask::new(target).within(patience(Duration::from_millis(150)));
    let answer = cluster.lab.client.ask_times(ask, 1).ok()?.pop()?.ok()?;
    (answer.from == target.address).then_some(())
}

/// How long it takes until the NodePort is served at an address, by both protocols.
fn wait_for_answers(cluster: &Cluster, what: &str, address: SocketAddr) -> Result<Duration> {
    let began = Instant::now();
    for protocol in Protocol::ALL {
        let target = Target { address, protocol };
        wait_until(&format!("an answer at {target}, {what}"), USUAL, || try_ask(cluster, target))?;
    }
    Ok(began.elapsed())
}

fn wait_for_silence(cluster: &Cluster, what: &str, address: SocketAddr) -> Result<()> {
    Protocol::ALL.into_iter().try_for_each(|protocol| {
        let target = Target { address, protocol };
        let is_silent = || try_ask(cluster, target).is_none().then_some(());
        wait_until(&format!("silence at {target}, {what}"), USUAL, is_silent)
    })
}

/// What a device that was down has lost, as whoever configures a node's network puts it back.
fn configure(node: &Node, device: &str) -> Result<()> {
    let (own, gateway) = (node.addresses(), on_wire(GATEWAY));
    let other = if node.plan.number == 1 { 2 } else { 1 };
    let (pods, via) = (of_pod(other, 0), on_wire(if other == 1 { 11 } else { 12 }));
    node.host.namespace().ip(&format!(
        "addr replace {}/24 dev {device}
         addr replace {}/64 dev {device} nodad
         route replace default via {}
         route replace default via {}
         route replace {}/24 via {}
         route replace {}/64 via {}",
        own.v4, own.v6, gateway.v4, gateway.v6, pods.v4, via.v4, pods.v6, via.v6
    ))
}

fn pins_of(node: &Node, device: &str) -> Result<Vec<(String, u32)>> {
    let links = pinned_links(node.pins())?.into_iter().filter(|link| link.target == device);
    Ok(links.map(|link| (link.program.to_string(), link.link)).collect())
}

#[test]
fn scenario_17_an_uplink_that_flaps_and_is_renamed_keeps_its_programs_and_its_connections() -> Result<()> {
    let cluster = cluster(LabOptions::default())?;
    for (node, port) in cluster.lab.nodes.iter().zip(["port-node-a", "port-node-b"]) {
        let name = node.plan.name;
        let namespace = node.host.namespace();
        let before = pins_of(node, "uplink")?;
        let target = echo().at_node(node.addresses(), Family::V4, Protocol::Tcp);
        let open = cluster.lab.client.open(Ask::new(target))?;
        let pod = open.ask()?.pod;
        let check = |what: &str| -> Result<()> {
            for family in Family::ALL {
                let address = (node.addresses().of(family), echo().node_port).into();
                let took = wait_for_answers(&cluster, what, address)?;
                note(17, &format!("{name}, {what}: {} is served {took:?} after it can be", family.name()));
                // The kernel finds the neighbour anew: its first question may go unheard for a second.
                assert!(took < patience(SOON + Duration::from_secs(1)), "{what}: {took:?}");
            }
            assert_eq!(open.ask()?.pod, pod, "{what}: the connection");
            Ok(())
        };
        // The other end goes: the kernel forgets the neighbours behind the device.
        cluster.lab.gateway.namespace().ip(&format!("link set {port} down"))?;
        wait_for_silence(&cluster, "without a carrier", target.address)?;
        cluster.lab.gateway.namespace().ip(&format!("link set {port} up"))?;
        check("the carrier is back")?;

        namespace.ip("link set uplink down\nlink set uplink up")?;
        configure(node, "uplink")?;
        check("the device was down")?;
        assert_eq!(pins_of(node, "uplink")?, before, "{name}: links were made anew");

        namespace.ip("link set uplink down\nlink set uplink name upstream\nlink set upstream up")?;
        configure(node, "upstream")?;
        check("the device has another name")?;
        let renamed = || pins_of(node, "upstream").ok().filter(|now| *now == before).map(drop);
        wait_until("the pins to follow the name", USUAL, renamed)
            .with_context(|| format!("{before:?}, now {:?}", pinned_links(node.pins())))?;
        assert_eq!(pins_of(node, "uplink")?, [], "{name}: pins of the former name");
    }
    Ok(())
}

/// As keepalived and kube-vip add them: on the wire, and no node's own.
const FLOATING: Addresses =
    Addresses { v4: Ipv4Addr::new(192, 0, 2, 77), v6: std::net::Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x77) };

#[test]
fn scenario_17_new_devices_and_addresses_that_move_are_followed_and_what_is_gone_is_silent() -> Result<()> {
    let cluster = cluster(LabOptions::default())?;
    let node = &cluster.lab.nodes[0];
    let (inside, wire) = (node.host.namespace(), cluster.lab.gateway.namespace());
    let addresses = Family::ALL.map(|family| (FLOATING.of(family), echo().node_port).into());
    let change = |what: &str, device: &str| -> Result<()> {
        inside.ip(&format!("addr {what} {}/32 dev {device}", FLOATING.v4))?;
        inside.ip(&format!("addr {what} {}/128 dev {device} nodad", FLOATING.v6))
    };
    let check = |what: &str| -> Result<()> {
        for address in addresses {
            let took = wait_for_answers(&cluster, what, address)?;
            note(17, &format!("{what}: {address} is served after {took:?}"));
            assert!(took < patience(SOON + Duration::from_secs(1)), "{what}: {took:?}");
        }
        Ok(())
    };
    change("add", "uplink")?;
    check("a new address")?;
    change("del", "uplink")?;
    change("add", "lo")?;
    check("the address has moved to another device")?;
    change("del", "lo")?;
    addresses.into_iter().try_for_each(|address| wait_for_silence(&cluster, "after its end", address))?;

    wire.ip(&format!(
        "link add port-new type veth peer name nic1 netns {}\nlink set port-new master wire\nlink set port-new up",
        inside.path().display()
    ))?;
    inside.ip("link set nic1 up")?;
    change("add", "nic1")?;
    check("a new device")?;
    let attached = || pins_of(node, "nic1").ok().filter(|pins| !pins.is_empty()).map(drop);
    wait_until("programs at the new device", USUAL, attached)?;
    inside.ip("link del nic1")?;
    addresses.into_iter().try_for_each(|address| wait_for_silence(&cluster, "without its device", address))?;
    wait_until("the pins of the device to go", USUAL, || pins_of(node, "nic1").ok().filter(Vec::is_empty).map(drop))?;
    // The device it came with before is as good as ever.
    wait_for_answers(&cluster, "in the end", echo().at_node(node.addresses(), Family::V4, Protocol::Tcp).address)?;
    for kind in ["bond", "vlan", "dummy"] {
        let specifics = if kind == "vlan" { " id 5" } else { "" };
        let link = if kind == "vlan" { "link upstream " } else { "" };
        if inside
            .ip(&format!("link add {}name probe type {kind}{specifics}", link.replace("upstream", "uplink")))
            .is_err()
        {
            note(17, &format!("this kernel makes no {kind}"));
        } else {
            inside.ip("link del probe")?;
        }
    }
    Ok(())
}

/// A processor that is offline; online again when dropped.
struct Offline {
    switch: PathBuf,
}

impl Offline {
    fn new(cpu: u32) -> io::Result<Self> {
        let switch = Path::new("/sys/devices/system/cpu").join(format!("cpu{cpu}/online"));
        fs::write(&switch, "0")?;
        Ok(Self { switch })
    }
}

impl Drop for Offline {
    fn drop(&mut self) {
        if let Err(error) = fs::write(&self.switch, "1") {
            eprintln!("{} stays offline: {error}", self.switch.display());
        }
    }
}

fn opened(node: &Node) -> Result<u64> {
    node.counted(Hook::UplinkXdp, Outcome::Opened)
}

#[test]
fn scenario_18_counters_are_complete_while_processors_come_and_go() -> Result<()> {
    const ASKED: u32 = 40;
    let cluster = cluster(LabOptions::default())?;
    let node = &cluster.lab.nodes[0];
    let map = MapData::from_pin(node.pins().join("maps/COUNTERS"))?;
    let counters = PerCpuArray::<_, u64>::try_from(Map::PerCpuArray(map))?;
    let possible = nr_cpus().map_err(|(what, error)| io::Error::other(format!("{what}: {error}")))?;
    assert_eq!(counters.get(&0, 0)?.len(), possible, "one value for each CPU that is possible");
    let before = opened(node)?;
    let target = echo().at_node(node.addresses(), Family::V4, Protocol::Tcp);
    let ask = || -> Result<()> {
        cluster.lab.client.ask_times(Ask::new(target), ASKED)?.into_iter().try_for_each(|answer| Ok(answer.map(drop)?))
    };
    ask()?;
    let offline = match Offline::new(1) {
        Ok(offline) => offline,
        Err(error) => {
            note(
                18,
                &format!(
                    "no CPU can be taken off this machine ({error}): {possible} are possible, and that many are read"
                ),
            );
            return Ok(());
        }
    };
    ask()?;
    assert_eq!(counters.get(&0, 0)?.len(), possible, "while one is offline");
    assert_eq!(opened(node)? - before, u64::from(2 * ASKED), "what the CPU has counted that is offline counts");
    drop(offline);
    ask()?;
    assert_eq!(opened(node)? - before, u64::from(3 * ASKED));
    note(18, &format!("cpu1 went offline and came back; {possible} CPUs are possible"));
    Ok(())
}

/// Has a command run in a time namespace whose monotonic clock and time since boot are so many seconds ahead.
fn shift(command: &mut Command, seconds: i64) {
    let offsets = format!("monotonic {seconds} 0\nboottime {seconds} 0\n");
    let enter = move || {
        // SAFETY: a system call without pointers.
        if unsafe { libc::unshare(libc::CLONE_NEWTIME) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the path is a C string, and static.
        let file = unsafe { libc::open(c"/proc/self/timens_offsets".as_ptr(), libc::O_WRONLY) };
        // SAFETY: the kernel reads as many bytes as there are.
        let written = unsafe { libc::write(file, offsets.as_ptr().cast(), offsets.len()) };
        if written < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    };
    // SAFETY: between fork and exec the closure makes three system calls, and allocates nothing.
    unsafe { command.pre_exec(enter) };
}

fn programs(node: &Node) -> Result<Vec<u32>> {
    Ok(pinned_links(node.pins())?.iter().map(|link| link.program_id).collect())
}

/// As after a suspend: an agent's clocks are suddenly elsewhere, and flows are as old as they are.
#[test]
fn scenario_19_an_agent_whose_clocks_have_jumped_is_healthy_and_flows_are_none_the_wiser() -> Result<()> {
    let cluster = cluster(LabOptions::default())?;
    let node = &cluster.lab.nodes[0];
    let target = echo().at_node(node.addresses(), Family::V4, Protocol::Tcp);
    let open = cluster.lab.client.open(Ask::new(target))?;
    let pod = open.ask()?.pod;
    let load = Load::begin(&cluster, &echo())?;
    // Back as far as a machine allows that was booted a while ago.
    let back = (clock_gettime(ClockId::CLOCK_MONOTONIC)?.tv_sec() / 2).min(3_600);
    for seconds in [86_400, -back] {
        let before = programs(node)?;
        let successor = Successor::start_with(node, |command| {
            shift(command, seconds);
            Ok(())
        })?;
        let [own, others] = ["self".to_owned(), successor.id().to_string()]
            .map(|process| fs::read_link(format!("/proc/{process}/ns/time")));
        // Before Linux 6.3 a process stays in its time namespace when it executes a program.
        if own? == others? {
            note(19, "this kernel gives nobody other clocks by exec");
            return Ok(());
        }
        node.agent()?.kill();
        let is_taken_over = || programs(node).ok().filter(|now| now.iter().all(|id| !before.contains(id))).map(drop);
        wait_until("the next agent to take over", USUAL, is_taken_over)?;
        let health = (Ipv4Addr::LOCALHOST, 10_256).into();
        for path in ["/healthz", "/livez", "/readyz"] {
            wait_for_answer(node.host.namespace(), health, path, |answer| answer.status == 200)?;
        }
        thread::sleep(patience(Duration::from_secs(1)));
        assert_eq!(ask(node.host.namespace(), health, "GET", "/livez")?.status, 200, "{seconds} s");
        assert_eq!(open.ask()?.pod, pod, "{seconds} s");
        drop(successor);
        node.start_agent(cluster.source(), &cluster.options)?;
        assert_eq!(open.ask()?.pod, pod, "back from {seconds} s");
    }
    load.finish_unhurt()?;
    note(19, &format!("monotonic and boot time a day ahead, then {back} seconds back, by time namespaces"));
    Ok(())
}

#[test]
fn scenario_19_changes_that_come_from_tomorrow_and_from_yesterday_are_no_negative_samples() -> Result<()> {
    const METRIC: &str = "kubeproxy_network_programming_duration_seconds";
    let sandbox = Sandbox::new()?;
    let server = sandbox.server()?;
    server.apply(node())?;
    server.apply(service("web", "10.96.0.1"))?;
    server.apply(slice("web", &["10.0.0.1"]))?;
    let agent = sandbox.agent(&["--master", &server.url()])?;
    agent.wait_for("in sync")?;
    let metrics: SocketAddr = (Ipv4Addr::LOCALHOST, 10_249).into();
    let value = |series: &str| -> Result<f64> {
        let answer = ask(&sandbox.namespace, metrics, "GET", "/metrics")?;
        answer.metric(&format!("{METRIC}_{series}{{ip_family=\"IPv4\"}}")).with_context(|| format!("no {series}"))
    };
    let day = SignedDuration::from_hours(24);
    for (host, (name, offset)) in (2..).zip([("tomorrow", day), ("yesterday", -day), ("now", SignedDuration::ZERO)]) {
        let mut changed = slice("web", &[&format!("10.0.0.{host}")]);
        let at = Timestamp::now().checked_add(offset)?;
        changed["metadata"]["annotations"] =
            json!({"endpoints.kubernetes.io/last-change-trigger-time": at.to_string()});
        let (count, sum) = (value("count")?, value("sum")?);
        server.apply(changed)?;
        let target = format!("10.0.0.{host}:8080");
        sandbox.wait_for_picture(name, |picture| picture["10.96.0.1:80/TCP"].internal.iter().eq([target.as_str()]))?;
        let expected = if name == "yesterday" { count } else { count + 1.0 };
        wait_until(name, USUAL, || (value("count").ok()? >= expected).then_some(()))?;
        let took = value("sum")? - sum;
        ensure!((0.0..60.0).contains(&took), "a change made {name} took {took} s");
        ensure!(value("count")? - expected < 0.5, "{name}: no more than one sample");
    }
    assert_eq!(ask(&sandbox.namespace, (Ipv4Addr::LOCALHOST, 10_256).into(), "GET", "/livez")?.status, 200);
    Ok(())
}
