//! Scenario 28: sockets that were translated as they connected, and whose backend is deleted. Many at once.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use tests::{
    http,
    lab::{LabOptions, address::Family, agent::AgentOptions, cluster::Cluster, manifest::Service},
    patience::{patience, wait_until},
    traffic::{
        Ask, Failure, Protocol,
        place::{Activity, Place},
    },
};

const METRICS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 10_249);

/// Sockets of each kind and family.
const SOCKETS: u16 = 25;

/// From the deletion, or from the moment a backend counts as gone, to the socket's end.
const AT_ONCE: Duration = Duration::from_secs(1);

/// An endpoint that comes back within that time is what it was, and no connection to it is ended.
const GRACE: Duration = Duration::from_secs(5);

/// What a socket says that was ended: waiting, sending, or asked for its peer.
const ENDED: [Failure; 3] =
    [Failure::Reset, Failure::System { errno: libc::EDESTADDRREQ }, Failure::System { errno: libc::ENOTCONN }];

fn open<'place>(client: &'place Place, service: &Service, protocol: Protocol) -> Result<Vec<Activity<'place>>> {
    let mut sockets = Vec::new();
    for family in Family::ALL {
        for _ in 0..SOCKETS {
            let socket = client.open(Ask::new(service.cluster(family, protocol)).within(patience(AT_ONCE)))?;
            ensure!(service.pods.contains(&socket.ask()?.pod.as_str()));
            sockets.push(socket);
        }
    }
    Ok(sockets)
}

/// Asks with each until it has ended. Before that it is answered by the pod it was with, or not at all, and by nobody else.
fn wait_until_ended(sockets: &[Activity<'_>], pod: &str, since: Instant, limit: Duration) -> Result<Duration> {
    for (number, socket) in sockets.iter().enumerate() {
        loop {
            match socket.try_ask()? {
                Err(failure) if ENDED.contains(&failure) => break,
                Err(Failure::TimedOut) => {}
                Ok(answer) if answer.pod == pod => {}
                other => anyhow::bail!("socket {number}: {other:?}"),
            }
            ensure!(since.elapsed() < patience(limit), "socket {number} goes on after {:?}", since.elapsed());
        }
    }
    Ok(since.elapsed())
}

/// What a resolver does: asks on its connected socket, and opens another one when that is ended.
fn resolved<'place>(client: &'place Place, ask: Ask, socket: &mut Option<Activity<'place>>) -> Option<String> {
    if socket.is_none() {
        *socket = client.open(ask.within(patience(Duration::from_millis(200)))).ok();
    }
    match socket.as_ref()?.try_ask().ok()? {
        Ok(answer) => Some(answer.pod),
        Err(failure) => {
            if ENDED.contains(&failure) {
                *socket = None;
            }
            None
        }
    }
}

#[test]
fn scenario_28_sockets_to_a_deleted_backend_are_ended_and_others_are_not() -> Result<()> {
    let (moving, staying) = (Service::new("moving", 40, &["a1"]), Service::new("staying", 41, &["a2"]));
    let cluster = Cluster::start(LabOptions::default(), AgentOptions::default(), &[moving.clone(), staying.clone()])?;
    let (host, pod) = (cluster.lab.place("node-a")?, cluster.lab.place("client-a")?);
    let datagrams = open(host, &moving, Protocol::Udp)?;
    let connections = [open(host, &moving, Protocol::Tcp)?, open(pod, &moving, Protocol::Tcp)?];
    let bystanders = [open(host, &staying, Protocol::Udp)?, open(host, &staying, Protocol::Tcp)?];
    let mut resolvers = Family::ALL.map(|family| (Ask::new(moving.cluster(family, Protocol::Udp)), None));
    for (ask, socket) in &mut resolvers {
        ensure!(resolved(host, *ask, socket).as_deref() == Some("a1"));
    }

    let deleted = Instant::now();
    moving.with_pods(&["b1"]).write(cluster.source())?;
    for (ask, socket) in &mut resolvers {
        wait_until("the resolver's answer", AT_ONCE, || resolved(host, *ask, socket).filter(|pod| pod == "b1"))?;
    }
    let recovered = deleted.elapsed();
    let udp = wait_until_ended(&datagrams, "a1", deleted, AT_ONCE).context("UDP")?;
    let tcp = connections.iter().map(|sockets| wait_until_ended(sockets, "a1", deleted, GRACE + AT_ONCE));
    let tcp = tcp.collect::<Result<Vec<_>>>().context("TCP")?;
    eprintln!("a resolver had its answer after {recovered:?}; UDP was ended after {udp:?}, TCP after {tcp:?}");
    ensure!(tcp.iter().all(|tcp| *tcp + AT_ONCE >= GRACE), "before anybody could know that it does not come back");
    for socket in bystanders.iter().flatten() {
        assert_eq!(socket.ask().context("somebody else's socket")?.pod, "a2");
    }
    for place in [host, pod] {
        assert_eq!(place.ask(Ask::new(moving.cluster(Family::V4, Protocol::Tcp)))?.pod, "b1");
    }
    // Of each kind and of the resolver, and no other.
    for family in Family::ALL {
        let series = format!("kubeproxy_conntrack_reconciler_deleted_entries_total{{ip_family=\"{}\"}}", family.name());
        wait_until(&series, Duration::from_secs(3), || {
            let answer = http::ask(host.namespace(), METRICS, "GET", "/metrics").ok()?;
            let ended = answer.metric(&series)?;
            ((ended - f64::from(3 * SOCKETS + 1)).abs() < 0.5).then_some(())
        })?;
    }
    Ok(())
}
