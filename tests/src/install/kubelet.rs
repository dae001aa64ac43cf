//! What kubelet adds to a pod: its volumes' contents, its service account, the variables that name the API server.

use std::{
    collections::BTreeMap,
    fs,
    net::{IpAddr, SocketAddr},
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};
use tempfile::TempDir;

use super::{
    manifest::{Manifest, Mount, Propagation, Variable, VolumeSource},
    mounts::Bind,
};

/// Of the service account. The API server is to refuse who does not bear it.
pub const TOKEN: &str = "of-the-service-account";
const SERVICE_ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// A node, as its kubelet and its runtime know it.
#[derive(Clone, Debug)]
pub struct Host {
    /// Of its Node object.
    pub name: String,
    /// Where its network namespace can be opened.
    pub namespace: PathBuf,
    /// The cgroup that its containers' processes go to.
    pub cgroup: PathBuf,
    /// Of the node, and therefore of a pod with its network.
    pub address: IpAddr,
    /// Which directory stands for which path of a real node. There are no others.
    pub paths: BTreeMap<PathBuf, PathBuf>,
    /// The `ConfigMaps` of the pod's namespace: keys and values by name.
    pub config_maps: BTreeMap<String, BTreeMap<String, String>>,
    /// Its API server.
    pub api: ApiAccess,
}

/// What pods are told of an API server.
#[derive(Clone, Debug)]
pub struct ApiAccess {
    /// The address that the ClusterIP of `kubernetes` stands for, or the chart's `k8sServiceHost` and `k8sServicePort`.
    pub address: SocketAddr,
    /// Who vouches for it, as PEM.
    pub authority: String,
}

/// What a pod is given; its directories go away with the handle.
#[derive(Debug)]
pub(super) struct Given {
    pub(super) binds: Vec<Bind>,
    pub(super) variables: BTreeMap<String, String>,
    _directories: Vec<TempDir>,
}

impl Given {
    pub(super) fn to(manifest: &Manifest, host: &Host) -> Result<Self> {
        let mut directories = Vec::new();
        let mut binds = Vec::new();
        for mount in &manifest.mounts {
            let from = match &mount.source {
                VolumeSource::HostPath { path, is_made } => on_node(host, path, *is_made)?,
                VolumeSource::ConfigMap { name, is_optional, files } => {
                    let keys = host.config_maps.get(name);
                    ensure!(keys.is_some() || *is_optional, "there is no ConfigMap {name}");
                    let keys = keys.into_iter().flatten().filter_map(|(key, text)| {
                        let file = files.iter().find(|(named, _)| named == key).map(|(_, file)| file);
                        Some((file.or(files.is_empty().then_some(key))?.clone(), text.clone()))
                    });
                    directories.push(written(&keys.collect())?);
                    last(&directories)?
                }
            };
            let Mount { path, read_only, propagation, .. } = mount.clone();
            binds.push(Bind { from, to: path, read_only, propagation });
        }
        let account = [("ca.crt", &*host.api.authority), ("namespace", "kube-system"), ("token", TOKEN)];
        let account = account.into_iter().map(|(name, text)| (name.to_owned(), text.to_owned()));
        directories.push(written(&account.collect())?);
        let (from, to) = (last(&directories)?, SERVICE_ACCOUNT.into());
        binds.push(Bind { from, to, read_only: true, propagation: Propagation::None });
        Ok(Self { binds, variables: variables(manifest, host), _directories: directories })
    }
}

fn last(directories: &[TempDir]) -> Result<PathBuf> {
    Ok(directories.last().context("no directory")?.path().to_owned())
}

fn on_node(host: &Host, path: &Path, is_made: bool) -> Result<PathBuf> {
    let stands_for = host.paths.get(path);
    let directory = stands_for.with_context(|| format!("this node has no {}", path.display()))?;
    if is_made {
        fs::create_dir_all(directory)?;
    }
    ensure!(directory.is_dir(), "hostPath type check failed: {} is not a directory", path.display());
    Ok(directory.clone())
}

/// A volume's files, behind a link by which kubelet replaces all of them at once.
fn written(files: &BTreeMap<String, String>) -> Result<TempDir> {
    let directory = tempfile::tempdir()?;
    let data = directory.path().join("..data_1");
    fs::create_dir(&data)?;
    symlink("..data_1", directory.path().join("..data"))?;
    for (name, text) in files {
        fs::write(data.join(name), text)?;
        symlink(format!("..data/{name}"), directory.path().join(name))?;
    }
    Ok(directory)
}

/// Later ones decide: the container's own before those of the Service `kubernetes`.
fn variables(manifest: &Manifest, host: &Host) -> BTreeMap<String, String> {
    let (address, port) = (host.api.address.ip(), host.api.address.port());
    let usual = [
        ("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_owned()),
        ("HOSTNAME", host.name.clone()),
        ("KUBERNETES_SERVICE_HOST", address.to_string()),
        ("KUBERNETES_SERVICE_PORT", port.to_string()),
        ("KUBERNETES_SERVICE_PORT_HTTPS", port.to_string()),
        ("KUBERNETES_PORT", format!("tcp://{}", host.api.address)),
    ];
    let usual = usual.into_iter().map(|(name, value)| (name.to_owned(), value));
    let own = manifest.variables.iter().map(|(name, variable)| {
        let value = match variable {
            Variable::Literal(value) => value.clone(),
            Variable::NodeName => host.name.clone(),
        };
        (name.clone(), value)
    });
    usual.chain(own).collect()
}
