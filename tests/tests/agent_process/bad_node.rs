//! What is wrong with the node or the configuration: said with advice, and nothing that was there is lost.

use std::{fs, path::Path};

use anyhow::{Context as _, Result};
use aya::maps::MapInfo;
use caps::Capability;
use tests::{
    lab::{agent::sluice_program, pins::PinDirectory},
    netns::require_root,
    sandbox::{Agent, Sandbox},
    spoil::{hide, lose, only, start_where, unmount_cgroup2},
};

use super::{filled, service, write};

/// The node must change first: `EX_CONFIG` of sysexits.h.
pub(super) const NODE_MUST_CHANGE: i32 = 78;

fn assert_refused(sandbox: &Sandbox, mut agent: Agent, object: &str, advice: &str) -> Result<()> {
    assert_eq!(agent.ended()?, NODE_MUST_CHANGE, "{}", agent.log());
    let log = agent.log();
    assert!(log.contains(object) && log.contains(advice), "{object:?} and {advice:?} are missing in\n{log}");
    assert!(log.lines().count() < 10, "the reason should not have to be looked for:\n{log}");
    assert!(!sandbox.pins.path().join("maps").exists(), "something was written");
    Ok(())
}

#[test]
fn a_kernel_without_btf_is_refused() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let source = format!("file:{}", sandbox.directory.path().display());
    let agent = start_where(|| hide("/sys/kernel/btf"), || sandbox.agent(&["--source", &source]))?;
    assert_refused(&sandbox, agent, "/sys/kernel/btf/vmlinux", "CONFIG_DEBUG_INFO_BTF=y")
}

#[test]
fn a_node_without_cgroup_v2_is_refused() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let source = format!("file:{}", sandbox.directory.path().display());
    // Without --cgroup: the agent looks for the hierarchy itself.
    let start = || sandbox.start(sandbox.command(&["--source", &source])?);
    let agent = start_where(unmount_cgroup2, start)?;
    assert_refused(&sandbox, agent, "no cgroup v2", "mount -t cgroup2 none /sys/fs/cgroup")
}

#[test]
fn each_missing_capability_is_named() -> Result<()> {
    require_root()?;
    let cases = [
        ("CAP_BPF", vec![Capability::CAP_BPF, Capability::CAP_SYS_ADMIN]),
        ("CAP_NET_ADMIN", vec![Capability::CAP_NET_ADMIN]),
        ("CAP_PERFMON", vec![Capability::CAP_PERFMON, Capability::CAP_SYS_ADMIN]),
    ];
    for (name, lost) in cases {
        let sandbox = Sandbox::new()?;
        let source = format!("file:{}", sandbox.directory.path().display());
        let agent = start_where(|| lose(&lost), || sandbox.agent(&["--source", &source]))?;
        assert_refused(&sandbox, agent, &format!("{name} is missing"), "the capabilities BPF, NET_ADMIN and PERFMON")?;
    }
    Ok(())
}

#[test]
fn the_capabilities_that_the_advice_names_are_enough() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let services = tempfile::tempdir()?;
    write(services.path(), "good.yaml", &[service("a", "10.96.0.1")])?;
    let source = format!("file:{}", services.path().display());
    let named = [Capability::CAP_BPF, Capability::CAP_NET_ADMIN, Capability::CAP_PERFMON];
    // Kept because the agent's binary may lie in a directory that only another user may enter.
    let kept = [&named[..], &[Capability::CAP_DAC_READ_SEARCH]].concat();
    let agent = start_where(|| only(&kept), || sandbox.agent(&["--source", &source]))?;
    agent.wait_for("in sync")?;
    sandbox.wait_for_services("the Service", |services| services.len() == 1)?;
    Ok(())
}

#[test]
fn what_keeps_an_agent_from_starting_is_said_with_advice() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let directory = sandbox.directory.path().display().to_string();
    let missing = format!("{directory}/missing");
    let garbage = format!("{directory}/garbage");
    fs::write(&garbage, "clusters: [\n")?;
    let cases = [
        (vec!["--source", "file:/nonexistent/services"], "/nonexistent/services", "names a directory of YAML files"),
        (vec!["--kubeconfig", &missing], &missing, "correct --kubeconfig"),
        (vec!["--kubeconfig", &garbage], &garbage, "correct --kubeconfig"),
        (vec!["--kubeconfig", &directory], &directory, "correct --kubeconfig"),
        (vec!["--master", "not a url"], "--master", "is not a URL"),
        (vec![], "not in a cluster", "name the API server with --kubeconfig or --master"),
    ];
    for (arguments, object, advice) in cases {
        let agent = sandbox.agent(&arguments)?;
        assert_refused(&sandbox, agent, object, advice).with_context(|| format!("{arguments:?}"))?;
    }
    Ok(())
}

#[test]
fn devices_that_do_not_exist_are_named_and_services_are_written_all_the_same() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let server = filled(&sandbox)?;
    let devices = ["--uplinks", "wrong0", "--pod-devices", "veth*,wrong1"];
    let agent = sandbox.agent(&[&["--master", &server.url()][..], &devices].concat())?;
    agent.wait_for("in sync")?;
    for device in ["wrong0", "wrong1"] {
        agent.wait_for(&format!("there is no device {device} yet: it is attached when it appears"))?;
    }
    assert_eq!(sandbox.services()?.len(), 1);
    Ok(())
}

#[test]
fn an_occupied_xdp_hook_is_left_to_its_owner() -> Result<()> {
    let sandbox = Sandbox::new()?;
    sandbox.namespace.ip("link add up0 type veth peer name far0\nlink set up0 up\nlink set far0 up")?;
    let source = format!("file:{}", sandbox.directory.path().display());
    let arguments = ["--source", &source, "--uplinks", "up0", "--socket-lb", "off"];
    // The owner happens to be another agent.
    let owner = PinDirectory::new(2000, "owner")?;
    let mut command = sandbox.namespace.command(sluice_program()?)?;
    command.args(["run", "--hostname-override", "here"]).args(arguments).arg("--pin-path").arg(owner.path());
    let first = sandbox.start(command)?;
    first.wait_for("in sync")?;
    let agent = sandbox.agent(&arguments)?;
    agent.wait_for("device up0 already has an XDP program (id ")?;
    agent.wait_for("it was left alone, and the device gets TC instead")?;
    assert!(owner.path().join("links/uplink_xdp-up0").exists());
    let links = sandbox.pins.path().join("links");
    assert!(links.join("uplink_in-up0").exists() && !links.join("uplink_xdp-up0").exists());
    Ok(())
}

#[test]
fn an_incompatible_pin_is_left_alone_and_the_way_out_is_told() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let server = filled(&sandbox)?;
    let arguments = ["--master", &server.url()];
    sandbox.agent(&arguments)?.wait_for("in sync")?;
    let maps = sandbox.pins.path().join("maps");
    let pin = maps.join("SERVICES_V4");
    fs::rename(maps.join("SERVICES_V6"), &pin).context("cannot put another map into its place")?;
    let id = |path: &Path| Ok::<_, anyhow::Error>(MapInfo::from_pin(path)?.id());
    let before = id(&pin)?;

    let mut agent = sandbox.agent(&arguments)?;
    assert_eq!(agent.ended()?, NODE_MUST_CHANGE, "{}", agent.log());
    let log = agent.log();
    assert!(log.contains(&format!("{} is not compatible", pin.display())), "{log}");
    assert!(log.contains("it was left alone") && log.contains("sluice cleanup"), "{log}");
    assert_eq!(id(&pin)?, before);
    assert!(!maps.join("SERVICES_V6").exists(), "nothing was made anew beside it");
    assert!(sandbox.pins.path().join("links/connect4-cgroup").exists());
    Ok(())
}

#[test]
fn cleanup_is_refused_while_an_agent_runs() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let server = filled(&sandbox)?;
    let agent = sandbox.agent(&["--master", &server.url()])?;
    agent.wait_for("in sync")?;
    let cleanup = || -> Result<_> {
        let mut command = sandbox.namespace.command(sluice_program()?)?;
        command.arg("cleanup").arg("--pin-path").arg(sandbox.pins.path()).output().context("cannot run sluice")
    };
    let refused = cleanup()?;
    let said = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(1), "{said}");
    assert!(said.contains("an agent uses") && said.contains("stop it first"), "{said}");
    assert_eq!(sandbox.services()?.len(), 1);
    drop(agent);
    assert!(cleanup()?.status.success());
    assert_eq!(sandbox.services()?, []);
    Ok(())
}
