//! What an API server is told about its objects, by Events about them, and how little it has to bear. Needs root.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tests::{
    api::{
        ApiServer, Fault, On, Resource, Verb,
        object::{node, service, slice},
    },
    http::{ask, wait_for_answer},
    patience::{patience, wait_until},
    picture::Picture,
    sandbox::Sandbox,
};

const METRICS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 10249);
const USUAL: Duration = Duration::from_secs(20);
/// How many Events an agent may send at once, and how many seconds it takes until it may send another.
const LIMIT: (usize, u64) = (25, 5);

/// An Event: the kind, namespace and name of its object, and its reason.
type Told = (String, String, String, String);

fn told(kind: &str, namespace: &str, name: &str, reason: &str) -> Told {
    (kind.into(), namespace.into(), name.into(), reason.into())
}

fn events(server: &ApiServer) -> BTreeSet<Told> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let key = |event: &Value| {
        let regarding = &event["regarding"];
        (text(&regarding["kind"]), text(&regarding["namespace"]), text(&regarding["name"]), text(&event["reason"]))
    };
    server.events().iter().map(key).collect()
}

fn wait_for_event(server: &ApiServer, wanted: &Told) -> Result<Value> {
    let about = |event: &Value| event["regarding"]["name"] == wanted.2 && event["reason"] == wanted.3;
    wait_until(&format!("{wanted:?}"), USUAL, || server.events().into_iter().find(about))
        .with_context(|| format!("there are {:#?}", events(server)))
}

/// A Service with something else in its spec.
fn odd(name: &str, host: u8, change: impl FnOnce(&mut Value)) -> Value {
    let mut object = service(name, &format!("10.96.0.{host}"));
    change(&mut object);
    object
}

/// With an address of a load balancer.
fn balanced(object: &mut Value, address: &str, port: u16) {
    object["spec"]["type"] = json!("LoadBalancer");
    object["spec"]["ports"][0]["port"] = json!(port);
    object["status"] = json!({"loadBalancer": {"ingress": [{"ip": address}]}});
}

fn named(mut slice: Value, name: &str) -> Value {
    slice["metadata"]["name"] = json!(name);
    slice
}

/// Objects with one fault each, the reason it should be told for, and what else has to be there.
fn bad_services() -> Vec<(Value, &'static str)> {
    vec![
        (odd("nonsense", 1, |it| it["spec"]["externalIPs"] = json!(["nonsense"])), "InvalidAddress"),
        (odd("loopback", 2, |it| it["spec"]["externalIPs"] = json!(["127.0.0.1"])), "AddressRefused"),
        (odd("stranger", 3, |it| it["spec"]["externalIPs"] = json!(["8.8.8.8"])), "AddressRefused"),
        (odd("pods", 4, |it| balanced(it, "10.244.0.7", 80)), "AddressRefused"),
        (odd("metadata", 5, |it| balanced(it, "169.254.169.254", 80)), "AddressRefused"),
        (odd("server", 6, |it| balanced(it, "203.0.113.6", 6443)), "AddressRefused"),
        (odd("host", 7, |it| balanced(it, "198.51.100.9", 2222)), "AddressRefused"),
        (odd("younger", 8, |it| balanced(it, "203.0.113.80", 80)), "FrontendConflict"),
        (odd("port", 9, |it| it["spec"]["ports"][0]["port"] = json!(70_000)), "InvalidPort"),
        (odd("protocol", 10, |it| it["spec"]["ports"][0]["protocol"] = json!("QUIC")), "InvalidProtocol"),
        (odd("policy", 11, |it| it["spec"]["internalTrafficPolicy"] = json!("Near")), "InvalidTrafficPolicy"),
        (odd("affinity", 12, |it| it["spec"]["sessionAffinity"] = json!("Name")), "InvalidSessionAffinity"),
        (
            odd("range", 13, |it| {
                balanced(it, "203.0.113.81", 80);
                it["spec"]["loadBalancerSourceRanges"] = json!(["10.0.0.0/99"]);
            }),
            "InvalidSourceRange",
        ),
        (
            odd("algorithm", 14, |it| {
                it["metadata"]["annotations"] = json!({"service.sluice.dev/algorithm": "\u{1b}[31mbest"});
            }),
            "InvalidAnnotation",
        ),
        (
            odd("twice", 15, |it| it["spec"]["ports"] = json!([{"name": "a", "port": 80}, {"name": "b", "port": 80}])),
            "DuplicatePort",
        ),
        (odd("shapeless", 16, |it| it["spec"]["ports"] = json!(7)), "Unreadable"),
    ]
}

fn bad_slices() -> Vec<(Value, &'static str)> {
    let mut port = named(slice("web", &["10.244.0.2"]), "port");
    port["ports"][0]["port"] = json!(-1);
    let mut family = named(slice("web", &["10.244.0.3"]), "family");
    family["addressType"] = json!("IPX");
    vec![
        (named(slice("web", &["127.0.0.1"]), "loopback"), "AddressRefused"),
        (named(slice("web", &["fe80::1"]), "link-local"), "AddressRefused"),
        (named(slice("web", &["no address"]), "nonsense"), "InvalidAddress"),
        (port, "InvalidPort"),
        (family, "InvalidAddressType"),
    ]
}

/// A server with what makes objects bad that would be good elsewhere.
fn server(sandbox: &Sandbox) -> Result<ApiServer> {
    let server = sandbox.server()?;
    let mut here = node();
    here["spec"]["podCIDRs"] = json!(["10.244.0.0/24"]);
    here["status"]["addresses"] = json!([{"type": "InternalIP", "address": "198.51.100.9"}]);
    server.apply(here)?;
    let mut kubernetes = slice("kubernetes", &["203.0.113.6"]);
    kubernetes["metadata"]["namespace"] = json!("default");
    kubernetes["ports"][0]["port"] = json!(6443);
    server.apply(kubernetes)?;
    let mut elder = odd("elder", 80, |it| balanced(it, "203.0.113.80", 80));
    elder["metadata"]["creationTimestamp"] = json!("2020-01-01T00:00:00Z");
    server.apply(elder)?;
    Ok(server)
}

/// Of scenarios 33 to 35 and 37, what people are told.
#[test]
fn each_kind_of_bad_object_gets_an_event_of_its_own() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let server = server(&sandbox)?;
    let _host = sandbox.namespace.run(|| TcpListener::bind("0.0.0.0:2222"))??;
    let mut wanted = BTreeSet::new();
    for (kind, objects) in [("Service", bad_services()), ("EndpointSlice", bad_slices())] {
        for (object, reason) in objects {
            wanted.insert(told(kind, "test", object["metadata"]["name"].as_str().unwrap_or_default(), reason));
            server.apply(object)?;
        }
    }
    server.apply(json!({"kind": "ServiceCIDR", "metadata": {"name": "odd"}, "spec": {"cidrs": ["nowhere"]}}))?;
    wanted.insert(told("ServiceCIDR", "", "odd", "InvalidCIDR"));
    assert!(wanted.len() < LIMIT.0, "there would not be an Event for each");
    let external_ips = ["--external-ips", "127.0.0.0/8"];
    let agent = sandbox.agent(&[&["--master", &server.url()][..], &external_ips].concat())?;
    agent.wait_for("in sync")?;
    let all = || (events(&server).len() >= wanted.len()).then(|| events(&server));
    let found = wait_until("all Events", USUAL, all).with_context(|| format!("{:#?}", events(&server)))?;
    assert_eq!(found, wanted);
    for event in server.events() {
        assert_eq!((&event["type"], &event["reportingController"]), (&json!("Warning"), &json!("sluice")));
        assert_eq!(event["reportingInstance"], "here");
        assert!(!event["note"].as_str().unwrap_or("\n").contains(char::is_control), "{event}");
        let uid = event["regarding"]["uid"].as_str().unwrap_or_default();
        assert!(!uid.is_empty() || event["reason"] == "Unreadable", "{event}");
    }
    let lost = wait_for_event(&server, &told("Service", "test", "younger", "FrontendConflict"))?;
    assert!(lost["note"].as_str().is_some_and(|note| note.contains("test/elder")), "{lost}");
    Ok(())
}

#[test]
fn a_thousand_bad_objects_cost_a_burst_of_events_and_are_served_as_far_as_they_make_sense() -> Result<()> {
    const BAD: usize = 1000;
    let sandbox = Sandbox::new()?;
    let server = sandbox.server()?;
    server.apply(node())?;
    for number in 0..BAD {
        let mut object = service(&format!("bad-{number}"), &format!("10.96.{}.{}", number / 200, number % 200 + 1));
        object["spec"]["externalIPs"] = json!([format!("nonsense-{number}")]);
        server.apply(object)?;
    }
    server.apply(service("good", "10.97.0.1"))?;
    let began = Instant::now();
    let agent = sandbox.agent(&["--master", &server.url()])?;
    agent.wait_for("in sync")?;
    sandbox.wait_for_services("all of them", |services| services.len() == BAD + 1)?;
    wait_until("the burst", USUAL, || (server.events().len() >= LIMIT.0).then_some(()))?;
    let metrics = ask(&sandbox.namespace, METRICS, "GET", "/metrics")?;
    let sent = server.events().len();
    let refilled = began.elapsed().as_secs() / LIMIT.1 + 1;
    assert!(sent <= LIMIT.0 + refilled as usize, "{sent}");
    let suppressed = metrics.metric("sluice_api_events_total{outcome=\"suppressed\"}");
    assert_eq!(suppressed, Some(f64::from((BAD - sent) as u32)));
    assert_eq!(agent.count("some are left out"), 1, "{}", agent.log());
    assert_eq!(agent.count("is not an IP address"), BAD, "the log has all of it");
    Ok(())
}

#[test]
fn an_event_that_is_refused_is_not_sent_again() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let server = server(&sandbox)?;
    server.inject(On::all(Resource::Events), Fault::Refuse(403), usize::MAX);
    let bad = |name: &str| odd(name, 9, |it| it["spec"]["ports"][0]["port"] = json!(0));
    for name in ["a", "b", "c"] {
        server.apply(bad(name))?;
    }
    let agent = sandbox.agent(&["--master", &server.url()])?;
    agent.wait_for("in sync")?;
    let failed = "sluice_api_events_total{outcome=\"failed\"}";
    let is_over = |answer: &tests::http::Answer| answer.metric(failed) >= Some(3.0);
    wait_for_answer(&sandbox.namespace, METRICS, "/metrics", is_over)?;
    server.heal();
    server.apply(bad("d"))?;
    wait_for_event(&server, &told("Service", "test", "d", "InvalidPort"))?;
    let writes = server.requests().into_iter().filter(|request| request.verb == Verb::Create).count();
    // The younger Service of the fixture is not there, so nothing else is wrong.
    assert_eq!(writes, 4, "{:#?}", events(&server));
    Ok(())
}

#[test]
fn a_server_that_does_not_answer_about_events_does_not_hold_up_services() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let server = server(&sandbox)?;
    server.inject(On::all(Resource::Events), Fault::Silence, usize::MAX);
    for (object, _) in bad_services() {
        server.apply(object)?;
    }
    let agent = sandbox.agent(&["--master", &server.url()])?;
    agent.wait_for("in sync")?;
    let before = sandbox.services()?.len();
    let began = Instant::now();
    server.apply(service("late", "10.97.0.1"))?;
    sandbox.wait_for_services("the late one", |services| services.len() == before + 1)?;
    ensure!(began.elapsed() < patience(Duration::from_secs(2)), "it took {:?}", began.elapsed());
    Ok(())
}

#[test]
fn what_goes_wrong_again_is_counted_up_and_told_anew_to_a_server_that_forgot() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let server = server(&sandbox)?;
    let bad = odd("flapping", 9, |it| it["spec"]["sessionAffinity"] = json!("Name"));
    let wanted = told("Service", "test", "flapping", "InvalidSessionAffinity");
    server.apply(bad.clone())?;
    let agent = sandbox.agent(&["--master", &server.url()])?;
    let event = wait_for_event(&server, &wanted)?;
    assert_eq!(event.get("series").filter(|series| !series.is_null()), None);
    for count in 2..4 {
        server.apply(service("flapping", "10.96.0.9"))?;
        server.apply(bad.clone())?;
        agent.wait_for_count("sessionAffinity: \"Name\" is not known", count)?;
        let counted = || server.events().into_iter().find(|event| event["series"]["count"] == count);
        let event = wait_until("the series", USUAL, counted)?;
        assert!(event["series"]["lastObservedTime"].is_string(), "{event}");
        assert_eq!(server.events().len(), 1, "{:#?}", server.events());
    }
    server.forget_events();
    server.apply(service("flapping", "10.96.0.9"))?;
    server.apply(bad)?;
    wait_for_event(&server, &wanted)?;
    Ok(())
}

/// Scenario 6: one kind of object can be read no more.
#[test]
fn a_kind_of_object_that_may_not_be_watched_any_more_is_told_about_the_node_and_kept() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let server = server(&sandbox)?;
    server.apply(service("web", "10.96.0.1"))?;
    server.apply(slice("web", &["10.244.0.2"]))?;
    let agent = sandbox.agent(&["--master", &server.url()])?;
    agent.wait_for("in sync")?;
    let before = sandbox.picture()?;
    server.inject(On::all(Resource::EndpointSlices), Fault::Refuse(403), usize::MAX);
    server.end_watches();
    let event = wait_for_event(&server, &told("Node", "", "here", "FailedToWatch"))?;
    assert_eq!((&event["metadata"]["namespace"], &event["action"]), (&json!("default"), &json!("Watch")));
    assert_eq!(sandbox.picture()?, before, "nothing is forgotten");
    server.apply(service("late", "10.97.0.1"))?;
    sandbox.wait_for_picture("Services go on", |picture| picture.len() == before.len() + 1)?;
    server.heal();
    server.apply(slice("web", &["10.244.0.2", "10.244.0.3"]))?;
    let has_both = |picture: &Picture| picture.values().any(|answers| answers.internal.len() == 2);
    sandbox.wait_for_picture("the new endpoint", has_both)?;
    agent.wait_for("watching EndpointSlices again")?;
    Ok(())
}
