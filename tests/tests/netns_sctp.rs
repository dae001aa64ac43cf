//! Associations of the kernel's own SCTP, through Services: from pods and from outside, to backends here and elsewhere.
//! A kernel without SCTP ignores every test by its name and says why.

use std::{
    io::{self, Read as _, Write as _},
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use libtest_mimic::{Arguments, Trial};
use socket2::{Domain, Protocol, Socket, Type};
use tests::{
    lab::{
        LabOptions, UplinkMode,
        address::{self, Family},
        agent::{AgentOptions, SocketLb},
        cluster::Cluster,
        manifest::{Service, write_documents},
    },
    patience::patience,
    traffic::{self, place::Place},
};

const UPLINKS: [[UplinkMode; 2]; 2] = [[UplinkMode::Xdp, UplinkMode::Tc], [UplinkMode::Tc, UplinkMode::Xdp]];

type Test = fn() -> Result<()>;

const TESTS: [(&str, Test); 3] = [
    (
        "pods_hold_associations_with_backends_here_and_elsewhere",
        pods_hold_associations_with_backends_here_and_elsewhere,
    ),
    ("clients_outside_hold_associations_by_node_ports", clients_outside_hold_associations_by_node_ports),
    ("a_client_of_nobody_is_refused_at_once", a_client_of_nobody_is_refused_at_once),
];

fn main() {
    let arguments = Arguments::from_args();
    let is_missing = socket(Family::V4).err();
    if let Some(error) = &is_missing {
        eprintln!(
            "IGNORED: this kernel has no SCTP ({error}); `cargo xtask vm 6.1 --suite netns --test netns_sctp` has"
        );
    }
    let trials = TESTS.map(|(name, test)| {
        let run = move || test().map_err(|error| format!("{error:?}").into());
        Trial::test(name, run).with_ignored_flag(is_missing.is_some())
    });
    libtest_mimic::run(&arguments, trials.into()).exit();
}

fn socket(family: Family) -> io::Result<Socket> {
    let domain = if family == Family::V4 { Domain::IPV4 } else { Domain::IPV6 };
    let socket = Socket::new(domain, Type::STREAM, Some(Protocol::from(libc::IPPROTO_SCTP)))?;
    if family == Family::V6 {
        // Its INIT would tell of IPv4 addresses, too.
        socket.set_only_v6(true)?;
    }
    Ok(socket)
}

/// Answers every association in a pod, one after the other, with the pod's name, the client's address and what was said.
struct Server {
    is_over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    fn new(place: &Place, address: IpAddr, port: u16) -> Result<Self> {
        let listener = place.namespace().run(|| listen(SocketAddr::new(address, port)))??;
        let (name, is_over) = (place.name().to_owned(), Arc::new(AtomicBool::new(false)));
        let has_ended = Arc::clone(&is_over);
        let serve = move || {
            while !has_ended.load(Ordering::Relaxed) {
                if let Ok((socket, peer)) = listener.accept() {
                    // A client that leaves early fails its own test.
                    let _ = answer(&socket, &name, peer.as_socket());
                }
            }
        };
        Ok(Self { is_over, thread: Some(thread::spawn(serve)) })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

fn listen(address: SocketAddr) -> io::Result<Socket> {
    let socket = socket(Family::of(address.ip()))?;
    socket.bind(&address.into())?;
    socket.listen(16)?;
    socket.set_read_timeout(Some(Duration::from_millis(200)))?;
    Ok(socket)
}

fn answer(mut socket: &Socket, name: &str, peer: Option<SocketAddr>) -> io::Result<()> {
    socket.set_read_timeout(Some(patience(Duration::from_secs(5))))?;
    let mut text = vec![0; 1 << 17];
    loop {
        let length = socket.read(&mut text)?;
        if length == 0 {
            return Ok(());
        }
        let peer = peer.map(|peer| peer.ip().to_string()).unwrap_or_default();
        socket.write_all(
            format!("{name} {peer} {}", text[..length].iter().map(|byte| u64::from(*byte)).sum::<u64>()).as_bytes(),
        )?;
    }
}

/// Opens an association, says something short and something longer than a packet, and closes it. Returns who answered, and whom
/// it saw. What is longer is cut up by the sender, or by a device on the way.
fn ask(place: &Place, target: SocketAddr) -> Result<(String, IpAddr)> {
    let limit = patience(Duration::from_secs(5));
    let talk = || -> Result<(String, IpAddr)> {
        let mut socket = socket(Family::of(target.ip()))?;
        socket.connect_timeout(&target.into(), limit).context("connect")?;
        socket.set_read_timeout(Some(limit))?;
        let peer = socket.peer_addr()?.as_socket();
        ensure!(peer == Some(target), "the client sees {peer:?} as its peer");
        let mut heard = None;
        for length in [3, 30_000] {
            let text: Vec<u8> = (0..length).map(|index: u32| (index * 7 % 251) as u8).collect();
            socket.write_all(&text).context("send")?;
            let mut answer = [0; 200];
            let length = socket.read(&mut answer).context("receive")?;
            let answer = String::from_utf8_lossy(&answer[..length]).into_owned();
            let mut words = answer.split(' ');
            let (name, client) = (words.next().context("no name")?, words.next().context("no client")?.parse()?);
            let sum: u64 = words.next().context("no sum")?.parse()?;
            ensure!(sum == text.iter().map(|byte| u64::from(*byte)).sum::<u64>(), "something else arrived");
            heard = Some((name.to_owned(), client));
        }
        heard.context("nothing heard")
    };
    place.namespace().run(talk)?.with_context(|| format!("{} asks {target}", place.name()))
}

/// A Service per backend, with servers behind them; and one without.
fn services() -> [Service; 3] {
    [Service::new("at-a", 31, &["a1"]), Service::new("at-b", 32, &["b1"]), Service::new("nobody", 33, &[])]
}

/// The lab, its Services in SCTP where they are else in TCP, and the servers.
fn cluster(uplinks: [UplinkMode; 2]) -> Result<(Vec<Server>, Cluster)> {
    let options = AgentOptions { socket_lb: SocketLb::All, ..AgentOptions::default() };
    let cluster = Cluster::start_with(LabOptions { uplinks, ..LabOptions::default() }, options, |source| {
        for service in services() {
            let text = serde_json::to_string(&service.documents())?.replace("\"TCP\"", "\"SCTP\"");
            let documents: Vec<serde_json::Value> = serde_json::from_str(&text)?;
            write_documents(source, &format!("{}.yaml", service.name), &documents)?;
        }
        Ok(())
    })?;
    let mut servers = Vec::new();
    for name in ["a1", "b1"] {
        let (_, addresses) = address::pod(name).context("no such pod")?;
        for family in Family::ALL {
            servers.push(Server::new(cluster.lab.place(name)?, addresses.of(family), 8080)?);
        }
    }
    Ok((servers, cluster))
}

fn for_each_way(test: impl Fn(&Place, SocketAddr, &Service) -> Result<()>, is_outside: bool) -> Result<()> {
    for uplinks in UPLINKS {
        let (_servers, cluster) = cluster(uplinks)?;
        for service in services() {
            for family in Family::ALL {
                if is_outside {
                    for node in &cluster.lab.nodes {
                        let target = service.at_node(node.addresses(), family, traffic::Protocol::Tcp);
                        test(&cluster.lab.client, target.address, &service)?;
                    }
                } else {
                    let target = service.cluster(family, traffic::Protocol::Tcp).address;
                    test(cluster.lab.place("client-a")?, target, &service)?;
                    test(cluster.lab.place("client-b")?, target, &service)?;
                }
            }
        }
    }
    Ok(())
}

fn pods_hold_associations_with_backends_here_and_elsewhere() -> Result<()> {
    for_each_way(
        |client, target, service| {
            let Some(backend) = service.pods.first() else { return Ok(()) };
            let (_, own) = address::pod(client.name()).context("no such pod")?;
            let (name, seen) = ask(client, target)?;
            ensure!(name == *backend && own.has(seen), "{name} answers {} and sees {seen}", client.name());
            Ok(())
        },
        false,
    )
}

fn clients_outside_hold_associations_by_node_ports() -> Result<()> {
    for_each_way(
        |client, target, service| {
            let Some(backend) = service.pods.first() else { return Ok(()) };
            let (name, _) = ask(client, target)?;
            ensure!(name == *backend, "{name} answers at {target}");
            Ok(())
        },
        true,
    )
}

fn a_client_of_nobody_is_refused_at_once() -> Result<()> {
    for is_outside in [false, true] {
        for_each_way(
            |client, target, service| {
                if !service.pods.is_empty() {
                    return Ok(());
                }
                let error = ask(client, target).err().context("somebody answers")?;
                let kind = error.downcast_ref::<io::Error>().map(io::Error::kind);
                ensure!(kind == Some(io::ErrorKind::ConnectionRefused), "{error:?}");
                Ok(())
            },
            is_outside,
        )?;
    }
    Ok(())
}
