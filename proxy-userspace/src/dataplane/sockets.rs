//! Sockets whose backend has gone. A connected socket passes no hook again, so it would go on talking to nobody: TCP until
//! its retransmissions end, UDP for ever. Such sockets are destroyed: the application's next system call fails with
//! ECONNABORTED, and its next `connect` is given another backend. Unconnected UDP sockets choose again by themselves and are
//! never touched.
//!
//! In: `SOCKETS_*` and `BACKENDS_*`, read anew each time, so that nothing depends on having seen a change; and for UDP who answers
//! for which Service port (`datagrams.rs`), whose flows are gone through here, too. It works on a thread of its own: the
//! tables never wait for it.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    io,
    net::SocketAddr,
    sync::{
        Arc, OnceLock,
        mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    },
    thread,
    time::{Duration, Instant},
};

use aya::{Ebpf, Pod};
use proxy_common::{
    addr::{Address, Ipv4, Ipv6, Port, Protocol},
    backend::{Backend, BackendId, BackendState},
    flow::Flow,
    socket::{SocketOrigin, SocketPeer, SocketTarget, SocketWay},
    tuple::Tuple,
};

use super::{
    datagrams::{Flows, Judge, Opinions},
    error::{Error, OpenError},
    family, namespaces,
    netlink::sockets::{Kind, SocketId, SocketList},
    syscall,
    table::Table,
};
use crate::diff::{Plan, Step};

/// Between a sweep and the one that finds what connected while the first was under way.
const SETTLE: Duration = Duration::from_millis(200);

/// Until a sweep that failed is tried again.
const RETRY: Duration = Duration::from_secs(5);

/// What came of a sweep.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// How long it took.
    pub took: Duration,
    /// Sockets that were ended, by the family of their backends: IPv4, IPv6.
    pub ended: [usize; 2],
    /// Entries of UDP flows that were taken out, and that unconnected sockets remember no more.
    pub forgotten: [usize; 2],
}

/// Who is told of each sweep, if anybody.
type Listener = OnceLock<Box<dyn Fn(Swept) + Send + Sync>>;

/// The way to the thread that sweeps. It ends with this handle.
pub(super) struct Sweeper {
    wake: SyncSender<()>,
    opinions: Opinions,
    listener: Arc<Listener>,
}

impl Sweeper {
    /// Starts the thread in the calling thread's network namespace, and wakes it once: a predecessor may have left work.
    pub(super) fn start(object: &Ebpf) -> Result<Self, OpenError> {
        let (listener, opinions) = (Arc::new(Listener::new()), Opinions::default());
        let sweep = Sweep {
            listener: Arc::clone(&listener),
            swept: Swept::default(),
            v4: Sockets::new(object, "SOCKETS_V4", "BACKENDS_V4", Flows::new(object, &family::V4, false, &opinions)?)?,
            v6: Sockets::new(object, "SOCKETS_V6", "BACKENDS_V6", Flows::new(object, &family::V6, true, &opinions)?)?,
            opinions: opinions.clone(),
            suspects: Default::default(),
            said: BTreeSet::new(),
        };
        let (wake, wakes) = sync_channel(1);
        let spawned = thread::Builder::new().name("sockets".into()).spawn(move || sweep.run(&wakes));
        spawned.map_err(|source| Error::Kernel { what: "a thread", source })?;
        let sweeper = Self { wake, opinions, listener };
        sweeper.wake();
        Ok(sweeper)
    }

    /// Tells somebody of each sweep, from now on.
    pub(super) fn tell(&self, listener: impl Fn(Swept) + Send + Sync + 'static) {
        // The first one stays.
        let _ = self.listener.set(Box::new(listener));
    }

    /// Takes in who answers for UDP Service ports once a plan is carried out.
    pub(super) fn expect(&self, plan: &Plan) {
        self.opinions.expect([&plan.serving_v4, &plan.serving_v6]);
    }

    /// Takes in what a plan that is carried out says of UDP Service ports, and whether one has lost a backend: then there is something
    /// to look for.
    pub(super) fn follow(&self, plan: &Plan) -> bool {
        self.opinions.follow([&plan.serving_v4, &plan.serving_v6])
    }

    /// Has it look at the sockets again, as some backend may have gone.
    pub(super) fn wake(&self) {
        // If a wake waits already, it will do for both.
        let _ = self.wake.try_send(());
    }
}

/// Whether sockets may lose their backends by a plan.
pub(super) fn may_lose<A>(steps: &[Step<A>]) -> bool {
    steps.iter().any(|step| matches!(step, Step::PutBackend(_, backend) if backend.state != BackendState::Serving))
}

/// A socket whose backend has gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Lost {
    netns: u64,
    cookie: u64,
    protocol: Protocol,
    /// The backend.
    peer: SocketAddr,
}

/// What is done with entries whose sockets are not found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unseen {
    /// They may be about to connect.
    Stay,
    /// They were closed.
    Go,
}

/// The thread's own.
struct Sweep {
    listener: Arc<Listener>,
    /// What comes of the sweep under way.
    swept: Swept,
    opinions: Opinions,
    /// UDP Service ports of IPv4 and of IPv6 that have lost a backend: looked at until both sweeps went well.
    suspects: [BTreeSet<u32>; 2],
    v4: Sockets<Ipv4>,
    v6: Sockets<Ipv6>,
    /// Problems that were logged: each is told once.
    said: BTreeSet<String>,
}

impl Sweep {
    fn run(mut self, wakes: &Receiver<()>) {
        let mut has_failed = false;
        loop {
            let woken = if has_failed { wakes.recv_timeout(RETRY) } else { wakes.recv().map_err(Into::into) };
            if woken == Err(RecvTimeoutError::Disconnected) {
                return;
            }
            self.opinions.take_suspects(&mut self.suspects);
            has_failed = !self.sweep(Unseen::Stay);
            thread::sleep(SETTLE);
            has_failed |= !self.sweep(Unseen::Go);
            if !has_failed {
                self.suspects = Default::default();
            }
        }
    }

    /// Says whether all is done that can be.
    fn sweep(&mut self, unseen: Unseen) -> bool {
        let began = Instant::now();
        self.swept = Swept::default();
        // Flows first: sockets may be many, and in many namespaces.
        let datagrams = self.sweep_datagrams();
        let sockets = self.try_sweep(unseen);
        if let Some(tell) = self.listener.get() {
            tell(Swept { took: began.elapsed(), ..self.swept });
        }
        let is_done = datagrams.is_ok() && sockets.is_ok();
        if let Err(error) = datagrams {
            self.say(format!("UDP flows stay with backends that their Services have lost: {error}"));
        }
        if let Err(error) = sockets {
            self.say(format!("sockets of backends that have gone are not ended: {error}"));
        }
        is_done
    }

    fn sweep_datagrams(&mut self) -> Result<(), Error> {
        let v4 = self.v4.forget_datagrams(&self.suspects[0]);
        let v6 = self.v6.forget_datagrams(&self.suspects[1]);
        self.swept.forgotten = [v4?, v6?];
        let entries: usize = self.swept.forgotten.iter().sum();
        if entries > 0 {
            tracing::info!(entries, "took out UDP flows whose Services have lost their backends");
        }
        Ok(())
    }

    fn try_sweep(&mut self, unseen: Unseen) -> Result<(), Error> {
        let mut namespaces: BTreeMap<u64, Vec<Lost>> = BTreeMap::new();
        let [of_v4, of_v6] = &self.suspects;
        for lost in self.v4.lost(of_v4)?.into_iter().chain(self.v6.lost(of_v6)?) {
            namespaces.entry(lost.netns).or_default().push(lost);
        }
        let error = |source| Error::Kernel { what: "its sockets", source };
        let own = syscall::network_namespace_cookie().map_err(error)?;
        if let Some(lost) = namespaces.remove(&own) {
            let ended = end(&lost).map_err(error)?;
            self.forget(&lost, &ended, unseen)?;
        }
        if namespaces.is_empty() { Ok(()) } else { self.sweep_pods(&namespaces, unseen) }
    }

    /// What the agent is not allowed to do in the namespaces of pods, it does not try again before the next change.
    fn sweep_pods(&mut self, namespaces: &BTreeMap<u64, Vec<Lost>>, unseen: Unseen) -> Result<(), Error> {
        let mut results = Vec::new();
        let search = namespaces::visit(&namespaces.keys().copied().collect(), |cookie| {
            results.push((cookie, end(&namespaces[&cookie])));
        });
        for (cookie, result) in results {
            match result {
                Ok(ended) => self.forget(&namespaces[&cookie], &ended, unseen)?,
                Err(error) => self.say(format!("sockets of pods whose backends have gone are not ended: {error}")),
            }
        }
        match search.refused {
            Some(error) => self.say(format!("sockets of pods whose backends have gone are not all ended: {error}")),
            // Pods that have gone themselves.
            None => search.missing.iter().try_for_each(|cookie| self.forget(&namespaces[cookie], &[], unseen))?,
        }
        Ok(())
    }

    fn forget(&mut self, lost: &[Lost], ended: &[Lost], unseen: Unseen) -> Result<(), Error> {
        let v4 = ended.iter().filter(|lost| lost.peer.is_ipv4()).count();
        self.swept.ended[0] += v4;
        self.swept.ended[1] += ended.len() - v4;
        if !ended.is_empty() {
            tracing::info!(sockets = ended.len(), "ended sockets whose backends have gone");
        }
        let gone = if unseen == Unseen::Go { lost } else { ended };
        gone.iter().try_for_each(|lost| match lost.peer {
            SocketAddr::V4(peer) => self.v4.forget(lost.cookie, (*peer.ip()).into(), peer.port()),
            SocketAddr::V6(peer) => self.v6.forget(lost.cookie, (*peer.ip()).into(), peer.port()),
        })
    }

    fn say(&mut self, problem: String) {
        if !self.said.contains(&problem) {
            tracing::warn!("{problem}");
            self.said.insert(problem);
        }
    }
}

/// The tables of one family.
struct Sockets<A> {
    /// `SOCKETS_*`
    peers: Table<SocketPeer<A>, SocketTarget<A>>,
    backends: Table<BackendId, Backend<A>>,
    flows: Flows<A>,
}

impl<A> Sockets<A>
where
    A: Address + Into<std::net::IpAddr>,
    SocketPeer<A>: Pod,
    SocketTarget<A>: Pod,
    Backend<A>: Pod,
    Tuple<A>: Pod,
    Flow<A>: Pod,
{
    fn new(object: &Ebpf, sockets: &'static str, backends: &'static str, flows: Flows<A>) -> Result<Self, OpenError> {
        Ok(Self { peers: family::table(object, sockets)?, backends: family::table(object, backends)?, flows })
    }

    /// Takes out what keeps datagrams of these Service ports with backends that they have lost; returns how many entries.
    fn forget_datagrams(&self, suspects: &BTreeSet<u32>) -> Result<usize, Error> {
        if suspects.is_empty() {
            return Ok(0);
        }
        Ok(self.flows.remove_lost(suspects)? + self.flows.forget_lost(&self.peers, suspects)?)
    }

    /// Connected sockets whose backend has gone, or is lost to one of these Service ports.
    fn lost(&self, suspects: &BTreeSet<u32>) -> Result<Vec<Lost>, Error> {
        let mut connected = Vec::new();
        self.peers.visit(|peer, target| {
            if peer.way == SocketWay::ToFrontend && target.origin == SocketOrigin::Connected {
                connected.push((peer, target));
            }
            true
        })?;
        // After that look: whoever was chosen before it is known to answer by now.
        let judge = self.flows.judge(suspects);
        let mut backends = HashMap::new();
        for (_, target) in &connected {
            if let std::collections::hash_map::Entry::Vacant(e) = backends.entry(target.backend) {
                e.insert(self.backends.read(&target.backend)?);
            }
        }
        let is_lost = |target: &SocketTarget<A>| is_lost(target, &backends[&target.backend], &judge);
        let lost = connected.iter().filter(|(_, target)| is_lost(target));
        Ok(lost.map(|(peer, target)| Lost::new(peer, target)).collect())
    }

    fn forget(&self, cookie: u64, addr: A, port: u16) -> Result<(), Error> {
        self.peers.remove(&SocketPeer::new(cookie, addr, Port::new(port), SocketWay::ToFrontend))
    }
}

impl Lost {
    fn new<A: Address + Into<std::net::IpAddr>>(peer: &SocketPeer<A>, target: &SocketTarget<A>) -> Self {
        Self {
            netns: word(target.netns),
            cookie: word(peer.cookie),
            protocol: target.proto,
            peer: SocketAddr::new(peer.addr.into(), peer.port.number()),
        }
    }
}

fn word([low, high]: [u32; 2]) -> u64 {
    u64::from(high) << 32 | u64::from(low)
}

/// TCP keeps its backend while that stands in a slice, UDP while it serves, and its own Service port has it.
fn is_lost<A>(target: &SocketTarget<A>, backend: &Backend<A>, judge: &Judge) -> bool {
    let keeps = match backend.state {
        BackendState::Serving => true,
        BackendState::NotServing => target.proto != Protocol::Udp,
        BackendState::Free | BackendState::Gone => false,
    };
    !keeps
        || backend.generation != target.backend_generation
        || judge.is_lost((target.proto, target.service, target.backend))
}

/// Destroys those of the sockets that exist in the calling thread's network namespace, and returns them.
fn end(lost: &[Lost]) -> io::Result<Vec<Lost>> {
    let sockets = SocketList::open()?;
    let mut ended = Vec::new();
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        let wanted = lost.iter().filter(|lost| lost.protocol == protocol);
        let wanted: HashMap<(u64, SocketAddr), Lost> = wanted.map(|lost| ((lost.cookie, lost.peer), *lost)).collect();
        if wanted.is_empty() {
            continue;
        }
        for is_v6 in [false, true] {
            end_kind(&sockets, Kind { is_v6, protocol }, &wanted, &mut ended)?;
        }
    }
    Ok(ended)
}

/// A socket may have connected to somebody else since, so the peer must be the backend still.
fn end_kind(
    sockets: &SocketList,
    kind: Kind,
    wanted: &HashMap<(u64, SocketAddr), Lost>,
    ended: &mut Vec<Lost>,
) -> io::Result<()> {
    for socket in sockets.connected(kind, only_port(wanted.values()))? {
        let peer = SocketAddr::new(socket.destination_address.to_canonical(), socket.destination_port);
        let Some(known) = wanted.get(&(cookie(&socket), peer)) else { continue };
        match sockets.destroy(kind, socket) {
            Ok(()) => ended.push(*known),
            // It was closed meanwhile.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESTALE)) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Two words, the low one first.
fn cookie(socket: &SocketId) -> u64 {
    word([0, 4].map(|at| u32::from_ne_bytes(core::array::from_fn(|byte| socket.cookie[at + byte]))))
}

/// The port of all backends, if it is the same: the kernel then lists fewer sockets.
fn only_port<'a>(lost: impl IntoIterator<Item = &'a Lost>) -> Option<u16> {
    let ports: BTreeSet<u16> = lost.into_iter().map(|lost| lost.peer.port()).collect();
    if ports.len() == 1 { ports.into_iter().next() } else { None }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, sync::Arc};

    use proxy_common::{
        addr::{Ipv4, Port, Protocol},
        backend::{Backend, BackendState},
        socket::{SocketOrigin, SocketTarget},
    };

    use super::{Judge, is_lost};

    #[test]
    fn a_socket_is_lost_when_its_backend_can_do_no_more_for_its_protocol() {
        let cases = [
            ("serving", Protocol::Udp, BackendState::Serving, 1, false),
            ("draining, UDP", Protocol::Udp, BackendState::NotServing, 1, true),
            ("draining, TCP", Protocol::Tcp, BackendState::NotServing, 1, false),
            ("gone", Protocol::Tcp, BackendState::Gone, 1, true),
            ("never written", Protocol::Tcp, BackendState::Free, 1, true),
            ("another's by now", Protocol::Tcp, BackendState::Serving, 2, true),
        ];
        for (name, proto, state, generation, expected) in cases {
            let target = SocketTarget {
                addr: Ipv4::default(),
                port: Port::new(80),
                proto,
                origin: SocketOrigin::Connected,
                backend: 1,
                backend_generation: 1,
                service: 1,
                netns: [0; 2],
            };
            let backend = Backend { state, generation, ..Backend::default() };
            assert_eq!(is_lost(&target, &backend, &Judge::default()), expected, "{name}");
            let judge = Judge(BTreeMap::from([(1, Arc::from([2]))]));
            let is_lost = is_lost(&target, &backend, &judge);
            assert_eq!(is_lost, expected || proto == Protocol::Udp, "{name}, and lost to its Service");
        }
    }
}
