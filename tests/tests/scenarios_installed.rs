//! The agent as `deploy/sluice.yaml` starts it, without a cluster: what it is given, what it does with it, and what it is refused.
//! Needs root.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::Read as _,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use flate2::read::GzDecoder;
use serde_json::json;
use tests::{
    api::{
        Resource, Verb,
        object::{NODE, service},
    },
    install::{Node, Pod, RUNTIME_MOUNTS, mask},
    lab::agent::IN_SYNC,
    patience::wait_until,
};

const USUAL: Duration = Duration::from_mins(1);
const WEB: &str = "10.96.0.2:80/TCP";

/// A file of a pod's process in `/proc`, as the node sees it.
fn proc(pod: &Pod, file: &str) -> Result<String> {
    let path = format!("/proc/{}/{file}", pod.container.child.id());
    fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))
}

/// A field of its `status`; several values are separated by one space.
fn status(pod: &Pod, name: &str) -> Result<String> {
    let status = proc(pod, "status")?;
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let words: Vec<&str> = line.with_context(|| format!("no {name} in\n{status}"))?.split_whitespace().collect();
    Ok(words.join(" "))
}

/// Strings of a file in which each ends with a zero.
fn strings(pod: &Pod, file: &str) -> Result<Vec<String>> {
    Ok(proc(pod, file)?.split_terminator('\0').map(Into::into).collect())
}

/// Its mounts as the kernel has them, by their paths in the container.
fn mounts(pod: &Pod) -> Result<BTreeMap<PathBuf, Mounted>> {
    proc(pod, "mountinfo")?.lines().map(|line| mounted(line).with_context(|| line.to_owned())).collect()
}

/// A line of `mountinfo`.
#[derive(Debug, PartialEq, Eq)]
struct Mounted {
    kind: String,
    options: BTreeSet<String>,
    is_shared: bool,
}

/// See proc(5).
fn mounted(line: &str) -> Option<(PathBuf, Mounted)> {
    let (mount, file_system) = line.split_once(" - ")?;
    let mut fields = mount.split(' ').skip(4);
    let (path, options) = (fields.next()?, fields.next()?);
    let options = options.split(',').filter(|option| !option.contains("atime")).map(Into::into).collect();
    let is_shared = fields.any(|field| field.starts_with("shared:"));
    Some((path.into(), Mounted { kind: file_system.split(' ').next()?.into(), options, is_shared }))
}

#[test]
fn scenario_38_the_agent_has_the_manifests_user_and_capabilities_and_no_others() -> Result<()> {
    let node = Node::new()?;
    let pod = node.start(&[])?;
    pod.wait_until_in_sync()?;
    node.wait_for_endpoints(WEB, &["10.0.0.1:8080"])?;
    let (user, group) = node.manifest.user;
    assert_eq!(status(&pod, "Uid")?, [user; 4].map(|id| id.to_string()).join(" "));
    assert_eq!(status(&pod, "Gid")?, [group; 4].map(|id| id.to_string()).join(" "));
    assert_eq!(status(&pod, "Groups")?, group.to_string());
    let given = mask(&node.manifest.capabilities);
    for set in ["CapPrm", "CapEff", "CapBnd"] {
        assert_eq!(status(&pod, set)?, given, "{set}");
    }
    for set in ["CapInh", "CapAmb"] {
        assert_eq!(status(&pod, set)?, mask(&[]), "{set}");
    }
    assert_eq!((&*status(&pod, "NoNewPrivs")?, &*status(&pod, "Seccomp")?), ("1", "2"));
    assert_eq!(status(&pod, "Seccomp_filters")?, "3", "two of the container's, and the agent's own");
    assert!(status(&pod, "NSpid")?.ends_with(" 1"), "it is the first of its PID namespace");
    let log = pod.text();
    for given_up in ["few capabilities", "no new privileges", "filtered system calls", "writes only to"] {
        assert!(log.contains(given_up), "{given_up}:\n{log}");
    }
    Ok(())
}

#[test]
fn scenario_38_the_agent_sees_the_manifests_mounts_and_no_others() -> Result<()> {
    let node = Node::new()?;
    let pod = node.start(&[])?;
    pod.wait_until_in_sync()?;
    let mounts = mounts(&pod)?;
    let root = &mounts[Path::new("/")];
    assert!(root.options.contains("ro"), "{root:?}");
    assert!(mounts.values().all(|mount| !mount.is_shared), "what it mounts would be the node's: {mounts:?}");
    for mount in &node.manifest.mounts {
        let found = mounts.get(&mount.path).with_context(|| format!("{} is not mounted", mount.path.display()))?;
        assert_eq!(found.options.contains("ro"), mount.read_only, "{}: {found:?}", mount.path.display());
    }
    assert_eq!(mounts[Path::new("/sys/fs/bpf")].kind, "bpf");
    assert_eq!(mounts[Path::new("/run/sluice/cgroup")].kind, "cgroup2");
    for (path, kind, options) in RUNTIME_MOUNTS {
        let found = &mounts[Path::new(path)];
        assert_eq!((&*found.kind, &found.options), (kind, &options.split(',').map(Into::into).collect()), "{path}");
    }
    // What masks parts of /proc and /sys gives nothing.
    let ours = |path: &&PathBuf| {
        let of_manifest = node.manifest.mounts.iter().any(|mount| mount.path == **path);
        of_manifest || !(path.starts_with("/proc") || path.starts_with("/sys") || path.starts_with("/dev"))
    };
    let given: BTreeSet<&Path> = mounts.keys().filter(ours).map(PathBuf::as_path).collect();
    let of_manifest = node.manifest.mounts.iter().map(|mount| mount.path.as_path());
    let usual = ["/", "/run/secrets/kubernetes.io/serviceaccount", "/var/run/secrets/kubernetes.io/serviceaccount"];
    let allowed: BTreeSet<&Path> = of_manifest.chain(usual.map(Path::new)).collect();
    assert!(given.is_subset(&allowed), "{:?}", given.difference(&allowed));
    Ok(())
}

#[test]
fn arguments_and_variables_are_the_manifests_and_more_of_them_come_after() -> Result<()> {
    let node = Node::new()?;
    for more in [&[][..], &["-v", "--uplinks=eth9"]] {
        let pod = node.start(more)?;
        pod.wait_until_in_sync()?;
        let own = node.manifest.arguments.iter().map(String::as_str);
        let expected: Vec<&str> = ["/sluice"].into_iter().chain(own).chain(more.iter().copied()).collect();
        assert_eq!(strings(&pod, "cmdline")?, expected);
        let variables = strings(&pod, "environ")?;
        let names: BTreeSet<&str> = variables.iter().filter_map(|text| Some(text.split_once('=')?.0)).collect();
        let own = node.manifest.variables.keys().map(String::as_str);
        let usual = ["PATH", "HOSTNAME"];
        let rest: Vec<_> = names.iter().filter(|name| !name.starts_with("KUBERNETES_")).copied().collect();
        assert_eq!(rest, own.chain(usual).collect::<BTreeSet<_>>().into_iter().collect::<Vec<_>>());
        assert!(variables.contains(&format!("NODE_NAME={NODE}")), "{variables:?}");
    }
    Ok(())
}

/// As `kubectl exec` runs it there.
#[test]
fn verify_in_the_pod_asks_the_pods_agent() -> Result<()> {
    let node = Node::new()?;
    let pod = node.start(&[])?;
    pod.wait_until_in_sync()?;
    let output = pod.container.exec(&["verify"])?;
    let (told, complaint) = (String::from_utf8(output.stdout)?, String::from_utf8(output.stderr)?);
    assert!(told.starts_with("The kernel holds what it should, as far as its agent has heard"), "{told}{complaint}");
    Ok(())
}

#[test]
fn a_bug_report_out_of_the_pod_needs_no_file_and_no_tool_of_the_image() -> Result<()> {
    let node = Node::new()?;
    let pod = node.start(&[])?;
    pod.wait_until_in_sync()?;
    let output = pod.container.exec(&["bugreport", "--to", "-"])?;
    let complaint = String::from_utf8(output.stderr)?;
    let mut network = String::new();
    for entry in tar::Archive::new(GzDecoder::new(&output.stdout[..])).entries()? {
        let mut entry = entry?;
        if entry.path()?.ends_with("network.txt") {
            entry.read_to_string(&mut network)?;
        }
    }
    assert!(network.contains("IfName(\"lo\")") && network.contains("# rules: "), "{network}\n{complaint}");
    Ok(())
}

#[test]
fn a_pod_is_alive_without_its_api_server_and_ready_when_the_kernel_has_everything() -> Result<()> {
    let mut node = Node::new()?;
    node.server.stop();
    let pod = node.start(&[])?;
    wait_until("the liveness probe's answer", USUAL, || pod.container.probes.is_alive().then_some(()))?;
    assert!(!pod.container.probes.is_ready(), "ready, and knows nothing");
    let server = &mut node.server;
    node.sandbox.namespace.run(|| server.resume())??;
    wait_until("the pod to be ready", USUAL, || pod.container.probes.is_ready().then_some(()))?;
    assert!(pod.says(IN_SYNC), "ready before it was in sync");
    let (alive, ready) = pod.container.probes.answers();
    assert!(alive >= 1 && ready >= 1);
    assert_eq!(pod.container.probes.restarts(), 0);
    Ok(())
}

#[test]
fn scenario_38_the_role_allows_what_is_asked_of_the_server_and_no_writes_but_events() -> Result<()> {
    let node = Node::new()?;
    let pod = node.start(&[])?;
    pod.wait_until_in_sync()?;
    // Something to tell of.
    let mut broken = service("broken", "10.96.0.9");
    broken["spec"]["ports"] = json!("none");
    node.server.apply(broken)?;
    wait_until("an Event", USUAL, || (!node.server.events().is_empty()).then_some(()))?;
    let mut kinds = BTreeSet::new();
    for request in node.server.requests() {
        let (group, resource) = match request.resource {
            Resource::Services => ("", "services"),
            Resource::EndpointSlices => ("discovery.k8s.io", "endpointslices"),
            Resource::Nodes => ("", "nodes"),
            Resource::ServiceCidrs => ("networking.k8s.io", "servicecidrs"),
            Resource::Events => ("events.k8s.io", "events"),
        };
        let verb = match request.verb {
            Verb::List => "list",
            Verb::Watch => "watch",
            Verb::Create => "create",
            Verb::Patch => "patch",
        };
        let mut rules = node.manifest.rules.iter().filter(|rule| rule.group == group && rule.resource == resource);
        let is_allowed = rules.any(|rule| rule.verbs.iter().any(|allowed| allowed == verb));
        ensure!(is_allowed, "the role does not allow to {verb} {resource}");
        kinds.insert((resource, verb));
    }
    assert!(kinds.contains(&("events", "create")), "{kinds:?}");
    for rule in node.manifest.rules.iter().filter(|rule| rule.resource != "events") {
        let writes = rule.verbs.iter().find(|verb| !["get", "list", "watch"].contains(&verb.as_str()));
        assert_eq!(writes, None, "{} may be written", rule.resource);
    }
    Ok(())
}

/// The same container with another program in it.
#[test]
fn scenario_38_to_mount_enter_trace_and_load_modules_is_refused() -> Result<()> {
    let node = Node::new()?;
    let mut pod = node.run(Path::new(env!("CARGO_BIN_EXE_attempts")), &[])?;
    let ended = wait_until("the attempts", USUAL, || pod.container.child.try_wait().ok().flatten())?;
    pod.wait_for("getpid")?;
    let text = pod.text();
    assert!(ended.success(), "{text}");
    let found: BTreeMap<&str, (i32, i32)> = text
        .lines()
        .filter_map(|line| match line.split(' ').collect::<Vec<_>>()[..] {
            [name, before, after] => Some((name, (before.parse().ok()?, after.parse().ok()?))),
            _ => None,
        })
        .collect();
    for name in ["mount", "umount2", "setns", "unshare", "init_module", "finit_module"] {
        assert_eq!(found[name], (libc::EPERM, libc::EPERM), "{name}: {text}");
    }
    // The runtimes let processes of one container trace each other; the agent has no use for that.
    assert_eq!(found["ptrace"], (libc::ESRCH, libc::EPERM), "{text}");
    assert_eq!(found["getpid"], (0, 0), "{text}");
    Ok(())
}
