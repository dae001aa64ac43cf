//! The node's own sockets as clients: who they get, under every rule by which a Service chooses, and what they are told when
//! they get nobody. Their address is the one that the node's packets bear.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use proxy_common::outcome::{Hook, Outcome};
use serde_json::{Value, json};
use tests::{
    lab::{
        LabOptions, Node,
        address::{Addresses, Family, of_balancer, of_service},
        agent::AgentOptions,
        cluster::Cluster,
        manifest::{Service, write_documents},
    },
    patience::{patience, wait_until},
    traffic::{Answer, Ask, Failure, Protocol, Target, place::Place},
};

const PODS: [&str; 4] = ["a1", "a2", "b1", "b2"];
/// From the system call to its error.
const AT_ONCE: Duration = Duration::from_millis(300);
/// Affinity ends after.
const TIMEOUT: u32 = 60;

/// A Service whose object is changed before it is written.
type Written = (Service, fn(&mut Value));

fn start(services: &[Written]) -> Result<Cluster> {
    Cluster::start_with(LabOptions::default(), AgentOptions::default(), |source| {
        for (service, change) in services {
            let mut documents = service.documents();
            change(&mut documents[0]);
            write_documents(source, &format!("{}.yaml", service.name), &documents)?;
        }
        let cidr = json!({
            "apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR", "metadata": { "name": "kubernetes" },
            "spec": { "cidrs": ["10.96.0.0/16", "fd00:10:96::/112"] },
        });
        write_documents(source, "cidrs.yaml", &[cidr])
    })
}

/// TCP, UDP of a connected socket, UDP of an unconnected one.
fn asks(address: IpAddr, port: u16) -> [Ask; 3] {
    let [tcp, udp] =
        Protocol::ALL.map(|protocol| Ask::new(Target { address: SocketAddr::new(address, port), protocol }));
    [tcp, udp, udp.unconnected()]
}

fn by_cluster_ip(service: &Service, family: Family) -> [Ask; 3] {
    asks(service.cluster_ips.of(family), service.port)
}

fn heard(client: &Place, ask: Ask, times: u32) -> Result<Vec<String>> {
    let answers: Result<Vec<Answer>, _> = client.ask_times(ask, times)?.into_iter().collect();
    let answers = answers.with_context(|| format!("{} asks {ask:?}", client.name()))?;
    Ok(answers.into_iter().map(|answer| answer.pod).collect())
}

fn all_heard(client: &Place, ask: Ask, times: u32) -> Result<BTreeSet<String>> {
    Ok(heard(client, ask, times)?.into_iter().collect())
}

/// The socket is told at once, and the hook has counted why.
fn is_told(node: &Node, ask: Ask, failure: &Failure, outcome: Outcome) -> Result<()> {
    let hook = if ask.unconnected { Hook::Sendmsg } else { Hook::Connect };
    let before = node.counted(hook, outcome)?;
    let start = Instant::now();
    let answer = node.host.ask_times(ask, 1)?.pop().context("no answer to one request")?;
    let took = start.elapsed();
    assert_eq!(answer.as_ref().err(), Some(failure), "{ask:?}: {answer:?}");
    ensure!(took <= patience(AT_ONCE), "{ask:?} failed after {took:?}");
    assert_eq!(node.counted(hook, outcome)?, before + 1, "{outcome:?} at {hook:?} for {ask:?}");
    Ok(())
}

fn with_affinity(service: &mut Value) {
    service["spec"]["sessionAffinity"] = "ClientIP".into();
    service["spec"]["sessionAffinityConfig"] = json!({ "clientIP": { "timeoutSeconds": TIMEOUT } });
}

#[test]
fn with_affinity_the_node_stays_with_its_backend_by_every_address() -> Result<()> {
    let service = Service::new("sticky", 10, &PODS);
    let cluster = start(&[(service.clone(), with_affinity)])?;
    let node = &cluster.lab.nodes[0];
    for family in Family::ALL {
        let loopback: IpAddr =
            if family == Family::V4 { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() };
        let ways = [
            (service.cluster_ips.of(family), service.port),
            (node.addresses().of(family), service.node_port),
            (loopback, service.node_port),
        ];
        let ways: Vec<Ask> = ways.into_iter().flat_map(|(address, port)| asks(address, port)).collect();
        for protocol in Protocol::ALL {
            let ways = ways.iter().filter(|ask| ask.target.protocol == protocol);
            let pods: Vec<_> = ways.map(|ask| all_heard(&node.host, *ask, 6)).collect::<Result<_>>()?;
            let different: BTreeSet<_> = pods.iter().flatten().collect();
            assert_eq!(different.len(), 1, "{protocol} over {}: {pods:?}", family.name());
        }
        let known: BTreeSet<_> = node.affinities(family)?.into_iter().map(|(client, _)| client).collect();
        assert_eq!(known, [node.addresses().of(family)].into(), "the client is the node");
    }
    Ok(())
}

#[test]
fn affinity_is_refreshed_by_connections_and_ends_after_its_time() -> Result<()> {
    let service = Service::new("sticky", 10, &PODS);
    let cluster = start(&[(service.clone(), with_affinity)])?;
    let node = &cluster.lab.nodes[0];
    for family in Family::ALL {
        for protocol in Protocol::ALL {
            let ask = Ask::new(service.cluster(family, protocol));
            let open = node.host.open(ask)?;
            let first = open.ask()?.pod;
            let last_used = || -> Result<Vec<u32>> {
                Ok(node.affinities(family)?.into_iter().map(|(_, affinity)| affinity.last_used).collect())
            };
            // Long enough ago to be told from now, and not too long.
            node.age_affinities(family, TIMEOUT / 2)?;
            let before = last_used()?;
            open.ask()?;
            assert_eq!(last_used()?, before, "refreshed by a request on an open {protocol} socket");
            assert_eq!(node.host.ask(ask)?.pod, first);
            assert_ne!(last_used()?, before, "not refreshed by a new {protocol} socket");
            wait_until("another backend after the timeout", Duration::from_secs(10), || {
                node.age_affinities(family, TIMEOUT + 1).ok()?;
                (node.host.ask(ask).ok()?.pod != first).then_some(())
            })?;
            open.close()?;
        }
    }
    Ok(())
}

const BALANCER: u8 = 20;

fn balancer(service: &mut Value, ranges: &[&str]) {
    let Addresses { v4, v6 } = of_balancer(BALANCER);
    service["spec"]["type"] = "LoadBalancer".into();
    service["spec"]["loadBalancerSourceRanges"] = json!(ranges);
    service["status"] = json!({ "loadBalancer": { "ingress": [{ "ip": v4 }, { "ip": v6 }] } });
}

#[test]
fn source_ranges_are_asked_for_the_nodes_own_address() -> Result<()> {
    let service = Service::new("ranged", 10, &["a1"]);
    // Those of node-a alone.
    let cluster = start(&[(service.clone(), |object| balancer(object, &["192.0.2.11/32", "2001:db8::11/128"]))])?;
    let [a, b] = &cluster.lab.nodes;
    let vip = of_balancer(BALANCER);
    a.host.namespace().ip(&format!("addr add {}/32 dev lo\naddr add {}/128 dev lo nodad", vip.v4, vip.v6))?;
    for family in Family::ALL {
        for ask in asks(vip.of(family), service.port) {
            assert_eq!(a.host.ask(ask)?.pod, "a1", "{ask:?}");
            // By the balancer's own address, if a node in the ranges has it.
            let own = ask.from(SocketAddr::new(vip.of(family), 0));
            assert_eq!(a.host.ask(own)?.peer.ip(), vip.of(family), "{own:?}");
            is_told(b, ask, &Failure::Unreachable, Outcome::DropSource)?;
        }
        // Other frontends have no ranges.
        for ask in by_cluster_ip(&service, family) {
            assert_eq!(b.host.ask(ask)?.pod, "a1", "{ask:?}");
        }
    }
    Ok(())
}

fn algorithm(service: &mut Value, name: &str) {
    service["metadata"]["annotations"] = json!({ "service.sluice.dev/algorithm": name });
}

#[test]
fn each_algorithm_serves_the_nodes_own_sockets_in_its_way() -> Result<()> {
    let named = |name: &str, number| Service::new(name, number, &PODS);
    let (hash, maglev, sticky, turns) =
        (named("hash", 10), named("maglev", 11), named("sticky", 12), named("turns", 13));
    let cluster = start(&[
        (hash.clone(), |object| algorithm(object, "source-hash")),
        (maglev.clone(), |object| algorithm(object, "maglev")),
        (sticky.clone(), |object| {
            algorithm(object, "maglev");
            with_affinity(object);
        }),
        (turns.clone(), |object| algorithm(object, "round-robin")),
    ])?;
    let host = &cluster.lab.nodes[0].host;
    for family in Family::ALL {
        for (service, pods) in [(&hash, 1), (&maglev, PODS.len()), (&sticky, 1)] {
            for ask in by_cluster_ip(service, family) {
                let heard = all_heard(host, ask, 60)?;
                assert_eq!(heard.len(), pods, "{} {ask:?}: {heard:?}", service.name);
            }
        }
        for ask in by_cluster_ip(&turns, family) {
            let mut counts: BTreeMap<String, usize> = BTreeMap::new();
            for pod in heard(host, ask, 40)? {
                *counts.entry(pod).or_default() += 1;
            }
            let is_even = counts.len() == PODS.len() && counts.values().all(|count| *count == 40 / PODS.len());
            assert!(is_even, "{ask:?}: {counts:?}");
        }
    }
    Ok(())
}

/// Sections 5 and 6 of the rules: what a policy means for the node's own sockets, and what they are told.
#[test]
fn policies_and_refusals_reach_the_socket_at_once() -> Result<()> {
    let internal = |object: &mut Value| object["spec"]["internalTrafficPolicy"] = "Local".into();
    let external = |object: &mut Value| object["spec"]["externalTrafficPolicy"] = "Local".into();
    let away = Service::new("away", 10, &["b1"]);
    let both = Service::new("both", 11, &["a1", "b1"]);
    let outside = Service::new("outside", 12, &["b1"]);
    let nobody = Service::new("nobody", 13, &[]);
    let cluster = start(&[
        (away.clone(), internal),
        (both.clone(), internal),
        (outside.clone(), external),
        (nobody.clone(), |_| ()),
    ])?;
    let node = &cluster.lab.nodes[0];
    let own = |service: &Service, family| asks(node.addresses().of(family), service.node_port);
    for family in Family::ALL {
        for ask in by_cluster_ip(&both, family) {
            assert_eq!(all_heard(&node.host, ask, 8)?, ["a1".to_owned()].into(), "internal, local: {ask:?}");
        }
        for ask in own(&outside, family) {
            let answer = node.host.ask(ask)?;
            assert_eq!(answer.pod, "b1", "external, but the client is not: {ask:?}");
            assert_eq!(answer.peer.ip(), node.addresses().of(family), "{ask:?}");
        }
        for ask in by_cluster_ip(&away, family) {
            is_told(node, ask, &Failure::Unreachable, Outcome::DropNoLocalEndpoint)?;
        }
        for ask in by_cluster_ip(&nobody, family).into_iter().chain(own(&nobody, family)) {
            is_told(node, ask, &Failure::Refused, Outcome::RejectNoEndpoint)?;
        }
        for ask in asks(both.cluster_ips.of(family), both.port + 1) {
            is_told(node, ask, &Failure::Refused, Outcome::RejectNoPort)?;
        }
        for ask in asks(of_service(200).of(family), 80) {
            is_told(node, ask, &Failure::Unreachable, Outcome::DropUnallocated)?;
        }
    }
    Ok(())
}
