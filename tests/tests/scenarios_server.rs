//! Scenarios of the API server: it goes, falls silent, forgets, refuses, lies in pieces. The kernel keeps what it has,
//! and what changed is all that is written when there is a server again. Needs root.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::Duration,
};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use tests::{
    api::{
        ApiServer, Fault, On, Resource,
        object::{node, service, slice},
    },
    http::{Answer, wait_for_answer},
    patience::wait_until,
    picture::{Picture, Witness},
    sandbox::{Agent, Sandbox},
};

const ALL: [Resource; 4] = [Resource::Services, Resource::EndpointSlices, Resource::Nodes, Resource::ServiceCidrs];

const METRICS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 10249);

/// What the agent logs with each plan that writes anything.
const WRITES: &str = "kernel follows";

/// As many Services as said, `s0` at 10.96.0.1 with the endpoint 10.0.0.1 and so on.
fn cluster(sandbox: &Sandbox, services: usize) -> Result<ApiServer> {
    let server = sandbox.server()?;
    fill(&server, services)?;
    Ok(server)
}

fn fill(server: &ApiServer, services: usize) -> Result<()> {
    server.apply(node())?;
    for number in 0..services {
        server.apply(service(&format!("s{number}"), &cluster_ip(number)))?;
        server.apply(slice(&format!("s{number}"), &[&format!("10.0.0.{}", number + 1)]))?;
    }
    Ok(())
}

fn cluster_ip(number: usize) -> String {
    format!("10.96.0.{}", number + 1)
}

fn start(sandbox: &Sandbox, server: &ApiServer, more: &[&str]) -> Result<Agent> {
    let agent = sandbox.agent(&[&["--master", &server.url()][..], more].concat())?;
    agent.wait_for("in sync")?;
    Ok(agent)
}

/// The endpoints at each TCP port 80, as clients of the node have them.
fn endpoints(picture: &Picture) -> BTreeMap<&str, Vec<&str>> {
    let frontends = picture.iter();
    frontends
        .map(|(frontend, answers)| (frontend.as_str(), answers.internal.iter().map(String::as_str).collect()))
        .collect()
}

/// How often a resource was asked for from scratch, by pages or as a stream.
fn lists(server: &ApiServer, resource: Resource) -> usize {
    let requests = server.requests().into_iter().filter(|request| request.resource == resource);
    requests
        .filter(|request| {
            let is_first_page = !request.query.contains("watch=") && !request.query.contains("continue=");
            is_first_page || request.query.contains("sendInitialEvents=true")
        })
        .count()
}

fn silence(server: &ApiServer) {
    for resource in ALL {
        server.inject(On::all(resource), Fault::Silence, usize::MAX);
    }
    server.end_watches();
}

/// What the agent's metrics say of one watch.
#[derive(Clone, Copy, Debug)]
struct Contact {
    /// Seconds since 1970.
    last: f64,
    errors: f64,
}

const NEVER: [Contact; ALL.len()] = [Contact { last: 0.0, errors: 0.0 }; ALL.len()];

/// Waits until that of every watch is so, each beside what was seen of it `before`.
fn wait_for_contact(
    sandbox: &Sandbox,
    before: [Contact; ALL.len()],
    is_right: impl Fn(Contact, Contact) -> bool,
) -> Result<[Contact; ALL.len()]> {
    let series = ["services", "endpointslices", "nodes", "servicecidrs"].map(|resource| {
        ["sluice_watch_last_contact_timestamp_seconds", "sluice_watch_errors_total"]
            .map(|name| format!("{name}{{resource=\"{resource}\"}}"))
    });
    let found = |answer: &Answer| {
        let value = |series: &String| answer.metric(series).unwrap_or(f64::NAN);
        series.each_ref().map(|[last, errors]| Contact { last: value(last), errors: value(errors) })
    };
    let answer = wait_for_answer(&sandbox.namespace, METRICS, "/metrics", |answer| {
        found(answer).into_iter().zip(before).all(|(now, before)| is_right(now, before))
    })?;
    Ok(found(&answer))
}

/// A server that takes connections and says nothing, for as long as it takes the agent to give up on it, and then some;
/// meanwhile the cluster goes on, and the server's memory does not.
#[test]
fn scenario_01_a_server_that_is_gone_costs_nothing_and_its_return_one_list() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let server = cluster(&sandbox, 20)?;
    let agent = start(&sandbox, &server, &["--api-silence", "1"])?;
    let before = sandbox.picture()?;
    let (written, asked) = (agent.count(WRITES), ALL.map(|resource| lists(&server, resource)));
    let witness = Witness::of(sandbox.pins.path())?;
    let heard = wait_for_contact(&sandbox, NEVER, |now, _| now.last > 1_700_000_000.0)?;
    server.bookmark();
    let there = wait_for_contact(&sandbox, heard, |now, heard| now.last > heard.last)?;

    silence(&server);
    agent.wait_for_count("what is known is kept, trying again", ALL.len())?;
    let away = wait_for_contact(&sandbox, there, |now, there| now.errors > there.errors)?;
    server.apply(slice("s3", &["10.0.1.3", "10.0.1.4"]))?;
    server.delete(Resource::Services, "test", "s4")?;
    server.compact();
    assert_eq!(agent.count(WRITES), written, "{}", agent.log());
    assert_eq!(sandbox.picture()?, before);
    // Each has failed once more meanwhile, and heard nothing.
    let still = wait_for_contact(&sandbox, away, |now, away| now.errors > away.errors)?;
    assert!(still.into_iter().zip(away).all(|(now, away)| now.last <= away.last), "{still:?} after {away:?}");

    server.heal();
    let at = format!("{}:80/TCP", cluster_ip(3));
    sandbox.wait_for_picture("what changed meanwhile", |picture| {
        endpoints(picture)[at.as_str()] == ["10.0.1.3:8080", "10.0.1.4:8080"] && picture.len() == before.len() - 1
    })?;
    agent.wait_for_count("INFO proxy_userspace::source::kubernetes: watching ", ALL.len())?;
    wait_for_contact(&sandbox, still, |now, still| now.last > still.last)?;
    let testimony = witness.testify()?;
    let gone = format!("{}:80/TCP", cluster_ip(4));
    assert_eq!(testimony.changes().into_keys().collect::<Vec<_>>(), [at.as_str(), gone.as_str()]);
    assert_eq!(testimony.seen[&at].len(), 2, "the old endpoints, then the new: {:?}", testimony.seen[&at]);
    for (resource, asked) in ALL.into_iter().zip(asked) {
        assert_eq!(lists(&server, resource), asked + 1, "{resource:?}: {:#?}", server.requests());
    }
    Ok(())
}

#[test]
fn scenario_02_an_agent_killed_while_there_is_no_server_adopts_and_prunes_only_when_all_is_known() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let mut server = cluster(&sandbox, 5)?;
    drop(start(&sandbox, &server, &[])?);
    let before = sandbox.picture()?;
    server.stop();
    let witness = Witness::of(sandbox.pins.path())?;
    let agent = sandbox.agent(&["--master", &server.url()])?;
    agent.wait_for_count("Connection refused", ALL.len())?;

    // Services alone, one less than before, are not enough to take anything out.
    server.delete(Resource::Services, "test", "s4")?;
    for resource in [Resource::EndpointSlices, Resource::Nodes] {
        server.inject(On::all(resource), Fault::Refuse(503), usize::MAX);
    }
    sandbox.namespace.run(|| server.resume())??;
    agent.wait_for("watching Services again")?;
    assert_eq!(witness.testify()?.changes(), BTreeMap::new(), "{}", agent.log());
    assert_eq!(sandbox.picture()?, before);

    let witness = Witness::of(sandbox.pins.path())?;
    server.heal();
    agent.wait_for("in sync")?;
    let gone = format!("{}:80/TCP", cluster_ip(4));
    assert!(witness.testify()?.changes().into_keys().eq([gone.as_str()]));
    Ok(())
}

#[test]
fn scenario_04_a_410_storm_swaps_atomically() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let server = cluster(&sandbox, 10)?;
    let agent = start(&sandbox, &server, &[])?;
    let written = agent.count(WRITES);
    let witness = Witness::of(sandbox.pins.path())?;
    // A refusal before the watch begins, an error within it, and lists that expire between their pages.
    server.limit_pages(3);
    for round in 0..2 {
        for resource in ALL {
            server.inject(On::watch(resource), Fault::Refuse(410), 1);
            server.inject(On::next_page(resource), Fault::Refuse(410), 1);
        }
        let asked = lists(&server, Resource::Services);
        server.compact();
        server.end_watches();
        // Each refusal makes the next attempt wait longer, up to half a minute.
        wait_until("a new list", Duration::from_mins(1), || (lists(&server, Resource::Services) > asked).then_some(()))
            .with_context(|| format!("round {round}; the log:\n{}", agent.log()))?;
    }
    server.apply(slice("s7", &["10.0.1.7"]))?;
    let at = format!("{}:80/TCP", cluster_ip(7));
    sandbox.wait_for_picture("the change", |picture| endpoints(picture)[at.as_str()] == ["10.0.1.7:8080"])?;
    let testimony = witness.testify()?;
    assert!(testimony.changes().into_keys().eq([at.as_str()]), "{:?}", testimony.changes());
    assert_eq!(testimony.seen[&at].len(), 2, "{:?}", testimony.seen[&at]);
    // The kernel has it a moment before the log has.
    agent.wait_for_count(WRITES, written + 1)?;
    assert_eq!(agent.count(WRITES), written + 1, "only the change is written:\n{}", agent.log());
    Ok(())
}

/// Faults in the middle of a list that has five pages, or comes as a stream.
#[test]
fn scenario_05_a_list_that_comes_in_part_changes_nothing() -> Result<()> {
    let page = On::next_page(Resource::Services);
    let cases = [
        ("a page fails", true, page, Fault::Refuse(500)),
        ("too many requests", true, page, Fault::Refuse(429)),
        ("the connection is cut in a page", true, page, Fault::BreakOff),
        ("the connection is cut in the stream", false, On::watch(Resource::Services), Fault::BreakOff),
    ];
    let sandbox = Sandbox::new()?;
    for (name, has_pages, on, fault) in cases {
        let server = cluster(&sandbox, 10)?;
        if has_pages {
            server.refuse_streaming_lists();
            server.limit_pages(2);
        }
        let agent = start(&sandbox, &server, &[])?;
        let (before, written) = (sandbox.picture()?, agent.count(WRITES));
        let witness = Witness::of(sandbox.pins.path())?;
        server.inject(on, fault, 2);
        server.delete(Resource::Services, "test", "s9")?;
        server.compact();
        server.end_watches();
        sandbox.wait_for_picture("the new list", |picture| picture.len() == before.len() - 1).context(name)?;
        let testimony = witness.testify()?;
        let gone = format!("{}:80/TCP", cluster_ip(9));
        assert!(testimony.changes().into_keys().eq([gone.as_str()]), "{name}: {:?}", testimony.changes());
        agent.wait_for_count(WRITES, written + 1)?;
        assert_eq!(agent.count(WRITES), written + 1, "{name}:\n{}", agent.log());
    }
    Ok(())
}

#[test]
fn scenario_06_one_resource_that_is_forbidden_leaves_the_others_alone_and_comes_back() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let server = cluster(&sandbox, 3)?;
    let agent = start(&sandbox, &server, &[])?;
    let before = sandbox.picture()?;
    let heard = wait_for_contact(&sandbox, NEVER, |now, _| now.last > 0.0)?;
    server.inject(On::all(Resource::EndpointSlices), Fault::Refuse(403), usize::MAX);
    server.end_watches();
    agent.wait_for("watching EndpointSlices: ")?;
    assert!(agent.log().contains("forbidden: "), "{}", agent.log());
    // Slices are not heard of any more; Services are.
    server.apply(slice("s0", &["10.0.1.1"]))?;
    server.apply(service("late", "10.96.0.99"))?;
    let after = sandbox.wait_for_picture("the new Service", |picture| picture.len() == before.len() + 1)?;
    assert!(before.iter().all(|(frontend, answers)| after.get(frontend) == Some(answers)), "{after:#?}");
    assert_eq!(agent.count("watching EndpointSlices: "), 1, "told once, not at each attempt:\n{}", agent.log());
    let [services, slices, ..] = wait_for_contact(&sandbox, heard, |_, _| true)?;
    assert!(services.last > heard[0].last && services.errors <= heard[0].errors, "{services:?} after {heard:?}");
    assert!(slices.last <= heard[1].last && slices.errors > heard[1].errors, "{slices:?} after {heard:?}");
    server.heal();
    agent.wait_for("watching EndpointSlices again")?;
    server.bookmark();
    wait_for_contact(&sandbox, heard, |now, heard| now.last > heard.last)?;
    let at = format!("{}:80/TCP", cluster_ip(0));
    sandbox.wait_for_picture("the slice", |picture| endpoints(picture)[at.as_str()] == ["10.0.1.1:8080"])?;
    Ok(())
}

/// The API server's own Service and another one.
#[test]
fn scenario_08_the_api_servers_own_service_keeps_its_last_endpoints_and_others_reject() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let server = cluster(&sandbox, 1)?;
    let of_api_server = |mut object: Value| {
        object["metadata"]["namespace"] = json!("default");
        object
    };
    server.apply(of_api_server(service("kubernetes", "10.96.0.100")))?;
    server.apply(of_api_server(slice("kubernetes", &["192.0.2.1", "192.0.2.2"])))?;
    let _agent = start(&sandbox, &server, &[])?;
    let before = sandbox.picture()?;
    let witness = Witness::of(sandbox.pins.path())?;
    server.apply(of_api_server(slice("kubernetes", &[])))?;
    server.delete(Resource::EndpointSlices, "default", "kubernetes-1")?;
    server.apply(slice("s0", &[]))?;
    let (own, other) = ("10.96.0.100:80/TCP", "10.96.0.1:80/TCP");
    let after = sandbox.wait_for_picture("the other to be empty", |picture| picture[other].internal.is_empty())?;
    assert_eq!(after[other].otherwise, "reject");
    assert_eq!(after[own], before[own]);
    server.apply(of_api_server(slice("kubernetes", &["192.0.2.3"])))?;
    sandbox.wait_for_picture("the successor", |picture| endpoints(picture)[own] == ["192.0.2.3:8080"])?;
    let testimony = witness.testify()?;
    assert_eq!(testimony.seen[own].len(), 2, "{:?}", testimony.seen[own]);
    Ok(())
}
