//! `sluice explain` on a node without an agent: what it says of packets that would come, of connections that are there, and that
//! asking changes nothing. Needs root.

mod fixture;

use std::{
    net::{SocketAddr, UdpSocket},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use fixture::{DNS, LOCAL_PORT, Node, SOME_CLIENTS, STICKY, TURNS, UNALLOCATED};
use proxy_common::{
    addr::{Ipv4, Port, Protocol},
    backend::{Backend, BackendState},
    service::{Frontend, Range, Service},
};
use proxy_userspace::{
    dataplane::{UplinkMode, netlink::conntrack::TranslatedConnection},
    diff::{Plan, Step},
    explain::{Answer, Clients, Fate, Origin, WayKind},
};
use tests::{
    dump,
    frame::{Family, Host},
    lab::agent::sluice_program,
    patience::{patience, wait_until},
    testbed::{CLIENT, NODE, NODE_PORT, OTHER_SERVICE, POD, POD2, PORT, REMOTE, SERVICE, TARGET},
};

fn to(host: Host, family: Family, port: u16, protocol: &str) -> String {
    format!("{}/{protocol}", SocketAddr::new(host.address(family), port))
}

fn end(host: Host, family: Family, port: u16) -> String {
    SocketAddr::new(host.address(family), port).to_string()
}

/// Series of the metrics that would have counted it.
fn counted(answer: &Answer) -> &str {
    answer.reason.counted_as.as_deref().unwrap_or_default()
}

#[test]
fn a_pod_is_told_the_backend_of_a_cluster_ip() -> Result<()> {
    let node = Node::new(UplinkMode::Tc)?;
    for family in Family::BOTH {
        for (protocol, port, name) in [("tcp", PORT, "http"), ("udp", DNS, "dns")] {
            let client = end(POD, family, 40_000);
            let answer = node.explain(&client, &to(SERVICE, family, port, protocol), Origin::Auto)?;
            assert_eq!((answer.program, answer.device.as_deref()), ("pod_in", Some("pod0")));
            assert_eq!((answer.result, counted(&answer)), (Fate::Translated, "sluice_events_total{event=\"opened\"}"));
            assert_eq!(answer.service.context("no Service")?.name.to_string(), format!("shop/web:{name}"));
            let backend = answer.backend.context("no backend")?;
            assert_eq!((backend.address.ip(), backend.is_local), (POD2.address(family), true));
            let after = answer.after.context("no packet")?;
            assert_eq!((after.source, after.destination), (client, end(POD2, family, TARGET)));
            assert_eq!(answer.way.context("no way")?.kind, WayKind::Stack);
        }
    }
    Ok(())
}

#[test]
fn a_client_outside_is_told_where_a_node_port_leads_by_xdp_and_by_tc() -> Result<()> {
    for (mode, program) in [(UplinkMode::Xdp, "uplink_xdp"), (UplinkMode::Tc, "uplink_in")] {
        let node = Node::new(mode)?;
        for family in Family::BOTH {
            let client = end(CLIENT, family, 20_000);
            let answer = node.explain(&client, &to(NODE, family, NODE_PORT, "tcp"), Origin::Auto)?;
            assert_eq!((answer.program, answer.result), (program, Fate::Translated));
            assert_eq!(answer.choice.context("no choice")?.clients, Clients::External);
            let after = answer.after.context("no packet")?;
            let (source, destination) = (end(NODE, family, 20_000), end(REMOTE, family, TARGET));
            assert_eq!((after.source, after.destination), (source, destination));
            let way = answer.way.context("no way")?;
            assert_eq!((way.kind, way.device.as_deref()), (WayKind::Forward, Some("up0")));
            assert_eq!(way.mac.as_deref(), Some("02:00:00:00:00:02"));
        }
    }
    Ok(())
}

#[test]
fn what_is_masqueraded_on_its_way_is_told_with_its_second_step() -> Result<()> {
    let node = Node::new(UplinkMode::Tc)?;
    let answer = node.explain(&end(POD, Family::V4, 20_000), &to(NODE, Family::V4, NODE_PORT, "tcp"), Origin::Auto)?;
    assert_eq!(answer.result, Fate::Translated);
    assert_eq!(answer.after.context("no packet")?.source, end(POD, Family::V4, 20_000), "at first");
    assert_eq!(answer.second_step.context("no second step")?.source.to_string(), end(NODE, Family::V4, 20_000));
    Ok(())
}

#[test]
fn what_is_not_served_is_told_with_the_reason() -> Result<()> {
    let node = Node::new(UplinkMode::Tc)?;
    for family in Family::BOTH {
        let (pod, outside) = (POD.address(family).to_string(), CLIENT.address(family).to_string());
        let cases = [
            (
                &pod,
                to(OTHER_SERVICE, family, PORT, "tcp"),
                Fate::Rejected,
                "sluice_rejects_total{reason=\"no_endpoint\"}",
            ),
            (&pod, to(SERVICE, family, 9, "udp"), Fate::Rejected, "sluice_rejects_total{reason=\"no_port\"}"),
            (&pod, to(UNALLOCATED, family, PORT, "tcp"), Fate::Dropped, "sluice_drops_total{reason=\"unallocated\"}"),
            (
                &outside,
                to(NODE, family, LOCAL_PORT, "tcp"),
                Fate::Dropped,
                "sluice_drops_total{reason=\"no_local_endpoint\"}",
            ),
            (&outside, to(NODE, family, SOME_CLIENTS, "tcp"), Fate::Dropped, "sluice_drops_total{reason=\"source\"}"),
            (&pod, to(POD2, family, TARGET, "tcp"), Fate::PassedOn, ""),
            (&outside, to(NODE, family, 22, "tcp"), Fate::PassedOn, ""),
        ];
        for (client, destination, fate, series) in cases {
            let answer = node.explain(client, &destination, Origin::Auto)?;
            assert_eq!((answer.result, counted(&answer)), (fate, series), "{client} to {destination}");
            assert!(answer.backend.is_none() && !answer.reason.sentence.is_empty(), "{destination}: {answer:?}");
        }
        let answer = node.explain(&pod, &to(OTHER_SERVICE, family, PORT, "tcp"), Origin::Auto)?;
        assert_eq!(answer.after.context("no answer")?.kind, "TCP RST ACK");
    }
    Ok(())
}

#[test]
fn the_nodes_own_sockets_are_told_by_the_same_tables() -> Result<()> {
    let node = Node::new(UplinkMode::Tc)?;
    for family in Family::BOTH {
        let loopback = if family == Family::V4 { "127.0.0.1" } else { "::1" };
        let port = if family == Family::V4 { format!("127.0.0.1:{NODE_PORT}") } else { format!("[::1]:{NODE_PORT}") };
        for (client, destination) in
            [(NODE.address(family).to_string(), to(NODE, family, NODE_PORT, "tcp")), (loopback.to_owned(), port)]
        {
            let answer = node.explain(&client, &destination, Origin::Auto)?;
            assert_eq!((answer.from, answer.result), (Origin::Node, Fate::Translated), "{client} to {destination}");
            assert_eq!(answer.way.context("no way")?.kind, WayKind::Socket);
            let backend = answer.backend.context("no backend")?;
            assert_eq!(backend.address.to_string(), end(REMOTE, family, TARGET));
        }
    }
    Ok(())
}

#[test]
fn sockets_of_the_node_that_no_program_sees_are_passed_on() -> Result<()> {
    let node = Node::new(UplinkMode::Tc)?;
    for family in Family::BOTH {
        let (client, sctp) = (NODE.address(family).to_string(), to(NODE, family, NODE_PORT, "sctp"));
        let answer = node.explain(&client, &sctp, Origin::Auto)?;
        assert_eq!((answer.from, answer.result), (Origin::Node, Fate::PassedOn));
        assert!(answer.reason.sentence.contains("SCTP") && answer.backend.is_none(), "{answer:?}");
    }
    let node = node.without_socket_lb()?;
    for family in Family::BOTH {
        let (client, destination) = (NODE.address(family).to_string(), to(NODE, family, NODE_PORT, "tcp"));
        let answer = node.explain(&client, &destination, Origin::Auto)?;
        assert_eq!((answer.from, answer.result), (Origin::Node, Fate::PassedOn));
        assert!(answer.reason.sentence.contains("--socket-lb=off") && answer.backend.is_none(), "{answer:?}");
    }
    Ok(())
}

#[test]
fn a_socket_of_a_node_without_an_address_to_masquerade_with_is_translated_all_the_same() -> Result<()> {
    let node = Node::new(UplinkMode::Tc)?;
    node.forget_addresses()?;
    for family in Family::BOTH {
        let (client, destination) = (NODE.address(family).to_string(), to(NODE, family, NODE_PORT, "tcp"));
        let answer = node.explain(&client, &destination, Origin::Auto)?;
        assert_eq!((answer.from, answer.result), (Origin::Node, Fate::Translated));
        assert_eq!(answer.also, [], "nothing is said against it");
        let outside = node.explain(&end(CLIENT, family, 20_000), &destination, Origin::Auto)?;
        assert_eq!(outside.result, Fate::Dropped, "others are dropped");
    }
    Ok(())
}

#[test]
fn a_connection_that_another_proxy_has_is_passed_on() -> Result<()> {
    let node = Node::new(UplinkMode::Tc)?;
    for family in Family::BOTH {
        let (client, other) = (end(POD, family, 20_000), end(POD, family, 20_001));
        let destination = to(SERVICE, family, PORT, "tcp");
        node.leave(TranslatedConnection {
            protocol: Protocol::Tcp,
            client: client.parse()?,
            frontend: end(SERVICE, family, PORT).parse()?,
            backend: end(POD, family, 8_080).parse()?,
            answered: client.parse()?,
        })?;
        let answer = node.explain(&client, &destination, Origin::Auto)?;
        assert_eq!(answer.result, Fate::PassedOn);
        assert!(answer.reason.sentence.contains("another proxy"), "{:?}", answer.reason);
        assert_eq!(node.explain(&other, &destination, Origin::Auto)?.result, Fate::Translated);
    }
    Ok(())
}

/// Sends a datagram from the pod, by the programs that are attached.
fn send(node: &Node, from: (Host, u16), to: (Host, u16), family: Family) -> Result<()> {
    node.pod.run(|| -> Result<()> {
        let socket = UdpSocket::bind((from.0.address(family), from.1))?;
        socket.send_to(b"question", (to.0.address(family), to.1))?;
        Ok(())
    })?
}

#[test]
fn a_connection_that_is_there_is_told_with_its_backend_although_others_would_get_another() -> Result<()> {
    let node = Node::new(UplinkMode::Tc)?;
    for family in Family::BOTH {
        let (client, destination) = (end(POD, family, 40_000), to(SERVICE, family, DNS, "udp"));
        assert_eq!(node.explain(&client, &destination, Origin::Auto)?.result, Fate::Translated);
        send(&node, (POD, 40_000), (SERVICE, DNS), family)?;
        let answer = wait_until("a known connection", Duration::from_secs(5), || {
            let answer = node.explain(&client, &destination, Origin::Auto).ok()?;
            (answer.result == Fate::Known).then_some(answer)
        })?;
        let known = answer.connection.context("no connection")?;
        assert_eq!((known.phase, known.is_kept), ("opening", true));
        assert_eq!(known.destination.to_string(), end(POD2, family, TARGET));
    }

    // The Service is another backend's from now on; a connection of UDP stays while its backend serves.
    let range = Range { first: 1, count: 1 };
    let service = Service { index: 2, internal: range, external: range, ..Service::default() };
    let frontend = Frontend::new(SERVICE.v4.into(), Port::new(DNS), Protocol::Udp);
    node.apply(&Plan { v4: vec![Step::PutService(frontend, service)], ..Plan::default() })?;
    send(&node, (POD, 40_000), (SERVICE, DNS), Family::V4)?;
    let destination = to(SERVICE, Family::V4, DNS, "udp");
    let known = node.explain(&end(POD, Family::V4, 40_000), &destination, Origin::Auto)?;
    assert_eq!((known.result, known.backend.context("no backend")?.id), (Fate::Known, 1));
    let new = node.explain(&end(POD, Family::V4, 40_001), &destination, Origin::Auto)?;
    assert_eq!((new.result, new.backend.context("no backend")?.id), (Fate::Translated, 2));

    // And leaves it when it does not.
    send(&node, (POD, 40_000), (SERVICE, DNS), Family::V4)?;
    let backend = Backend {
        addr: POD2.v4.into(),
        node: Ipv4::default(),
        port: Port::new(TARGET),
        state: BackendState::NotServing,
        is_local: 1,
        generation: 1,
    };
    node.apply(&Plan { v4: vec![Step::PutBackend(1, backend)], ..Plan::default() })?;
    let moved = node.explain(&end(POD, Family::V4, 40_000), &destination, Origin::Auto)?;
    assert_eq!((moved.result, moved.backend.context("no backend")?.id), (Fate::Translated, 2));
    assert!(!moved.connection.context("no connection")?.is_kept);
    assert_eq!(moved.also.len(), 1, "{:?}", moved.also);
    Ok(())
}

#[test]
fn asking_takes_nobodys_turn_and_tells_whose_it_is() -> Result<()> {
    let node = Node::new(UplinkMode::Tc)?;
    let ask = || -> Result<u32> {
        let answer = node.explain(&POD.v4.to_string(), &to(SERVICE, Family::V4, TURNS, "tcp"), Origin::Auto)?;
        ensure!(answer.notes.iter().any(|note| note.contains("the next connection")), "{:?}", answer.notes);
        Ok(answer.backend.context("no backend")?.id)
    };
    let first = ask()?;
    assert_eq!(ask()?, first, "nobody has connected meanwhile");
    // Another one has: the turn is kept by the pinned map.
    let mut turns: aya::maps::Array<_, u64> =
        aya::maps::Map::Array(aya::maps::MapData::from_pin(node.maps().join("TURNS_V4"))?).try_into()?;
    let turn = turns.get(&7, 0)?;
    turns.set(7, turn + 1, 0)?;
    assert_ne!(ask()?, first);
    Ok(())
}

#[test]
fn a_client_that_has_a_backend_is_told_that_it_stays() -> Result<()> {
    let node = Node::new(UplinkMode::Tc)?;
    let ask = || node.explain(&POD.v4.to_string(), &to(SERVICE, Family::V4, STICKY, "udp"), Origin::Auto);
    let affinity = |answer: &Answer| answer.choice.as_ref().and_then(|choice| choice.affinity);
    let unknown = affinity(&ask()?).context("no affinity")?;
    assert_eq!((unknown.is_kept, unknown.idle_seconds), (false, None));

    send(&node, (POD, 40_000), (SERVICE, STICKY), Family::V4)?;
    let first = wait_until("an affinity", Duration::from_secs(5), || {
        let answer = ask().ok()?;
        affinity(&answer)?.is_kept.then_some(answer.backend?.id)
    })?;
    // By chance it would be one of two.
    for _ in 0..8 {
        let answer = ask()?;
        assert_eq!(answer.backend.as_ref().map(|backend| backend.id), Some(first));
        assert!(affinity(&answer).is_some_and(|affinity| affinity.is_kept), "{answer:?}");
    }
    Ok(())
}

#[test]
fn asking_changes_no_map() -> Result<()> {
    let node = Node::new(UplinkMode::Xdp)?;
    send(&node, (POD, 40_000), (SERVICE, DNS), Family::V4)?;
    let known = || node.explain(&end(POD, Family::V4, 40_000), &to(SERVICE, Family::V4, DNS, "udp"), Origin::Auto);
    wait_until("a known connection", Duration::from_secs(5), || (known().ok()?.result == Fate::Known).then_some(()))?;

    let before = dump::pinned(&node.maps())?;
    assert!(before.len() > 40 && before["EMBRYOS_V4"].len() == 2, "the dump sees what is there");
    for family in Family::BOTH {
        for (client, destination) in [
            (POD, to(SERVICE, family, DNS, "udp")),
            (POD, to(SERVICE, family, TURNS, "tcp")),
            (POD, to(SERVICE, family, STICKY, "udp")),
            (POD, to(SERVICE, family, 9, "sctp")),
            (NODE, to(SERVICE, family, STICKY, "udp")),
            (CLIENT, to(NODE, family, NODE_PORT, "tcp")),
            (CLIENT, to(NODE, family, LOCAL_PORT, "tcp")),
        ] {
            let answer = node.explain(&client.address(family).to_string(), &destination, Origin::Auto)?;
            assert_ne!(answer.result, Fate::PassedOn, "{destination}: a packet of its kind has no way here");
        }
    }
    known()?;
    let after = dump::pinned(&node.maps())?;
    for (name, entries) in &before {
        assert!(after.get(name) == Some(entries), "{name} is not what it was");
    }
    assert_eq!(after.len(), before.len());
    Ok(())
}

/// Runs the binary in the node's namespace.
fn sluice(node: &Node, arguments: &[&str]) -> Result<std::process::Output> {
    let mut command = node.namespace.command(sluice_program()?)?;
    command.arg("explain").args(arguments).arg("--pin-path").arg(&node.options.pin_path);
    Ok(command.output()?)
}

/// Holds what the command prints to what it was.
fn hold(node: &Node, name: &str, question: &[&str]) -> Result<()> {
    let mut settings = insta::Settings::clone_current();
    settings.set_snapshot_path("../snapshots/explain");
    settings.set_prepend_module_to_snapshot(false);
    for (suffix, more) in [("", &[][..]), ("_json", &["-o", "json"])] {
        let output = sluice(node, &[question, more].concat())?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let printed = String::from_utf8(output.stdout)?;
        settings.bind(|| insta::assert_snapshot!(format!("{name}{suffix}"), printed));
    }
    Ok(())
}

#[test]
fn the_command_prints_lines_for_people_and_json_for_programs() -> Result<()> {
    let node = Node::new(UplinkMode::Tc)?;
    hold(&node, "translated", &["10.244.1.5:40000", "10.96.0.10:80/tcp"])?;
    hold(&node, "forwarded", &["[2001:db8:fe01::7]:20000", "[2001:db8:1::1]:30080"])?;
    hold(&node, "rejected", &["10.244.1.5:40000", "10.96.0.11:80"])?;
    hold(&node, "dropped", &["198.51.100.7:40000", "192.0.2.1:30082", "--from", "uplink"])?;
    hold(&node, "node", &["192.0.2.1:40000", "10.96.0.10:53/udp"])
}

#[test]
fn a_question_that_cannot_be_answered_is_told_what_to_do() -> Result<()> {
    let node = Node::new(UplinkMode::Tc)?;
    let cases = [
        (vec!["10.244.1.5", "[fd00::1]:80"], 2, "two families"),
        (vec!["10.244.1.5", "10.96.0.10"], 2, "ADDRESS:PORT/PROTOCOL"),
        (vec!["10.244.1.5", "10.96.0.10:80", "--device", "eth9"], 78, "there is no device eth9"),
        (vec!["10.244.1.5", "10.96.0.10:80", "--device", "lo"], 78, "no program of Sluice takes what comes in by lo"),
        (vec!["10.244.9.9", "10.96.0.10:80", "--from", "pod"], 78, "name the pod's device with --device"),
    ];
    for (arguments, code, words) in cases {
        let output = sluice(&node, &arguments)?;
        let said = String::from_utf8(output.stderr)?;
        assert!(output.status.code() == Some(code) && said.contains(words), "{arguments:?}: {said}");
    }
    std::fs::remove_file(node.maps().join("AFFINITY_V6"))?;
    let output = sluice(&node, &["10.244.1.5", "10.96.0.10:80"])?;
    let said = String::from_utf8(output.stderr)?;
    assert!(output.status.code() == Some(78) && said.contains("AFFINITY_V6"), "{said}");
    std::fs::remove_file(node.maps().join("NODE"))?;
    let output = sluice(&node, &["10.244.1.5", "10.96.0.10:80"])?;
    let said = String::from_utf8(output.stderr)?;
    assert!(output.status.code() == Some(78) && said.contains("name its --pin-path"), "{said}");
    Ok(())
}

#[test]
fn it_takes_hardly_longer_where_there_are_ten_thousand_services() -> Result<()> {
    const SERVICES: u32 = 10_000;
    let node = Node::with_sizes(UplinkMode::Tc, std::collections::BTreeMap::new())?;
    let ask = || -> Result<Duration> {
        let began = Instant::now();
        let answer = node.explain(&POD.v4.to_string(), &to(SERVICE, Family::V4, PORT, "tcp"), Origin::Auto)?;
        ensure!(answer.result == Fate::Translated, "{answer:?}");
        Ok(began.elapsed())
    };
    let few = ask()?.min(ask()?);
    let range = Range { first: 0, count: 1 };
    let service = |number: u32| {
        let [_, _, high, low] = number.to_be_bytes();
        let frontend = Frontend::new(Ipv4 { octets: [10, 97, high, low] }, Port::new(PORT), Protocol::Tcp);
        Step::PutService(
            frontend,
            Service { index: 100 + number, internal: range, external: range, ..Service::default() },
        )
    };
    node.apply(&Plan { v4: (0..SERVICES).map(service).collect(), ..Plan::default() })?;
    let many = ask()?.min(ask()?);
    println!("{few:?} with a few Services, {many:?} with {SERVICES} more");
    assert!(many < few * 2 + patience(Duration::from_millis(200)), "{few:?} with a few Services, {many:?} with many");
    Ok(())
}
