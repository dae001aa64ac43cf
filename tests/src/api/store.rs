//! Objects, their versions, and what has happened to them since the last compaction.

use std::{collections::BTreeMap, sync::Arc};

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

use super::resource::Resource;

/// `namespace/name`, which is the order of lists.
type Key = String;
type Objects = BTreeMap<Key, Arc<Value>>;

#[derive(Debug, Default)]
pub(super) struct Store {
    version: u64,
    /// History up to here is forgotten.
    compacted: u64,
    objects: BTreeMap<Resource, Objects>,
    history: Vec<Happened>,
    /// Lists that are being read in pages, by their version.
    snapshots: BTreeMap<(Resource, u64), Objects>,
}

/// A change.
#[derive(Clone, Debug)]
pub(super) struct Happened {
    pub(super) version: u64,
    pub(super) what: What,
}

#[derive(Clone, Debug)]
pub(super) enum What {
    /// Before and after; either may be missing, not both.
    Changed { resource: Resource, before: Option<Arc<Value>>, after: Option<Arc<Value>> },
    /// Watches tell their clients how far they are.
    Bookmark,
}

impl Store {
    pub(super) fn version(&self) -> u64 {
        self.version
    }

    /// Whether history from a version on is still known.
    pub(super) fn remembers(&self, version: u64) -> bool {
        version >= self.compacted
    }

    pub(super) fn compacted(&self) -> u64 {
        self.compacted
    }

    pub(super) fn compact(&mut self) {
        // A version of its own, so that whoever is up to date is behind now, too.
        self.version += 1;
        self.compacted = self.version;
        self.history.clear();
        self.snapshots.clear();
    }

    pub(super) fn bookmark(&mut self) {
        self.version += 1;
        self.history.push(Happened { version: self.version, what: What::Bookmark });
    }

    pub(super) fn apply(&mut self, mut object: Value) -> Result<()> {
        let kind = object["kind"].as_str().context("the object has no kind")?;
        let resource = Resource::of_kind(kind).with_context(|| format!("no kind {kind:?} here"))?;
        object["apiVersion"] = json!(resource.api_version());
        let key = key(&object);
        let before = self.objects.get(&resource).and_then(|objects| objects.get(&key)).cloned();
        self.stamp(&mut object, before.as_deref());
        let after = Arc::new(object);
        self.objects.entry(resource).or_default().insert(key, Arc::clone(&after));
        self.remember(What::Changed { resource, before, after: Some(after) });
        Ok(())
    }

    fn stamp(&mut self, object: &mut Value, before: Option<&Value>) {
        self.version += 1;
        let kept = |field: &str| before.map(|before| before["metadata"][field].clone());
        let uid = kept("uid").unwrap_or_else(|| json!(format!("00000000-0000-4000-8000-{:012}", self.version)));
        let created = kept("creationTimestamp").unwrap_or_else(|| json!("2026-11-20T11:40:16Z"));
        let metadata = &mut object["metadata"];
        metadata["resourceVersion"] = json!(self.version.to_string());
        for (field, value) in [("uid", uid), ("creationTimestamp", created)] {
            if metadata[field].is_null() {
                metadata[field] = value;
            }
        }
    }

    /// A deleted object bears the version of its deletion.
    pub(super) fn delete(&mut self, resource: Resource, namespace: &str, name: &str) -> Result<()> {
        let objects = self.objects.entry(resource).or_default();
        let Some(object) = objects.remove(&format!("{namespace}/{name}")) else {
            bail!("{} {namespace}/{name} is not there", resource.kind());
        };
        self.version += 1;
        let mut last = Value::clone(&object);
        last["metadata"]["resourceVersion"] = json!(self.version.to_string());
        self.remember(What::Changed { resource, before: Some(Arc::new(last)), after: None });
        Ok(())
    }

    fn remember(&mut self, what: What) {
        self.history.push(Happened { version: self.version, what });
    }

    /// What has happened after a version.
    pub(super) fn since(&self, version: u64) -> Vec<Happened> {
        let first = self.history.partition_point(|happened| happened.version <= version);
        self.history[first..].to_vec()
    }

    /// All objects, as of now.
    pub(super) fn all(&self, resource: Resource) -> Objects {
        self.objects.get(&resource).cloned().unwrap_or_default()
    }

    /// Keeps a list for its later pages.
    pub(super) fn keep(&mut self, resource: Resource) -> u64 {
        let objects = self.all(resource);
        self.snapshots.insert((resource, self.version), objects);
        self.version
    }

    /// The list an earlier page was of; none when it is forgotten.
    pub(super) fn kept(&self, resource: Resource, version: u64) -> Option<&Objects> {
        self.snapshots.get(&(resource, version))
    }
}

fn key(object: &Value) -> Key {
    let text = |field: &str| object["metadata"][field].as_str().unwrap_or_default().to_owned();
    format!("{}/{}", text("namespace"), text("name"))
}
