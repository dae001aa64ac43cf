//! What a real API server has said is understood, and the fake one says the same.

use std::{
    collections::BTreeSet,
    io::{Read as _, Write as _},
    net::TcpStream,
    time::Duration,
};

use anyhow::{Context as _, Result};
use k8s_openapi::api::{core::v1::Service, discovery::v1::EndpointSlice, networking::v1::ServiceCIDR};
use kube::api::{ObjectList, WatchEvent};
use proxy_userspace::{
    model::{Model, ObjectName, TrafficPolicy},
    source::{Change, Event},
};
use serde_json::Value;
use tests::api::{ApiServer, Resource};

const WATCH_SERVICES: &str = include_str!("../fixtures/api/watch-services.jsonl");
const WATCH_SLICES: &str = include_str!("../fixtures/api/watch-endpointslices.jsonl");
const PAGES: [&str; 2] = [
    include_str!("../fixtures/api/list-services-page1.json"),
    include_str!("../fixtures/api/list-services-page2.json"),
];
const LIST_SLICES: &str = include_str!("../fixtures/api/list-endpointslices.json");
const LIST_CIDRS: &str = include_str!("../fixtures/api/list-servicecidrs.json");
const NODE: &str = include_str!("../fixtures/api/get-node.json");
const TOO_OLD: &str = include_str!("../fixtures/api/http-watch-too-old.txt");
const INITIAL_EVENTS: &str = include_str!("../fixtures/api/watch-initial-events.jsonl");

fn changes<T: kube::Resource<DynamicType = ()> + serde::de::DeserializeOwned>(lines: &str) -> Result<Vec<Change<T>>> {
    let mut changes = Vec::new();
    for line in lines.lines() {
        match serde_json::from_str(line)? {
            WatchEvent::Added(object) | WatchEvent::Modified(object) => changes.push(Change::Apply(Box::new(object))),
            WatchEvent::<T>::Deleted(object) => changes.push(Change::Delete(ObjectName::of(object.meta()))),
            WatchEvent::Bookmark(_) | WatchEvent::Error(_) => {}
        }
    }
    Ok(changes)
}

fn web() -> ObjectName {
    ObjectName { namespace: "capture".into(), name: "web".into() }
}

#[test]
fn a_watch_of_a_real_server_is_understood() -> Result<()> {
    let mut model = Model::new("node-cap".into());
    for change in changes::<Service>(WATCH_SERVICES)? {
        model.absorb(Event::Services(change));
    }
    for change in changes::<EndpointSlice>(WATCH_SLICES)? {
        let defects = model.absorb(Event::EndpointSlices(change));
        assert_eq!(defects, []);
    }
    let service = model.service(&web()).context("no web")?;
    assert_eq!(service.cluster_ips.len(), 2);
    assert_eq!(service.external_policy, TrafficPolicy::Local);
    assert_eq!(service.ports.len(), 2);
    assert!(service.ports.iter().all(|port| port.node_port.is_some()));
    let plain = ObjectName { name: "plain".into(), ..web() };
    assert!(model.service(&plain).is_none(), "it was deleted");
    let slices: Vec<_> = model.slices(&web()).collect();
    assert_eq!(slices.len(), 4, "two hold nothing yet: their endpoints are null");
    let endpoints: usize = slices.iter().map(|slice| slice.endpoints.len()).sum();
    assert!(endpoints >= 2, "{slices:?}");
    Ok(())
}

#[test]
fn lists_of_a_real_server_are_understood() -> Result<()> {
    let mut model = Model::new("node-cap".into());
    let mut services = Vec::new();
    for page in PAGES {
        services.extend(serde_json::from_str::<ObjectList<Service>>(page)?.items);
    }
    let slices: ObjectList<EndpointSlice> = serde_json::from_str(LIST_SLICES)?;
    model.absorb(Event::Services(Change::Replace(services)));
    model.absorb(Event::EndpointSlices(Change::Replace(slices.items)));
    model.absorb(Event::Nodes(Change::Apply(Box::new(serde_json::from_str(NODE)?))));
    assert!(model.is_complete());
    assert_eq!(model.service_ranges(), None, "nothing is known of them");
    let cidrs: ObjectList<ServiceCIDR> = serde_json::from_str(LIST_CIDRS)?;
    assert_eq!(model.absorb(Event::ServiceCidrs(Change::Replace(cidrs.items))), []);
    let ranges = ["10.96.0.0/16", "fd00:10:96::/112"].map(|range| range.parse().unwrap());
    assert_eq!(model.service_ranges(), Some(&ranges[..]));
    assert!(model.service(&web()).is_some());
    for unserved in ["headless", "outside"] {
        let name = ObjectName { name: unserved.into(), ..web() };
        assert!(model.service(&name).is_none(), "{unserved}");
        assert_eq!(model.slices(&name).count(), 0, "{unserved}");
    }
    let node = model.node().context("no node")?;
    assert_eq!(node.zone.as_deref(), Some("zone-1"));
    assert_eq!(node.ipv4, "192.0.2.9".parse().ok());
    assert_eq!(node.ipv6, "2001:db8::9".parse().ok());
    Ok(())
}

/// What is sent in answer to a GET within a moment, without the HTTP framing of chunks.
fn get(server: &ApiServer, path: &str) -> Result<String> {
    let mut stream = TcpStream::connect(server.address())?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    write!(stream, "GET {path} HTTP/1.0\r\nHost: fake\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (_, body) = answer.split_once("\r\n\r\n").context("no body")?;
    Ok(body.to_owned())
}

/// A server that was given the objects of the captured list.
fn captured_server() -> Result<ApiServer> {
    let server = ApiServer::start()?;
    for page in PAGES {
        let page: Value = serde_json::from_str(page)?;
        for mut object in page["items"].as_array().context("no items")?.clone() {
            object["kind"] = "Service".into();
            server.apply(object)?;
        }
    }
    Ok(server)
}

/// With everything masked that differs from server to server.
fn masked(mut value: Value) -> Value {
    for pointer in ["/metadata/resourceVersion", "/object/metadata/resourceVersion", "/metadata/continue"] {
        if let Some(version) = value.pointer_mut(pointer) {
            *version = "masked".into();
        }
    }
    for item in value.get_mut("items").and_then(Value::as_array_mut).into_iter().flatten() {
        item["metadata"]["resourceVersion"] = "masked".into();
    }
    value
}

#[test]
fn the_fake_lists_in_pages_as_the_real_one() -> Result<()> {
    let server = captured_server()?;
    let first: Value = serde_json::from_str(&get(&server, "/api/v1/services?limit=2")?)?;
    let token = first["metadata"]["continue"].as_str().context("no continue token")?.to_owned();
    // What happens between the pages is not in the list.
    server.delete(Resource::Services, "capture", "web")?;
    let second: Value = serde_json::from_str(&get(&server, &format!("/api/v1/services?limit=2&continue={token}"))?)?;
    for (fake, real) in [first, second].into_iter().zip(PAGES) {
        assert_eq!(masked(fake), masked(serde_json::from_str(real)?));
    }
    server.compact();
    let late: Value = serde_json::from_str(&get(&server, &format!("/api/v1/services?limit=2&continue={token}"))?)?;
    assert_eq!((&late["kind"], &late["code"]), (&"Status".into(), &410.into()));
    Ok(())
}

#[test]
fn the_fake_streams_lists_as_the_real_one() -> Result<()> {
    let server = captured_server()?;
    let parameters =
        "watch=1&sendInitialEvents=true&resourceVersionMatch=NotOlderThan&allowWatchBookmarks=true&timeoutSeconds=1";
    let body = get(&server, &format!("/api/v1/services?{parameters}"))?;
    let parse = |text: &str| -> Result<Vec<Value>> {
        text.lines().map(|line| Ok(masked(serde_json::from_str(line)?))).collect()
    };
    let names = |events: &[Value]| -> BTreeSet<String> {
        events.iter().map(|event| format!("{} {}", event["type"], event["object"]["metadata"]["name"])).collect()
    };
    let (fake, real) = (parse(&body)?, parse(INITIAL_EVENTS)?);
    assert_eq!(names(&fake), names(&real));
    assert_eq!(fake.last(), real.last(), "the bookmark that ends the list");
    assert_eq!(fake.first(), real.first());
    Ok(())
}

#[test]
fn the_fake_forgets_as_the_real_one() -> Result<()> {
    let server = captured_server()?;
    server.compact();
    let body = get(&server, "/api/v1/services?watch=1&resourceVersion=1")?;
    let (fake, real): (Value, Value) =
        (serde_json::from_str(&body)?, serde_json::from_str(TOO_OLD.lines().last().context("empty")?)?);
    let without_message = |mut event: Value| {
        event["object"]["message"] = "masked".into();
        event
    };
    assert!(fake["object"]["message"].as_str().is_some_and(|text| text.starts_with("too old resource version: 1 (")));
    assert_eq!(without_message(fake), without_message(real));
    Ok(())
}
