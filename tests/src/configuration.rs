//! An agent's configuration file.

use std::{fs, path::Path};

use anyhow::{Context as _, Result};

/// Looks at what others may have undone several times a second, instead of twice a minute.
pub const HASTY: &str = "iptables: {syncPeriod: 300ms}";

/// Writes a `KubeProxyConfiguration` with these fields into a directory: its path.
pub fn write(directory: &Path, fields: &str) -> Result<String> {
    let path = directory.join("config.yaml");
    let head = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration";
    fs::write(&path, format!("{head}\n{fields}\n")).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path.display().to_string())
}
