//! `deploy/sluice.yaml`: what it asks of a cluster is what the agent needs, and what it tells the agent the agent understands.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use axum::body::Body;
use clap::CommandFactory as _;
use http::Request;
use k8s_openapi::{
    api::{
        apps::v1::DaemonSet,
        core::v1::{Container, PodSpec, Probe, ServiceAccount, VolumeMount},
        rbac::v1::{ClusterRole, ClusterRoleBinding},
    },
    apimachinery::pkg::util::intstr::IntOrString,
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;
use tower::ServiceExt as _;

use super::requests::{self, Asked};
use crate::{
    cli::{self, Cli},
    config::{Config, Source},
    dataplane::CAPABILITIES,
    health,
    metrics::Metrics,
    progress::Progress,
};

const MANIFEST: &str = "deploy/sluice.yaml";

/// The manifest's only object of a kind. What Kubernetes would not know of it, it would forget: nothing may be lost.
fn object<T: DeserializeOwned + Serialize>(kind: &str) -> T {
    let documents = super::yaml(MANIFEST);
    let of_kind: Vec<&Value> = documents.iter().filter(|document| document["kind"] == kind).collect();
    let [document] = of_kind[..] else { panic!("{} of kind {kind}", of_kind.len()) };
    let object: T =
        serde_path_to_error::deserialize(document).unwrap_or_else(|error| panic!("{kind}: {}: {error}", error.path()));
    assert_eq!(serde_json::to_value(&object).unwrap(), *document, "a field of {kind} is none");
    object
}

fn pod() -> PodSpec {
    object::<DaemonSet>("DaemonSet").spec.template.spec.unwrap()
}

fn container(pod: &PodSpec) -> &Container {
    let [container] = &pod.containers[..] else { panic!("one container") };
    container
}

/// What the agent makes of its arguments.
fn config(container: &Container) -> Config {
    let arguments = container.args.iter().flatten().map(String::as_str);
    cli::configuration(["sluice"].into_iter().chain(arguments)).unwrap_or_else(|error| panic!("{error}"))
}

fn port(container: &Container, name: &str) -> u16 {
    let named = container.ports.iter().flatten().find(|port| port.name.as_deref() == Some(name));
    named.unwrap_or_else(|| panic!("no port {name}")).container_port.try_into().unwrap()
}

#[test]
fn every_object_is_one_that_kubernetes_knows_in_every_field() {
    object::<ServiceAccount>("ServiceAccount");
    object::<ClusterRole>("ClusterRole");
    object::<ClusterRoleBinding>("ClusterRoleBinding");
    object::<DaemonSet>("DaemonSet");
    assert_eq!(super::yaml(MANIFEST).len(), 4, "an object is looked at by no test");
}

#[test]
fn objects_name_each_other_as_they_are_called() {
    let account = object::<ServiceAccount>("ServiceAccount").metadata;
    let binding = object::<ClusterRoleBinding>("ClusterRoleBinding");
    let [subject] = &binding.subjects.unwrap()[..] else { panic!("one subject") };
    assert_eq!((Some(&subject.name), &subject.namespace), (account.name.as_ref(), &account.namespace));
    assert_eq!(Some(binding.role_ref.name), object::<ClusterRole>("ClusterRole").metadata.name);
    assert_eq!(pod().service_account_name, account.name);
    let daemon_set = object::<DaemonSet>("DaemonSet");
    assert_eq!(daemon_set.metadata.namespace, account.namespace);
    let spec = daemon_set.spec;
    let labels = spec.template.metadata.unwrap().labels.unwrap();
    for label in spec.selector.match_labels.unwrap() {
        assert!(labels.iter().any(|own| own == (&label.0, &label.1)), "{label:?} selects no pod");
    }
}

#[test]
fn arguments_and_variables_are_the_agents_own() {
    let pod = pod();
    let container = container(&pod);
    let config = config(container);
    assert!(matches!(config.source, Source::Kubernetes(_)));
    let command = Cli::command();
    let run = command.find_subcommand("run").unwrap();
    for variable in container.env.iter().flatten() {
        let is_read =
            run.get_arguments().any(|argument| argument.get_env().is_some_and(|name| *name == *variable.name));
        assert!(is_read, "{} is nothing to the agent", variable.name);
    }
    assert_eq!(container.image.as_deref(), Some(concat!("localhost/sluice:", env!("CARGO_PKG_VERSION"))));
}

#[tokio::test]
async fn probes_ask_where_and_what_the_agent_answers() {
    let pod = pod();
    let container = container(&pod);
    let config = config(container);
    assert_eq!(config.healthz.map(|address| address.port()), Some(port(container, "health")));
    assert_eq!(config.metrics.map(|address| address.port()), Some(port(container, "metrics")));
    assert!(config.metrics.unwrap().ip().is_loopback(), "metrics are served to everybody");
    let progress = Arc::new(Progress::new(Duration::from_mins(1)));
    let router = health::router(progress, Metrics::default());
    let path = async |probe: &Option<Probe>| {
        let action = probe.as_ref().unwrap().http_get.clone().unwrap();
        assert_eq!(action.port, IntOrString::String("health".into()));
        let path = action.path.unwrap();
        let request = Request::get(&path).body(Body::empty()).unwrap();
        let answer = router.clone().oneshot(request).await.unwrap();
        assert_ne!(answer.status(), 404, "{path}");
        path
    };
    assert_eq!(path(&container.liveness_probe).await, "/livez", "what depends on others is no reason to start it anew");
    assert_eq!(path(&container.readiness_probe).await, "/readyz");
}

#[test]
fn what_the_agent_reads_and_writes_of_the_node_is_mounted_and_nothing_else() {
    let pod = pod();
    let container = container(&pod);
    let config = config(container);
    let mounts = container.volume_mounts.as_ref().unwrap();
    let mount_of = |path: &Path| -> (&VolumeMount, PathBuf) {
        let mount = mounts.iter().find(|mount| path.starts_with(&mount.mount_path));
        let mount = mount.unwrap_or_else(|| panic!("{} is not mounted", path.display()));
        let volume = pod.volumes.iter().flatten().find(|volume| volume.name == mount.name).unwrap();
        (mount, volume.host_path.as_ref().unwrap().path.clone().into())
    };
    let (pins, on_node) = mount_of(&config.dataplane.pin_path);
    assert_eq!((on_node.to_str(), pins.read_only), (Some("/sys/fs/bpf"), None), "what is pinned outlives the pod");
    assert_eq!(pins.mount_propagation.as_deref(), Some("HostToContainer"));
    // What /proc/self/mountinfo names in a container is the container's own cgroup.
    let (cgroup, on_node) = mount_of(config.dataplane.cgroup.as_ref().unwrap());
    assert_eq!((on_node.to_str(), cgroup.read_only), (Some("/sys/fs/cgroup"), Some(true)));
    let Source::Kubernetes(server) = &config.source else { panic!("no API server") };
    let (state, on_node) = mount_of(server.state.as_ref().unwrap());
    assert_eq!((on_node.to_str(), state.read_only), (Some("/var/lib/sluice"), None), "what is kept outlives a reboot");
    // Of kube-proxy, which may have been there; its ConfigMap is the API's, not the node's.
    let bootstrap = server.bootstrap.as_ref().unwrap();
    let mount = mounts.iter().find(|mount| bootstrap.starts_with(&mount.mount_path)).unwrap();
    let volume = pod.volumes.iter().flatten().find(|volume| volume.name == mount.name).unwrap();
    let source = volume.config_map.as_ref().unwrap();
    let files: Vec<&str> = source.items.iter().flatten().map(|item| item.path.as_str()).collect();
    assert_eq!(bootstrap.strip_prefix(&mount.mount_path).unwrap().to_str(), files.first().copied());
    assert_eq!((&*source.name, source.optional, mount.read_only), ("kube-proxy", Some(true), Some(true)));
    assert_eq!(mounts.len(), 4);
    assert_eq!((pod.host_network, pod.host_pid, pod.host_ipc), (Some(true), None, None));
}

#[test]
fn the_pod_has_the_capabilities_that_the_agent_asks_for_at_start_and_no_others() {
    let pod = pod();
    let context = container(&pod).security_context.as_ref().unwrap();
    let capabilities = context.capabilities.as_ref().unwrap();
    assert_eq!(capabilities.drop.as_deref(), Some(&["ALL".to_owned()][..]));
    let added: BTreeSet<String> = capabilities.add.iter().flatten().map(|name| format!("CAP_{name}")).collect();
    assert_eq!(added, CAPABILITIES.iter().map(ToString::to_string).collect());
    assert_eq!((context.privileged, context.allow_privilege_escalation), (None, Some(false)));
    assert_eq!(context.read_only_root_filesystem, Some(true));
    let profile = pod.security_context.as_ref().unwrap().seccomp_profile.as_ref().unwrap();
    assert_eq!(profile.type_, "RuntimeDefault");
}

#[tokio::test]
async fn the_role_allows_what_the_agent_asks_for_and_nothing_else() {
    let role = object::<ClusterRole>("ClusterRole");
    let mut allowed = BTreeSet::new();
    for rule in role.rules.unwrap() {
        assert_eq!((rule.resource_names, rule.non_resource_urls), (None, None));
        for group in rule.api_groups.iter().flatten() {
            for resource in rule.resources.iter().flatten() {
                allowed.extend(rule.verbs.iter().map(|verb| Asked {
                    group: group.clone(),
                    resource: resource.clone(),
                    verb: verb.clone(),
                }));
            }
        }
    }
    assert_eq!(requests::all().await, allowed);
}
