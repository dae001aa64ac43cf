//! Scenarios of the connection to the API server: half open, the first address dead, credentials replaced. Needs root.

use std::{
    fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use tests::{
    api::{
        ApiServer, Authority,
        object::{node, service, slice},
    },
    netns::Namespace,
    patience::patience,
    sandbox::{Agent, Sandbox},
};

const NODE: &str = "192.0.2.1";
const FAR: &str = "192.0.2.2";
const WEB: &str = "10.96.0.1:80/TCP";

fn fill(server: &ApiServer) -> Result<()> {
    server.apply(node())?;
    server.apply(service("web", "10.96.0.1"))?;
    server.apply(slice("web", &["10.0.0.1"]))
}

/// Gives the Service another endpoint; returns how long it took to be in the kernel.
fn change(sandbox: &Sandbox, server: &ApiServer, endpoint: &str) -> Result<Duration> {
    let began = Instant::now();
    server.apply(slice("web", &[endpoint]))?;
    let target = format!("{endpoint}:8080");
    sandbox.wait_for_picture("the change", |picture| picture[WEB].internal.iter().eq([target.as_str()]))?;
    Ok(began.elapsed())
}

/// A namespace on a wire to the sandbox's.
fn beyond_a_wire(sandbox: &Sandbox) -> Result<Namespace> {
    let far = Namespace::new("far")?;
    sandbox.namespace.ip(&format!(
        "link add api type veth peer name node netns {}\naddress add {NODE}/24 dev api\nlink set api up",
        far.path().display()
    ))?;
    far.ip(&format!("address add {FAR}/24 dev node\nlink set node up"))?;
    Ok(far)
}

/// The agent's ports of the connections that are open in a server's namespace.
fn client_ports(namespace: &Namespace) -> Result<Vec<u16>> {
    const ESTABLISHED: &str = "01";
    let table = namespace.run(|| fs::read_to_string("/proc/thread-self/net/tcp"))??;
    let fields = table.lines().skip(1).map(|line| line.split_whitespace().collect::<Vec<_>>());
    let open = fields.filter(|fields| fields.get(3) == Some(&ESTABLISHED));
    let ports = open.filter_map(|fields| fields.get(2)?.split_once(':').map(|(_, port)| port.to_owned()));
    ports.map(|port| Ok(u16::from_str_radix(&port, 16)?)).collect()
}

/// What the server sends on the connections that are open is lost from now on, as if a firewall had forgotten them.
fn lose_answers(far: &Namespace) -> Result<usize> {
    let ports = client_ports(far)?;
    for port in &ports {
        far.ip(&format!("rule add pref 10 to {NODE} ipproto tcp dport {port} blackhole"))?;
    }
    Ok(ports.len())
}

#[test]
fn scenario_03_a_watch_that_is_half_open_is_noticed() -> Result<()> {
    let silence = Duration::from_secs(3);
    let sandbox = Sandbox::new()?;
    let far = beyond_a_wire(&sandbox)?;
    let server = far.run(|| ApiServer::start_at((FAR.parse::<Ipv4Addr>()?, 6443).into()))??;
    fill(&server)?;
    let agent = sandbox.agent(&["--master", &server.url(), "--api-silence", "3"])?;
    agent.wait_for("in sync")?;
    ensure!(lose_answers(&far)? >= 3, "three watches have a connection each");
    let took = change(&sandbox, &server, "10.0.0.2")?;
    println!("noticed after {took:?}");
    // A third of the time more until the next probe, and the wait before the next attempt.
    assert!(took < silence + silence / 3 + patience(Duration::from_secs(4)), "{took:?}:\n{}", agent.log());
    assert!(took > silence / 2, "the connections were not lost: {took:?}");
    change(&sandbox, &server, "10.0.0.3")?;
    Ok(())
}

/// An address at which nothing answers, not even with a RST.
fn black_hole(sandbox: &Sandbox) -> Result<String> {
    sandbox.namespace.ip(
        "link add hole type veth peer name nothing\nlink set hole up\nlink set nothing up\naddress add 198.51.100.1/24 dev hole\n\
         neighbour add 198.51.100.9 lladdr 02:00:00:00:00:09 dev hole",
    )?;
    Ok("http://198.51.100.9:6443".into())
}

fn agent_in_a_pod(sandbox: &Sandbox, arguments: &[&str]) -> Result<Agent> {
    let mut command = sandbox.command(arguments)?;
    // What kubelet tells every pod, and what leads nowhere as long as no proxy runs.
    command.env("KUBERNETES_SERVICE_HOST", "10.96.0.1").env("KUBERNETES_SERVICE_PORT", "443");
    command.arg("--cgroup").arg(sandbox.cgroup.path());
    sandbox.start(command)
}

#[test]
fn scenario_09_an_agent_without_a_proxy_finds_a_server_that_lives() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let mut first = sandbox.server()?;
    fill(&first)?;
    let second = sandbox.namespace.run(|| first.replica((Ipv4Addr::LOCALHOST, 0).into()))??;
    let urls = [&black_hole(&sandbox)?, "http://127.0.0.1:9", &first.url(), &second.url()].join(",");
    let began = Instant::now();
    let agent = agent_in_a_pod(&sandbox, &["--api-servers", &urls])?;
    agent.wait_for("in sync")?;
    let took = began.elapsed();
    println!("found after {took:?}");
    // Of two dead ones, each costs at most five seconds.
    assert!(took < patience(Duration::from_secs(10)), "{took:?}:\n{}", agent.log());

    first.stop();
    let took = change(&sandbox, &second, "10.0.0.2")?;
    println!("turned to the other after {took:?}");
    assert!(took < patience(Duration::from_secs(5)), "{took:?}:\n{}", agent.log());
    Ok(())
}

/// A kubeconfig of files that may be replaced, as those of a service account are.
struct Account {
    directory: PathBuf,
}

impl Account {
    fn new(directory: &Path, server: &ApiServer) -> Result<Self> {
        let account = Self { directory: directory.to_owned() };
        let path = |name: &str| directory.join(name).display().to_string();
        let text = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: c\ncontexts: [{{name: c, context: {{cluster: c, user: u}}}}]\n\
             clusters: [{{name: c, cluster: {{server: \"{}\", certificate-authority: {}}}}}]\n\
             users: [{{name: u, user: {{tokenFile: {}}}}}]\n",
            server.url(),
            path("ca.crt"),
            path("token"),
        );
        account.replace("kubeconfig", &text)?;
        Ok(account)
    }

    fn path(&self, name: &str) -> String {
        self.directory.join(name).display().to_string()
    }

    /// By renaming, as kubelet does.
    fn replace(&self, name: &str, text: &str) -> Result<()> {
        let hidden = self.path(&format!(".{name}"));
        fs::write(&hidden, text)
            .and_then(|()| fs::rename(&hidden, self.path(name)))
            .with_context(|| format!("cannot write {name}"))
    }
}

#[test]
fn scenario_10_tokens_and_certificates_are_replaced_under_the_agents_eyes() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let mut server = sandbox.server()?;
    fill(&server)?;
    let authority = Authority::new()?;
    server.secure(&authority);
    server.require_token("first");
    let account = Account::new(sandbox.directory.path(), &server)?;
    account.replace("ca.crt", authority.pem())?;
    account.replace("token", "first")?;
    let agent = sandbox.agent(&["--kubeconfig", &account.path("kubeconfig")])?;
    agent.wait_for("in sync")?;
    let gap = patience(Duration::from_secs(4));

    server.require_token("second");
    account.replace("token", "second")?;
    server.end_watches();
    let took = change(&sandbox, &server, "10.0.0.2")?;
    assert!(took < gap, "the token: {took:?}:\n{}", agent.log());

    let authority = Authority::new()?;
    server.secure(&authority);
    server.require_token("third");
    account.replace("ca.crt", authority.pem())?;
    account.replace("token", "third")?;
    // Connections that are open go on with the old certificate: those, too, must end.
    server.stop();
    sandbox.namespace.run(|| server.resume())??;
    let took = change(&sandbox, &server, "10.0.0.3")?;
    println!("the certificate: {took:?}");
    assert!(took < gap, "the certificate: {took:?}:\n{}", agent.log());
    Ok(())
}
