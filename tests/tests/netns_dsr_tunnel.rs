//! Direct server return between nodes that are not on one link: a router is between them, and what one dispatches to the other
//! goes behind an IP header. A kernel without IPIP ignores these tests by name.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use libtest_mimic::{Arguments, Trial};
use tests::{
    lab::{
        LabOptions, UplinkMode,
        address::{CLIENT, Family, GATEWAY, on_wire},
        agent::AgentOptions,
        cluster::Cluster,
        manifest::Service,
    },
    netns::Namespace,
    patience::wait_until,
    traffic::{Answer, Ask, Protocol, Target},
};

/// Until the nodes know of each other, and of the router: they look for it every half minute.
const SOON: Duration = Duration::from_mins(1);
const UPLINKS: [(&str, [UplinkMode; 2]); 2] =
    [("xdp_to_tc", [UplinkMode::Xdp, UplinkMode::Tc]), ("tc_to_xdp", [UplinkMode::Tc, UplinkMode::Xdp])];

fn main() {
    let arguments = Arguments::from_args();
    let is_missing = !is_known().unwrap_or_default();
    if is_missing {
        eprintln!(
            "IGNORED: this kernel makes no ipip or ip6tnl device; \
             `cargo xtask vm 6.12 --suite netns --test netns_dsr_tunnel` has one that does"
        );
    }
    let trials = UPLINKS.map(|(name, uplinks)| {
        let name = format!("a_pod_behind_a_router_answers_the_client_itself_{name}");
        let run = move || test(uplinks).map_err(|error| format!("{error:?}").into());
        Trial::test(name, run).with_ignored_flag(is_missing)
    });
    libtest_mimic::run(&arguments, trials.into()).exit();
}

/// Whether the kernel has such devices.
fn is_known() -> Result<bool> {
    let namespace = Namespace::new("tunnels")?;
    Ok(namespace.ip("link add one type ipip external\nlink add other type ip6tnl external").is_ok())
}

/// The only backend is on node-b.
fn at_b() -> Service {
    Service::new("at-b", 32, &["b1"])
}

fn is_direct(answer: &Answer, target: Target) -> bool {
    answer.peer.ip() == on_wire(CLIENT).of(Family::of(target.address.ip()))
}

/// Puts the gateway between node-a and node-b, one way; answers of node-b go to the client directly.
fn part(cluster: &Cluster) -> Result<()> {
    let [a, b] = &cluster.lab.nodes;
    let gateway = cluster.lab.gateway.namespace();
    for (name, value) in [
        ("net/ipv4/ip_forward", "1"),
        ("net/ipv6/conf/all/forwarding", "1"),
        ("net/ipv4/conf/all/send_redirects", "0"),
        ("net/ipv4/conf/default/send_redirects", "0"),
    ] {
        gateway.sysctl(name, value)?;
    }
    let (to, by) = (b.addresses(), on_wire(GATEWAY));
    a.host.namespace().ip(&format!("route add {}/32 via {}\nroute add {}/128 via {}", to.v4, by.v4, to.v6, by.v6))
}

/// Packets that node-b has taken out of tunnels.
fn unwrapped(namespace: &Namespace) -> Result<u64> {
    ["sluice_ipip", "sluice_ip6tnl"].iter().try_fold(0, |sum, device| {
        let output = namespace.command("ip")?.args(["-j", "-s", "link", "show", "dev", device]).output()?;
        let links: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        let packets = links[0]["stats64"]["rx"]["packets"].as_u64().context("ip tells no packets")?;
        Ok(sum + packets)
    })
}

fn test(uplinks: [UplinkMode; 2]) -> Result<()> {
    const BYTES: u64 = 1 << 20;
    let more = ["--nodeport-mode=dsr", "--dsr-dispatch=ipip"].map(str::to_owned).to_vec();
    let agent = AgentOptions { more, ..AgentOptions::default() };
    let options = LabOptions { uplinks, ..LabOptions::default() };
    let cluster = Cluster::start(options, agent, &[at_b()])?;
    part(&cluster)?;
    let [a, b] = &cluster.lab.nodes;
    for family in Family::ALL {
        for protocol in Protocol::ALL {
            let target = at_b().at_node(a.addresses(), family, protocol);
            let before = unwrapped(b.host.namespace())?;
            let mut last = None;
            let is_seen = wait_until(&format!("the pod to see the client of {target}"), SOON, || {
                last = Some(cluster.lab.client.ask(Ask::new(target)));
                last.as_ref()?.as_ref().ok().filter(|answer| is_direct(answer, target)).map(drop)
            });
            is_seen.with_context(|| format!("the last answer was {last:?}"))?;
            for answer in cluster.lab.client.ask_times(Ask::new(target), 5)? {
                let answer = answer?;
                assert_eq!((answer.pod.as_str(), answer.from), ("b1", target.address), "{target}");
                assert!(is_direct(&answer, target), "{target}: {answer:?}");
            }
            let passed = unwrapped(b.host.namespace())? - before;
            ensure!(passed >= 5, "{target}: {passed} packets came through tunnels");
        }
        // What a client sends is at first as long as its own link takes, and too long behind another header.
        let target = at_b().at_node(a.addresses(), family, Protocol::Tcp);
        let report = cluster.lab.client.transfer(Ask::new(target), BYTES)?;
        assert_eq!((report.pod.as_str(), report.bytes), ("b1", BYTES), "{target}");
        let open = cluster.lab.client.open(Ask::new(target))?;
        open.ask()?;
        cluster.lab.nodes.iter().for_each(tests::lab::Node::kill_agent);
        assert!(is_direct(&open.ask()?, target), "without agents");
        cluster.restart_agents()?;
        assert!(is_direct(&open.ask()?, target), "with new ones");
        open.close()?;
    }
    Ok(())
}
