//! Scenarios of what an agent shows to others on its node and beyond: who may ask it, what they get, and that asking hurts nobody. Needs
//! root.

use std::{
    collections::BTreeSet,
    fs,
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream},
    os::unix::{fs::PermissionsExt as _, net::UnixStream},
    path::Path,
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use nix::sys::resource::{Resource as Limit, getrlimit, setrlimit};
use tests::{
    api::{
        ApiServer,
        object::{node, service, slice},
    },
    http::{ask, wait_for_answer},
    lab::agent::sluice_program,
    netns::Namespace,
    patience::patience,
    sandbox::{Agent, Sandbox},
    scenario::note,
};

const HEALTH: u16 = 10_256;
const METRICS: u16 = 10_249;
/// An address of the node that others reach.
const OWN: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 9);
const TOKEN: &str = "eyJhbGciOiJSUzI1NiJ9.a-secret-of-the-agents.x";

fn at(address: Ipv4Addr, port: u16) -> SocketAddr {
    (address, port).into()
}

/// An agent that bears a token, and the server that asks for it.
fn started(sandbox: &Sandbox) -> Result<(ApiServer, Agent)> {
    sandbox.namespace.ip(&format!("address add {OWN}/32 dev lo"))?;
    let server = sandbox.server()?;
    server.apply(node())?;
    server.apply(service("web", "10.96.0.1"))?;
    server.apply(slice("web", &["10.0.0.1"]))?;
    server.require_token(TOKEN);
    let path = sandbox.directory.path().join("kubeconfig");
    let text = format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: c\ncontexts: [{{name: c, context: {{cluster: c, user: u}}}}]\n\
         clusters: [{{name: c, cluster: {{server: \"{}\"}}}}]\nusers: [{{name: u, user: {{token: {TOKEN}}}}}]\n",
        server.url()
    );
    fs::write(&path, text)?;
    let state = sandbox.directory.path().join("state").display().to_string();
    let agent = sandbox.agent(&["--kubeconfig", &path.display().to_string(), "--state-dir", &state])?;
    agent.wait_for("in sync")?;
    for port in [HEALTH, METRICS] {
        wait_for_answer(&sandbox.namespace, at(Ipv4Addr::LOCALHOST, port), "/", |_| true)?;
    }
    Ok((server, agent))
}

/// An address as `/proc/net/tcp` has it: words of 32 bits, each in the order of this machine.
fn parse(text: &str) -> Option<SocketAddr> {
    let (address, port) = text.split_once(':')?;
    let words: Vec<[u8; 4]> = (0..address.len() / 8)
        .map(|word| Some(u32::from_str_radix(address.get(8 * word..8 * word + 8)?, 16).ok()?.to_ne_bytes()))
        .collect::<Option<_>>()?;
    let address = match words.concat().try_into() {
        Ok::<[u8; 16], _>(octets) => IpAddr::V6(Ipv6Addr::from(octets)),
        Err(octets) => IpAddr::V4(Ipv4Addr::from(<[u8; 4]>::try_from(octets).ok()?)),
    };
    Some(SocketAddr::new(address, u16::from_str_radix(port, 16).ok()?))
}

/// Sockets of a namespace that others may send to.
fn open_sockets(namespace: &Namespace) -> Result<BTreeSet<(&'static str, SocketAddr)>> {
    // Listening, and for UDP: not connected.
    let tables = [("tcp", "0A"), ("tcp6", "0A"), ("udp", "07"), ("udp6", "07"), ("raw", "07"), ("raw6", "07")];
    let mut open = BTreeSet::new();
    for (table, state) in tables {
        let text = namespace.run(|| fs::read_to_string(format!("/proc/thread-self/net/{table}")))??;
        for fields in text.lines().skip(1).map(|line| line.split_whitespace().collect::<Vec<_>>()) {
            if let [_, local, _, found, ..] = fields[..]
                && found == state
            {
                open.insert((table, parse(local).with_context(|| format!("not an address: {local}"))?));
            }
        }
    }
    Ok(open)
}

#[test]
fn scenario_39_an_agent_listens_where_kube_proxy_does_and_nowhere_else() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let (server, _agent) = started(&sandbox)?;
    let expected = [
        ("tcp", at(Ipv4Addr::UNSPECIFIED, HEALTH)),
        ("tcp", at(Ipv4Addr::LOCALHOST, METRICS)),
        ("tcp", server.address()),
    ];
    assert_eq!(open_sockets(&sandbox.namespace)?, BTreeSet::from(expected));
    let unix = sandbox.namespace.run(|| fs::read_to_string("/proc/thread-self/net/unix"))??;
    // A socket that listens has the flag __SO_ACCEPTCON.
    let listening = unix.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let listening = listening.filter(|fields| fields.get(3) == Some(&"00010000")).map(|fields| fields[7..].concat());
    let state = sandbox.directory.path().join("state/verify.sock");
    assert_eq!(listening.collect::<Vec<_>>(), [state.display().to_string()]);

    assert_eq!(ask(&sandbox.namespace, at(OWN, HEALTH), "GET", "/healthz")?.status, 200);
    let refused = sandbox.namespace.run(|| TcpStream::connect(at(OWN, METRICS)))?;
    assert_eq!(refused.map(drop).map_err(|error| error.kind()), Err(std::io::ErrorKind::ConnectionRefused));
    for port in [HEALTH, METRICS] {
        for path in ["/debug/pprof/", "/debug/pprof/heap", "/debug/pprof/profile", "/debug/flags/v", "/logs/", "/"] {
            let answer = ask(&sandbox.namespace, at(Ipv4Addr::LOCALHOST, port), "GET", path)?;
            assert_eq!(answer.status, 404, "{port}{path}: {}", answer.body);
        }
        let answer = ask(&sandbox.namespace, at(Ipv4Addr::LOCALHOST, port), "POST", "/healthz")?;
        assert!([404, 405].contains(&answer.status), "nothing takes a POST: {}", answer.status);
    }
    Ok(())
}

/// What somebody who is not root is told by a socket of the agent.
fn told_to_nobody(socket: &Path) -> Result<std::io::Result<String>> {
    const NOBODY: libc::c_long = 65_534;
    let ask = || {
        // SAFETY: it changes the user of this thread alone, which ends with this.
        let changed = unsafe { libc::syscall(libc::SYS_setresuid, NOBODY, NOBODY, NOBODY) };
        ensure!(changed == 0, "cannot become another user");
        let mut answer = String::new();
        Ok(UnixStream::connect(socket).and_then(|mut stream| stream.read_to_string(&mut answer)).map(|_| answer))
    };
    thread::scope(|scope| scope.spawn(ask).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
}

#[test]
fn scenario_39_the_agents_socket_answers_its_own_user_and_nobody_else() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let (_server, _agent) = started(&sandbox)?;
    let socket = sandbox.directory.path().join("state/verify.sock");
    let mut answer = String::new();
    UnixStream::connect(&socket)?.read_to_string(&mut answer)?;
    ensure!(answer.contains("frontends"), "{answer}");
    // The directories on the way let others through; the socket does not.
    for directory in socket.ancestors().skip(1).filter(|directory| directory.starts_with(sandbox.directory.path())) {
        fs::set_permissions(directory, fs::Permissions::from_mode(0o755))?;
    }
    let refused = told_to_nobody(&socket)?;
    assert_eq!(refused.map_err(|error| error.kind()), Err(std::io::ErrorKind::PermissionDenied));
    // Nor does the agent, whatever became of the socket's mode.
    fs::set_permissions(&socket, fs::Permissions::from_mode(0o666))?;
    assert_eq!(told_to_nobody(&socket)?.ok().as_deref(), Some(""));
    let mut again = String::new();
    UnixStream::connect(&socket)?.read_to_string(&mut again)?;
    assert_eq!(again, answer);
    Ok(())
}

/// Paths below a directory that others than their owner may do something with.
fn open_to_others(directory: &Path, found: &mut Vec<String>) -> Result<usize> {
    let mut count = 0;
    for entry in fs::read_dir(directory)? {
        let (path, metadata) = entry.and_then(|entry| Ok((entry.path(), entry.metadata()?)))?;
        let mode = metadata.permissions().mode() & 0o7777;
        // A directory may be looked into, a link leads nowhere.
        let allowed = if metadata.is_dir() { 0o755 } else { 0o600 };
        if mode & !allowed != 0 && !metadata.is_symlink() {
            found.push(format!("{} {mode:o}", path.display()));
        }
        count += if metadata.is_dir() { open_to_others(&path, found)? } else { 1 };
    }
    Ok(count)
}

#[test]
fn scenario_39_pins_are_the_owners_alone_and_nobody_is_shown_a_credential() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let (_server, agent) = started(&sandbox)?;
    let mut found = Vec::new();
    let count = open_to_others(sandbox.pins.path(), &mut found)?;
    ensure!(count > 40, "{count} pins");
    assert!(found.is_empty(), "{found:?}");

    let archive = sandbox.directory.path().join("report.tar.gz");
    let mut report = sandbox.namespace.command(sluice_program()?)?;
    let output =
        report.arg("bugreport").arg("--pin-path").arg(sandbox.pins.path()).arg("--to").arg(&archive).output()?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let content = Command::new("gzip").arg("-dc").arg(&archive).output().context("cannot run gzip")?;
    let report = String::from_utf8_lossy(&content.stdout);
    ensure!(content.status.success() && report.contains("--kubeconfig"), "the report does not name the command line");
    let metrics = at(Ipv4Addr::LOCALHOST, METRICS);
    let said = |path: &str| ask(&sandbox.namespace, metrics, "GET", path).map(|answer| answer.body);
    let configuration = said("/configz")?;
    ensure!(configuration.contains("kubeconfig") || configuration.contains("sluice"), "{configuration}");
    for (name, text) in [
        ("the report", &*report),
        ("/configz", &configuration),
        ("/metrics", &said("/metrics")?),
        ("the log", &agent.log()),
    ] {
        assert!(!text.contains("a-secret-of-the-agents"), "{name} shows the token");
    }
    Ok(())
}

/// As many descriptors as this process may have.
fn descriptors() -> Result<u64> {
    let (_, hard) = getrlimit(Limit::RLIMIT_NOFILE)?;
    setrlimit(Limit::RLIMIT_NOFILE, hard, hard)?;
    Ok(hard)
}

/// Clients that send one byte of a request now and then, until told to end.
fn trickle(mut clients: Vec<TcpStream>, is_over: &AtomicBool) {
    for byte in b"GET /healthz HTTP/1.1\r\nX-Slow: ".iter().chain(std::iter::repeat(&b'x')) {
        for client in &mut clients {
            // The server may have had enough of it.
            let _ = client.write_all(&[*byte]);
        }
        if is_over.load(Ordering::Relaxed) {
            return;
        }
        thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn scenario_39_ten_thousand_connections_and_clients_that_trickle_hold_up_nobody() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let (server, agent) = started(&sandbox)?;
    let connections = descriptors()?.saturating_sub(2_000).min(10_000);
    let health = at(Ipv4Addr::LOCALHOST, HEALTH);
    let connect = |count: u64| -> std::io::Result<Vec<_>> {
        (0..count).map(|_| TcpStream::connect_timeout(&health, patience(Duration::from_secs(20)))).collect()
    };
    let slow = sandbox.namespace.run(|| connect(50))??;
    let is_over = AtomicBool::new(false);
    let slowest = thread::scope(|scope| -> Result<Duration> {
        let trickling = scope.spawn(|| trickle(slow, &is_over));
        let result = (|| {
            let silent = sandbox.namespace.run(|| connect(connections))??;
            let mut slowest = Duration::ZERO;
            for host in 2..12 {
                let began = Instant::now();
                server.apply(slice("web", &[&format!("10.0.0.{host}")]))?;
                let target = format!("10.0.0.{host}:8080");
                sandbox.wait_for_picture("the change", |picture| {
                    picture["10.96.0.1:80/TCP"].internal.iter().eq([target.as_str()])
                })?;
                slowest = slowest.max(began.elapsed());
                for path in ["/healthz", "/livez", "/readyz"] {
                    assert_eq!(ask(&sandbox.namespace, health, "GET", path)?.status, 200, "{path}");
                }
            }
            drop(silent);
            Ok(slowest)
        })();
        is_over.store(true, Ordering::Relaxed);
        ensure!(trickling.join().is_ok(), "the trickle panicked");
        result
    })?;
    note(
        39,
        &format!(
            "{connections} silent connections to the health port and 50 that trickle; a change takes {slowest:?} at most"
        ),
    );
    assert!(slowest < patience(Duration::from_secs(2)), "{slowest:?}");
    let open = fs::read_dir(format!("/proc/{}/fd", agent.id()))?.count();
    assert!(open < 500, "the agent keeps {open} descriptors");
    Ok(())
}
