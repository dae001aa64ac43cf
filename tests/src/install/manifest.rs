//! `deploy/sluice.yaml` as far as a node carries it out. In: the file. Out: what is to be started, every field of it accounted for.

use std::{collections::BTreeMap, fs, path::PathBuf, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use caps::Capability;
use k8s_openapi::{
    api::{
        apps::v1::DaemonSet,
        core::v1 as core,
        rbac::v1::{ClusterRole, PolicyRule},
    },
    apimachinery::pkg::util::intstr::IntOrString,
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

const MANIFEST: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/sluice.yaml");

/// What the pod's only container is to be.
#[derive(Clone, Debug, PartialEq)]
pub struct Manifest {
    /// Its arguments, as they are written.
    pub arguments: Vec<String>,
    /// Variables of its own.
    pub variables: BTreeMap<String, Variable>,
    /// Everything it may do.
    pub capabilities: Vec<Capability>,
    /// The user's and the group's id.
    pub user: (u32, u32),
    /// What is mounted, in the manifest's order.
    pub mounts: Vec<Mount>,
    /// Tells whether it lives.
    pub liveness: HttpProbe,
    /// Tells whether it is ready.
    pub readiness: HttpProbe,
    /// What the API lets its service account do.
    pub rules: Vec<Rule>,
}

/// Where a variable's value comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Variable {
    /// It is written there.
    Literal(String),
    /// The node's name.
    NodeName,
}

/// A mount of the container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Where it is in the container.
    pub path: PathBuf,
    /// What is there.
    pub source: VolumeSource,
    /// Nothing can be written there.
    pub read_only: bool,
    /// What becomes of mounts below it that are made later.
    pub propagation: Propagation,
}

/// What a volume is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VolumeSource {
    /// A directory of the node, which is made where it is missing if `is_made`.
    HostPath {
        /// On the node.
        path: PathBuf,
        /// `DirectoryOrCreate`, and not `Directory`.
        is_made: bool,
    },
    /// The keys of a `ConfigMap` of the pod's namespace.
    ConfigMap {
        /// Its name.
        name: String,
        /// The volume is empty where there is none.
        is_optional: bool,
        /// Its keys, and what their files are called; none means all, by their own names.
        files: Vec<(String, String)>,
    },
}

/// `mountPropagation`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Propagation {
    /// None in either direction.
    None,
    /// What the node mounts there later is seen.
    HostToContainer,
}

/// A probe over HTTP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpProbe {
    /// Which is asked for.
    pub path: String,
    /// Of the pod.
    pub port: u16,
    /// Between two questions.
    pub period: Duration,
    /// So many failures in a row are one.
    pub failures: u32,
}

/// What may be done with a resource.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Its API group.
    pub group: String,
    /// Its plural.
    pub resource: String,
    /// How.
    pub verbs: Vec<String>,
}

impl Manifest {
    /// What is shipped.
    pub fn shipped() -> Result<Self> {
        Self::parse(&fs::read_to_string(MANIFEST).with_context(|| format!("cannot read {MANIFEST}"))?)
    }

    /// The manifest in a text of YAML documents.
    pub fn parse(text: &str) -> Result<Self> {
        let documents: Vec<Value> = serde_saphyr::from_multiple(text).context("the manifest is not YAML")?;
        let daemon_set: DaemonSet = object(&documents, "DaemonSet")?;
        let role: ClusterRole = object(&documents, "ClusterRole")?;
        let pod = daemon_set.spec.template.spec.context("the DaemonSet has no pod")?;
        let rules = role.rules.into_iter().flatten().flat_map(rules).collect();
        Self::of_pod(pod, rules)
    }

    /// Takes out what it carries out; nothing may be left.
    fn of_pod(mut pod: core::PodSpec, rules: Vec<Rule>) -> Result<Self> {
        ensure!(pod.host_network.take() == Some(true), "the stand-in knows the node's network only");
        // Not of the container: who schedules it where, and how it ends.
        pod.service_account_name.take();
        pod.dns_policy.take();
        pod.termination_grace_period_seconds.take();
        pod.priority_class_name.take();
        pod.node_selector.take();
        pod.tolerations.take();
        confined_as_usual(pod.security_context.take().context("the pod has no securityContext")?)?;
        let volumes = pod.volumes.take().unwrap_or_default().into_iter().map(volume);
        let volumes: BTreeMap<String, VolumeSource> = volumes.collect::<Result<_>>()?;
        let Ok([container]) = <[core::Container; 1]>::try_from(std::mem::take(&mut pod.containers)) else {
            bail!("the stand-in starts one container");
        };
        ensure_nothing_left("the pod", &pod, &core::PodSpec::default())?;
        Self::of_container(container, &volumes, rules)
    }

    fn of_container(
        mut container: core::Container,
        volumes: &BTreeMap<String, VolumeSource>,
        rules: Vec<Rule>,
    ) -> Result<Self> {
        container.name.clear();
        // What is started is what was built.
        container.image.take();
        container.image_pull_policy.take();
        // Nothing limits it: requests are the scheduler's.
        if let Some(mut resources) = container.resources.take() {
            resources.requests.take();
            ensure_nothing_left("resources", &resources, &core::ResourceRequirements::default())?;
        }
        let ports = container.ports.take().unwrap_or_default();
        let mounts = container.volume_mounts.take().unwrap_or_default();
        let mounts = mounts.into_iter().map(|mount| self::mount(mount, volumes)).collect::<Result<Vec<_>>>()?;
        let variables = container.env.take().unwrap_or_default().into_iter().map(variable);
        let (capabilities, user) = may_do(container.security_context.take().context("no securityContext")?)?;
        let manifest = Self {
            arguments: container.args.take().unwrap_or_default(),
            variables: variables.collect::<Result<_>>()?,
            capabilities,
            user,
            mounts,
            liveness: probe(container.liveness_probe.take().context("no livenessProbe")?, &ports)?,
            readiness: probe(container.readiness_probe.take().context("no readinessProbe")?, &ports)?,
            rules,
        };
        ensure_nothing_left("the container", &container, &core::Container::default())?;
        Ok(manifest)
    }
}

/// The only object of a kind. What Kubernetes does not know of it, it would forget.
fn object<T: DeserializeOwned + Serialize>(documents: &[Value], kind: &str) -> Result<T> {
    let of_kind: Vec<&Value> = documents.iter().filter(|document| document["kind"] == kind).collect();
    let [document] = of_kind[..] else { bail!("{} objects of kind {kind}", of_kind.len()) };
    let object: T =
        serde_json::from_value(document.clone()).with_context(|| format!("the {kind} has another shape"))?;
    ensure!(serde_json::to_value(&object)? == *document, "the {kind} has a field that is none");
    Ok(object)
}

fn ensure_nothing_left<T: Serialize + PartialEq>(what: &str, left: &T, nothing: &T) -> Result<()> {
    ensure!(left == nothing, "the stand-in does not know of {what}: {}", serde_json::to_string(left)?);
    Ok(())
}

/// The pod's own settings of security: the runtime's seccomp profile, and no `AppArmor`, which is not here.
fn confined_as_usual(mut context: core::PodSecurityContext) -> Result<()> {
    let seccomp = context.seccomp_profile.take().context("the pod has no seccompProfile")?;
    let profile = core::SeccompProfile { type_: "RuntimeDefault".into(), ..core::SeccompProfile::default() };
    ensure_nothing_left("seccompProfile", &seccomp, &profile)?;
    let unconfined = core::AppArmorProfile { type_: "Unconfined".into(), ..core::AppArmorProfile::default() };
    ensure_nothing_left("appArmorProfile", &context.app_armor_profile.take(), &Some(unconfined))?;
    ensure_nothing_left("the pod's securityContext", &context, &core::PodSecurityContext::default())
}

/// Capabilities, and user and group.
fn may_do(mut context: core::SecurityContext) -> Result<(Vec<Capability>, (u32, u32))> {
    ensure!(context.allow_privilege_escalation.take() == Some(false), "the stand-in lets no privileges be gained");
    ensure!(context.read_only_root_filesystem.take() == Some(true), "the stand-in's root is read-only");
    let mut capabilities = context.capabilities.take().context("no capabilities")?;
    ensure!(capabilities.drop.take().as_deref() == Some(&["ALL".to_owned()]), "the stand-in drops all capabilities");
    let added = capabilities.add.take().unwrap_or_default().into_iter();
    let added = added.map(|name| format!("CAP_{name}").parse().with_context(|| format!("no capability {name}")));
    let added = added.collect::<Result<Vec<_>>>()?;
    let id = |id: Option<i64>| -> Result<u32> { Ok(id.context("no runAsUser or runAsGroup")?.try_into()?) };
    let user = (id(context.run_as_user.take())?, id(context.run_as_group.take())?);
    ensure_nothing_left("capabilities", &capabilities, &core::Capabilities::default())?;
    ensure_nothing_left("the container's securityContext", &context, &core::SecurityContext::default())?;
    Ok((added, user))
}

fn volume(mut volume: core::Volume) -> Result<(String, VolumeSource)> {
    let name = std::mem::take(&mut volume.name);
    let source = match (volume.host_path.take(), volume.config_map.take()) {
        (Some(host_path), None) => VolumeSource::HostPath {
            is_made: match host_path.type_.as_deref() {
                Some("Directory") => false,
                Some("DirectoryOrCreate") => true,
                other => bail!("the stand-in does not know of a hostPath of type {other:?}"),
            },
            path: host_path.path.into(),
        },
        (None, Some(mut config_map)) => {
            let is_optional = config_map.optional.take() == Some(true);
            let items = config_map.items.take().unwrap_or_default().into_iter();
            let files = items.map(|mut item| -> Result<_> {
                let named = (std::mem::take(&mut item.key), std::mem::take(&mut item.path));
                ensure_nothing_left("an item of a configMap", &item, &core::KeyToPath::default())?;
                Ok(named)
            });
            let files = files.collect::<Result<_>>()?;
            let source = VolumeSource::ConfigMap { name: std::mem::take(&mut config_map.name), is_optional, files };
            ensure_nothing_left("a configMap volume", &config_map, &core::ConfigMapVolumeSource::default())?;
            source
        }
        _ => bail!("the stand-in does not know what volume {name} is"),
    };
    ensure_nothing_left("a volume", &volume, &core::Volume::default())?;
    Ok((name, source))
}

fn mount(mut mount: core::VolumeMount, volumes: &BTreeMap<String, VolumeSource>) -> Result<Mount> {
    let name = std::mem::take(&mut mount.name);
    let known = Mount {
        source: volumes.get(&name).with_context(|| format!("no volume {name}"))?.clone(),
        path: std::mem::take(&mut mount.mount_path).into(),
        read_only: mount.read_only.take() == Some(true),
        propagation: match mount.mount_propagation.take().as_deref() {
            None | Some("None") => Propagation::None,
            Some("HostToContainer") => Propagation::HostToContainer,
            Some(other) => bail!("the stand-in does not know of the propagation {other}"),
        },
    };
    ensure_nothing_left("a volumeMount", &mount, &core::VolumeMount::default())?;
    Ok(known)
}

fn variable(mut variable: core::EnvVar) -> Result<(String, Variable)> {
    let name = std::mem::take(&mut variable.name);
    let value = match (variable.value.take(), variable.value_from.take()) {
        (value, None) => Variable::Literal(value.unwrap_or_default()),
        (None, Some(from)) => {
            let field = core::ObjectFieldSelector { field_path: "spec.nodeName".into(), api_version: None };
            let known = core::EnvVarSource { field_ref: Some(field), ..core::EnvVarSource::default() };
            ensure_nothing_left("where a variable's value comes from", &from, &known)?;
            Variable::NodeName
        }
        (Some(_), Some(_)) => bail!("{name} has two values"),
    };
    ensure_nothing_left("a variable", &variable, &core::EnvVar::default())?;
    Ok((name, value))
}

/// Kubelet's own defaults are ten seconds and three failures.
fn probe(mut probe: core::Probe, ports: &[core::ContainerPort]) -> Result<HttpProbe> {
    let mut action = probe.http_get.take().context("the stand-in probes over HTTP only")?;
    let seconds = probe.period_seconds.take().unwrap_or(10).try_into()?;
    let known = HttpProbe {
        path: action.path.take().unwrap_or_else(|| "/".into()),
        port: port(&std::mem::take(&mut action.port), ports)?,
        period: Duration::from_secs(seconds),
        failures: probe.failure_threshold.take().unwrap_or(3).try_into()?,
    };
    ensure_nothing_left("httpGet", &action, &core::HTTPGetAction::default())?;
    ensure_nothing_left("a probe", &probe, &core::Probe::default())?;
    Ok(known)
}

fn port(named: &IntOrString, ports: &[core::ContainerPort]) -> Result<u16> {
    let number = match named {
        IntOrString::Int(number) => *number,
        IntOrString::String(name) => {
            let port = ports.iter().find(|port| port.name.as_ref() == Some(name));
            port.with_context(|| format!("no port {name}"))?.container_port
        }
    };
    Ok(number.try_into()?)
}

fn rules(rule: PolicyRule) -> Vec<Rule> {
    let groups = rule.api_groups.unwrap_or_default();
    let resources = rule.resources.unwrap_or_default();
    let all = groups.iter().flat_map(|group| resources.iter().map(move |resource| (group, resource)));
    all.map(|(group, resource)| Rule { group: group.clone(), resource: resource.clone(), verbs: rule.verbs.clone() })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::{MANIFEST, Manifest};

    #[test]
    fn all_that_is_shipped_is_carried_out() {
        Manifest::shipped().unwrap();
    }

    #[test]
    fn what_the_stand_in_does_not_know_makes_it_fail() {
        let text = fs::read_to_string(MANIFEST).unwrap();
        for (there, instead) in [
            ("          readinessProbe:", "          workingDir: /tmp\n          readinessProbe:"),
            ("      hostNetwork: true", "      hostNetwork: true\n      hostPID: true"),
            ("            readOnlyRootFilesystem: true", "            readOnlyRootFilesystem: false"),
            ("            allowPrivilegeEscalation: false", "            privileged: true"),
            ("mountPropagation: HostToContainer", "mountPropagation: Bidirectional"),
            ("mountPropagation: HostToContainer", "subPath: sluice"),
            ("            type: Directory\n", "            type: Socket\n"),
            ("          type: RuntimeDefault", "          type: Unconfined"),
            ("            periodSeconds: 5", "            periodSeconds: 5\n            initialDelaySeconds: 1"),
            ("            periodSeconds: 5", "            period: 5"),
            ("                  fieldPath: spec.nodeName", "                  fieldPath: status.hostIP"),
            (
                "              memory: 128Mi",
                "              memory: 128Mi\n            limits:\n              memory: 1Gi",
            ),
        ] {
            let changed = text.replacen(there, instead, 1);
            assert_ne!(changed, text, "{there} is not in the manifest");
            assert!(Manifest::parse(&changed).is_err(), "{instead} is passed over");
        }
    }
}
