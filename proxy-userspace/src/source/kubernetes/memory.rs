//! What is known of the API server itself, kept in a file for the next agent: the Service `default/kubernetes` and its slices. After
//! a reboot nobody serves its ClusterIP, and an agent that knows the endpoints needs nobody to.
//!
//! The file is a `List` of Kubernetes objects as JSON. It is written when they change, all of it or nothing, for its owner alone.
//! One that is missing or broken is as good as none.

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    net::{IpAddr, SocketAddr},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use k8s_openapi::{
    api::{core::v1::Service, discovery::v1::EndpointSlice},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use serde_json::{Value, json};
use tracing::{debug, warn};

use crate::{
    model::{ObjectName, SERVICE_NAME},
    source::{Change, Event},
};

const FILE: &str = "kubernetes.json";
/// Where it is written before it gets its name.
const DRAFT: &str = ".kubernetes.json.new";
/// All that there may be of it in a state directory.
pub(crate) const FILES: [&str; 2] = [FILE, DRAFT];
/// More than a hundred replicas are not an API server's.
const MOST: usize = 1 << 20;

/// The API server's own objects.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Remembered {
    /// `default/kubernetes`.
    pub(crate) service: Option<Service>,
    /// Its slices.
    pub(crate) slices: Vec<EndpointSlice>,
}

/// Why what was remembered is of no use.
#[derive(Debug, thiserror::Error)]
enum ReadError {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("it is no list of objects: {0}")]
    Shape(#[from] serde_json::Error),
    #[error("it is larger than anything that was written there")]
    Large,
}

impl Remembered {
    /// What the last agent has left in a directory; nothing where there is nothing, or nothing that can be read.
    pub(crate) fn read(directory: &Path) -> Self {
        match Self::try_read(&directory.join(FILE)) {
            Ok(remembered) => remembered,
            Err(ReadError::Io(error)) if error.kind() == io::ErrorKind::NotFound => Self::default(),
            Err(error) => {
                warn!("{}: {error}; the API server is looked for elsewhere", directory.join(FILE).display());
                Self::default()
            }
        }
    }

    fn try_read(path: &Path) -> Result<Self, ReadError> {
        if fs::metadata(path)?.len() > MOST as u64 {
            return Err(ReadError::Large);
        }
        let mut list: Value = serde_json::from_slice(&fs::read(path)?)?;
        let items: Vec<Value> = serde_json::from_value(list.get_mut("items").map(Value::take).unwrap_or_default())?;
        let mut remembered = Self::default();
        for item in items {
            match item["kind"].as_str() {
                Some("Service") => remembered.service = Some(serde_json::from_value(item)?),
                Some("EndpointSlice") => remembered.slices.push(serde_json::from_value(item)?),
                _ => {}
            }
        }
        Ok(remembered)
    }

    /// Where its replicas listen: the ready ones, at the port of each slice that is called `https`, or its only one.
    pub(super) fn endpoints(&self) -> Vec<SocketAddr> {
        let mut endpoints: Vec<SocketAddr> = self.slices.iter().flat_map(endpoints).collect();
        endpoints.dedup();
        endpoints
    }

    fn text(&self) -> Result<String, serde_json::Error> {
        let slices = self.slices.iter().map(|slice| serde_json::to_value(bare_slice(slice)));
        let service = self.service.iter().map(|service| serde_json::to_value(bare_service(service)));
        let items: Vec<Value> = service.chain(slices).collect::<Result<_, _>>()?;
        serde_json::to_string_pretty(&json!({"apiVersion": "v1", "kind": "List", "items": items}))
    }
}

fn endpoints(slice: &EndpointSlice) -> Vec<SocketAddr> {
    let ports = slice.ports.as_deref().unwrap_or_default();
    let named = ports.iter().find(|port| port.name.as_deref() == Some("https"));
    let port = named.or(ports.first()).and_then(|port| u16::try_from(port.port?).ok());
    let Some(port) = port else { return Vec::new() };
    let ready = slice
        .endpoints
        .iter()
        .flatten()
        .filter(|endpoint| endpoint.conditions.as_ref().and_then(|conditions| conditions.ready) != Some(false));
    let addresses = ready.filter_map(|endpoint| endpoint.addresses.first()?.parse::<IpAddr>().ok());
    addresses.map(|address| SocketAddr::new(address, port)).collect()
}

/// Without what changes though nothing does.
fn bare(metadata: &ObjectMeta) -> ObjectMeta {
    ObjectMeta {
        namespace: metadata.namespace.clone(),
        name: metadata.name.clone(),
        uid: metadata.uid.clone(),
        labels: metadata.labels.clone(),
        ..ObjectMeta::default()
    }
}

fn bare_service(service: &Service) -> Service {
    Service { metadata: bare(&service.metadata), spec: service.spec.clone(), status: None }
}

fn bare_slice(slice: &EndpointSlice) -> EndpointSlice {
    EndpointSlice { metadata: bare(&slice.metadata), ..slice.clone() }
}

/// Follows the API server's own objects, and writes them down.
#[derive(Debug)]
pub(crate) struct Memory {
    directory: PathBuf,
    service: Option<Service>,
    slices: Objects,
    /// A list that is not complete.
    listed: Objects,
    /// What the file says.
    written: Option<String>,
    /// When it could not be written last, and why.
    failed: Option<(Instant, String)>,
}

/// A full disk is not asked again before.
const PAUSE: Duration = Duration::from_secs(10);

type Objects = BTreeMap<ObjectName, EndpointSlice>;

impl Memory {
    /// Begins with what is there.
    pub(crate) fn new(directory: &Path) -> Self {
        let written = fs::read_to_string(directory.join(FILE)).ok();
        let [slices, listed] = [const { Objects::new() }; 2];
        Self { directory: directory.into(), service: None, slices, listed, written, failed: None }
    }

    /// Takes in what a source has learned.
    pub(crate) fn note(&mut self, event: &Event) {
        self.note_at(event, Instant::now());
    }

    fn note_at(&mut self, event: &Event, now: Instant) {
        let is_news = match event {
            Event::Services(change) => self.note_service(change),
            Event::EndpointSlices(change) => self.note_slice(change),
            _ => false,
        };
        let is_due = self.failed.as_ref().is_some_and(|(at, _)| now.duration_since(*at) >= PAUSE);
        if is_news || is_due {
            self.write(now);
        }
    }

    fn note_service(&mut self, change: &Change<Service>) -> bool {
        let is_own = |service: &&Service| ObjectName::of(&service.metadata).is_api_server();
        let found = match change {
            Change::Replace(services) => services.iter().find(is_own),
            Change::Listed(service) | Change::Apply(service) => Some(&**service).filter(is_own),
            Change::Begin | Change::End | Change::Delete(_) => None,
        };
        if let Some(service) = found {
            self.service = Some(service.clone());
        }
        found.is_some()
    }

    fn note_slice(&mut self, change: &Change<EndpointSlice>) -> bool {
        let key = |slice: &EndpointSlice| is_of_api_server(slice).then(|| ObjectName::of(&slice.metadata));
        match change {
            Change::Replace(slices) => {
                self.slices = slices.iter().filter_map(|slice| Some((key(slice)?, slice.clone()))).collect();
                true
            }
            Change::Begin => {
                self.listed.clear();
                false
            }
            Change::Listed(slice) => {
                self.listed.extend(key(slice).map(|key| (key, (**slice).clone())));
                false
            }
            Change::End => {
                self.slices = std::mem::take(&mut self.listed);
                true
            }
            Change::Apply(slice) => key(slice).is_some_and(|key| {
                self.slices.insert(key, (**slice).clone());
                true
            }),
            Change::Delete(name) => self.slices.remove(name).is_some(),
        }
    }

    /// Servers that are all gone were the last ones that are known.
    fn write(&mut self, now: Instant) {
        let remembered = Remembered { service: self.service.clone(), slices: self.slices.values().cloned().collect() };
        if remembered.service.is_none() || remembered.endpoints().is_empty() {
            return;
        }
        let text = match remembered.text() {
            Ok(text) if self.written.as_ref() != Some(&text) => text,
            Ok(_) => return,
            Err(error) => return warn!("the API server's endpoints cannot be remembered: {error}"),
        };
        match replace(&self.directory, &text) {
            Ok(()) => {
                debug!(endpoints = ?remembered.endpoints(), "the API server's endpoints are remembered");
                (self.written, self.failed) = (Some(text), None);
            }
            Err(error) => self.complain(&error, now),
        }
    }

    fn complain(&mut self, error: &io::Error, now: Instant) {
        let said = format!(
            "the API server's endpoints cannot be remembered in {}: {error}; correct --state-dir",
            self.directory.display()
        );
        if self.failed.as_ref().is_none_or(|(_, before)| *before != said) {
            warn!("{said}");
        }
        self.failed = Some((now, said));
    }
}

fn is_of_api_server(slice: &EndpointSlice) -> bool {
    let service = slice.metadata.labels.as_ref().and_then(|labels| labels.get(SERVICE_NAME));
    slice.metadata.namespace.as_deref() == Some("default") && service.is_some_and(|name| name == "kubernetes")
}

fn replace(directory: &Path, text: &str) -> io::Result<()> {
    let hidden = directory.join(DRAFT);
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&hidden)?;
    file.write_all(text.as_bytes())?;
    // A power failure must not leave the name without the text.
    file.sync_all()?;
    fs::rename(&hidden, directory.join(FILE))?;
    File::open(directory)?.sync_all()
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt as _, time::Instant};

    use k8s_openapi::api::{core::v1::Service, discovery::v1::EndpointSlice};
    use serde_json::json;

    use super::{FILE, Memory, PAUSE, Remembered};
    use crate::source::{Change, Event};

    fn service(version: u32) -> Service {
        serde_json::from_value(json!({
            "metadata": {"namespace": "default", "name": "kubernetes", "resourceVersion": version.to_string()},
            "spec": {"clusterIP": "10.96.0.1", "clusterIPs": ["10.96.0.1"], "ports": [{"name": "https", "port": 443}]},
        }))
        .unwrap()
    }

    fn slice(name: &str, addresses: &[&str]) -> EndpointSlice {
        let endpoints: Vec<_> = addresses.iter().map(|address| json!({"addresses": [address]})).collect();
        serde_json::from_value(json!({
            "metadata": {"namespace": "default", "name": name, "labels": {"kubernetes.io/service-name": "kubernetes"}},
            "addressType": if addresses.iter().any(|address| address.contains(':')) { "IPv6" } else { "IPv4" },
            "endpoints": endpoints, "ports": [{"name": "https", "port": 6443, "protocol": "TCP"}],
        }))
        .unwrap()
    }

    fn apply(memory: &mut Memory, slice: EndpointSlice) {
        memory.note(&Event::EndpointSlices(Change::Apply(Box::new(slice))));
    }

    fn endpoints(directory: &std::path::Path) -> Vec<String> {
        Remembered::read(directory).endpoints().iter().map(ToString::to_string).collect()
    }

    #[test]
    fn endpoints_of_both_families_are_remembered_when_they_change_and_never_none() {
        let directory = tempfile::tempdir().unwrap();
        let mut memory = Memory::new(directory.path());
        memory.note(&Event::Services(Change::Listed(Box::new(service(1)))));
        memory.note(&Event::EndpointSlices(Change::Begin));
        for listed in [slice("kubernetes", &["192.0.2.1", "192.0.2.2"]), slice("kubernetes-v6", &["2001:db8::1"])] {
            memory.note(&Event::EndpointSlices(Change::Listed(Box::new(listed))));
        }
        assert!(!directory.path().join(FILE).exists(), "half a list is none");
        memory.note(&Event::EndpointSlices(Change::End));
        let all = ["192.0.2.1:6443", "192.0.2.2:6443", "[2001:db8::1]:6443"];
        assert_eq!(endpoints(directory.path()), all);
        let path = directory.path().join(FILE);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);

        let before = fs::metadata(&path).unwrap().modified().unwrap();
        memory.note(&Event::Services(Change::Apply(Box::new(service(2)))));
        apply(&mut memory, slice("kubernetes", &["192.0.2.1", "192.0.2.2"]));
        assert_eq!(fs::metadata(&path).unwrap().modified().unwrap(), before, "written, and nothing has changed");

        apply(&mut memory, slice("kubernetes", &["192.0.2.3"]));
        assert_eq!(endpoints(directory.path()), ["192.0.2.3:6443", "[2001:db8::1]:6443"]);
        for name in ["kubernetes", "kubernetes-v6"] {
            apply(&mut memory, slice(name, &[]));
        }
        assert_eq!(endpoints(directory.path()), ["[2001:db8::1]:6443"], "the last ones that were known");
    }

    #[test]
    fn what_could_not_be_written_is_tried_again() {
        let parent = tempfile::tempdir().unwrap();
        let directory = parent.path().join("state");
        let mut memory = Memory::new(&directory);
        let slices = Event::EndpointSlices(Change::Replace(vec![slice("kubernetes", &["192.0.2.1"])]));
        let services = Event::Services(Change::Replace(vec![service(1)]));
        let now = Instant::now();
        memory.note_at(&slices, now);
        memory.note_at(&services, now);
        fs::create_dir(&directory).unwrap();
        let other = Event::Nodes(Change::Replace(Vec::new()));
        memory.note_at(&other, now);
        assert!(!directory.join(FILE).exists(), "a disk is asked all the time");
        memory.note_at(&other, now + PAUSE);
        assert_eq!(endpoints(&directory), ["192.0.2.1:6443"]);
    }

    #[test]
    fn what_cannot_be_read_is_as_good_as_nothing() {
        let directory = tempfile::tempdir().unwrap();
        for text in ["", "{", "[]", "{\"items\": [{\"kind\": \"Service\", \"spec\": 7}]}", "{\"items\": 7}"] {
            fs::write(directory.path().join(FILE), text).unwrap();
            assert_eq!(Remembered::read(directory.path()), Remembered::default(), "{text}");
        }
        assert_eq!(Remembered::read(&directory.path().join("missing")), Remembered::default());
    }

    #[test]
    fn a_service_of_somebody_else_is_not_remembered() {
        let directory = tempfile::tempdir().unwrap();
        let mut memory = Memory::new(directory.path());
        let mut other = slice("kubernetes", &["192.0.2.1"]);
        other.metadata.namespace = Some("tenant".into());
        memory.note(&Event::Services(Change::Apply(Box::new(service(1)))));
        apply(&mut memory, other);
        assert!(!directory.path().join(FILE).exists());
    }
}
