//! Kubelet's probes of a container, each on a thread of its own until the handle goes.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
        mpsc::{self, RecvTimeoutError, Sender},
    },
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};
use nix::sched::{CloneFlags, setns};

use super::{kubelet::Host, manifest::HttpProbe};
use crate::patience::patience;

/// Kubelet's `timeoutSeconds`, which the manifest leaves as it is.
const TIMEOUT: Duration = Duration::from_secs(1);

/// What the probes have found so far.
#[derive(Debug)]
pub struct Probes {
    readiness: Arc<State>,
    liveness: Arc<State>,
    /// They end when it is gone.
    _stop: [Sender<()>; 2],
}

#[derive(Debug, Default)]
struct State {
    is_good: AtomicBool,
    answers: AtomicU32,
    /// How often so many failures came in a row that kubelet would have acted.
    verdicts: AtomicU32,
}

impl Probes {
    /// Begins to ask.
    pub(super) fn start(host: &Host, liveness: &HttpProbe, readiness: &HttpProbe) -> Result<Self> {
        let (liveness, stop_liveness) = ask(host, liveness)?;
        let (readiness, stop_readiness) = ask(host, readiness)?;
        Ok(Self { readiness, liveness, _stop: [stop_liveness, stop_readiness] })
    }

    /// Whether the pod is ready.
    pub fn is_ready(&self) -> bool {
        self.readiness.is_good.load(Ordering::Relaxed)
    }

    /// Whether it has answered that it lives.
    pub fn is_alive(&self) -> bool {
        self.liveness.is_good.load(Ordering::Relaxed)
    }

    /// How often kubelet would have started it anew.
    pub fn restarts(&self) -> u32 {
        self.liveness.verdicts.load(Ordering::Relaxed)
    }

    /// How often each was answered with success: liveness, readiness.
    pub fn answers(&self) -> (u32, u32) {
        (self.liveness.answers.load(Ordering::Relaxed), self.readiness.answers.load(Ordering::Relaxed))
    }
}

fn ask(host: &Host, probe: &HttpProbe) -> Result<(Arc<State>, Sender<()>)> {
    let state = Arc::new(State::default());
    let (stop, stopped) = mpsc::channel::<()>();
    let (told, probe, address) = (Arc::clone(&state), probe.clone(), SocketAddr::new(host.address, probe.port));
    let namespace = open(&host.namespace)?;
    // A deadline like any other: on a slow machine it is stretched.
    let most = patience(Duration::from_secs(probe.failures.into())).as_secs();
    let run = move || -> Result<()> {
        setns(namespace, CloneFlags::CLONE_NEWNET)?;
        let mut failures = 0;
        loop {
            if answers(address, &probe.path) {
                failures = 0;
                told.is_good.store(true, Ordering::Relaxed);
                told.answers.fetch_add(1, Ordering::Relaxed);
            } else {
                failures += 1;
            }
            if failures == most {
                failures = 0;
                told.is_good.store(false, Ordering::Relaxed);
                told.verdicts.fetch_add(1, Ordering::Relaxed);
            }
            if stopped.recv_timeout(probe.period) != Err(RecvTimeoutError::Timeout) {
                return Ok(());
            }
        }
    };
    thread::Builder::new().name("probe".into()).spawn(move || {
        if let Err(error) = run() {
            eprintln!("a probe has ended: {error:#}");
        }
    })?;
    Ok((state, stop))
}

fn open(namespace: &Path) -> Result<std::fs::File> {
    std::fs::File::open(namespace).with_context(|| format!("cannot open {}", namespace.display()))
}

/// Any status of 200 to 399 is success to kubelet.
fn answers(address: SocketAddr, path: &str) -> bool {
    let ask = || -> std::io::Result<String> {
        let mut stream = TcpStream::connect_timeout(&address, patience(TIMEOUT))?;
        stream.set_read_timeout(Some(patience(TIMEOUT)))?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    let answer = ask().unwrap_or_default();
    let status = answer.split(' ').nth(1).and_then(|status| status.parse::<u16>().ok());
    status.is_some_and(|status| (200..400).contains(&status))
}
