//! `sluice cleanup --kube-proxy` among rules of kube-proxy's shape and those of others, which the node's own tools have loaded; and an
//! agent on a node where kube-proxy has run. Needs root, and nft, iptables and ipset.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream},
    process::{Command, ExitCode, Output, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use libtest_mimic::{Arguments, Trial};
use tests::{
    lab::agent::sluice_program,
    netns::Namespace,
    patience::{patience, wait_until},
    sandbox::Sandbox,
};

/// Lines that begin with a tab are kube-proxy's.
const IPTABLES: &str = include_str!("../fixtures/kube-proxy/iptables.rules");
const IPVS: &str = include_str!("../fixtures/kube-proxy/ipvs.rules");
const SETS: &str = include_str!("../fixtures/kube-proxy/ipvs.sets");
const NFTABLES: &str = include_str!("../fixtures/kube-proxy/nftables.nft");
const FOREIGN: &str = include_str!("../fixtures/kube-proxy/foreign.nft");

const FOREIGN_SET: &str = "create OPERATOR-ALLOWED hash:ip\nadd OPERATOR-ALLOWED 192.0.2.50\n";

type Test = fn() -> Result<()>;

const TESTS: [(&str, Test); 10] = [
    ("of_iptables_nft_everything_goes_and_nothing_of_others", of_iptables_nft_everything_goes_and_nothing_of_others),
    (
        "of_iptables_legacy_everything_goes_and_nothing_of_others",
        of_iptables_legacy_everything_goes_and_nothing_of_others,
    ),
    ("of_nftables_its_two_tables_go", of_nftables_its_two_tables_go),
    ("of_mode_ipvs_sets_and_the_device_go", of_mode_ipvs_sets_and_the_device_go),
    (
        "without_tools_it_does_what_it_can_and_says_what_is_missing",
        without_tools_it_does_what_it_can_and_says_what_is_missing,
    ),
    ("as_long_as_kube_proxy_runs_on_this_node_it_is_refused", as_long_as_kube_proxy_runs_on_this_node_it_is_refused),
    (
        "an_open_connection_goes_on_without_the_rules_that_translated_it",
        an_open_connection_goes_on_without_the_rules_that_translated_it,
    ),
    ("the_last_rules_that_translate_hold_connections", the_last_rules_that_translate_hold_connections),
    ("check_names_what_it_finds", check_names_what_it_finds),
    ("addresses_of_the_device_of_mode_ipvs_are_not_the_nodes", addresses_of_the_device_of_mode_ipvs_are_not_the_nodes),
];

fn main() -> ExitCode {
    let missing: Vec<&str> = ["nft", "iptables-nft-save", "iptables-legacy-save", "ipset"]
        .into_iter()
        .filter(|program| Command::new(program).arg("--version").stdout(Stdio::null()).status().is_err())
        .collect();
    if !missing.is_empty() {
        eprintln!("IGNORED: there is no {} here; packages nftables, iptables and ipset have them", missing.join(", "));
    }
    let trials = TESTS.map(|(name, test)| {
        let run = move || test().map_err(|error| format!("{error:?}").into());
        Trial::test(name, run).with_ignored_flag(!missing.is_empty())
    });
    libtest_mimic::run(&Arguments::from_args(), trials.into()).exit_code()
}

/// A node's network namespace, and what is done in it.
struct Node(Namespace);

impl Node {
    fn new() -> Result<Self> {
        Namespace::new("node").map(Self)
    }

    /// Runs a program on an input: what it prints.
    fn run(&self, program: &str, arguments: &[&str], input: &str) -> Result<String> {
        let mut command = self.0.command(program)?;
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().with_context(|| format!("cannot run {program}"))?;
        child.stdin.take().context("no stdin")?.write_all(input.as_bytes())?;
        let output = child.wait_with_output()?;
        let complaint = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{program} {arguments:?}: {complaint}");
        Ok(String::from_utf8(output.stdout)?)
    }

    fn sluice(&self, arguments: &[&str]) -> Result<Output> {
        Ok(self.0.command(sluice_program()?)?.args(arguments).output()?)
    }

    /// Cleans up, which must go well.
    fn clean(&self, arguments: &[&str]) -> Result<String> {
        let output = self.sluice(&[&["cleanup", "--kube-proxy"], arguments].concat())?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8(output.stdout)?)
    }

    /// Cleans up, which must not go well: the exit status and what is said.
    fn refuses(&self, arguments: &[&str]) -> Result<(Option<i32>, String)> {
        let output = self.sluice(&[&["cleanup", "--kube-proxy"], arguments].concat())?;
        ensure!(!output.status.success(), "it was done: {}", String::from_utf8_lossy(&output.stdout));
        Ok((output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned()))
    }

    /// Rules with their counters, and policies; without times of day.
    fn saved(&self, tool: &str) -> Result<String> {
        let text = self.run(&format!("{tool}-save"), &["--counters"], "")?;
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        // What policies count is what the kernel sends by itself.
        Ok(lines
            .map(|line| {
                if line.starts_with(':') { line.split(" [").next().unwrap_or(line) } else { line }.to_owned() + "\n"
            })
            .collect())
    }

    fn ruleset(&self) -> Result<String> {
        self.run("nft", &["list", "ruleset"], "")
    }
}

fn with_kube_proxy(rules: &str) -> String {
    rules.replace('\t', "")
}

fn without_kube_proxy(rules: &str) -> String {
    rules.lines().filter(|line| !line.starts_with('\t')).map(|line| line.to_owned() + "\n").collect()
}

/// The same for IPv6.
fn of_ipv6(rules: &str) -> String {
    let mapped = |v4: Ipv4Addr| Ipv6Addr::from_bits(0x2001_0db8 << 96 | u128::from(v4.to_bits()));
    let word = |word: &str| -> String {
        let (address, length) = word.split_once('/').unwrap_or((word, "32"));
        if word == "255.255.255.255" {
            "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff".into()
        } else if let Ok(address) = word.parse::<SocketAddrV4>() {
            format!("[{}]:{}", mapped(*address.ip()), address.port())
        } else if let (Ok(address), Ok(length)) = (address.parse(), length.parse::<u8>()) {
            format!("{}/{}", mapped(address), 96 + length)
        } else {
            word.replace("icmp-port", "icmp6-port")
        }
    };
    let line = |line: &str| line.split(' ').map(word).collect::<Vec<_>>().join(" ") + "\n";
    rules.lines().map(line).collect()
}

/// Every rule has counted something.
fn counted(rules: &str) -> String {
    rules.replace("\n-A ", "\n[7:420] -A ")
}

fn of_iptables_nft_everything_goes_and_nothing_of_others() -> Result<()> {
    of_iptables("nft")
}

fn of_iptables_legacy_everything_goes_and_nothing_of_others() -> Result<()> {
    of_iptables("legacy")
}

fn of_iptables(backend: &str) -> Result<()> {
    for (program, rules) in [("iptables", IPTABLES.to_owned()), ("ip6tables", of_ipv6(IPTABLES))] {
        let tool = format!("{program}-{backend}");
        let (node, other) = (Node::new()?, Node::new()?);
        let restore = format!("{tool}-restore");
        node.run(&restore, &["--counters"], &counted(&with_kube_proxy(&rules)))?;
        other.run(&restore, &["--counters"], &counted(&without_kube_proxy(&rules)))?;
        let before = node.saved(&tool)?;
        let planned = node.clean(&["--dry-run"])?;
        assert!(planned.contains("would be removed") && planned.contains("-j KUBE-SERVICES"), "{planned}");
        assert_eq!(node.saved(&tool)?, before, "{tool}: a dry run changes nothing");
        let done = node.clean(&["-o", "json"])?;
        let report: serde_json::Value = serde_json::from_str(&done)?;
        let rows = report["removed"].as_array().context("nothing removed")?;
        assert!(rows.iter().all(|row| row["mechanism"] == format!("iptables-{backend}").as_str()), "{done}");
        assert_eq!(node.saved(&tool)?, other.saved(&tool)?, "{tool}");
        assert_eq!(node.clean(&[])?, "There is nothing of kube-proxy's here.\n");
        assert_eq!(node.saved(&tool)?, other.saved(&tool)?, "{tool}: the second time");
    }
    Ok(())
}

fn of_nftables_its_two_tables_go() -> Result<()> {
    let (node, other) = (Node::new()?, Node::new()?);
    let (early, late) = FOREIGN.split_at(FOREIGN.find("add table inet kube-proxy").context("no such table")?);
    for rules in [early, NFTABLES, late] {
        node.run("nft", &["-f", "-"], rules)?;
    }
    other.run("nft", &["-f", "-"], FOREIGN)?;
    let before = node.ruleset()?;
    let planned = node.clean(&["--dry-run"])?;
    assert!(planned.contains("the table, with 21 chains") && planned.contains("IPv6"), "{planned}");
    assert_eq!(node.ruleset()?, before, "a dry run changes nothing");
    node.clean(&[])?;
    assert_eq!(node.ruleset()?, other.ruleset()?);
    assert_eq!(node.clean(&[])?, "There is nothing of kube-proxy's here.\n");
    assert_eq!(node.ruleset()?, other.ruleset()?);
    Ok(())
}

fn of_mode_ipvs_sets_and_the_device_go() -> Result<()> {
    for backend in ["nft", "legacy"] {
        let (node, other) = (Node::new()?, Node::new()?);
        let tool = format!("iptables-{backend}");
        node.run("ipset", &["restore"], &format!("{FOREIGN_SET}{SETS}"))?;
        other.run("ipset", &["restore"], FOREIGN_SET)?;
        node.run(&format!("{tool}-restore"), &["--counters"], &counted(&with_kube_proxy(IPVS)))?;
        other.run(&format!("{tool}-restore"), &["--counters"], &counted(&without_kube_proxy(IPVS)))?;
        // Not every kernel has dummy devices.
        node.0.ip("link add kube-ipvs0 type veth peer name peer\naddress add 10.96.0.10/32 dev kube-ipvs0")?;
        let report = node.clean(&[])?;
        assert!(report.contains("device kube-ipvs0") && report.contains("set KUBE-6-NODE-PORT-TCP"), "{report}");
        assert_eq!(node.saved(&tool)?, other.saved(&tool)?, "{tool}");
        assert_eq!(node.run("ipset", &["list", "-name"], "")?, "OPERATOR-ALLOWED\n", "{tool}");
        assert!(node.0.device_index("kube-ipvs0").is_err(), "the device is still there");
        assert_eq!(node.clean(&[])?, "There is nothing of kube-proxy's here.\n");
    }
    Ok(())
}

fn without_tools_it_does_what_it_can_and_says_what_is_missing() -> Result<()> {
    let node = Node::new()?;
    node.run("nft", &["-f", "-"], NFTABLES)?;
    node.run("iptables-nft-restore", &[], &with_kube_proxy(IPTABLES))?;
    node.run("ip6tables-legacy-restore", &[], &with_kube_proxy(&of_ipv6(IPTABLES)))?;
    let rules = node.saved("iptables-nft")?;
    let mut command = node.0.command(sluice_program()?)?;
    let output = command.args(["cleanup", "--kube-proxy"]).env("PATH", "/nonexistent").output()?;
    let said = String::from_utf8(output.stderr)?;
    assert_eq!(output.status.code(), Some(1), "{said}");
    for missing in ["no iptables-nft-save here", "no ip6tables-legacy-save here", "run this on the node itself"] {
        assert!(said.contains(missing), "{missing}: {said}");
    }
    assert!(!said.contains("no iptables-legacy-save"), "there are no such tables: {said}");
    assert!(!node.ruleset()?.contains("table ip kube-proxy"), "what needs no tool was not done");
    assert_eq!(node.saved("iptables-nft")?, rules);
    Ok(())
}

fn as_long_as_kube_proxy_runs_on_this_node_it_is_refused() -> Result<()> {
    let (node, elsewhere) = (Node::new()?, Node::new()?);
    let directory = tempfile::tempdir()?;
    let program = directory.path().join("kube-proxy");
    fs::copy("/bin/sleep", &program)?;
    for node in [&node, &elsewhere] {
        node.run("nft", &["-f", "-"], NFTABLES)?;
    }
    let mut process = node.0.command(&program)?.arg("3600").spawn()?;
    let before = node.ruleset()?;
    let refused = node.refuses(&["--force"]);
    let other = elsewhere.clean(&[]);
    process.kill()?;
    process.wait()?;
    let (status, said) = refused?;
    assert_eq!(status, Some(78), "{said}");
    assert!(said.contains(&format!("kube-proxy runs on this node (process {})", process.id())), "{said}");
    assert_eq!(node.ruleset()?, before);
    other.context("one in another network namespace is none of this node")?;
    node.clean(&[])?;
    assert_eq!(node.ruleset()?, "");
    Ok(())
}

/// A client, a node, a backend that sends back what it gets, and a connection between the two.
struct Path {
    client: Namespace,
    node: Node,
    connection: TcpStream,
    _backend: Namespace,
}

const SERVICE: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 96, 0, 10)), 80);

impl Path {
    /// `rules` are told to nft on the node before the client connects.
    fn new(rules: &str) -> Result<Self> {
        let (client, node, backend) = (Namespace::new("client")?, Node::new()?, Namespace::new("backend")?);
        let (to_client, to_backend) = (client.path(), backend.path());
        node.0.ip(&format!(
            "link add to-client type veth peer name eth0 netns {}
            link add to-backend type veth peer name eth0 netns {}
            address add 192.0.2.9/24 dev to-client\naddress add 10.244.1.1/24 dev to-backend
            link set to-client up\nlink set to-backend up",
            to_client.display(),
            to_backend.display(),
        ))?;
        client.ip("address add 192.0.2.5/24 dev eth0\nlink set eth0 up\nroute add default via 192.0.2.9")?;
        backend.ip("address add 10.244.1.5/24 dev eth0\nlink set eth0 up\nroute add default via 10.244.1.1")?;
        node.0.sysctl("net/ipv4/ip_forward", "1")?;
        node.run("nft", &["-f", "-"], rules)?;
        let listener = backend.run(|| TcpListener::bind("10.244.1.5:8080"))??;
        thread::spawn(move || {
            for mut connection in listener.incoming().flatten() {
                thread::spawn(move || {
                    let mut byte = [0];
                    while connection.read_exact(&mut byte).and_then(|()| connection.write_all(&byte)).is_ok() {}
                });
            }
        });
        let connect = || TcpStream::connect_timeout(&SERVICE, patience(Duration::from_secs(10)));
        let connection = client.run(connect)?.context("the rules translate nothing")?;
        Ok(Self { client, node, connection, _backend: backend })
    }

    /// Whether a byte comes back.
    fn answers(&mut self, limit: Duration) -> Result<bool> {
        self.connection.set_read_timeout(Some(limit))?;
        self.connection.write_all(b"?")?;
        Ok(self.connection.read_exact(&mut [0]).is_ok())
    }
}

/// One Service port with one endpoint, as kube-proxy writes it.
const SHORT: &str = "add table ip kube-proxy
add map ip kube-proxy service-ips { type ipv4_addr . inet_proto . inet_service : verdict ; }
add chain ip kube-proxy nat-prerouting { type nat hook prerouting priority -100 ; }
add chain ip kube-proxy services
add rule ip kube-proxy nat-prerouting jump services
add chain ip kube-proxy endpoint-KX7QO3BP-shop/web/tcp/http__10.244.1.5/8080
add rule ip kube-proxy endpoint-KX7QO3BP-shop/web/tcp/http__10.244.1.5/8080 meta l4proto tcp dnat to 10.244.1.5:8080
add chain ip kube-proxy service-6FYM2NDL-shop/web/tcp/http
add rule ip kube-proxy service-6FYM2NDL-shop/web/tcp/http goto endpoint-KX7QO3BP-shop/web/tcp/http__10.244.1.5/8080
add rule ip kube-proxy services ip daddr . meta l4proto . th dport vmap @service-ips
add element ip kube-proxy service-ips { 10.96.0.10 . tcp . 80 : goto service-6FYM2NDL-shop/web/tcp/http }
";

fn an_open_connection_goes_on_without_the_rules_that_translated_it() -> Result<()> {
    let mut path = Path::new(&format!("{SHORT}{FOREIGN}"))?;
    assert!(path.answers(patience(Duration::from_secs(10)))?);
    let (status, said) = path.node.refuses(&[])?;
    assert_eq!(status, Some(1), "{said}");
    assert!(said.contains("open connections with a translated destination: 1;"), "{said}");
    assert!(path.node.ruleset()?.contains("table ip kube-proxy {"));
    path.node.clean(&["--force"])?;
    for _ in 0..3 {
        assert!(path.answers(patience(Duration::from_secs(10)))?, "nf_conntrack has lost it");
    }
    let again = path.client.run(|| TcpStream::connect_timeout(&SERVICE, Duration::from_secs(2)))?;
    assert!(again.is_err(), "a new one is still translated");
    drop(path.connection);
    Ok(())
}

/// The kernel looks at packets for NAT as long as there is a rule that may ask for it. This is why open connections are waited for.
fn the_last_rules_that_translate_hold_connections() -> Result<()> {
    let mut path = Path::new(SHORT)?;
    assert!(path.answers(patience(Duration::from_secs(10)))?);
    assert_eq!(path.node.refuses(&[])?.0, Some(1));
    assert!(path.answers(patience(Duration::from_secs(10)))?, "it was refused, and done");
    path.node.clean(&["--force"])?;
    assert!(!path.answers(Duration::from_secs(2))?, "the kernel has become better: do not refuse any more");
    Ok(())
}

fn check_names_what_it_finds() -> Result<()> {
    let node = Node::new()?;
    let found = |node: &Node| -> Result<serde_json::Value> {
        let output = node.sluice(&["check", "--pin-path", "/sys/fs/bpf/sluice-check", "-o", "json"])?;
        let findings: Vec<serde_json::Value> = serde_json::from_slice(&output.stdout)?;
        findings.into_iter().find(|finding| finding["subject"] == "kube-proxy").context("nothing of kube-proxy")
    };
    assert_eq!(found(&node)?["verdict"], "good");
    node.run("iptables-legacy-restore", &[], &with_kube_proxy(IPTABLES))?;
    let finding = found(&node)?;
    assert_eq!(finding["verdict"], "fallback", "{finding}");
    assert_eq!(finding["found"], "does not run, but its rules are here, mode iptables (Service ports: 1)");
    assert!(
        finding["advice"].as_str().is_some_and(|advice| advice.contains("sluice cleanup --kube-proxy")),
        "{finding}"
    );
    Ok(())
}

/// A Service whose address were the node's would be refused.
fn addresses_of_the_device_of_mode_ipvs_are_not_the_nodes() -> Result<()> {
    const OBJECTS: &str = r"
apiVersion: v1
kind: Service
metadata: {namespace: shop, name: web}
spec: {clusterIP: 10.96.0.10, ports: [{name: http, port: 80}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {namespace: shop, name: web-4, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
endpoints: [{addresses: [10.244.1.5]}]
ports: [{name: http, port: 8080}]
";
    let sandbox = Sandbox::new()?;
    sandbox.namespace.ip("link add uplink type veth peer name wire\nlink set uplink up\nlink set wire up
        address add 192.0.2.1/24 dev uplink\nroute add default via 192.0.2.254
        link add kube-ipvs0 type veth peer name peer\naddress add 10.96.0.10/32 dev kube-ipvs0
        address add 203.0.113.81/32 dev kube-ipvs0")?;
    let objects = sandbox.directory.path().join("objects");
    fs::create_dir(&objects)?;
    fs::write(objects.join("shop.yaml"), OBJECTS)?;
    let source = format!("file:{}", objects.display());
    let agent = sandbox.agent(&[
        "--source",
        &source,
        "--uplinks",
        "uplink",
        "--nodeport-addresses",
        "all",
        "--flow-table-size",
        "16384",
    ])?;
    agent.wait_for("in sync")?;
    sandbox.wait_for_picture("the Service", |picture| picture.contains_key("10.96.0.10:80/TCP"))?;
    let command = || sandbox.namespace.command("bpftool");
    let listed = wait_until("the node's addresses", Duration::from_secs(20), || {
        let map = sandbox.pins.path().join("maps/LOCAL_ADDRS_V4");
        let output = command().ok()?.args(["--json", "map", "dump", "pinned"]).arg(map).output().ok()?;
        let entries: Vec<serde_json::Value> = serde_json::from_slice(&output.stdout).ok()?;
        (entries.len() >= 2).then_some(entries)
    })?;
    assert_eq!(listed.len(), 2, "loopback and the uplink's: {listed:?}");
    Ok(())
}
