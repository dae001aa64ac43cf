//! Scenarios of what others do to the agent's objects in the kernel: pins that are wiped, programs that are detached, places that are
//! occupied, features that are not there. Needs root.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use aya::maps::MapInfo;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use proxy_userspace::dataplane::{PinnedLink, pinned_links};
use tempfile::TempDir;
use tests::{
    api::{
        ApiServer,
        object::{node, service, slice},
    },
    configuration,
    lab::{
        LabOptions, Node, UplinkMode,
        address::Family,
        agent::{AgentOptions, sluice_program},
        cluster::Cluster,
        device::XdpPass,
        load::Load,
        manifest::Service,
    },
    links::{detach, exists},
    patience::{is_shipped, patience, wait_until},
    picture::Maps,
    sandbox::Sandbox,
    scenario::note,
    spoil::{hide, start_where, unmount_cgroup2},
    traffic::{Ask, Protocol, StreamPlan},
};

/// What the default of `syncPeriod` promises.
const SOON: Duration = Duration::from_secs(30);

/// What a start without pins may take of an agent that is no debug build: twice what it takes on two processors that carry the
/// traffic as well.
const AS_SHIPPED: Duration = Duration::from_secs(3);

/// The node must change first: `EX_CONFIG` of sysexits.h.
const NODE_MUST_CHANGE: i32 = 78;

fn echo() -> Service {
    Service::new("echo", 10, &["a1", "b1", "b2"])
}

/// A lab whose agents look at what others may have undone several times a second.
fn hasty_cluster(lab: LabOptions) -> Result<(Cluster, TempDir)> {
    let directory = tempfile::tempdir()?;
    let config = configuration::write(directory.path(), configuration::HASTY)?;
    let options = AgentOptions { more: vec!["--config".into(), config], ..AgentOptions::default() };
    Ok((Cluster::start(lab, options, &[echo()])?, directory))
}

/// Ids of the links and maps that are pinned.
fn pinned(pins: &Path) -> Result<BTreeMap<String, u32>> {
    let links = pinned_links(pins)?;
    let mut ids: BTreeMap<_, _> =
        links.into_iter().map(|link| (format!("{}-{}", link.program, link.target), link.link)).collect();
    for entry in fs::read_dir(pins.join("maps"))? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        ids.insert(name, MapInfo::from_pin(&path)?.id());
    }
    Ok(ids)
}

fn link_ids(node: &Node) -> Result<Vec<u32>> {
    Ok(pinned_links(node.pins())?.iter().map(|link| link.link).collect())
}

/// Everything below the pin path goes, the directory included, as by `rm -r`: an agent may be pinning again while it is under way.
fn wipe(node: &Node) -> Result<()> {
    let is_gone = || (fs::remove_dir_all(node.pins()).is_ok() || !node.pins().exists()).then_some(());
    wait_until(&format!("{} to be wiped", node.pins().display()), Duration::from_secs(5), is_gone)
}

#[test]
fn scenario_14_pins_that_are_wiped_come_back_and_nothing_is_lost() -> Result<()> {
    let (cluster, _config) = hasty_cluster(LabOptions::default())?;
    let [a, b] = &cluster.lab.nodes;
    let before = [pinned(a.pins())?, pinned(b.pins())?];
    let load = Load::begin(&cluster, &echo())?;
    let mut slowest = Duration::ZERO;
    for _ in 0..3 {
        for (node, before) in [a, b].into_iter().zip(&before) {
            let began = Instant::now();
            wipe(node)?;
            wait_until("everything to be pinned again", SOON, || {
                pinned(node.pins()).ok().filter(|now| now == before).map(drop)
            })
            .with_context(|| format!("{before:?}, now {:?}", pinned(node.pins())))?;
            slowest = slowest.max(began.elapsed());
        }
    }
    let (datagrams, connections) = load.finish_unhurt()?;
    note(
        14,
        &format!(
            "{datagrams} datagrams and {connections} connections; pinned again within {slowest:?} at a period of 0.3 s"
        ),
    );

    // The pins are those of an agent at work.
    echo().with_pods(&["b2"]).write(cluster.source())?;
    let client = cluster.lab.place("client-a")?;
    let target = echo().cluster(Family::V4, Protocol::Tcp);
    wait_until("the change", SOON, || {
        let answers = client.ask_times(Ask::new(target), 8).ok()?;
        answers.iter().all(|answer| answer.as_ref().is_ok_and(|answer| answer.pod == "b2")).then_some(())
    })?;
    cluster.restart_agents()?;
    assert_eq!([pinned(a.pins())?, pinned(b.pins())?], before, "the next agents adopt them");
    Ok(())
}

#[test]
fn scenario_14_an_agent_that_starts_without_the_pins_of_the_last_attaches_anew_and_nothing_old_is_left() -> Result<()> {
    const PER_SECOND: u32 = 1_000;
    let service = echo();
    let cluster = Cluster::start(LabOptions::default(), AgentOptions::default(), std::slice::from_ref(&service))?;
    let node = &cluster.lab.nodes[0];
    let old = link_ids(node)?;
    let target = service.cluster(Family::V4, Protocol::Udp);
    let stream = StreamPlan { target, per_second: PER_SECOND, linger: patience(Duration::from_secs(2)) };
    let stream = cluster.lab.place("client-a")?.stream(stream)?;
    // Before the agent looks again, which it does twice a minute.
    wipe(node)?;
    node.kill_agent();
    wait_until("the old links to go", SOON, || old.iter().all(|link| !exists(*link)).then_some(()))?;
    let began = Instant::now();
    node.start_agent(cluster.source(), &cluster.options)?;
    let started = began.elapsed();
    cluster.lab.place("client-a")?.ask(Ask::new(target))?;
    let report = stream.finish_stream()?;
    let gap = Duration::from_millis(report.lost() * 1_000 / u64::from(PER_SECOND));
    note(
        14,
        &format!(
            "without pins and agent: {gap:?} without translation, {started:?} of it until the next agent was in sync"
        ),
    );
    ensure!(report.lost() > 0, "nothing was lost, so nothing was detached: {report:?}");
    let bound = if is_shipped() { AS_SHIPPED } else { Duration::from_secs(15) };
    assert!(gap < patience(bound), "{gap:?}");
    let new = link_ids(node)?;
    assert!(new.len() == old.len() && new.iter().all(|link| !old.contains(link)), "{old:?} and {new:?}");
    Ok(())
}

/// A BPF file system of the test's own; unmounted when dropped.
struct BpfMount {
    directory: TempDir,
}

impl BpfMount {
    fn new() -> Result<Self> {
        let made = Self { directory: tempfile::tempdir()? };
        made.mount()?;
        Ok(made)
    }

    fn path(&self) -> &Path {
        self.directory.path()
    }

    fn mount(&self) -> Result<()> {
        mount(Some("bpf"), self.path(), Some("bpf"), MsFlags::empty(), None::<&str>).context("cannot mount bpffs")
    }

    fn unmount(&self) -> Result<()> {
        umount2(self.path(), MntFlags::MNT_DETACH).context("cannot unmount bpffs")
    }
}

impl Drop for BpfMount {
    fn drop(&mut self) {
        let _ = self.unmount();
    }
}

fn filled(sandbox: &Sandbox) -> Result<ApiServer> {
    let server = sandbox.server()?;
    server.apply(node())?;
    server.apply(service("web", "10.96.0.1"))?;
    server.apply(slice("web", &["10.0.0.1"]))?;
    Ok(server)
}

#[test]
fn scenario_14_a_bpf_file_system_that_is_unmounted_takes_nothing_along() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let command = sandbox.namespace.command(sluice_program()?)?;
    unmounted_and_mounted_again(&sandbox, command)
}

#[test]
fn scenario_14_an_agent_with_no_more_than_its_capabilities_pins_again_too() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let mut command = sandbox.namespace.command("setpriv")?;
    command.args(["--bounding-set", "-all,+bpf,+net_admin,+perfmon"]).arg(sluice_program()?);
    unmounted_and_mounted_again(&sandbox, command)
}

fn unmounted_and_mounted_again(sandbox: &Sandbox, mut command: Command) -> Result<()> {
    let server = filled(sandbox)?;
    sandbox.namespace.ip("link add up0 type veth peer name far0\nlink set up0 up\nlink set far0 up")?;
    let config = configuration::write(sandbox.directory.path(), configuration::HASTY)?;
    let bpf = BpfMount::new()?;
    let pins = bpf.path().join("pins");
    command.args(["run", "-v", "--hostname-override", "here", "--uplinks", "up0", "--config", &config]);
    command.args(["--master", &server.url()]).arg("--pin-path").arg(&pins).arg("--cgroup").arg(sandbox.cgroup.path());
    let agent = sandbox.start(command)?;
    agent.wait_for("in sync")?;
    let before = pinned(&pins)?;
    let links: Vec<u32> = pinned_links(&pins)?.iter().map(|link| link.link).collect();
    bpf.unmount()?;
    agent.wait_for("is gone and cannot be pinned again")?;
    server.apply(slice("web", &["10.0.0.2"]))?;
    agent.wait_for_count("kernel follows", 2)?;
    assert!(links.iter().all(|link| exists(*link)), "links went with their pins:\n{}", agent.log());
    assert_eq!(agent.count("cannot be pinned again"), 1, "told once:\n{}", agent.log());
    bpf.mount()?;
    wait_until("everything to be pinned again", SOON, || pinned(&pins).ok().filter(|now| *now == before).map(drop))
        .with_context(|| agent.log())?;
    let answers = Maps::open(&pins)?.picture()?;
    assert!(answers["10.96.0.1:80/TCP"].internal.iter().eq(["10.0.0.2:8080"]), "{answers:?}");
    Ok(())
}

fn link_of<'a>(links: &'a [PinnedLink], program: &str) -> Option<&'a PinnedLink> {
    links.iter().find(|link| link.program.as_str() == program)
}

/// Whether all that was attached is again, by other links where it was detached.
fn is_healed(node: &Node, before: &[PinnedLink], detached: &[u32]) -> Option<()> {
    let now = pinned_links(node.pins()).ok()?;
    let heals = |old: &PinnedLink| {
        now.iter().any(|new| {
            let is_new = !detached.contains(&old.link) || new.link != old.link;
            is_new && (new.program, &new.target, new.target_id) == (old.program, &old.target, old.target_id)
        })
    };
    (now.len() == before.len() && before.iter().all(heals)).then_some(())
}

#[test]
fn scenario_15_what_others_detach_is_attached_again() -> Result<()> {
    let (cluster, _config) = hasty_cluster(LabOptions::default())?;
    for node in &cluster.lab.nodes {
        let before = pinned_links(node.pins())?;
        let mechanisms: Vec<_> = before.iter().map(|link| link.mechanism.as_str()).collect();
        let expected = if node.uplink == UplinkMode::Xdp { &["xdp", "tcx", "cgroup"][..] } else { &["tcx", "cgroup"] };
        assert!(expected.iter().all(|one| mechanisms.contains(one)), "{mechanisms:?}");
        for link in &before {
            let name = format!("{}-{}", link.program, link.target.replace('.', ":"));
            detach(&node.pins().join("links").join(name))?;
        }
        let detached: Vec<u32> = before.iter().map(|link| link.link).collect();
        let began = Instant::now();
        wait_until("all to be attached again", SOON, || is_healed(node, &before, &detached))
            .with_context(|| format!("{before:?}, now {:?}", pinned_links(node.pins())))?;
        note(
            15,
            &format!(
                "{}: {} links, attached again after {:?} at a period of 0.3 s",
                node.plan.name,
                before.len(),
                began.elapsed()
            ),
        );
    }
    // And traffic is what it was.
    let load = Load::begin(&cluster, &echo())?;
    load.go_on(Duration::from_secs(1));
    load.finish_unhurt()?;
    Ok(())
}

fn run(node: &Node, program: &str, arguments: &str) -> Result<std::process::Output> {
    let mut command: Command = node.host.namespace().command(program)?;
    command.args(arguments.split(' ')).output().with_context(|| format!("cannot run {program} {arguments}"))
}

#[test]
fn scenario_15_the_usual_commands_that_take_programs_off_take_off_none_of_ours() -> Result<()> {
    let (cluster, _config) = hasty_cluster(LabOptions::default())?;
    let node = &cluster.lab.nodes[0];
    let before = pinned(node.pins())?;
    let load = Load::begin(&cluster, &echo())?;
    let refused = run(node, "ip", "link set dev uplink xdp off")?;
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success() && said.contains("Can't replace active BPF XDP link"), "{said}");
    load.go_on(Duration::from_secs(1));
    load.finish_unhurt()?;
    for device in ["uplink", "pod-client-a"] {
        // Somebody's qdisc that comes and goes is none of ours. The kernel empties the device's queues for it.
        for verb in ["add", "del"] {
            let done = run(node, "tc", &format!("qdisc {verb} dev {device} clsact"))?;
            assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        }
    }
    for (client, target) in [
        ("client-a", echo().cluster(Family::V4, Protocol::Tcp)),
        ("client", echo().at_node(node.addresses(), Family::V4, Protocol::Tcp)),
    ] {
        cluster.lab.place(client)?.ask(Ask::new(target))?;
    }
    assert_eq!(pinned(node.pins())?, before);
    Ok(())
}

#[test]
fn scenario_15_a_device_that_another_one_occupies_gets_tc_until_it_is_free() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let config = configuration::write(directory.path(), configuration::HASTY)?;
    let options = AgentOptions { more: vec!["--config".into(), config], ..AgentOptions::default() };
    let (service, source) = (echo(), tempfile::tempdir()?);
    tests::lab::manifest::write_nodes(source.path())?;
    service.write(source.path())?;
    let lab = tests::lab::Lab::new(LabOptions::default())?;
    let node = &lab.nodes[0];
    let owner = XdpPass::attach(node.host.namespace(), "uplink")?;
    lab.start_agents(source.path(), &options)?;
    assert!(node.agent()?.says("device uplink already has an XDP program (id "), "{}", node.agent()?.log());
    assert!(node.agent()?.says("it was left alone, and the device gets TC instead"), "{}", node.agent()?.log());
    let ask = |protocol| lab.client.ask(Ask::new(service.at_node(node.addresses(), Family::V4, protocol)));
    Protocol::ALL.into_iter().try_for_each(|protocol| ask(protocol).map(drop))?;
    assert!(link_of(&pinned_links(node.pins())?, "uplink_in").is_some(), "no program at TC");
    drop(owner);
    wait_until("XDP", SOON, || {
        let links = pinned_links(node.pins()).ok()?;
        (link_of(&links, "uplink_xdp").is_some() && link_of(&links, "uplink_in").is_none()).then_some(())
    })?;
    Protocol::ALL.into_iter().try_for_each(|protocol| ask(protocol).map(drop))
}

/// Why an agent does not start, where what is missing is seen by its words.
fn refused(sandbox: &Sandbox, mut agent: tests::sandbox::Agent, advice: &str) -> Result<()> {
    assert_eq!(agent.ended()?, NODE_MUST_CHANGE, "{}", agent.log());
    let log = agent.log();
    let told: Vec<_> = log.lines().filter(|line| line.contains(advice)).collect();
    assert_eq!(told.len(), 1, "{advice:?} is one line of\n{log}");
    assert!(pinned_links(sandbox.pins.path()).unwrap_or_default().is_empty(), "half attached");
    assert!(!sandbox.pins.path().join("maps").exists(), "something was written");
    let devices = sandbox.namespace.command("ip")?.args(["-details", "link", "show", "dev", "up0"]).output()?;
    let devices = String::from_utf8_lossy(&devices.stdout).into_owned();
    assert!(!devices.contains("prog/xdp"), "half attached: {devices}");
    Ok(())
}

#[test]
fn scenario_16_what_a_node_lacks_is_one_line_with_advice_and_nothing_is_half_attached() -> Result<()> {
    let sandbox = Sandbox::new()?;
    sandbox.namespace.ip("link add up0 type veth peer name far0\nlink set up0 up\nlink set far0 up")?;
    let server = filled(&sandbox)?;
    let url = server.url();
    let arguments = ["--master", &url, "--uplinks", "up0"];
    let agent = start_where(|| hide("/sys/kernel/btf"), || sandbox.agent(&arguments))?;
    refused(&sandbox, agent, "boot a kernel built with CONFIG_DEBUG_INFO_BTF=y")?;
    let agent = start_where(unmount_cgroup2, || sandbox.start(sandbox.command(&arguments)?))?;
    refused(&sandbox, agent, "mount -t cgroup2 none /sys/fs/cgroup")?;
    for (cgroup, why) in [("/nonexistent", "No such file"), ("/tmp", "it is on another file system")] {
        let agent = sandbox.start(sandbox.command(&[&arguments[..], &["--cgroup", cgroup]].concat())?)?;
        refused(&sandbox, agent, why).with_context(|| format!("--cgroup {cgroup}"))?;
    }
    let elsewhere = sandbox.directory.path().join("pins").display().to_string();
    let mut command = sandbox.namespace.command(sluice_program()?)?;
    command.args(["run", "--hostname-override", "here"]).args(arguments).args(["--pin-path", &elsewhere]);
    refused(&sandbox, sandbox.start(command)?, "is not on a BPF file system")?;
    assert!(!PathBuf::from(elsewhere).exists(), "a directory was made where nothing can be pinned");
    // The same node with all of it.
    sandbox.agent(&arguments)?.wait_for("in sync")
}

#[test]
fn scenario_16_a_device_without_native_xdp_gets_tc_and_says_so() -> Result<()> {
    let sandbox = Sandbox::new()?;
    sandbox.namespace.ip("link add up0 type bridge\nlink set up0 up")?;
    let server = filled(&sandbox)?;
    let agent = sandbox.agent(&["--master", &server.url(), "--uplinks", "up0"])?;
    agent.wait_for("in sync")?;
    agent.wait_for("device up0 takes no XDP program in this mode")?;
    let links = pinned_links(sandbox.pins.path())?;
    assert!(link_of(&links, "uplink_xdp").is_none() && link_of(&links, "uplink_in").is_some(), "{links:?}");
    let generic = ["--master", &server.url(), "--uplinks", "up0", "--uplink-mode", "xdp-generic"];
    drop(agent);
    let agent = sandbox.agent(&generic)?;
    agent.wait_for("in sync")?;
    let links = pinned_links(sandbox.pins.path())?;
    assert!(link_of(&links, "uplink_xdp").is_some() && link_of(&links, "uplink_in").is_none(), "{links:?}");
    Ok(())
}
