//! An OCI image layout in a tar (OCI image specification 1.1): layers, configuration, manifest, index. The same input makes the
//! same bytes.

use anyhow::Result;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::content::{self, Layer};

pub(super) const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
pub(super) const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
/// What a container runs.
pub(super) const ENTRYPOINT: &str = "/sluice";

/// What is said about the image.
#[derive(Clone, Debug)]
pub(super) struct Description {
    name: String,
    tag: String,
    version: String,
    revision: Option<String>,
}

impl Description {
    pub(super) fn new(name: &str, version: &str, revision: Option<String>) -> Self {
        Self { name: name.into(), tag: version.into(), version: version.into(), revision }
    }

    /// Of the image with tools.
    pub(super) fn for_debugging(&self) -> Self {
        Self { tag: format!("{}-debug", self.tag), ..self.clone() }
    }

    pub(super) fn tag(&self) -> &str {
        &self.tag
    }

    pub(super) fn reference(&self) -> String {
        format!("{}:{}", self.name, self.tag)
    }

    fn labels(&self) -> Value {
        let mut labels = json!({
            "org.opencontainers.image.title": "sluice",
            "org.opencontainers.image.description": "A Service proxy for Kubernetes nodes, in BPF",
            "org.opencontainers.image.version": self.version,
            "org.opencontainers.image.licenses": "Apache-2.0",
        });
        if let Some(revision) = &self.revision {
            labels["org.opencontainers.image.revision"] = json!(revision);
        }
        labels
    }
}

pub(super) fn digest(bytes: &[u8]) -> String {
    let hash = Sha256::digest(bytes);
    hash.iter().fold("sha256:".to_owned(), |text, byte| format!("{text}{byte:02x}"))
}

/// Where a blob lies.
pub(super) fn path(digest: &str) -> String {
    format!("blobs/{}", digest.replace(':', "/"))
}

/// The files of an archive.
#[derive(Default)]
struct Blobs(Vec<(String, Vec<u8>)>);

impl Blobs {
    /// Takes one in, and returns how others name it.
    fn put(&mut self, media_type: &str, bytes: Vec<u8>) -> Value {
        let digest = digest(&bytes);
        let descriptor = json!({"mediaType": media_type, "digest": digest, "size": bytes.len()});
        self.0.push((path(&digest), bytes));
        descriptor
    }
}

/// The archive.
pub(super) fn archive(description: &Description, layers: &[Layer]) -> Result<Vec<u8>> {
    let mut blobs = Blobs::default();
    let ids: Vec<String> = layers.iter().map(|layer| digest(&layer.tar)).collect();
    let layers = layers.iter().map(|layer| Ok(blobs.put(LAYER, layer.compressed()?))).collect::<Result<Vec<_>>>()?;
    let config = json!({
        "architecture": "amd64",
        "os": "linux",
        "config": {"Entrypoint": [ENTRYPOINT], "Labels": description.labels()},
        "rootfs": {"type": "layers", "diff_ids": ids},
    });
    let config = blobs.put(CONFIG, serde_json::to_vec(&config)?);
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": config,
        "layers": layers,
        "annotations": description.labels(),
    });
    let mut manifest = blobs.put(MANIFEST, serde_json::to_vec(&manifest)?);
    manifest["platform"] = json!({"architecture": "amd64", "os": "linux"});
    manifest["annotations"] = json!({
        "org.opencontainers.image.ref.name": description.tag,
        "io.containerd.image.name": description.reference(),
    });
    let index = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [manifest],
    });
    let layout = json!({"imageLayoutVersion": "1.0.0"});
    let mut files = vec![
        ("oci-layout".to_owned(), serde_json::to_vec(&layout)?),
        ("index.json".to_owned(), serde_json::to_vec(&index)?),
    ];
    files.append(&mut blobs.0);
    content::tar(files.iter().map(|(path, bytes)| (path.as_str(), 0o644, bytes.as_slice())))
}

#[cfg(test)]
mod tests {
    use super::{Description, ENTRYPOINT};

    #[test]
    fn the_dockerfile_says_of_its_image_what_the_archive_says() {
        let dockerfile = include_str!("../../../Dockerfile");
        let (_, agent) = dockerfile.split_once("FROM scratch").unwrap();
        assert!(agent.contains(&format!("ENTRYPOINT [\"{ENTRYPOINT}\"]")));
        let labels = Description::new("", env!("CARGO_PKG_VERSION"), None).labels();
        for (label, value) in labels.as_object().unwrap() {
            assert!(agent.contains(&format!("{label}={value}")), "{label} is not {value}");
        }
        assert_eq!(agent.matches("org.opencontainers.image.").count(), labels.as_object().unwrap().len());
    }
}
