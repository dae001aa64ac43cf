//! The command line on a fixed state: what each verb prints for people and for programs, and what its exit status is. Needs root.

mod node;
mod snapshot;
mod thousands;

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead as _, BufReader, Read as _},
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::{Output, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use anyhow::{Context as _, Result, ensure};
use aya::maps::{Array, HashMap, Map, MapData};
use flate2::read::GzDecoder;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use proxy_common::{
    addr::{Ipv4, Port, Protocol},
    service::{Frontend, Service},
    stats::Stats,
};
use serde_json::json;
use tests::{lab::agent::sluice_program, sandbox::Sandbox};

use self::node::{Node, run, state};

#[test]
fn json_and_yaml_say_the_same() -> Result<()> {
    let node = Node::new()?;
    for words in [&["service", "list"][..], &["backend", "list"], &["affinity", "list"], &["flow", "list"]] {
        let json: serde_json::Value = serde_json::from_str(&node.ask(&[words, &["-o", "json"]].concat())?)?;
        let yaml = node.ask(&[words, &["-o", "yaml"]].concat())?;
        let yaml: serde_json::Value = serde_saphyr::from_str(&yaml).with_context(|| yaml.clone())?;
        assert_eq!(json, yaml, "{words:?}");
    }
    Ok(())
}

#[test]
fn the_agent_may_be_gone() -> Result<()> {
    let Node { sandbox, agent, .. } = Node::new()?;
    drop(agent);
    let output = run(&sandbox, &["status"])?;
    let status = String::from_utf8(output.stdout)?;
    assert!(output.status.success() && status.contains("not running: traffic goes on"), "{status}");
    let output = run(&sandbox, &["service", "list", "-n", "shop"])?;
    assert!(String::from_utf8(output.stdout)?.contains("shop/web:http"));
    Ok(())
}

#[test]
fn what_cannot_be_told_is_an_exit_status_and_a_sentence() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let complaint = |output: &Output| String::from_utf8_lossy(&output.stderr).into_owned();
    let output = run(&sandbox, &["service", "list"])?;
    assert_eq!(output.status.code(), Some(78), "{}", complaint(&output));
    assert!(complaint(&output).contains("nothing of Sluice is pinned under"), "{}", complaint(&output));
    let node = Node::new()?;
    let output = node.run(&["service", "get", "shop/none"])?;
    assert_eq!(output.status.code(), Some(3), "{}", complaint(&output));
    assert!(complaint(&output).contains("no Service shop/none"), "{}", complaint(&output));
    let unknown = ["flow", "get", "10.244.1.9:40001", "10.96.0.10:80"];
    let cases: [(&[&str], i32, &str); 3] = [
        (&["flow", "flush"], 2, "say which flows"),
        (&unknown, 3, "no TCP connection from 10.244.1.9:40001 to 10.96.0.10:80"),
        (&["flow", "get", "10.244.1.9", "10.96.0.10:80"], 2, "the client's port is missing"),
    ];
    for (words, code, expected) in cases {
        let output = node.run(words)?;
        assert_eq!(output.status.code(), Some(code), "{words:?}: {}", complaint(&output));
        assert!(complaint(&output).contains(expected), "{words:?}: {}", complaint(&output));
    }
    Ok(())
}

#[test]
fn flows_are_found_by_what_is_known_of_them_and_forgotten_in_pairs() -> Result<()> {
    let node = Node::new()?;
    node.open_flow(40_000)?;
    node.open_flow(40_001)?;
    let count = |words: &[&str]| -> Result<usize> {
        let answer = node.ask(&[&["flow", "list", "-o", "json"], words].concat())?;
        Ok(serde_json::from_str::<Vec<serde_json::Value>>(&answer)?.len())
    };
    let cases: [(&[&str], usize); 9] = [
        (&[], 2),
        (&["--halves"], 4),
        (&["--service", "shop/web"], 2),
        (&["--service", "shop/cart"], 0),
        (&["--address", "10.244.2.0/24"], 2),
        (&["--address", "10.244.3.1"], 0),
        (&["--port", "40001"], 1),
        (&["--protocol", "udp"], 0),
        (&["--stale"], 0),
    ];
    for (words, expected) in cases {
        assert_eq!(count(words)?, expected, "{words:?}");
    }
    assert_eq!(node.ask(&["flow", "flush", "--port", "40001"])?.trim(), "2 entries are out");
    assert_eq!(count(&["--halves"])?, 2);
    assert_eq!(node.ask(&["flow", "flush", "--all"])?.trim(), "2 entries are out");
    assert_eq!(count(&["--halves"])?, 0);
    Ok(())
}

#[test]
fn a_connection_is_found_by_either_of_its_directions() -> Result<()> {
    let node = Node::new()?;
    node.open_flow(40_000)?;
    let ends = [("10.244.1.9:40000", "10.96.0.10:80"), ("10.244.2.5:8080", "10.244.1.9:40000/tcp")];
    for ((source, destination), first) in ends.into_iter().zip(["original", "reply"]) {
        let answer = node.ask(&["flow", "get", source, destination, "-o", "json"])?;
        let entries: Vec<serde_json::Value> = serde_json::from_str(&answer)?;
        assert_eq!(entries.len(), 2, "{answer}");
        assert_eq!(entries[0]["direction"], first, "{answer}");
    }
    Ok(())
}

#[test]
fn what_a_cleanup_would_do_is_what_it_does() -> Result<()> {
    let Node { sandbox, agent, .. } = Node::new()?;
    let pins = || fs::read_dir(sandbox.pins.path().join("maps")).map(Iterator::count);
    let before = pins()?;
    let told = |words: &[&str]| -> Result<serde_json::Value> {
        let output = run(&sandbox, &[words, &["-o", "json"]].concat())?;
        ensure!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(serde_json::from_slice(&output.stdout)?)
    };
    let directory = state(&sandbox);
    let own = directory.display().to_string();
    let (plan, clean) = (["cleanup", "--dry-run", "--state-dir", &own], ["cleanup", "--state-dir", &own]);
    let planned = told(&plan)?;
    assert!(planned["notes"][0].as_str().is_some_and(|note| note.contains("an agent runs")), "{planned}");
    assert_eq!(run(&sandbox, &clean)?.status.code(), Some(1), "while an agent runs");
    assert!(directory.join("verify.sock").exists());
    drop(agent);
    fs::write(directory.join("kubernetes.json"), "")?;
    let planned = told(&plan)?;
    assert_eq!((pins()?, planned["notes"].as_array().map(Vec::len)), (before, Some(0)), "{planned}");
    let list = planned["removed"].as_array().context("no list")?;
    let expected = ["kubernetes.json", "verify.sock"].map(|name| json!({"kind": "file", "path": directory.join(name)}));
    assert!(list.ends_with(&[&expected[..], &[json!({"kind": "directory", "path": directory})]].concat()), "{planned}");
    assert_eq!(planned["removed"], told(&clean)?["removed"]);
    assert!(!sandbox.pins.path().exists() && !directory.exists());
    assert_eq!(told(&plan)?["removed"], json!([]));
    Ok(())
}

/// In a container `/proc/sys` is read-only and the state directory mounted.
#[test]
fn a_cleanup_goes_on_past_what_it_cannot_remove_and_says_what_to_do_about_it() -> Result<()> {
    let Node { sandbox, agent, .. } = Node::new()?;
    drop(agent);
    let (pins, state) = (sandbox.pins.path(), state(&sandbox));
    let container =
        "mount --bind /proc/sys /proc/sys && mount -o remount,bind,ro /proc/sys && mount --bind \"$2\" \"$2\" &&
        exec \"$0\" cleanup -o json --pin-path \"$1\" --state-dir \"$2\"";
    let clean = || -> Result<(Option<i32>, serde_json::Value, String)> {
        let mut command = sandbox.namespace.command("unshare")?;
        command.args(["--mount", "sh", "-c", container]).arg(sluice_program()?).arg(pins).arg(&state);
        let output = command.output()?;
        let complaint = String::from_utf8(output.stderr)?;
        let told = serde_json::from_slice(&output.stdout).with_context(|| complaint.clone())?;
        Ok((output.status.code(), told, complaint))
    };
    let advice = "sysctl -w net.ipv4.ip_local_reserved_ports=8080";
    sandbox.namespace.sysctl("net/ipv4/ip_local_reserved_ports", "8080,10000-29999")?;

    let (status, told, complaint) = clean()?;
    assert_eq!(status, Some(1), "{complaint}");
    assert!(complaint.contains("not removed: 10000-29999 from the reserved ports"), "{complaint}");
    assert!(complaint.contains(&format!("`{advice}`")), "{complaint}");
    assert_eq!(told["kept"].as_array().map(Vec::len), Some(1), "{told}");
    assert_eq!(told["kept"][0]["kind"], "reserved_ports", "{told}");
    let removed = told["removed"].as_array().context("no list")?;
    for gone in [pins.join("maps/NODE"), pins.join("links"), state.join("verify.sock")] {
        assert!(removed.iter().any(|thing| thing["path"] == json!(gone)) && !gone.exists(), "{gone:?}: {told}");
    }
    assert!(told["notes"][0].as_str().is_some_and(|note| note.contains("is mounted here")), "{told}");
    assert!(pins.exists() && state.exists());

    let words: Vec<&str> = advice.split(' ').collect();
    assert!(sandbox.namespace.command(words[0])?.args(&words[1..]).output()?.status.success());
    let (status, _, complaint) = clean()?;
    assert_eq!(status, Some(0), "{complaint}");
    assert!(!pins.exists());
    Ok(())
}

#[test]
fn verify_agrees_with_the_agent_and_names_what_somebody_has_changed() -> Result<()> {
    let node = Node::new()?;
    let agree = || -> Result<()> {
        for (words, whose) in
            [(&["verify"][..], "as far as its agent has heard"), (&["verify", "--anew"], "by the objects")]
        {
            let told = node.ask(words)?;
            assert!(told.starts_with(&format!("The kernel holds what it should, {whose}")), "{words:?}: {told}");
        }
        Ok(())
    };
    agree()?;
    let mut services: HashMap<_, Frontend<Ipv4>, Service> = node.map("SERVICES_V4")?;
    let frontend = Frontend::new(Ipv4 { octets: [10, 96, 0, 11] }, Port::new(80), Protocol::Tcp);
    let service = services.get(&frontend, 0)?;
    services.remove(&frontend)?;
    let stray = Frontend::new(Ipv4 { octets: [10, 96, 0, 99] }, Port::new(80), Protocol::Tcp);
    services.insert(stray, service, 0)?;
    for words in [&["verify"][..], &["verify", "--anew"]] {
        let output = node.run(words)?;
        let told = String::from_utf8(output.stdout)?;
        assert_eq!(output.status.code(), Some(4), "{words:?}: {told}");
        for expected in [
            "SERVICES_V4   10.96.0.11 port 80/TCP of shop/cart/TCP   is missing",
            "SERVICES_V4   10.96.0.99 port 80/TCP",
            "INBOUND       10.96.0.99",
        ] {
            assert!(told.contains(expected), "{words:?}: {expected:?} in\n{told}");
        }
    }
    services.insert(frontend, service, 0)?;
    services.remove(&stray)?;
    agree()
}

#[test]
fn verify_says_what_an_agent_that_stands_still_has_not_heard() -> Result<()> {
    let node = Node::new()?;
    node.agent.signal(Signal::SIGSTOP)?;
    let objects = node.sandbox.directory.path().join("objects");
    let service = "kind: Service\nmetadata: {name: unheard}\nspec: {clusterIP: 10.96.0.77, ports: [{port: 80}]}\n";
    fs::write(objects.join("unheard.yaml"), service)?;
    let asked = node.run(&["verify", "--timeout", "1"]);
    let anew = node.run(&["verify", "--anew"]);
    let (asked, anew) = (asked?, anew?);
    let complaint = String::from_utf8(asked.stderr)?;
    assert_eq!(asked.status.code(), Some(1), "{complaint}");
    assert!(complaint.contains("the agent has not answered within 1s"), "{complaint}");
    let told = String::from_utf8(anew.stdout)?;
    assert_eq!(anew.status.code(), Some(4), "{told}");
    assert!(told.contains("10.96.0.77 port 80/TCP of default/unheard/TCP   is missing"), "{told}");
    Ok(())
}

/// Who is alerted by the exit status must not take what could not be found out for a difference.
#[test]
fn verify_says_by_its_exit_status_what_kept_it_from_comparing() -> Result<()> {
    let Node { sandbox, agent, .. } = Node::new()?;
    let directory = sandbox.directory.path();
    fs::write(directory.join("broken.yaml"), "kind: KubeProxyConfiguration\nnope: 1\n")?;
    let broken = directory.join("broken.yaml").display().to_string();
    let missing = format!("file:{}", directory.join("missing").display());
    let cases: [(&str, &[&str], i32, &str); 4] = [
        ("flags that there are not", &["verify", "--", "--nope"], 2, "--nope"),
        ("a broken file", &["verify", "--", "--config", &broken], 78, "unknown field"),
        ("no such directory", &["verify", "--", "--source", &missing], 78, "missing"),
        ("nobody to ask", &["verify"], 1, "no agent runs"),
    ];
    drop(agent);
    for (name, words, code, expected) in cases {
        let output = run(&sandbox, words)?;
        let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{name}: {complaint}");
        assert!(complaint.contains(expected), "{name}: {complaint}");
    }
    Ok(())
}

#[test]
fn check_finds_nothing_missing_where_an_agent_runs() -> Result<()> {
    let node = Node::new()?;
    let answer = node.ask(&["check", "--uplinks", "uplink", "-o", "json"])?;
    let findings: Vec<serde_json::Value> = serde_json::from_str(&answer)?;
    let verdict = |subject: &str| findings.iter().find(|finding| finding["subject"] == subject).map(|f| &f["verdict"]);
    for subject in ["programs", "uplinks", "BPF file system", "cgroup v2", "capability BPF"] {
        assert_eq!(verdict(subject), Some(&"good".into()), "{subject}: {answer}");
    }
    assert!(answer.contains("the kernel takes all "), "{answer}");
    let at_work = node.ask(&["check"])?;
    assert!(at_work.contains(&format!("at work, kept by process {} ", node.agent.id())), "{at_work}");
    assert!(node.ask(&["check", "--load"])?.contains("the kernel takes all "));
    Ok(())
}

#[test]
fn a_bug_report_is_an_archive_of_what_the_kernel_holds() -> Result<()> {
    let node = Node::new()?;
    let archive = node.sandbox.directory.path().join("report.tar.gz");
    let path = archive.display().to_string();
    node.ask(&["bugreport", "--to", &path])?;
    assert_eq!(fs::metadata(&archive)?.permissions().mode() & 0o777, 0o600);
    let written = unpack(&fs::read(&archive)?)?;
    // What is there is not written over.
    assert_eq!(node.run(&["bugreport", "--to", &path])?.status.code(), Some(1));
    let piped = node.run(&["bugreport", "--to", "-"])?;
    let told = String::from_utf8(piped.stderr)?;
    assert!(piped.status.success() && told.contains("network.txt ("), "{told}");
    let piped = unpack(&piped.stdout)?;
    assert!(written.keys().eq(piped.keys()), "{:?} and {:?}", written.keys(), piped.keys());
    for name in ["counters.json", "status.json", "services.json", "flows.json", "check.json"] {
        serde_json::from_str::<serde_json::Value>(&piped[name]).with_context(|| format!("{name}: {}", piped[name]))?;
    }
    assert!(piped["kernel.txt"].starts_with("Linux version "), "{}", piped["kernel.txt"]);
    assert!(piped["agent.txt"].contains("--pin-path"), "{}", piped["agent.txt"]);
    // As `ip` shows it, which the image does not have.
    let network = &piped["network.txt"];
    for part in ["# links: ", "IfName(\"uplink\")", "# addresses: ", "# routes: ", "# rules: ", "# neighbours: "] {
        assert!(network.contains(part), "{part} in\n{network}");
    }
    Ok(())
}

/// The files of a bug report by name.
fn unpack(archive: &[u8]) -> Result<BTreeMap<String, String>> {
    let mut files = BTreeMap::new();
    for entry in tar::Archive::new(GzDecoder::new(archive)).entries()? {
        let mut entry = entry?;
        let name = entry.path()?.strip_prefix("sluice-bugreport")?.display().to_string();
        let mut content = String::new();
        entry.read_to_string(&mut content)?;
        files.insert(name, content);
    }
    Ok(files)
}

#[test]
fn who_asks_for_what_is_not_there_is_told_so_and_not_that_there_is_nothing() -> Result<()> {
    let node = Node::new()?;
    for words in [&["backend", "list"][..], &["flow", "list"], &["affinity", "list"]] {
        let answer = node.ask(&[words, &["--service", "shop/typo"]].concat())?;
        assert!(!answer.contains("The kernel has no") && answer.starts_with("No "), "{words:?}: {answer}");
    }
    assert!(node.ask(&["service", "list", "--namespace", "typo"])?.contains("of the namespace typo"));
    let by_name = node.ask(&["backend", "list", "--service", "web"])?;
    assert_eq!(by_name, node.ask(&["backend", "list", "--service", "shop/web"])?);
    assert!(by_name.contains("shop/web"), "{by_name}");
    // Why is told, and what to do about it.
    let failed = node.run(&["bugreport", "--to", "/proc/report"])?;
    let complaint = String::from_utf8(failed.stderr)?;
    assert!(complaint.contains("No such file") && complaint.contains("--to=-"), "{complaint}");
    Ok(())
}

#[test]
fn a_cleanup_that_is_to_stay_ends_with_a_signal() -> Result<()> {
    let sandbox = Sandbox::new()?;
    fs::create_dir_all(sandbox.pins.path().join("maps"))?;
    let pins = sandbox.pins.path().display().to_string();
    let mut command = sandbox.namespace.command(sluice_program()?)?;
    command.args(["cleanup", "--stay", "--pin-path", &pins]).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn()?;
    let said =
        BufReader::new(child.stdout.take().context("no output")?).lines().next().context("it says nothing")??;
    assert!(said.starts_with("removed directory "), "{said}");
    let staying =
        BufReader::new(child.stderr.take().context("no output")?).lines().next().context("it has ended")??;
    assert!(staying.contains("staying"), "{staying}");
    assert!(child.try_wait()?.is_none(), "it has ended");
    kill(Pid::from_raw(child.id().try_into()?), Signal::SIGTERM)?;
    assert_eq!(child.wait()?.code(), Some(0));
    Ok(())
}

#[test]
fn shells_and_manuals_know_every_verb() -> Result<()> {
    let sandbox = Sandbox::new()?;
    for shell in ["bash", "zsh", "fish"] {
        let script = String::from_utf8(run(&sandbox, &["completions", shell])?.stdout)?;
        assert!(script.contains("bugreport"), "{shell}: {script}");
    }
    let directory = sandbox.directory.path();
    let output = run(&sandbox, &["man", &directory.display().to_string()])?;
    assert!(output.status.success(), "{output:?}");
    for page in ["sluice.1", "sluice-service-list.1"] {
        assert!(Path::new(directory).join(page).exists(), "{page}");
    }
    Ok(())
}

#[test]
fn top_tells_rates_of_what_was_counted_meanwhile() -> Result<()> {
    let node = Node::new()?;
    let index = node.index([10, 96, 0, 10], 80, Protocol::Tcp)?;
    let map = MapData::from_pin(node.sandbox.pins.path().join("maps/SERVICE_STATS_4"))?;
    let mut counts: Array<_, Stats> = Map::Array(map).try_into()?;
    let done = AtomicBool::new(false);
    let answer = thread::scope(|scope| {
        let counting = scope.spawn(|| -> Result<()> {
            for packets in (0..).step_by(100) {
                counts.set(index, Stats { packets, ..Stats::default() }, 0)?;
                if done.load(Ordering::Relaxed) {
                    break;
                }
                thread::yield_now();
            }
            Ok(())
        });
        let answer = node.ask(&["top", "--once", "-o", "json"]);
        done.store(true, Ordering::Relaxed);
        counting.join().map_err(|_panic| anyhow::anyhow!("counting has panicked"))??;
        answer
    })?;
    let rates: serde_json::Value = serde_json::from_str(&answer)?;
    let busiest = &rates["services"][0];
    assert_eq!(busiest["name"], "shop/web:http/TCP", "{answer}");
    assert!(busiest["packets"].as_f64().is_some_and(|rate| rate > 0.0), "{answer}");
    Ok(())
}
