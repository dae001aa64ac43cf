//! Objects from the YAML files of a directory. In: file system events. Out: a whole new list of each kind that changed.
//!
//! A file is read when nobody is writing it: one that was truncated a moment ago is not an order to forget everything in
//! it. One that cannot be read keeps what it said last.

mod documents;
mod pairing;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, OpenOptions},
    io::{self, Read as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::mpsc::{Receiver, RecvTimeoutError, channel},
    thread,
    time::{Duration, Instant},
};

use documents::Objects;
use notify::{
    EventKind, RecursiveMode, Watcher as _,
    event::{AccessKind, AccessMode, CreateKind, ModifyKind},
};
use tracing::warn;

use super::{Change, Event, Sender};

/// Quiet time after an event: one save of an editor is several of them.
const SETTLE: Duration = Duration::from_millis(5);
/// Files that are written one after the other are not waited for longer than this.
const SETTLE_LIMIT: Duration = Duration::from_millis(25);
/// A writer that takes longer than this is not waited for.
const WRITER_PATIENCE: Duration = Duration::from_secs(1);
/// The directory is looked at now and then without an event, too: on some file systems there are none.
const POLL: Duration = Duration::from_secs(5);

/// Why the source could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The directory cannot be listed.
    #[error("cannot read the directory {path}: {source}; --source=file:DIR names a directory of YAML files", path = .path.display())]
    Directory {
        /// As given.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// No watch.
    #[error("cannot watch the directory {path}: {source}", path = .path.display())]
    Watch {
        /// As given.
        path: PathBuf,
        /// What the kernel said.
        source: notify::Error,
    },
    /// No thread.
    #[error("cannot start a thread: {0}")]
    Thread(io::Error),
}

/// Reads the directory and goes on watching it in a thread of its own, until nobody listens any more.
pub fn start(directory: PathBuf, sender: Sender) -> Result<(), OpenError> {
    list(&directory).map_err(|source| OpenError::Directory { path: directory.clone(), source })?;
    let (changes, incoming) = channel();
    let forward = move |event| {
        if is_change(&event) {
            let _ = changes.send(event);
        }
    };
    let mut watcher =
        notify::recommended_watcher(forward).map_err(|source| OpenError::Watch { path: directory.clone(), source })?;
    // Watched before it is read: what changes in between is read again.
    watch(&mut watcher, &directory)?;
    let source = Source { directory, texts: BTreeMap::new(), complaints: BTreeSet::new(), sent: None, sender };
    let run = move || source.run(&incoming, watcher);
    thread::Builder::new().name("file-source".into()).spawn(run).map(drop).map_err(OpenError::Thread)
}

fn watch(watcher: &mut notify::RecommendedWatcher, directory: &Path) -> Result<(), OpenError> {
    watcher
        .watch(directory, RecursiveMode::NonRecursive)
        .map_err(|source| OpenError::Watch { path: directory.into(), source })
}

struct Source {
    directory: PathBuf,
    /// What each file said when it could be read last.
    texts: BTreeMap<PathBuf, String>,
    /// What was complained of in the last round: each is logged once.
    complaints: BTreeSet<String>,
    sent: Option<Objects>,
    sender: Sender,
}

/// Nobody listens any more.
struct Unheard;

impl Source {
    fn run(mut self, incoming: &Receiver<notify::Result<notify::Event>>, mut watcher: notify::RecommendedWatcher) {
        while self.reload().is_ok() && wait(incoming) {
            // A directory that was replaced by another of the same name has lost its watch.
            let _ = watch(&mut watcher, &self.directory);
        }
    }

    fn reload(&mut self) -> Result<(), Unheard> {
        let mut complaints = BTreeSet::new();
        self.read_texts(&mut complaints);
        let mut objects = Objects::default();
        for (path, text) in &self.texts {
            for broken in documents::read(text, &mut objects) {
                complaints.insert(format!("{}: {broken}", path.display()));
            }
        }
        complaints.extend(pairing::complaints(&objects));
        for complaint in complaints.difference(&self.complaints) {
            warn!("{complaint}");
        }
        self.complaints = complaints;
        self.send(objects)
    }

    fn read_texts(&mut self, complaints: &mut BTreeSet<String>) {
        let paths = match list(&self.directory) {
            Ok(paths) => paths,
            Err(error) => {
                complaints.insert(format!("{}: {error}; what it held last is kept", self.directory.display()));
                return;
            }
        };
        self.texts.retain(|path, _| paths.contains(path));
        for path in paths {
            match read_current(&path).map(String::from_utf8) {
                Ok(Ok(text)) => drop(self.texts.insert(path, text)),
                Ok(Err(error)) => {
                    complaints.insert(format!("{}: {error}; what it said last is kept", path.display()));
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => drop(self.texts.remove(&path)),
                Err(error) => {
                    complaints.insert(format!("{}: {error}; what it said last is kept", path.display()));
                }
            }
        }
    }

    /// Endpoints go before the Services that need them, so that a new Service never lacks them for a moment.
    fn send(&mut self, objects: Objects) -> Result<(), Unheard> {
        let sent = self.sent.as_ref();
        let mut events = Vec::new();
        if sent.is_none_or(|sent| sent.slices != objects.slices) {
            events.push(Event::EndpointSlices(Change::Replace(objects.slices.values().cloned().collect())));
        }
        if sent.is_none_or(|sent| sent.nodes != objects.nodes) {
            let nodes: Vec<_> = objects.nodes.values().cloned().collect();
            events.push(Event::Peers(Change::Replace(nodes.clone())));
            events.push(Event::Nodes(Change::Replace(nodes)));
        }
        if sent.is_none_or(|sent| sent.service_cidrs != objects.service_cidrs) {
            events.push(Event::ServiceCidrs(Change::Replace(objects.service_cidrs.values().cloned().collect())));
        }
        if sent.is_none_or(|sent| sent.services != objects.services) {
            events.push(Event::Services(Change::Replace(objects.services.values().cloned().collect())));
        }
        self.sent = Some(objects);
        events.into_iter().try_for_each(|event| self.sender.blocking_send(event).or(Err(Unheard)))
    }
}

/// The content of a file. A link that was swapped while it was followed may have led to what is no longer there: it is
/// followed once more before the file counts as gone.
fn read_current(path: &Path) -> io::Result<Vec<u8>> {
    read(path).or_else(|error| if error.kind() == io::ErrorKind::NotFound { read(path) } else { Err(error) })
}

/// A pipe would be waited for, and a device may have no end.
fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is not a file"));
    }
    let mut content = Vec::new();
    file.read_to_end(&mut content).map(|_| content)
}

/// The YAML files of a directory in order of their names. Symbolic links count as what they lead to, so that a mounted
/// `ConfigMap`, whose `..data` link is swapped at each change, is read through it.
fn list(directory: &Path) -> io::Result<BTreeSet<PathBuf>> {
    let mut paths = BTreeSet::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        let is_yaml = path.extension().is_some_and(|extension| ["yaml", "yml", "json"].iter().any(|e| extension == *e));
        if is_yaml && !is_hidden(&path) && !path.is_dir() {
            paths.insert(path);
        }
    }
    Ok(paths)
}

fn is_hidden(path: &Path) -> bool {
    path.file_name().is_none_or(|name| name.as_encoded_bytes().starts_with(b"."))
}

/// Waits for something to change and then for the writers to finish. False when there will be no more events.
fn wait(incoming: &Receiver<notify::Result<notify::Event>>) -> bool {
    let mut writers = BTreeSet::new();
    match incoming.recv_timeout(POLL) {
        Ok(event) => note(event, &mut writers),
        Err(RecvTimeoutError::Timeout) => return true,
        Err(RecvTimeoutError::Disconnected) => return false,
    }
    let (settled, deadline) = (Instant::now() + SETTLE_LIMIT, Instant::now() + WRITER_PATIENCE);
    loop {
        let left = |end: Instant| end.saturating_duration_since(Instant::now());
        let patience = if writers.is_empty() { SETTLE.min(left(settled)) } else { left(deadline) };
        match incoming.recv_timeout(patience) {
            Ok(event) => note(event, &mut writers),
            Err(RecvTimeoutError::Timeout) => return true,
            Err(RecvTimeoutError::Disconnected) => return false,
        }
    }
}

/// Reading, which the source does itself, is no change.
fn is_change(event: &notify::Result<notify::Event>) -> bool {
    let is_writer_done = |kind| kind == EventKind::Access(AccessKind::Close(AccessMode::Write));
    event.as_ref().map_or(true, |event| !event.kind.is_access() || is_writer_done(event.kind))
}

/// Remembers files that are open for writing. An editor keeps hidden ones open for as long as it runs.
fn note(event: notify::Result<notify::Event>, writers: &mut BTreeSet<PathBuf>) {
    let Ok(event) = event else { return };
    match event.kind {
        EventKind::Create(CreateKind::File) => {
            writers.extend(event.paths.into_iter().filter(|path| !is_hidden(path) && !path.is_symlink()));
        }
        EventKind::Modify(ModifyKind::Data(_)) => {
            writers.extend(event.paths.into_iter().filter(|path| !is_hidden(path)));
        }
        EventKind::Access(AccessKind::Close(AccessMode::Write)) | EventKind::Modify(_) | EventKind::Remove(_) => {
            for path in &event.paths {
                writers.remove(path);
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::{self, File, Permissions},
        io::Write as _,
        os::unix::fs::{PermissionsExt as _, symlink},
        path::Path,
        sync::{
            Arc,
            atomic::{AtomicBool, Ordering},
        },
        thread,
        time::{Duration, Instant},
    };

    use tempfile::TempDir;
    use tokio::sync::mpsc::{Receiver, channel};

    use super::{OpenError, WRITER_PATIENCE, start};
    use crate::source::{Change, Event, QUEUE};

    const DEADLINE: Duration = Duration::from_secs(5);

    fn service(name: &str) -> String {
        format!("apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{clusterIP: 10.96.0.1}}\n")
    }

    fn watched(directory: &Path) -> Receiver<Event> {
        let (sender, receiver) = channel(QUEUE);
        start(directory.into(), sender).unwrap();
        receiver
    }

    /// The names in the next list of Services.
    async fn services(receiver: &mut Receiver<Event>) -> Vec<String> {
        let next = async {
            loop {
                if let Event::Services(Change::Replace(services)) = receiver.recv().await.unwrap() {
                    return services.into_iter().map(|service| service.metadata.name.unwrap()).collect();
                }
            }
        };
        tokio::time::timeout(DEADLINE, next).await.expect("no list of Services came")
    }

    #[tokio::test]
    async fn all_kinds_are_complete_at_once_and_endpoints_come_first() {
        let directory = TempDir::new().unwrap();
        let mut receiver = watched(directory.path());
        let mut kinds = Vec::new();
        for _ in 0..5 {
            kinds.push(receiver.recv().await.unwrap());
        }
        assert_eq!(
            kinds,
            [
                Event::EndpointSlices(Change::Replace(vec![])),
                Event::Peers(Change::Replace(vec![])),
                Event::Nodes(Change::Replace(vec![])),
                Event::ServiceCidrs(Change::Replace(vec![])),
                Event::Services(Change::Replace(vec![])),
            ]
        );
    }

    #[tokio::test]
    async fn files_that_come_change_and_go_are_followed() {
        let directory = TempDir::new().unwrap();
        let mut receiver = watched(directory.path());
        assert!(services(&mut receiver).await.is_empty());
        let path = directory.path().join("a.yaml");
        fs::write(&path, service("a")).unwrap();
        assert_eq!(services(&mut receiver).await, ["a"]);
        fs::write(directory.path().join("b.tmp"), format!("{}---\n{}", service("a"), service("b"))).unwrap();
        fs::rename(directory.path().join("b.tmp"), &path).unwrap();
        assert_eq!(services(&mut receiver).await, ["a", "b"]);
        fs::remove_file(&path).unwrap();
        assert!(services(&mut receiver).await.is_empty());
    }

    #[tokio::test]
    async fn a_file_is_not_read_while_it_is_written() {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("a.yaml");
        fs::write(&path, service("a")).unwrap();
        let mut receiver = watched(directory.path());
        assert_eq!(services(&mut receiver).await, ["a"]);
        // Truncated, then written in two parts: nothing in between may be seen.
        let mut file = File::create(&path).unwrap();
        let text = format!("{}---\n{}", service("b"), service("c"));
        let (head, tail) = text.split_at(text.len() / 2);
        file.write_all(head.as_bytes()).unwrap();
        file.flush().unwrap();
        let quiet = tokio::time::timeout(Duration::from_millis(200), services(&mut receiver)).await;
        assert!(quiet.is_err(), "a half-written file was read: {quiet:?}");
        file.write_all(tail.as_bytes()).unwrap();
        drop(file);
        assert_eq!(services(&mut receiver).await, ["b", "c"]);
    }

    #[tokio::test]
    async fn a_change_is_told_soon_while_other_files_go_on_changing() {
        let directory = TempDir::new().unwrap();
        let mut receiver = watched(directory.path());
        assert!(services(&mut receiver).await.is_empty());
        // An editor's own file, open all the time.
        let mut hidden = File::create(directory.path().join(".a.yaml.swp")).unwrap();
        let other = directory.path().join("other.yaml");
        let is_over = Arc::new(AtomicBool::new(false));
        let writer = thread::spawn({
            let is_over = Arc::clone(&is_over);
            move || {
                while !is_over.load(Ordering::Relaxed) {
                    hidden.write_all(b"x").unwrap();
                    fs::set_permissions(&other, Permissions::from_mode(0o600))
                        .or_else(|_| fs::write(&other, ""))
                        .unwrap();
                    // Never as long as it takes to settle; a loop would be a flood, on which a machine has to spend its time.
                    thread::sleep(super::SETTLE / 5);
                }
            }
        });
        let began = Instant::now();
        fs::write(directory.path().join("b.tmp"), service("b")).unwrap();
        fs::rename(directory.path().join("b.tmp"), directory.path().join("b.yaml")).unwrap();
        let names = services(&mut receiver).await;
        let elapsed = began.elapsed();
        is_over.store(true, Ordering::Relaxed);
        writer.join().unwrap();
        assert_eq!(names, ["b"]);
        assert!(elapsed < WRITER_PATIENCE / 2, "it took {elapsed:?}");
    }

    #[tokio::test]
    async fn a_swapped_link_of_a_mounted_config_map_is_followed() {
        let directory = TempDir::new().unwrap();
        let at = |name: &str| directory.path().join(name);
        for (version, name) in [("..1", "a"), ("..2", "b")] {
            fs::create_dir(at(version)).unwrap();
            fs::write(at(version).join("services.yaml"), service(name)).unwrap();
        }
        symlink("..1", at("..data")).unwrap();
        symlink("..data/services.yaml", at("services.yaml")).unwrap();
        let mut receiver = watched(directory.path());
        assert_eq!(services(&mut receiver).await, ["a"]);
        symlink("..2", at("..data_tmp")).unwrap();
        fs::rename(at("..data_tmp"), at("..data")).unwrap();
        assert_eq!(services(&mut receiver).await, ["b"]);
    }

    #[tokio::test]
    async fn a_file_that_cannot_be_read_keeps_what_it_said() {
        let directory = TempDir::new().unwrap();
        let at = |name: &str| directory.path().join(name);
        symlink("target", at("a.yaml")).unwrap();
        fs::write(at("target"), service("a")).unwrap();
        let mut receiver = watched(directory.path());
        assert_eq!(services(&mut receiver).await, ["a"]);
        // A link that leads to itself: an error, but not that the file is gone. Root may read everything else.
        symlink("loop", at("loop")).unwrap();
        fs::rename(at("loop"), at("target")).unwrap();
        symlink("target", at("loop")).unwrap();
        fs::write(at("b.yaml"), service("b")).unwrap();
        assert_eq!(services(&mut receiver).await, ["a", "b"]);
    }

    #[tokio::test]
    async fn what_is_not_text_keeps_what_it_said_and_what_is_not_a_file_holds_up_nothing() {
        let directory = TempDir::new().unwrap();
        let at = |name: &str| directory.path().join(name);
        make_pipe(&at("pipe.yaml"));
        symlink("/dev/zero", at("zero.yaml")).unwrap();
        fs::write(at("a.yaml"), service("a")).unwrap();
        let mut receiver = watched(directory.path());
        assert_eq!(services(&mut receiver).await, ["a"]);
        // As of one that was cut in the middle of a letter.
        fs::write(at("a.yaml"), [service("ä").as_bytes(), b"# \xc3"].concat()).unwrap();
        fs::write(at("b.yaml"), service("b")).unwrap();
        assert_eq!(services(&mut receiver).await, ["a", "b"]);
    }

    fn make_pipe(path: &Path) {
        use rustix::fs::{CWD, FileType, Mode, mknodat};
        mknodat(CWD, path, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
    }

    #[test]
    fn a_directory_that_is_not_there_is_an_error_that_names_it() {
        let (sender, _receiver) = channel(QUEUE);
        let error = start("/nonexistent/services".into(), sender).unwrap_err();
        assert!(matches!(error, OpenError::Directory { .. } | OpenError::Watch { .. }));
        assert!(error.to_string().contains("/nonexistent/services"), "{error}");
    }
}
