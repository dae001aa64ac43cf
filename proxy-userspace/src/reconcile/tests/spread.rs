//! How a Service's connections are spread: what its annotations make of its range of slots.

use proxy_common::service::Pick;

use super::*;
use crate::{algorithm::AlgorithmName, diff::Overflow};

const ROOMY: Capacity = Capacity { services: 64, backends: 64, slots: 4096, sources: 64 };

/// A Service with endpoints 10.0.0.1 to 10.0.0.3, pods named web-0 to web-2.
fn reconciler_of(usual: AlgorithmName, annotations: &Value, capacity: Capacity) -> Reconciler {
    let settings = Settings { name: "here".into(), algorithm: usual, ..Settings::default() };
    let mut reconciler = Reconciler::new(settings, capacity);
    reconciler.adopt(KernelState::default(), Instant::now());
    reconciler.absorb_network(NodeNetwork::default());
    let service = object(json!({
        "metadata": {"namespace": "test", "name": "web", "annotations": annotations},
        "spec": {"clusterIP": "10.96.0.1", "ports": [{"port": 80}]},
    }));
    let endpoint = |host: usize| json!({"addresses": [format!("10.0.0.{}", host + 1)], "targetRef": {"kind": "Pod", "name": format!("web-{host}")}});
    let endpoints: Vec<Value> = (0..3).map(endpoint).collect();
    tell(&mut reconciler, lists(vec![service], vec![slice("web-a", "web", &json!(endpoints))]));
    reconciler
}

/// The last byte of each slot's backend, and how one is picked.
fn spread(reconciler: &mut Reconciler) -> (Vec<u8>, Pick) {
    let mut kernel = KernelState::default();
    settle(reconciler, &mut kernel, Instant::now());
    let service = *ports(&kernel.v4)[0];
    let slots = backends(&kernel.v4, &kernel.slots, service.internal);
    (slots.into_iter().map(|backend| backend.addr.octets[3]).collect(), service.pick)
}

#[test]
fn a_list_holds_each_endpoint_as_often_as_its_weight_asks_for() {
    let weights = |text: &str| json!({"service.sluice.dev/weights": text});
    let cases = [
        ("alike", json!({}), vec![1, 2, 3]),
        ("by address", weights("10.0.0.2=2"), vec![2, 1, 3, 2]),
        ("by name", weights("web-0=0"), vec![2, 3]),
        ("by the beginning of a name", weights("web-2=3,web-*=3"), vec![1, 2, 3]),
        ("unreadable", weights("web-0=many"), vec![1, 2, 3]),
        ("nobody", weights("*=0"), vec![]),
    ];
    for (name, annotations, expected) in cases {
        let mut reconciler = reconciler_of(AlgorithmName::Random, &annotations, ROOMY);
        assert_eq!(spread(&mut reconciler), (expected, Pick::Random), "{name}");
    }
}

#[test]
fn a_service_names_its_algorithm_or_has_that_of_the_node() {
    let named = |name: &str| json!({"service.sluice.dev/algorithm": name});
    let cases = [
        ("the node's", json!({}), AlgorithmName::RoundRobin, (3, Pick::RoundRobin)),
        ("its own", named("least-connections"), AlgorithmName::Maglev, (3, Pick::LeastConnections)),
        ("a table", named("maglev"), AlgorithmName::Random, (509, Pick::Hash)),
        ("a table by client", named("source-hash"), AlgorithmName::Random, (509, Pick::SourceHash)),
        ("unknown", named("quickest"), AlgorithmName::RoundRobin, (3, Pick::RoundRobin)),
    ];
    for (name, annotations, usual, expected) in cases {
        let (slots, pick) = spread(&mut reconciler_of(usual, &annotations, ROOMY));
        assert_eq!((slots.len(), pick), expected, "{name}");
    }
}

#[test]
fn a_table_that_finds_no_room_is_a_list_until_there_is() {
    let annotations = json!({"service.sluice.dev/algorithm": "maglev"});
    let mut reconciler = reconciler_of(AlgorithmName::Random, &annotations, SMALL);
    let mut kernel = KernelState::default();
    let (plan, overflows) = reconciler.plan(Instant::now());
    kernel.carry_out(&plan);
    assert!(matches!(&overflows[..], [Overflow::Table { slots: 509, .. }]), "{overflows:?}");
    let defect = reconciler.defect(&overflows[0]).unwrap();
    assert_eq!((&*defect.object.name.name, defect.problem.reason()), ("web", "NoRoom"));
    let service = *ports(&kernel.v4)[0];
    assert_eq!((service.internal.count, service.pick), (3, Pick::Hash));
    assert!(reconciler.plan(Instant::now()).0.is_empty(), "it is not written again and again");
}
