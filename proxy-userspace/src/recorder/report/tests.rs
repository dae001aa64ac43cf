use std::net::IpAddr;

use k8s_openapi::jiff::Timestamp;
use proxy_common::addr::Protocol;
use serde_json::json;

use super::{INSTANCE, NAME, NOTE, Report, reports};
use crate::model::{Defect, ObjectName, ObjectReference, Problem, Taken};

fn object(kind: &'static str, namespace: &str, name: &str) -> ObjectReference {
    let name = ObjectName { namespace: namespace.into(), name: name.into() };
    ObjectReference { kind, name, uid: "1-2-3".into() }
}

fn web() -> ObjectReference {
    object("Service", "test", "web")
}

fn only_report(problem: Problem) -> Report {
    let reports = reports(&[Defect { object: web(), problem }]);
    let [report] = &reports[..] else { panic!("{reports:?}") };
    report.clone()
}

fn at() -> Timestamp {
    Timestamp::from_second(1_795_000_000).unwrap()
}

#[test]
fn every_problem_has_a_reason() {
    let (field, value, address) = ("spec.field", String::from("x"), IpAddr::from([192, 0, 2, 1]));
    let winner = ObjectName { namespace: "test".into(), name: "other".into() };
    let cases = [
        (Problem::Address { field, value: value.clone() }, "InvalidAddress"),
        (Problem::Refused { field, address }, "AddressRefused"),
        (Problem::Taken { address, by: Taken::Pods }, "AddressRefused"),
        (Problem::Port { field, value: 70_000 }, "InvalidPort"),
        (Problem::Protocol { field, value: value.clone() }, "InvalidProtocol"),
        (Problem::Policy { field, value: value.clone() }, "InvalidTrafficPolicy"),
        (Problem::AddressType(value.clone()), "InvalidAddressType"),
        (Problem::Twice { port: 80, protocol: Protocol::Tcp }, "DuplicatePort"),
        (Problem::SourceRange(value.clone()), "InvalidSourceRange"),
        (Problem::Cidr { field, value: value.clone() }, "InvalidCIDR"),
        (Problem::TooManyCidrs("10.0.0.0/8".parse().unwrap()), "TooManyServiceCIDRs"),
        (Problem::SourceScope(value.clone()), "InvalidAnnotation"),
        (Problem::Annotation { name: field, value: value.clone() }, "InvalidAnnotation"),
        (Problem::Affinity(value.clone()), "InvalidSessionAffinity"),
        (Problem::AffinitySeconds(0), "InvalidSessionAffinity"),
        (Problem::Conflict { frontend: value.clone(), winner }, "FrontendConflict"),
        (Problem::More(3), "MoreProblems"),
        (Problem::NoRoom(value.clone()), "NoRoom"),
        (Problem::unreadable("x"), "Unreadable"),
        (
            Problem::HealthCheck { place: "192.0.2.9:30100".parse().unwrap(), error: "in use".into() },
            "FailedToStartServiceHealthcheck",
        ),
        (Problem::watch("EndpointSlice", "forbidden"), "FailedToWatch"),
    ];
    for (problem, reason) in cases {
        let report = only_report(problem.clone());
        assert_eq!((report.reason, report.note), (reason, problem.to_string()));
    }
}

#[test]
fn an_event_names_its_object_and_who_reports() {
    let cases = [
        (
            web(),
            "test",
            json!({"apiVersion": "v1", "kind": "Service", "namespace": "test", "name": "web", "uid": "1-2-3"}),
        ),
        (
            object("EndpointSlice", "test", "web-1"),
            "test",
            json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "namespace": "test", "name": "web-1", "uid": "1-2-3"}),
        ),
        (
            object("ServiceCIDR", "", "more"),
            "default",
            json!({"apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR", "name": "more", "uid": "1-2-3"}),
        ),
        (
            ObjectReference::of_node("here"),
            "default",
            json!({"apiVersion": "v1", "kind": "Node", "name": "here", "uid": "here"}),
        ),
    ];
    for (object, namespace, regarding) in cases {
        let reports = reports(&[Defect { object, problem: Problem::AffinitySeconds(-1) }]);
        let event = serde_json::to_value(reports[0].event("here", at())).unwrap();
        let name = format!("{}.{:x}", regarding["name"].as_str().unwrap(), at().as_nanosecond());
        assert_eq!(event["metadata"], json!({"namespace": namespace, "name": name}));
        assert_eq!(event["regarding"], regarding);
        assert_eq!(event["reportingController"], "sluice");
        assert_eq!(event["reportingInstance"], "here");
        assert_eq!(event["type"], "Warning");
        assert_eq!(event["action"], "Serve");
        assert!(event["eventTime"].as_str().unwrap().ends_with(".000000Z"), "{event}");
    }
}

#[test]
fn defects_of_one_object_for_one_reason_are_one_report() {
    let port = |value| Problem::Port { field: "spec.ports.port", value };
    let defect = |object, problem| Defect { object, problem };
    let reports = reports(&[
        defect(web(), port(0)),
        defect(object("Service", "test", "other"), port(-1)),
        defect(web(), port(70_000)),
        defect(web(), Problem::AffinitySeconds(0)),
        defect(object("Service", "test", ""), Problem::Nameless),
    ]);
    let told: Vec<_> = reports.iter().map(|report| (&*report.object.name.name, report.reason)).collect();
    assert_eq!(told, [("other", "InvalidPort"), ("web", "InvalidPort"), ("web", "InvalidSessionAffinity")]);
    assert_eq!(reports[1].note, "spec.ports.port: 0 is not a port; spec.ports.port: 70000 is not a port");
}

#[test]
fn whatever_stands_in_an_object_its_event_is_one_the_server_takes() {
    let note = only_report(Problem::unreadable("a\u{1b}[2J\nb\u{9b}")).note;
    assert!(note.ends_with(r"a\u{1b}[2J\nb\u{9b}"), "{note}");
    let winner = ObjectName { namespace: "ü".repeat(2000).into(), name: "\u{7}".repeat(2000).into() };
    let note = only_report(Problem::Conflict { frontend: "x".into(), winner }).note;
    assert!(note.len() <= NOTE && note.len() > NOTE - 4 && note.ends_with('…'), "{} bytes", note.len());
    let long = object("EndpointSlice", "test", &format!("{}.{}", "a".repeat(NAME - 19), "b".repeat(18)));
    let reports = reports(&[Defect { object: long, problem: Problem::AffinitySeconds(0) }]);
    let event = reports[0].event(&"n".repeat(253), at());
    let name = event.metadata.name.unwrap();
    assert!(
        name.len() <= NAME && !name.contains("..") && name.ends_with(&format!(".{:x}", at().as_nanosecond())),
        "{name}"
    );
    assert!(event.reporting_instance.unwrap().len() <= INSTANCE);
}
