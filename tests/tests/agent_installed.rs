//! The agent as `deploy/sluice.yaml` starts it, without a cluster: what it is given, what it does with it, and what it is refused.
//! Needs root.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::{IpAddr, Ipv4Addr},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use tests::{
    api::{
        ApiServer, Authority, Resource, Verb,
        object::{NODE, node, service, slice},
    },
    install::{ApiAccess, Container, Host, Manifest, RUNTIME_MOUNTS, TOKEN, mask},
    lab::agent::{IN_SYNC, Log, sluice_program},
    patience::wait_until,
    picture::Maps,
    sandbox::Sandbox,
};

const USUAL: Duration = Duration::from_mins(1);
const WEB: &str = "10.96.0.1:80/TCP";

/// A node, an API server, and what the manifest says of its agent.
struct Cluster {
    sandbox: Sandbox,
    server: ApiServer,
    manifest: Manifest,
    host: Host,
}

/// A pod on the node.
struct Pod {
    container: Container,
    log: Log,
}

impl Cluster {
    fn new() -> Result<Self> {
        let sandbox = Sandbox::new()?;
        let server = sandbox.server()?;
        let authority = Authority::new()?;
        server.secure(&authority);
        server.require_token(TOKEN);
        server.apply(node())?;
        server.apply(service("web", "10.96.0.1"))?;
        server.apply(slice("web", &["10.0.0.1"]))?;
        let paths = [("/sys/fs/bpf", sandbox.pins.path()), ("/sys/fs/cgroup", sandbox.cgroup.path())];
        let host = Host {
            name: NODE.into(),
            namespace: sandbox.namespace.path(),
            cgroup: sandbox.cgroup.child("pod")?,
            address: IpAddr::V4(Ipv4Addr::LOCALHOST),
            paths: paths.into_iter().map(|(path, stands_for)| (path.into(), stands_for.into())).collect(),
            config_maps: BTreeMap::new(),
            api: ApiAccess { address: server.address(), authority: authority.pem().into() },
        };
        Ok(Self { sandbox, server, manifest: Manifest::shipped()?, host })
    }

    fn start(&self, more: &[&str]) -> Result<Pod> {
        self.run(&sluice_program()?, more)
    }

    fn run(&self, program: &Path, more: &[&str]) -> Result<Pod> {
        let more: Vec<String> = more.iter().map(|word| (*word).to_owned()).collect();
        let mut container = Container::start(&self.manifest, &self.host, program, &more)?;
        let log = Log::of(&mut container.child)?;
        Ok(Pod { container, log })
    }

    /// Waits until the kernel sends the Service to an endpoint.
    fn wait_for_endpoint(&self, endpoint: &str) -> Result<()> {
        let pins = self.sandbox.pins.path().join("sluice");
        let picture = || Maps::open(&pins).ok()?.picture().ok();
        let leads_there = || picture()?.get(WEB).is_some_and(|web| web.internal.contains(endpoint)).then_some(());
        wait_until(&format!("{WEB} to lead to {endpoint}"), USUAL, leads_there)
    }
}

impl Pod {
    fn wait_until_in_sync(&self) -> Result<()> {
        let says_so = || self.log.lines().iter().any(|line| line.contains(IN_SYNC)).then_some(());
        wait_until("the agent to be in sync", USUAL, says_so).with_context(|| self.log.lines().join("\n"))
    }

    /// A file of its process in `/proc`, as the node sees it.
    fn proc(&self, file: &str) -> Result<String> {
        let path = format!("/proc/{}/{file}", self.container.child.id());
        fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))
    }

    /// A field of its `status`; several values are separated by one space.
    fn status(&self, name: &str) -> Result<String> {
        let status = self.proc("status")?;
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        let words: Vec<&str> = line.with_context(|| format!("no {name} in\n{status}"))?.split_whitespace().collect();
        Ok(words.join(" "))
    }

    /// Strings of a file in which each ends with a zero.
    fn strings(&self, file: &str) -> Result<Vec<String>> {
        let text = self.proc(file)?;
        Ok(text.split_terminator('\0').map(Into::into).collect())
    }

    /// Its mounts as the kernel has them, by their paths in the container.
    fn mounts(&self) -> Result<BTreeMap<PathBuf, Mounted>> {
        self.proc("mountinfo")?.lines().map(|line| mounted(line).with_context(|| line.to_owned())).collect()
    }
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
    let cluster = Cluster::new()?;
    let pod = cluster.start(&[])?;
    pod.wait_until_in_sync()?;
    cluster.wait_for_endpoint("10.0.0.1:8080")?;
    let (user, group) = cluster.manifest.user;
    assert_eq!(pod.status("Uid")?, [user; 4].map(|id| id.to_string()).join(" "));
    assert_eq!(pod.status("Gid")?, [group; 4].map(|id| id.to_string()).join(" "));
    assert_eq!(pod.status("Groups")?, group.to_string());
    let given = mask(&cluster.manifest.capabilities);
    for set in ["CapPrm", "CapEff", "CapBnd"] {
        assert_eq!(pod.status(set)?, given, "{set}");
    }
    for set in ["CapInh", "CapAmb"] {
        assert_eq!(pod.status(set)?, mask(&[]), "{set}");
    }
    assert_eq!((&*pod.status("NoNewPrivs")?, &*pod.status("Seccomp")?), ("1", "2"));
    assert_eq!(pod.status("Seccomp_filters")?, "3", "two of the container's, and the agent's own");
    assert!(pod.status("NSpid")?.ends_with(" 1"), "it is the first of its PID namespace");
    let log = pod.log.lines().join("\n");
    for given_up in ["few capabilities", "no new privileges", "filtered system calls", "writes only to"] {
        assert!(log.contains(given_up), "{given_up}:\n{log}");
    }
    Ok(())
}

#[test]
fn scenario_38_the_agent_sees_the_manifests_mounts_and_no_others() -> Result<()> {
    let cluster = Cluster::new()?;
    let pod = cluster.start(&[])?;
    pod.wait_until_in_sync()?;
    let mounts = pod.mounts()?;
    let root = &mounts[Path::new("/")];
    assert!(root.options.contains("ro"), "{root:?}");
    assert!(mounts.values().all(|mount| !mount.is_shared), "what it mounts would be the node's: {mounts:?}");
    for mount in &cluster.manifest.mounts {
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
        let of_manifest = cluster.manifest.mounts.iter().any(|mount| mount.path == **path);
        of_manifest || !(path.starts_with("/proc") || path.starts_with("/sys") || path.starts_with("/dev"))
    };
    let given: BTreeSet<&Path> = mounts.keys().filter(ours).map(PathBuf::as_path).collect();
    let of_manifest = cluster.manifest.mounts.iter().map(|mount| mount.path.as_path());
    let usual = ["/", "/run/secrets/kubernetes.io/serviceaccount", "/var/run/secrets/kubernetes.io/serviceaccount"];
    let allowed: BTreeSet<&Path> = of_manifest.chain(usual.map(Path::new)).collect();
    assert!(given.is_subset(&allowed), "{:?}", given.difference(&allowed));
    Ok(())
}

#[test]
fn arguments_and_variables_are_the_manifests_and_more_of_them_come_after() -> Result<()> {
    let cluster = Cluster::new()?;
    for more in [&[][..], &["-v", "--uplinks=eth9"]] {
        let pod = cluster.start(more)?;
        pod.wait_until_in_sync()?;
        let own = cluster.manifest.arguments.iter().map(String::as_str);
        let expected: Vec<&str> = ["/sluice"].into_iter().chain(own).chain(more.iter().copied()).collect();
        assert_eq!(pod.strings("cmdline")?, expected);
        let variables = pod.strings("environ")?;
        let names: BTreeSet<&str> = variables.iter().filter_map(|text| Some(text.split_once('=')?.0)).collect();
        let own = cluster.manifest.variables.keys().map(String::as_str);
        let usual = ["PATH", "HOSTNAME"];
        let rest: Vec<_> = names.iter().filter(|name| !name.starts_with("KUBERNETES_")).copied().collect();
        assert_eq!(rest, own.chain(usual).collect::<BTreeSet<_>>().into_iter().collect::<Vec<_>>());
        assert!(variables.contains(&format!("NODE_NAME={NODE}")), "{variables:?}");
    }
    Ok(())
}

#[test]
fn a_pod_is_alive_without_its_api_server_and_ready_when_the_kernel_has_everything() -> Result<()> {
    let mut cluster = Cluster::new()?;
    cluster.server.stop();
    let pod = cluster.start(&[])?;
    wait_until("the liveness probe's answer", USUAL, || pod.container.probes.is_alive().then_some(()))?;
    assert!(!pod.container.probes.is_ready(), "ready, and knows nothing");
    let server = &mut cluster.server;
    cluster.sandbox.namespace.run(|| server.resume())??;
    wait_until("the pod to be ready", USUAL, || pod.container.probes.is_ready().then_some(()))?;
    assert!(pod.log.lines().iter().any(|line| line.contains(IN_SYNC)), "ready before it was in sync");
    let (alive, ready) = pod.container.probes.answers();
    assert!(alive >= 1 && ready >= 1);
    assert_eq!(pod.container.probes.restarts(), 0);
    Ok(())
}

#[test]
fn scenario_38_the_role_allows_what_is_asked_of_the_server_and_no_writes_but_events() -> Result<()> {
    let cluster = Cluster::new()?;
    let pod = cluster.start(&[])?;
    pod.wait_until_in_sync()?;
    // Something to tell of.
    let mut broken = service("broken", "10.96.0.9");
    broken["spec"]["ports"] = json!("none");
    cluster.server.apply(broken)?;
    wait_until("an Event", USUAL, || (!cluster.server.events().is_empty()).then_some(()))?;
    let mut kinds = BTreeSet::new();
    for request in cluster.server.requests() {
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
        let mut rules = cluster.manifest.rules.iter().filter(|rule| rule.group == group && rule.resource == resource);
        let is_allowed = rules.any(|rule| rule.verbs.iter().any(|allowed| allowed == verb));
        ensure!(is_allowed, "the role does not allow to {verb} {resource}");
        kinds.insert((resource, verb));
    }
    assert!(kinds.contains(&("events", "create")), "{kinds:?}");
    for rule in cluster.manifest.rules.iter().filter(|rule| rule.resource != "events") {
        let writes = rule.verbs.iter().find(|verb| !["get", "list", "watch"].contains(&verb.as_str()));
        assert_eq!(writes, None, "{} may be written", rule.resource);
    }
    Ok(())
}

/// The same container with another program in it.
#[test]
fn scenario_38_to_mount_enter_trace_and_load_modules_is_refused() -> Result<()> {
    let cluster = Cluster::new()?;
    let mut pod = cluster.run(Path::new(env!("CARGO_BIN_EXE_attempts")), &[])?;
    let ended = wait_until("the attempts", USUAL, || pod.container.child.try_wait().ok().flatten())?;
    let last = |log: &Log| log.lines().iter().any(|line| line.starts_with("getpid")).then_some(());
    wait_until("what came of them", USUAL, || last(&pod.log))?;
    let text = pod.log.lines().join("\n");
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
