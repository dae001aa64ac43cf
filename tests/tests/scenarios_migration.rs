//! Scenario 40: Sluice takes kube-proxy's place on a node that is at work, and gives it back. Needs root,
//! `nft` and `iptables`.

use std::{net::SocketAddr, ops::RangeInclusive, path::Path, time::Duration};

use anyhow::{Context as _, Result, ensure};
use proxy_common::outcome::{Hook, Outcome};
use tests::{
    lab::{
        Lab, LabOptions, Node,
        address::{self, Family},
        agent::{AgentOptions, clean_up},
        kube_proxy::{self, Mode},
        manifest::{Service, write_nodes},
    },
    patience::{patience, wait_until},
    traffic::{
        Ask, Protocol, RatePlan, StreamPlan, Target,
        place::{Activity, Place},
    },
};

/// Long TCP connections that kube-proxy has.
const CONNECTIONS: usize = 500;

/// Rules of others, which nobody touches.
const FOREIGN: &str = "table inet site {
  chain forward {
    type filter hook forward priority filter; policy accept;
    ip saddr 203.0.113.99 counter drop comment \"abuse, ticket 4711\"
    meta mark & 0x0000000f == 0x00000003 counter accept
  }
}
table ip cni {
  chain portmap { tcp dport 18080 dnat to 10.244.1.11:8080; }
  chain prerouting { type nat hook prerouting priority dstnat; fib daddr type local jump portmap; }
  chain postrouting {
    type nat hook postrouting priority srcnat;
    ip saddr 10.244.0.0/16 ip daddr != { 10.244.0.0/16, 192.0.2.0/24 } masquerade
  }
}
";

/// A connection, or a socket, and the pod that it was given.
struct Long<'lab> {
    activity: Activity<'lab>,
    pod: String,
    peer: SocketAddr,
    what: String,
}

impl<'lab> Long<'lab> {
    fn open(place: &'lab Place, ask: Ask) -> Result<Self> {
        let what = format!("{} to {}", place.name(), ask.target);
        let activity = place.open(ask).with_context(|| what.clone())?;
        let answer = activity.ask().with_context(|| what.clone())?;
        Ok(Self { activity, pod: answer.pod, peer: answer.peer, what })
    }

    /// It goes on: the same pod answers, and sees the same client.
    fn check(&self, when: &str) -> Result<()> {
        let answer = self.activity.ask().with_context(|| format!("{} {when}", self.what))?;
        ensure!(answer.pod == self.pod, "{} {when}: {} answers instead of {}", self.what, answer.pod, self.pod);
        ensure!(answer.peer == self.peer, "{} {when}: the pod sees {}", self.what, answer.peer);
        Ok(())
    }
}

/// A node at work: pods and a client outside have connections to one Service.
struct Stage {
    lab: Lab,
    mode: Mode,
    service: Service,
    source: tempfile::TempDir,
}

impl Stage {
    fn new(mode: Mode) -> Result<Self> {
        Self::with(mode, &["a1", "a2", "b1"])
    }

    /// One whose Service has these pods.
    fn with(mode: Mode, pods: &[&'static str]) -> Result<Self> {
        let service = Service::new("echo", 10, pods);
        let source = tempfile::tempdir()?;
        write_nodes(source.path())?;
        service.write(source.path())?;
        let stage = Self { lab: Lab::new(LabOptions::default())?, mode, service, source };
        for node in &stage.lab.nodes {
            kube_proxy::load(node, FOREIGN)?;
        }
        stage.start_kube_proxy()?;
        for node in &stage.lab.nodes {
            // A socket that is silent for longer than that gets another pod by kube-proxy, too: half a minute is not enough here.
            for timeout in ["udp_timeout", "udp_timeout_stream"] {
                node.host.namespace().sysctl(&format!("net/netfilter/nf_conntrack_{timeout}"), "600")?;
            }
        }
        Ok(stage)
    }

    fn start_kube_proxy(&self) -> Result<()> {
        self.lab.nodes.iter().try_for_each(|node| self.mode.write(node, std::slice::from_ref(&self.service)))
    }

    fn source(&self) -> &Path {
        self.source.path()
    }

    fn node(&self) -> &Node {
        &self.lab.nodes[0]
    }

    /// Who asks whom: a pod by the cluster address, the node itself by it, and the client outside by the node port.
    fn ways(&self, family: Family, protocol: Protocol) -> Result<[(&Place, Target); 3]> {
        let cluster = self.service.cluster(family, protocol);
        Ok([
            (self.lab.place("client-a")?, cluster),
            (&self.node().host, cluster),
            (&self.lab.client, self.service.at_node(self.node().addresses(), family, protocol)),
        ])
    }

    fn open(&self, count: usize, protocol: Protocol) -> Result<Vec<Long<'_>>> {
        let mut open = Vec::new();
        while open.len() < count {
            for family in Family::ALL {
                for (place, target) in self.ways(family, protocol)? {
                    open.push(Long::open(place, Ask::new(target))?);
                    if protocol == Protocol::Udp {
                        open.push(Long::open(place, Ask::new(target).unconnected())?);
                    }
                }
            }
        }
        Ok(open)
    }

    /// Streams of datagrams on every way.
    fn streams(&self) -> Result<Vec<(String, Activity<'_>)>> {
        let mut streams = Vec::new();
        for family in Family::ALL {
            for (place, target) in self.ways(family, Protocol::Udp)? {
                let plan = StreamPlan { target, per_second: 500, linger: patience(Duration::from_secs(2)) };
                streams.push((format!("stream of {} to {target}", place.name()), place.stream(plan)?));
            }
        }
        Ok(streams)
    }

    /// Connections that are opened all the time.
    fn rates(&self) -> Result<Vec<(String, Activity<'_>)>> {
        let mut rates = Vec::new();
        for (place, target) in self.ways(Family::V4, Protocol::Tcp)? {
            let plan = RatePlan { target, per_second: 40, timeout: patience(Duration::from_secs(5)) };
            rates.push((format!("{} to {target}", place.name()), place.rate(plan)?));
        }
        Ok(rates)
    }

    fn start_agents(&self, flags: &[&str]) -> Result<()> {
        let more = flags.iter().map(ToString::to_string).collect();
        self.lab.start_agents(self.source(), &AgentOptions { more, ..AgentOptions::default() })
    }

    /// How many new connections the programs for packets have taken, and how many packets they have left to another proxy.
    fn counts(&self) -> Result<[u64; 2]> {
        let sum = |outcome| {
            let hooks = [Hook::PodIn, Hook::UplinkXdp, Hook::Connect, Hook::Sendmsg];
            hooks.into_iter().map(|hook| self.node().counted(hook, outcome)).sum::<Result<u64>>()
        };
        Ok([sum(Outcome::Opened)?, sum(Outcome::PassForeign)?])
    }
}

fn check(connections: &[Long<'_>], when: &str) -> Result<()> {
    connections.iter().try_for_each(|connection| connection.check(when))
}

#[test]
fn scenario_40_takeover_from_nftables_rules_and_back_without_a_lost_connection() -> Result<()> {
    take_over_and_give_back(Mode::Nftables)
}

#[test]
fn scenario_40_takeover_from_iptables_rules_and_back_without_a_lost_connection() -> Result<()> {
    take_over_and_give_back(Mode::Iptables)
}

#[expect(clippy::print_stdout, reason = "what was seen stands in the output of the test")]
fn take_over_and_give_back(mode: Mode) -> Result<()> {
    let stage = Stage::new(mode)?;
    let before: Vec<String> = stage.lab.nodes.iter().map(kube_proxy::ruleset).collect::<Result<_>>()?;

    let old = stage.open(CONNECTIONS, Protocol::Tcp)?;
    let old_datagrams = stage.open(12, Protocol::Udp)?;
    let old_streams = stage.streams()?;
    let rates = stage.rates()?;
    println!(
        "{} TCP connections, {} UDP sockets and {} UDP streams by kube-proxy",
        old.len(),
        old_datagrams.len(),
        old_streams.len()
    );

    stage.start_agents(&[])?;
    check(&old, "after the takeover")?;
    check(&old_datagrams, "after the takeover")?;
    let [opened, left] = stage.counts()?;
    ensure!(left > 0, "the programs have seen none of kube-proxy's connections");
    let new = stage.open(100, Protocol::Tcp)?;
    let new_datagrams = stage.open(12, Protocol::Udp)?;
    let new_streams = stage.streams()?;
    let [opened_then, _] = stage.counts()?;
    ensure!(opened_then >= opened + 112, "new connections are ours: {opened} before, {opened_then} after");

    // kube-proxy ends without removing its rules: the kernel no longer translates what it has if the last NAT chain goes. And
    // back: kube-proxy is there again, and the agents leave new connections to it.
    stage.start_agents(&["--handover"])?;
    let [opened, _] = stage.counts()?;
    for connections in [&old, &old_datagrams, &new, &new_datagrams] {
        check(connections, "in the handover")?;
    }
    let last = stage.open(12, Protocol::Tcp)?;
    ensure!(stage.counts()?[0] == opened, "new connections are kube-proxy's again");

    for (what, stream) in old_streams.into_iter().chain(new_streams) {
        let report = stream.finish_stream()?;
        println!("{what}: {} sent, {} lost, {} errors, {:?}", report.sent, report.lost(), report.errors, report.pods);
        ensure!(report.lost() == 0 && report.errors == 0, "{what}: {report:?}");
        ensure!(report.pods.len() == 1, "{what} changed its pod: {report:?}");
    }
    for (what, rate) in rates {
        let report = rate.finish_rate()?;
        println!("{what}: {} connections, {:?}, slowest {:?}", report.begun, report.failures, report.slowest);
        ensure!(report.failures.is_empty() && report.begun == report.answered, "{what}: {report:?}");
    }

    // Ours end, and then Sluice goes; what kube-proxy has goes on.
    for connections in [new, new_datagrams] {
        connections.into_iter().try_for_each(|connection| connection.activity.close())?;
    }
    for node in &stage.lab.nodes {
        node.kill_agent();
        let output = clean_up(node)?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    check(&old, "without Sluice")?;
    check(&last, "without Sluice")?;
    for (place, target) in stage.ways(Family::V6, Protocol::Tcp)? {
        place.ask(Ask::new(target))?;
    }
    let after: Vec<String> = stage.lab.nodes.iter().map(kube_proxy::ruleset).collect::<Result<_>>()?;
    assert_eq!(before, after, "every rule is as it was");
    Ok(())
}

#[test]
fn scenario_40_a_new_connection_gets_no_source_port_by_which_the_other_proxy_is_answered() -> Result<()> {
    /// Source ports of our masqueraded flows.
    const OURS: RangeInclusive<u16> = 10_000..=29_999;
    let stage = Stage::with(Mode::Nftables, &["b1"])?;
    let target = stage.service.at_node(stage.node().addresses(), Family::V4, Protocol::Tcp);
    // kube-proxy masquerades by any port.
    let mut old = Long::open(&stage.lab.client, Ask::new(target))?;
    for _ in 0..100 {
        if OURS.contains(&old.peer.port()) {
            break;
        }
        old.activity.close()?;
        old = Long::open(&stage.lab.client, Ask::new(target))?;
    }
    ensure!(OURS.contains(&old.peer.port()), "a hundred ports, and none of our range");
    stage.start_agents(&[])?;
    old.check("after the takeover")?;
    // A client's own port would be kept, being of the range.
    let source = SocketAddr::new(address::on_wire(address::CLIENT).of(Family::V4), old.peer.port());
    let new = Long::open(&stage.lab.client, Ask::new(target).from(source))?;
    ensure!(OURS.contains(&new.peer.port()) && new.peer != old.peer, "both are answered at {}", new.peer);
    old.check("beside the new one")?;
    new.check("beside the old one")
}

#[test]
fn scenario_40_a_takeover_ends_when_the_last_connection_of_the_other_proxy_is_over() -> Result<()> {
    let stage = Stage::new(Mode::Nftables)?;
    let old = stage.open(6, Protocol::Tcp)?;
    // Of a pod's host port, whose translation is the CNI's and stays so.
    let host_port = Target::tcp((stage.node().addresses().v4, 18_080));
    let host_port = Long::open(&stage.lab.client, Ask::new(host_port))?;
    stage.start_agents(&[])?;
    check(&old, "after the takeover")?;
    stage.node().kill_agent();
    check(&old, "without an agent")?;
    stage.start_agents(&[])?;
    check(&old, "after a restart in the middle of the takeover")?;
    for connection in old {
        connection.activity.close()?;
    }
    // What the kernel keeps of a closed connection for two minutes, in case something is still on its way.
    for node in &stage.lab.nodes {
        tests::bench::conntrack::forget(node.host.namespace())?;
    }
    host_port.check("and nobody remembers it")?;
    let log = || stage.node().agent().map(|agent| agent.log());
    wait_until("the end of the takeover", Duration::from_secs(30), || {
        log().ok().filter(|log| log.contains("the last connection of another proxy is over"))
    })?;
    host_port.check("after the takeover")?;
    stage.lab.nodes.iter().try_for_each(kube_proxy::remove)?;
    for family in Family::ALL {
        for (place, target) in stage.ways(family, Protocol::Tcp)? {
            place.ask(Ask::new(target))?;
        }
    }
    Ok(())
}
