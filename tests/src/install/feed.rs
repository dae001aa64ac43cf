//! Objects in files, served by an API server: so that a lab whose agents read a directory has agents that ask a server.

use std::{
    collections::BTreeMap,
    fs,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
};

use anyhow::{Context as _, Result};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::inotify::{AddWatchFlags, InitFlags, Inotify},
};
use serde_json::Value;

use super::kubelet::{ApiAccess, TOKEN};
use crate::{
    api::{ApiServer, Authority, Resource},
    netns::Namespace,
};

/// How soon it notices that nobody needs it any more, in milliseconds.
const LOOK: u16 = 100;

/// An API server that has what the YAML files of a directory say, and follows them.
#[derive(Debug)]
pub struct Feed {
    server: Arc<ApiServer>,
    authority: Authority,
    is_over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// Kind, namespace and name.
type Key = (Resource, String, String);
type Objects = BTreeMap<Key, Value>;

impl Feed {
    /// Serves the directory's objects at a loopback address of the namespace, over TLS, to who bears [`TOKEN`].
    pub fn start(namespace: &Namespace, directory: &Path) -> Result<Self> {
        let server = Arc::new(namespace.run(ApiServer::start)??);
        let authority = Authority::new()?;
        server.secure(&authority);
        server.require_token(TOKEN);
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        let changes = AddWatchFlags::IN_CLOSE_WRITE
            | AddWatchFlags::IN_MOVED_TO
            | AddWatchFlags::IN_MOVED_FROM
            | AddWatchFlags::IN_DELETE;
        inotify.add_watch(directory, changes).with_context(|| format!("cannot watch {}", directory.display()))?;
        let mut known = Objects::new();
        follow(&server, directory, &mut known)?;
        let is_over = Arc::new(AtomicBool::new(false));
        let (told, ends, directory) = (Arc::clone(&server), Arc::clone(&is_over), directory.to_owned());
        let run = move || {
            while !ends.load(Ordering::Relaxed) {
                let mut ready = [PollFd::new(inotify.as_fd(), PollFlags::POLLIN)];
                let _ = poll(&mut ready, PollTimeout::from(LOOK));
                if inotify.read_events().is_ok_and(|events| !events.is_empty())
                    && let Err(error) = follow(&told, &directory, &mut known)
                {
                    eprintln!("the API server does not follow {}: {error:#}", directory.display());
                }
            }
        };
        let thread = thread::Builder::new().name("feed".into()).spawn(run)?;
        Ok(Self { server, authority, is_over, thread: Some(thread) })
    }

    /// What pods are told of it.
    pub fn access(&self) -> ApiAccess {
        ApiAccess { address: self.server.address(), authority: self.authority.pem().to_owned() }
    }

    /// The server.
    pub fn server(&self) -> &ApiServer {
        &self.server
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        // What it has to say is printed already.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// Tells the server what is new, and what is gone.
fn follow(server: &ApiServer, directory: &Path, known: &mut Objects) -> Result<()> {
    let objects = read(directory)?;
    // Slices before the Services that need them.
    for (key, object) in objects.iter().rev() {
        if known.get(key) != Some(object) {
            server.apply(object.clone())?;
        }
    }
    for (resource, namespace, name) in known.keys().filter(|key| !objects.contains_key(key)) {
        server.delete(*resource, namespace, name)?;
    }
    *known = objects;
    Ok(())
}

fn read(directory: &Path) -> Result<Objects> {
    let mut objects = Objects::new();
    let paths: Vec<PathBuf> = fs::read_dir(directory)?.flatten().map(|entry| entry.path()).collect();
    let is_read = |path: &&PathBuf| {
        let is_hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        !is_hidden && path.extension().is_some_and(|extension| extension == "yaml" || extension == "yml")
    };
    for path in paths.iter().filter(is_read) {
        let text = fs::read_to_string(path)?;
        let documents: Vec<Value> =
            serde_saphyr::from_multiple(&text).with_context(|| format!("{} is not YAML", path.display()))?;
        objects.extend(documents.into_iter().filter_map(|document| Some((key(&document)?, document))));
    }
    Ok(objects)
}

/// None of a kind that the agent does not ask for.
fn key(object: &Value) -> Option<Key> {
    let resource = match object["kind"].as_str()? {
        "Service" => Resource::Services,
        "EndpointSlice" => Resource::EndpointSlices,
        "Node" => Resource::Nodes,
        "ServiceCIDR" => Resource::ServiceCidrs,
        _ => return None,
    };
    let of = |field: &str| object["metadata"][field].as_str().unwrap_or_default().to_owned();
    Some((resource, of("namespace"), of("name")))
}

#[cfg(test)]
mod tests {
    use super::read;
    use crate::{api::Resource, lab::manifest::Service};

    #[test]
    fn what_a_lab_writes_is_served() {
        let directory = tempfile::tempdir().unwrap();
        Service::new("web", 80, &["a1"]).write(directory.path()).unwrap();
        std::fs::write(directory.path().join(".hidden.yaml"), "{").unwrap();
        let objects = read(directory.path()).unwrap();
        let kinds: Vec<Resource> = objects.keys().map(|(kind, ..)| *kind).collect();
        assert_eq!(kinds, [Resource::Services, Resource::EndpointSlices, Resource::EndpointSlices]);
    }
}
