//! What an agent gives up before it begins, as the kernel has it, and that it works on what is left.

use std::fs;

use anyhow::{Context as _, Result};
use caps::Capability;
use serde_json::Value;
use tests::{
    lab::agent::sluice_program,
    sandbox::Sandbox,
    spoil::{only, start_where},
};

use super::{service, write};

/// A field of `/proc/PID/status`.
fn field(process: u32, name: &str) -> Result<String> {
    let status = fs::read_to_string(format!("/proc/{process}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    Ok(line.with_context(|| format!("no {name} in\n{status}"))?.trim().to_owned())
}

fn mask(capabilities: &[Capability]) -> String {
    let bits = capabilities.iter().map(|capability| 1_u64 << *capability as u8).sum::<u64>();
    format!("{bits:016x}")
}

/// What `sluice status` says that the agent has given up.
fn told(sandbox: &Sandbox) -> Result<Vec<String>> {
    let pins = sandbox.pins.path().display().to_string();
    let words = ["status", "-o", "json", "--pin-path", &pins];
    let output = sandbox.namespace.command(sluice_program()?)?.args(words).output()?;
    let status: Value = serde_json::from_slice(&output.stdout)?;
    Ok(serde_json::from_value(status["agent"]["confined"].clone())?)
}

#[test]
fn an_agent_with_the_manifests_capabilities_keeps_these_and_is_confined_to_its_pins() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let services = tempfile::tempdir()?;
    write(services.path(), "good.yaml", &[service("a", "10.96.0.1")])?;
    let source = format!("file:{}", services.path().display());
    let given = [Capability::CAP_BPF, Capability::CAP_NET_ADMIN, Capability::CAP_PERFMON];
    // The agent's binary may lie in a directory that only another user may enter.
    let given = [&given[..], &[Capability::CAP_DAC_READ_SEARCH]].concat();
    for _ in ["a first agent", "one that adopts"] {
        let agent = start_where(|| only(&given), || sandbox.agent(&["--source", &source]))?;
        agent.wait_for("in sync")?;
        for set in ["CapPrm", "CapEff"] {
            assert_eq!(field(agent.id(), set)?, mask(&given), "{set}");
        }
        assert_eq!(field(agent.id(), "CapInh")?, mask(&[]));
        assert_eq!(field(agent.id(), "NoNewPrivs")?, "1");
        assert_eq!(field(agent.id(), "Seccomp")?, "2");
        let expected = [
            "few capabilities",
            "no new privileges",
            "filtered system calls",
            "writes only to pins, network settings and its state",
        ];
        assert_eq!(told(&sandbox)?, expected);
        sandbox.wait_for_services("the Service", |services| services.len() == 1)?;
    }
    Ok(())
}

#[test]
fn root_keeps_what_finds_the_sockets_of_pods_and_nothing_else() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let services = tempfile::tempdir()?;
    let source = format!("file:{}", services.path().display());
    let agent = sandbox.agent(&["--source", &source])?;
    agent.wait_for("in sync")?;
    let kept = [
        Capability::CAP_BPF,
        Capability::CAP_NET_ADMIN,
        Capability::CAP_PERFMON,
        Capability::CAP_SYS_ADMIN,
        Capability::CAP_SYS_PTRACE,
        Capability::CAP_DAC_READ_SEARCH,
    ];
    for set in ["CapPrm", "CapEff", "CapBnd"] {
        assert_eq!(field(agent.id(), set)?, mask(&kept), "{set}");
    }
    assert_eq!(told(&sandbox)?, ["few capabilities", "no new privileges", "filtered system calls"]);
    drop(agent);
    let agent = sandbox.agent(&["--source", &source, "--confine", "false"])?;
    agent.wait_for("in sync")?;
    assert_eq!(field(agent.id(), "Seccomp")?, "0");
    assert_eq!(told(&sandbox)?, [""; 0]);
    Ok(())
}
