//! Scenarios of objects that want what is not theirs, or mean harm: addresses of others, endpoints that are no endpoints,
//! ranges of clients that come and go. What is refused is named in the log, and what others have stays as it is, byte by
//! byte. Needs root.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{TcpListener, TcpStream},
    time::Duration,
};

use anyhow::{Context as _, Result};
use aya::maps::{Map, MapData, lpm_trie::LpmTrie};
use proxy_common::{
    addr::Ipv4,
    service::{Frontend, Service, Source, flag},
};
use serde_json::{Value, json};
use tests::{
    api::{
        ApiServer, Resource,
        object::{self, node, slice},
    },
    patience::wait_until,
    picture::Witness,
    sandbox::{Agent, Sandbox},
};

const USUAL: Duration = Duration::from_secs(20);

/// What the agent logs with each plan that writes anything.
const WRITES: &str = "kernel follows";

/// A Service with the endpoint 10.0.0.HOST at 10.96.0.HOST, changed as said.
fn serve(server: &ApiServer, name: &str, host: u8, change: impl FnOnce(&mut Value)) -> Result<()> {
    let mut service = object::service(name, &format!("10.96.0.{host}"));
    change(&mut service);
    server.apply(slice(name, &[&format!("10.0.0.{host}")]))?;
    server.apply(service)
}

fn external_ip(service: &mut Value, address: &str) {
    service["spec"]["externalIPs"] = json!([address]);
}

fn balancer(service: &mut Value, address: &str) {
    service["spec"]["type"] = json!("LoadBalancer");
    service["status"] = json!({"loadBalancer": {"ingress": [{"ip": address}]}});
}

fn start(sandbox: &Sandbox, server: &ApiServer, more: &[&str]) -> Result<Agent> {
    let agent = sandbox.agent(&[&["--master", &server.url()][..], more].concat())?;
    agent.wait_for("in sync")?;
    Ok(agent)
}

/// The entries of `SERVICES_V4`, as they stand.
fn entries(sandbox: &Sandbox) -> Result<BTreeMap<Frontend<Ipv4>, Service>> {
    Ok(sandbox.services()?.into_iter().collect())
}

/// What was there before must be there now, whatever else is.
fn assert_untouched(sandbox: &Sandbox, before: &BTreeMap<Frontend<Ipv4>, Service>) -> Result<()> {
    let after = entries(sandbox)?;
    for (frontend, service) in before {
        assert_eq!(after.get(frontend), Some(service), "{frontend:?}");
    }
    Ok(())
}

/// Applies a Service and waits until its ClusterIP is served, which is when the agent has decided about the rest of it.
fn decide(sandbox: &Sandbox, server: &ApiServer, name: &str, host: u8, change: impl FnOnce(&mut Value)) -> Result<()> {
    serve(server, name, host, change)?;
    let at = format!("10.96.0.{host}:80/TCP");
    sandbox.wait_for_picture("the decision", |picture| {
        picture.get(&at).is_some_and(|answers| !answers.internal.is_empty())
    })?;
    Ok(())
}

#[test]
fn scenario_32_addresses_outside_the_operators_list_are_refused_and_a_balancers_address_stays_with_its_service()
-> Result<()> {
    let sandbox = Sandbox::new()?;
    let server = sandbox.server()?;
    server.apply(node())?;
    serve(&server, "honest", 1, |service| external_ip(service, "203.0.113.1"))?;
    serve(&server, "balanced", 2, |service| {
        balancer(service, "198.51.100.1");
        service["metadata"]["creationTimestamp"] = json!("2026-01-01T00:00:00Z");
    })?;
    let agent = start(&sandbox, &server, &["--external-ips", "203.0.113.0/24"])?;
    let before = entries(&sandbox)?;
    assert_eq!(before.len(), 4, "two ClusterIPs, an external IP, a balancer's address");

    for (host, address) in [(10, "8.8.8.8"), (11, "1.1.1.1"), (12, "198.51.100.1")] {
        decide(&sandbox, &server, &format!("thief{host}"), host, |service| external_ip(service, address))?;
        agent.wait_for(&format!("Service test/thief{host}: {address} is not served: external IPs are limited"))?;
    }
    decide(&sandbox, &server, "younger", 13, |service| balancer(service, "198.51.100.1"))?;
    agent.wait_for("Service test/younger: 198.51.100.1 port 80/TCP is not served: it belongs to test/balanced")?;
    assert_untouched(&sandbox, &before)?;
    assert_eq!(entries(&sandbox)?.len(), 4 + 4, "each newcomer has its ClusterIP and no more");
    Ok(())
}

/// A process of the node listens; the API server, pods and other Services have addresses of their own.
#[test]
fn scenario_33_addresses_of_the_node_the_api_server_pods_and_services_are_refused_and_stay_reachable() -> Result<()> {
    let sandbox = Sandbox::new()?;
    sandbox.namespace.ip("address add 192.0.2.9/32 dev lo")?;
    let listeners: Vec<TcpListener> = [22, 6443, 10_250]
        .into_iter()
        .map(|port| Ok(sandbox.namespace.run(|| TcpListener::bind(("192.0.2.9", port)))??))
        .collect::<Result<_>>()?;
    let server = sandbox.server()?;
    server.apply(json!({
        "kind": "Node", "metadata": {"name": object::NODE}, "spec": {"podCIDRs": ["10.244.1.0/24"]},
        "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.9"}]},
    }))?;
    serve(&server, "honest", 1, |service| service["metadata"]["creationTimestamp"] = json!("2026-01-01T00:00:00Z"))?;
    let mut of_api_server = slice("kubernetes", &["198.51.100.1"]);
    of_api_server["metadata"]["namespace"] = json!("default");
    of_api_server["ports"][0]["port"] = json!(6443);
    server.apply(of_api_server)?;
    let agent = start(&sandbox, &server, &[])?;
    let before = entries(&sandbox)?;

    let cases = [
        (
            "192.0.2.9",
            22,
            "192.0.2.9 is not served: it is the node's own, and a process of the node listens at port 22/TCP",
        ),
        ("192.0.2.9", 6443, "it is the node's own, and a process of the node listens at port 6443/TCP"),
        ("192.0.2.9", 10_250, "it is the node's own, and a process of the node listens at port 10250/TCP"),
        ("198.51.100.1", 6443, "198.51.100.1 is not served: the API server listens there at port 6443"),
        ("169.254.169.254", 80, "spec.externalIPs: 169.254.169.254 is an address no Service may have"),
        ("127.0.0.1", 80, "spec.externalIPs: 127.0.0.1 is an address no Service may have"),
        ("10.244.1.7", 80, "10.244.1.7 is not served: it is an address of pods"),
        ("10.96.0.1", 80, "10.96.0.1 port 80/TCP is not served: it belongs to test/honest"),
    ];
    for (host, (address, port, complaint)) in (10..).zip(cases) {
        let name = format!("thief{host}");
        serve(&server, &name, host, |service| {
            external_ip(service, address);
            service["spec"]["ports"][0]["port"] = json!(port);
        })?;
        agent.wait_for(&format!("Service test/{name}: "))?;
        assert!(agent.log().lines().any(|line| line.contains(&name) && line.contains(complaint)), "{}", agent.log());
    }
    let at = |host| format!("10.96.0.{host}:80/TCP");
    sandbox.wait_for_picture("the last ClusterIP", |picture| picture.contains_key(&at(9 + cases.len() as u8)))?;
    assert_untouched(&sandbox, &before)?;
    assert_eq!(entries(&sandbox)?.len(), before.len() + cases.len(), "each newcomer has its ClusterIP and no more");
    for listener in &listeners {
        let address = listener.local_addr()?;
        sandbox.namespace.run(|| TcpStream::connect_timeout(&address, USUAL))?.context("the node is not reachable")?;
    }
    Ok(())
}

/// A claim to 203.0.113.5.
fn claim(server: &ApiServer, name: &str, host: u8, created: &str, uid: &str) -> Result<()> {
    serve(server, name, host, |service| {
        external_ip(service, "203.0.113.5");
        service["metadata"]["creationTimestamp"] = json!(created);
        service["metadata"]["uid"] = json!(uid);
    })
}

const CONTESTED: &str = "203.0.113.5:80/TCP";

/// The older wins, then the smaller UID, whoever came first; two agents agree that heard in different orders.
#[test]
fn scenario_34_of_two_claims_the_older_wins_everywhere_and_the_other_takes_over_without_a_gap() -> Result<()> {
    let (older, newer) = ("2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z");
    for (name, [first, second], winner) in [
        ("by age", [(newer, "a"), (older, "b")], 2),
        ("by UID", [(older, "b"), (older, "a")], 2),
        ("the first one", [(older, "b"), (newer, "a")], 1),
    ] {
        let (sandbox, other) = (Sandbox::new()?, Sandbox::new()?);
        let server = sandbox.server()?;
        server.apply(node())?;
        serve(&server, "bystander", 9, |_| {})?;
        claim(&server, "first", 1, first.0, first.1)?;
        let agent = start(&sandbox, &server, &[])?;
        claim(&server, "second", 2, second.0, second.1)?;
        let endpoint = |host: u8| BTreeSet::from([format!("10.0.0.{host}:8080")]);
        let is_won = |host: u8| {
            move |picture: &tests::picture::Picture| {
                picture.contains_key("10.96.0.2:80/TCP")
                    && picture.get(CONTESTED).is_some_and(|answers| answers.internal == endpoint(host))
            }
        };
        sandbox.wait_for_picture("the winner", is_won(winner)).context(name)?;
        let (winner_name, loser_name) = if winner == 1 { ("first", "second") } else { ("second", "first") };
        agent.wait_for(&format!(
            "Service test/{loser_name}: 203.0.113.5 port 80/TCP is not served: it belongs to test/{winner_name}"
        ))?;

        // An agent that hears of both at once, of the winner last or first.
        let copy = other.server()?;
        copy.apply(node())?;
        claim(&copy, "first", 1, first.0, first.1)?;
        claim(&copy, "second", 2, second.0, second.1)?;
        let _other_agent = start(&other, &copy, &[])?;
        other.wait_for_picture("the same winner", is_won(winner)).context(name)?;

        let witness = Witness::of(sandbox.pins.path())?;
        server.delete(Resource::Services, "test", winner_name)?;
        let loser = 3 - winner;
        sandbox.wait_for_picture("the successor", |picture| {
            picture.get(CONTESTED).is_some_and(|answers| answers.internal == endpoint(loser))
        })?;
        let testimony = witness.testify()?;
        let seen: Vec<_> =
            testimony.seen[CONTESTED].iter().map(|seen| seen.as_ref().map(|seen| seen.internal.clone())).collect();
        assert!(!seen.contains(&None), "{name}: absent for a moment: {seen:?}");
        assert!(seen.iter().flatten().all(|seen| seen.len() == 1), "{name}: backends are mixed: {seen:?}");
        assert_eq!(testimony.seen["10.96.0.9:80/TCP"].len(), 1, "{name}: the bystander");
    }
    Ok(())
}

#[test]
fn scenario_35_endpoints_that_mean_the_node_itself_are_left_out_even_if_the_api_let_them_in() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let server = sandbox.server()?;
    server.apply(node())?;
    serve(&server, "bystander", 9, |_| {})?;
    let mut dual = object::service("victim", "10.96.0.1");
    dual["spec"]["clusterIPs"] = json!(["10.96.0.1", "fd00::1"]);
    server.apply(dual)?;
    let agent = start(&sandbox, &server, &[])?;
    let before = entries(&sandbox)?;

    let v4 = ["127.0.0.1", "169.254.169.254", "224.0.0.1", "0.0.0.0", "255.255.255.255", "10.0.0.7"];
    let v6 = ["::1", "fe80::1", "ff02::1", "::", "::ffff:127.0.0.1", "::ffff:10.0.0.8", "fd00:10::7"];
    for (name, family, addresses) in
        [("v4", "IPv4", &v4[..]), ("v6", "IPv6", &v6), ("names", "FQDN", &["evil.example.com"])]
    {
        let mut hostile = slice("victim", addresses);
        hostile["metadata"]["name"] = json!(name);
        hostile["addressType"] = json!(family);
        hostile["ports"] =
            json!([{"name": "", "port": 8080, "protocol": "TCP"}, {"name": "", "port": 0}, {"name": ""}]);
        server.apply(hostile)?;
    }
    let endpoints = |picture: &tests::picture::Picture, at: &str| {
        picture.get(at).map(|answers| answers.internal.iter().cloned().collect::<Vec<_>>()).unwrap_or_default()
    };
    sandbox.wait_for_picture("the good endpoints alone", |picture| {
        endpoints(picture, "10.96.0.1:80/TCP") == ["10.0.0.7:8080"]
            && endpoints(picture, "[fd00::1]:80/TCP") == ["[fd00:10::7]:8080"]
    })?;
    for address in v4[..5].iter().chain(&v6[..4]) {
        agent.wait_for(&format!("endpoints.addresses: {address} is an address no Service may have"))?;
    }
    agent.wait_for("EndpointSlice test/v6: endpoints.addresses: 127.0.0.1 is an address no Service may have")?;
    agent.wait_for("EndpointSlice test/v6: endpoints.addresses: \"::ffff:10.0.0.8\" is not an IP address")?;
    let others: BTreeMap<_, _> = before.into_iter().filter(|(frontend, _)| frontend.addr.octets[3] == 9).collect();
    assert_untouched(&sandbox, &others)?;
    Ok(())
}

/// The ranges of clients in `SOURCES_V4` as `index address/bits`.
fn sources(sandbox: &Sandbox) -> Result<BTreeSet<(u32, String)>> {
    let map = MapData::from_pin(sandbox.pins.path().join("maps/SOURCES_V4"))?;
    let map: LpmTrie<_, Source<Ipv4>, u32> = Map::LpmTrie(map).try_into()?;
    map.keys()
        .map(|key| {
            let key = key?;
            let source = key.data();
            Ok((source.service, format!("{}/{}", source.addr, key.prefix_len() - Source::<Ipv4>::BITS)))
        })
        .collect()
}

const TWO: [&str; 2] = ["198.51.100.0/24", "192.0.2.128/25"];
const ONE: [&str; 1] = ["198.51.100.0/24"];

/// Name, source ranges, their scope, those in the map, and the hosts of 203.0.113.0/24 that are restricted; 0 is the `NodePort`.
type Ranges = (&'static str, &'static [&'static str], Option<&'static str>, &'static [&'static str], &'static [u8]);

/// What the maps say of one Service with a ClusterIP, a NodePort, an external IP and a balancer's address. The answers that
/// clients get are those of the parity suite.
#[test]
fn scenario_36_the_maps_follow_source_ranges_their_scope_and_families() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let server = sandbox.server()?;
    server.apply(node())?;
    let apply = |ranges: &[&str], scope: Option<&str>| {
        serve(&server, "web", 1, |service| {
            balancer(service, "203.0.113.1");
            external_ip(service, "203.0.113.2");
            let port = |name: &str, protocol: &str| json!({"name": name, "port": 80, "protocol": protocol, "nodePort": 30_080});
            service["spec"]["ports"] = json!([port("", "TCP"), port("udp", "UDP")]);
            service["spec"]["loadBalancerSourceRanges"] = json!(ranges);
            if let Some(scope) = scope {
                service["metadata"]["annotations"] = json!({"service.sluice.dev/source-ranges-scope": scope});
            }
        })
    };
    apply(&[], None)?;
    let agent = start(&sandbox, &server, &[])?;
    let cases: [Ranges; 7] = [
        ("two ranges", &TWO, None, &TWO, &[1]),
        ("one is removed", &ONE, None, &ONE, &[1]),
        ("of both families", &["198.51.100.0/24", "2001:db8::/32"], None, &ONE, &[1]),
        ("for all ways in", &TWO, Some("all"), &TWO, &[0, 1, 2]),
        ("of the other family", &["2001:db8::/32"], Some("all"), &[], &[]),
        ("for nobody", &["nonsense"], None, &[], &[1]),
        ("none", &[], Some("all"), &[], &[]),
    ];
    for (name, ranges, scope, expected, restricted) in cases {
        apply(ranges, scope)?;
        let look = || -> Result<(BTreeSet<String>, BTreeSet<u8>)> {
            let services = sandbox.services()?;
            let known = sources(&sandbox)?;
            let flagged = services.iter().filter(|(_, service)| service.flags & flag::SOURCE_RANGES != 0);
            let hosts = flagged.clone().map(|(frontend, _)| frontend.addr.octets[3]).collect();
            let indexes: BTreeSet<u32> = flagged.map(|(_, service)| service.index).collect();
            let is_whole =
                indexes.iter().all(|index| expected.iter().all(|range| known.contains(&(*index, (*range).to_owned()))));
            anyhow::ensure!(is_whole, "{indexes:?} of both ports, {known:?}");
            Ok((known.into_iter().map(|(_, range)| range).collect(), hosts))
        };
        let wanted = (expected.iter().map(ToString::to_string).collect(), restricted.iter().copied().collect());
        wait_until(name, USUAL, || look().ok().filter(|found| *found == wanted))
            .with_context(|| format!("{name}: {:?} instead of {wanted:?}", look()))?;
    }
    let written = agent.count(WRITES);
    apply(&[], Some("all"))?;
    serve(&server, "late", 2, |_| {})?;
    sandbox.wait_for_picture("what comes after it", |picture| picture.contains_key("10.96.0.2:80/TCP"))?;
    assert!(agent.count(WRITES) <= written + 2, "what is no news is not written:\n{}", agent.log());
    Ok(())
}
