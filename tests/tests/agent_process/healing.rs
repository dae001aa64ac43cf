//! What others do to the node while an agent runs, and what a configuration file makes of the agent.

use std::{
    fs,
    net::Ipv4Addr,
    os::fd::{AsFd as _, AsRawFd as _},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use aya::maps::MapData;
use proxy_common::node::newcomers;
use proxy_userspace::dataplane::Observer;
use tests::{configuration, exclusive::Exclusive, http::ask, links::detach, patience::wait_until, sandbox::Sandbox};

use super::{bad_node::NODE_MUST_CHANGE, filled, service};

fn pin(sandbox: &Sandbox, name: &str) -> PathBuf {
    sandbox.pins.path().join("links").join(name)
}

fn wait_for_pin(sandbox: &Sandbox, name: &str) -> Result<()> {
    let usual = Duration::from_secs(20);
    wait_until(&format!("the link {name}"), usual, || pin(sandbox, name).exists().then_some(()))
}

#[test]
fn what_others_detach_is_attached_again_within_the_sync_period() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let server = filled(&sandbox)?;
    sandbox.namespace.ip("link add up0 type veth peer name far0\nlink set up0 up\nlink set far0 up")?;
    let config = configuration::write(sandbox.directory.path(), configuration::HASTY)?;
    let agent = sandbox.agent(&["--master", &server.url(), "--config", &config, "--uplinks", "up0"])?;
    agent.wait_for("in sync")?;
    let links = ["connect4-cgroup", "uplink_out-up0"];
    for name in links {
        detach(&pin(&sandbox, name))?;
        fs::remove_file(pin(&sandbox, name)).with_context(|| format!("no link {name}"))?;
    }
    links.into_iter().try_for_each(|name| wait_for_pin(&sandbox, name))
}

/// From now on nobody but programs writes to a map.
fn freeze(path: &Path) -> Result<()> {
    const BPF_MAP_FREEZE: libc::c_long = 22;
    let map = MapData::from_pin(path)?;
    let attributes = map.fd().as_fd().as_raw_fd();
    // SAFETY: the kernel reads the four octets of the map's descriptor.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, BPF_MAP_FREEZE, &raw const attributes, size_of_val(&attributes)) };
    ensure!(result == 0, "{}: {}", path.display(), std::io::Error::last_os_error());
    Ok(())
}

#[test]
fn an_agent_that_cannot_attach_is_not_ready_whatever_happens_next() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let server = filled(&sandbox)?;
    let agent = sandbox.agent(&["--master", &server.url()])?;
    agent.wait_for("in sync")?;
    assert_eq!(agent.terminate()?, 0);
    // The next agent has another device's address to write.
    freeze(&sandbox.pins.path().join("maps/LOCAL_MACS"))?;
    sandbox.namespace.ip("link add uplink type veth peer name wire")?;
    let agent = sandbox.agent(&["--master", &server.url()])?;
    agent.wait_for("LOCAL_MACS")?;
    // Each of these is written by the loop that says at its end whether all is well.
    for number in 2..5 {
        server.apply(service(&format!("web-{number}"), &format!("10.96.0.{number}")))?;
        sandbox.wait_for_services("the new Service", |services| services.len() == number)?;
    }
    assert!(!agent.log().contains("in sync"), "{}", agent.log());
    Ok(())
}

#[test]
fn an_agent_is_ready_when_every_hook_of_the_nodes_sockets_is_its_own() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let server = filled(&sandbox)?;
    let other = Exclusive::at_connect4(sandbox.cgroup.path())?;
    let agent = sandbox.agent(&["--master", &server.url()])?;
    agent.wait_for("program connect4 cannot be attached")?;
    agent.wait_for_count("not ready before", 2)?;
    assert!(!agent.log().contains("in sync"), "{}", agent.log());
    // What is attached serves: nothing new is left to a proxy that there is not, and nothing waits.
    let flags = Observer::open(sandbox.pins.path())?.node()?.flags;
    assert_eq!(flags & newcomers::ALL, 0, "{flags:#b}");
    let health = (Ipv4Addr::LOCALHOST, 10_256).into();
    assert_eq!(ask(&sandbox.namespace, health, "GET", "/readyz")?.status, 503);
    let livez = ask(&sandbox.namespace, health, "GET", "/livez")?;
    let written = livez.json()?["status"]["IPv4"]["lastUpdated"].clone();
    assert!(livez.status == 200 && written.as_str().is_some_and(|at| at > "2026"), "{livez:?}");
    drop(other);
    agent.wait_for("in sync")
}

#[test]
fn an_uplink_keeps_its_programs_until_another_device_has_a_default_route() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let server = filled(&sandbox)?;
    for (device, peer, network) in [("up0", "far0", "192.0.2"), ("up1", "far1", "198.51.100")] {
        sandbox.namespace.ip(&format!(
            "link add {device} type veth peer name {peer}\nlink set {device} up\nlink set {peer} up\n\
             address add {network}.1/24 dev {device}"
        ))?;
    }
    sandbox.namespace.ip("route add default via 192.0.2.2")?;
    let agent = sandbox.agent(&["--master", &server.url(), "--pod-devices", "pod0"])?;
    agent.wait_for("in sync")?;
    wait_for_pin(&sandbox, "uplink_out-up0")?;

    // The new device shows that the agent knows the network as it is without a default route.
    sandbox.namespace.ip("route delete default\nlink add pod0 type veth peer name far2\nlink set pod0 up")?;
    wait_for_pin(&sandbox, "pod_in-pod0")?;
    assert!(pin(&sandbox, "uplink_out-up0").exists());

    sandbox.namespace.ip("route add default via 198.51.100.2")?;
    wait_for_pin(&sandbox, "uplink_out-up1")?;
    let usual = Duration::from_secs(20);
    wait_until("the former uplink's link to go", usual, || (!pin(&sandbox, "uplink_out-up0").exists()).then_some(()))
}

#[test]
fn a_configuration_that_cannot_be_used_is_told_by_file_and_field_and_what_means_nothing_is_named() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let server = filled(&sandbox)?;
    let config = configuration::write(sandbox.directory.path(), "ipvs: {schedular: rr}")?;
    let mut agent = sandbox.agent(&["--master", &server.url(), "--config", &config])?;
    assert_eq!(agent.ended()?, NODE_MUST_CHANGE, "{}", agent.log());
    let log = agent.log();
    assert!(log.contains(&config) && log.contains("ipvs.schedular: unknown field"), "{log}");

    configuration::write(sandbox.directory.path(), "ipvs: {strictARP: true}")?;
    let agent = sandbox.agent(&["--master", &server.url(), "--config", &config])?;
    agent.wait_for("in sync")?;
    assert_eq!(agent.count("ipvs.strictARP is ignored: "), 1, "{}", agent.log());
    Ok(())
}
