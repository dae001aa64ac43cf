//! Whatever the events and their order, the kernel ends up holding what the objects say, and at no step does an entry
//! lead to an absent one.

mod access;
mod claims;
mod crossing;
mod dispatch;
mod families;
mod half;
mod no_local;
mod serving;
mod spread;
mod world;

use std::{collections::BTreeMap, time::Instant};

use k8s_openapi::api::{
    core::v1::{Node, Service},
    discovery::v1::EndpointSlice,
};
use proxy_common::{
    addr::Address,
    backend::{Backend, BackendId, BackendState},
    service::{
        self, Range,
        WhenEmpty::{self, Drop, Reject},
    },
};
use serde_json::{Value, json};

use super::{Reconciler, Settings};
use crate::{
    dataplane::netlink::{Link, LinkAddress, NodeNetwork},
    desired::{FamilyTables, Prefix, Tables, Target},
    diff::{Capacity, FamilyState, GRACE, KernelState, Plan, Step},
    model::ObjectName,
    source::{Change, Event},
};

const SMALL: Capacity = Capacity { services: 64, backends: 64, slots: 256, sources: 64 };

fn reconciler(kernel: &KernelState, capacity: Capacity) -> Reconciler {
    let settings = Settings { name: "here".into(), ..Settings::default() };
    let mut reconciler = Reconciler::new(settings, capacity);
    reconciler.adopt(kernel.clone(), Instant::now());
    reconciler.absorb_network(NodeNetwork::default());
    reconciler
}

fn object<T: serde::de::DeserializeOwned>(value: Value) -> T {
    serde_json::from_value(value).unwrap()
}

fn service(name: &str, mut spec: Value) -> Service {
    spec["ports"] = spec.get("ports").cloned().unwrap_or_else(|| json!([{"port": 80}]));
    object(json!({"metadata": {"namespace": "test", "name": name, "uid": name}, "spec": spec}))
}

fn slice(name: &str, service: &str, endpoints: &Value) -> EndpointSlice {
    object(json!({
        "metadata": {"namespace": "test", "name": name, "labels": {"kubernetes.io/service-name": service}},
        "addressType": "IPv4",
        "ports": [{"name": "", "port": 8080, "protocol": "TCP"}],
        "endpoints": endpoints,
    }))
}

fn ready(address: &str) -> Value {
    json!({"addresses": [address]})
}

fn lists(services: Vec<Service>, slices: Vec<EndpointSlice>) -> [Event; 2] {
    [Event::Services(Change::Replace(services)), Event::EndpointSlices(Change::Replace(slices))]
}

fn tell(reconciler: &mut Reconciler, events: impl IntoIterator<Item = Event>) {
    for event in events {
        reconciler.absorb(event);
    }
}

/// Plans and carries out, checking at each step that nothing leads to an absent entry.
fn settle(reconciler: &mut Reconciler, kernel: &mut KernelState, now: Instant) -> Plan {
    let (plan, _) = reconciler.plan(now);
    for step in &plan.v4 {
        kernel.carry_out(&Plan { v4: vec![step.clone()], ..Plan::default() });
        assert_whole(&kernel.v4, &kernel.slots);
        assert_asked(&kernel.v4, &reconciler.tables().v4, step);
    }
    for step in &plan.v6 {
        kernel.carry_out(&Plan { v6: vec![step.clone()], ..Plan::default() });
        assert_whole(&kernel.v6, &kernel.slots);
        assert_asked(&kernel.v6, &reconciler.tables().v6, step);
    }
    kernel.carry_out(&Plan { service_cidrs: plan.service_cidrs, ..Plan::default() });
    plan
}

fn assert_whole<A: Address + std::fmt::Debug>(state: &FamilyState<A>, slots: &[BackendId]) {
    for (frontend, service) in &state.services {
        for range in [service.internal, service.external, service.local] {
            for backend in backends(state, slots, range) {
                assert_eq!(backend.state, BackendState::Serving, "{frontend:?} leads to {backend:?}");
            }
        }
    }
}

/// A frontend that asks for its clients' ranges is written when all of them are there.
fn assert_asked<A: Address + std::fmt::Debug>(state: &FamilyState<A>, tables: &FamilyTables<A>, step: &Step<A>) {
    let Step::PutService(frontend, service) = step else { return };
    if is_restricted(service) {
        let known = sources(state, service.index);
        let wanted = &tables.services[frontend].sources;
        assert!(wanted.iter().all(|prefix| known.contains(prefix)), "{frontend:?} is there before its ranges");
    }
}

fn backends<A: Address>(state: &FamilyState<A>, slots: &[BackendId], range: Range) -> Vec<Backend<A>> {
    let indexes = range.first as usize..(range.first + range.count) as usize;
    indexes.map(|slot| state.backends[slots[slot] as usize]).collect()
}

fn is_restricted(service: &service::Service) -> bool {
    service.flags & service::flag::SOURCE_RANGES != 0
}

/// Frontends of Service ports: without those that stand for undefined ports.
fn ports<A: Address>(state: &FamilyState<A>) -> Vec<&service::Service> {
    let defined = state.services.iter().filter(|(frontend, _)| frontend.port.number() != 0);
    defined.map(|(_, service)| service).collect()
}

/// The ranges of clients of a Service port.
fn sources<A: Address>(state: &FamilyState<A>, index: u32) -> Vec<Prefix<A>> {
    state.sources.iter().filter(|(service, _)| *service == index).map(|(_, prefix)| *prefix).collect()
}

/// What the kernel's maps mean, in the terms of the tables.
fn assert_equal(kernel: &KernelState, tables: &Tables) {
    assert_family_equal(&kernel.v4, &kernel.slots, &tables.v4);
    assert_family_equal(&kernel.v6, &kernel.slots, &tables.v6);
    assert_eq!(kernel.service_cidrs, tables.service_cidrs.unwrap_or(kernel.service_cidrs));
}

fn assert_family_equal<A: Address + std::fmt::Debug>(
    state: &FamilyState<A>,
    slots: &[BackendId],
    tables: &FamilyTables<A>,
) {
    assert_eq!(state.local_addrs, tables.local_addrs);
    assert!(state.services.keys().eq(tables.services.keys()));
    for (frontend, service) in &state.services {
        let desired = &tables.services[frontend];
        let targets = |range| -> Vec<Target<A>> {
            let backends = backends(state, slots, range);
            backends.iter().map(|backend| Target { addr: backend.addr, port: backend.port }).collect()
        };
        assert_eq!(targets(service.internal), *desired.internal);
        assert_eq!(targets(service.external), *desired.external);
        assert_eq!(targets(service.local), *desired.local);
        assert_eq!(service.internal_empty, desired.internal_empty);
        assert_eq!(service.external_empty, desired.external_empty);
        assert_eq!((service.pick, service.flags), (desired.pick, desired.flags));
        assert_eq!(service.affinity_seconds, desired.affinity_seconds);
        if is_restricted(service) {
            assert_eq!(sources(state, service.index), *desired.sources);
        }
    }
    for (index, prefix) in &state.sources {
        let mut users = state.services.values().filter(|service| is_restricted(service));
        assert!(users.any(|service| service.index == *index), "nobody needs {prefix:?} of {index}");
    }
    assert_backends_equal(&state.backends, tables);
}

/// Those that are not wanted are gone, or about to be.
fn assert_backends_equal<A: Address + std::fmt::Debug>(backends: &[Backend<A>], tables: &FamilyTables<A>) {
    let mut missing: BTreeMap<_, _> = tables.backends.iter().collect();
    for backend in backends {
        let target = Target { addr: backend.addr, port: backend.port };
        match (backend.state, tables.backends.get(&target)) {
            (BackendState::Free | BackendState::Gone, _) | (BackendState::NotServing, None) => {}
            (state, Some(desired)) => {
                assert_eq!((state, backend.is_local), (desired.state, desired.is_local.into()), "{target:?}");
                assert_eq!(backend.node, desired.node, "{target:?}");
                assert!(missing.remove(&target).is_some(), "{target:?} is there twice");
            }
            (state, None) => panic!("{target:?} is {state:?}"),
        }
    }
    assert!(missing.is_empty(), "{missing:?}");
}

#[test]
fn nothing_is_written_before_the_first_complete_picture() {
    let mut reconciler = Reconciler::new(Settings::default(), SMALL);
    let [services, slices] = lists(vec![service("web", json!({"clusterIP": "10.96.0.1"}))], vec![]);
    let now = Instant::now();
    reconciler.absorb(services);
    assert!(reconciler.plan(now).0.is_empty(), "EndpointSlices are not known");
    reconciler.absorb(slices);
    assert!(reconciler.plan(now).0.is_empty(), "addresses are not known");
    reconciler.absorb_network(NodeNetwork::default());
    assert!(reconciler.plan(now).0.is_empty(), "the kernel's state is not known");
    reconciler.adopt(KernelState::default(), now);
    assert_eq!(reconciler.plan(now).0.len(), 2, "its port, and all other ports of its address");
}

#[test]
fn an_endpoint_that_leaves_serves_nobody_new_and_is_gone_after_a_grace() {
    let (mut kernel, now) = (KernelState::default(), Instant::now());
    let mut reconciler = reconciler(&kernel, SMALL);
    let web = service("web", json!({"clusterIP": "10.96.0.1"}));
    let slice =
        |hosts: &[&str]| slice("web-1", "web", &json!(hosts.iter().map(|host| ready(host)).collect::<Vec<_>>()));
    let apply = |hosts: &[&str]| Event::EndpointSlices(Change::Apply(Box::new(slice(hosts))));
    tell(&mut reconciler, lists(vec![web], vec![slice(&["10.0.0.1", "10.0.0.2"])]));
    settle(&mut reconciler, &mut kernel, now);
    let before = kernel.v4.backends[1];
    assert_eq!(reconciler.next_deadline(), None);

    reconciler.absorb(apply(&["10.0.0.2"]));
    let plan = settle(&mut reconciler, &mut kernel, now);
    assert_eq!(plan.len(), 3, "slots, service, backend: {plan:?}");
    assert_eq!(kernel.v4.backends[1].state, BackendState::NotServing);
    assert_eq!(reconciler.next_deadline(), Some(now + GRACE));
    assert!(settle(&mut reconciler, &mut kernel, now + GRACE / 2).is_empty());

    reconciler.absorb(apply(&["10.0.0.1", "10.0.0.2"]));
    settle(&mut reconciler, &mut kernel, now + GRACE / 2);
    assert_eq!((kernel.v4.backends[1], reconciler.next_deadline()), (before, None), "as if nothing had been");

    reconciler.absorb(apply(&["10.0.0.2"]));
    settle(&mut reconciler, &mut kernel, now + GRACE);
    let plan = settle(&mut reconciler, &mut kernel, now + 2 * GRACE);
    assert_eq!(plan.len(), 1, "{plan:?}");
    assert_eq!(kernel.v4.backends[1].state, BackendState::Gone);
    assert_eq!(reconciler.next_deadline(), None);

    reconciler.absorb(apply(&["10.0.0.1", "10.0.0.2"]));
    settle(&mut reconciler, &mut kernel, now + 2 * GRACE);
    assert_eq!(kernel.v4.backends[1].generation, before.generation + 1, "its old connections are over");
}

#[test]
fn an_older_service_keeps_an_address_both_claim_and_the_other_gets_it_later() {
    let claim = |name: &str, created: &str, cluster_ip: &str| {
        let mut service = service(name, json!({"clusterIP": cluster_ip, "externalIPs": ["203.0.113.1"]}));
        service.metadata.creation_timestamp = Some(serde_json::from_value(json!(created)).unwrap());
        service
    };
    let older = claim("z", "2026-01-01T00:00:00Z", "10.96.0.1");
    let newer = claim("a", "2026-01-02T00:00:00Z", "10.96.0.2");
    let mut kernel = KernelState::default();
    let mut reconciler = reconciler(&kernel, SMALL);
    tell(&mut reconciler, lists(vec![newer, older], vec![]));
    settle(&mut reconciler, &mut kernel, Instant::now());
    let owner = |reconciler: &Reconciler| {
        let services = reconciler.tables().v4.services.iter();
        let mut claimed = services.filter(|(frontend, _)| frontend.addr.octets == [203, 0, 113, 1]);
        claimed.next().map(|(_, service)| service.port.service.name.clone())
    };
    assert_eq!(owner(&reconciler).as_deref(), Some("z"));
    let gone = ObjectName { namespace: "test".into(), name: "z".into() };
    reconciler.absorb(Event::Services(Change::Delete(gone)));
    settle(&mut reconciler, &mut kernel, Instant::now());
    assert_eq!(owner(&reconciler).as_deref(), Some("a"));
    assert_equal(&kernel, reconciler.tables());
}

/// Name, spec and endpoints, counts for the ClusterIP and the NodePort, what an empty range means.
type Case = (&'static str, Value, [(usize, usize); 2], [WhenEmpty; 2]);

/// Trap 16: a policy about traffic from outside leaves clients of the cluster alone.
#[test]
fn traffic_policies_choose_the_ranges() {
    let remote = json!([ready("10.0.0.1"), ready("10.0.0.2")]);
    let mixed = json!([{"addresses": ["10.0.0.1"], "nodeName": "here"}, ready("10.0.0.2")]);
    let cases: Vec<Case> = vec![
        ("both Cluster", json!([{}, remote]), [(2, 2), (2, 2)], [Drop, Drop]),
        (
            "internal Local, one here",
            json!([{"internalTrafficPolicy": "Local"}, mixed]),
            [(1, 1), (2, 2)],
            [Drop, Drop],
        ),
        (
            "internal Local, none here",
            json!([{"internalTrafficPolicy": "Local"}, remote]),
            [(0, 0), (2, 2)],
            [Drop, Drop],
        ),
        (
            "external Local, one here",
            json!([{"externalTrafficPolicy": "Local"}, mixed]),
            [(2, 2), (2, 1)],
            [Drop, Drop],
        ),
        (
            "external Local, none here",
            json!([{"externalTrafficPolicy": "Local"}, remote]),
            [(2, 2), (2, 0)],
            [Drop, Drop],
        ),
        ("nothing anywhere", json!([{"externalTrafficPolicy": "Local"}, []]), [(0, 0), (0, 0)], [Reject, Reject]),
    ];
    for (name, case, [cluster_ip, node_port], empty) in cases {
        let mut spec = case[0].clone();
        spec["clusterIP"] = json!("10.96.0.1");
        spec["ports"] = json!([{"port": 80, "nodePort": 30080}]);
        let mut reconciler = reconciler(&KernelState::default(), SMALL);
        tell(&mut reconciler, lists(vec![service("web", spec)], vec![slice("web-1", "web", &case[1])]));
        reconciler.plan(Instant::now());
        let services = reconciler.tables().v4.services.iter();
        let services = services.filter(|(frontend, _)| frontend.port.number() != 0);
        let services: Vec<_> = services.map(|(_, service)| service).collect();
        let counts = |index: usize| (services[index].internal.len(), services[index].external.len());
        // The NodePort's unspecified address sorts first.
        assert_eq!((counts(1), counts(0)), (cluster_ip, node_port), "{name}");
        assert_eq!([services[0].external_empty, services[1].internal_empty], empty, "{name}");
    }
}

#[test]
fn a_service_of_two_families_and_two_ports_has_all_its_frontends() {
    let spec = json!({
        "clusterIPs": ["10.96.0.1", "fd00::1"],
        "ports": [
            {"name": "http", "port": 80, "nodePort": 30080, "targetPort": "web"},
            {"name": "dns", "port": 53, "protocol": "UDP"},
        ],
    });
    let v6 = object(json!({
        "metadata": {"namespace": "test", "name": "web-6", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv6",
        "ports": [{"name": "http", "port": 8080}, {"name": "dns", "port": 5353, "protocol": "TCP"}],
        "endpoints": [{"addresses": ["fd00:10::1"]}],
    }));
    let mut kernel = KernelState::default();
    let mut reconciler = reconciler(&kernel, SMALL);
    tell(&mut reconciler, lists(vec![service("web", spec)], vec![v6]));
    settle(&mut reconciler, &mut kernel, Instant::now());
    assert_equal(&kernel, reconciler.tables());
    let v6 = ports(&kernel.v6);
    assert_eq!(v6.len(), 3);
    // The port `dns` is UDP, its namesake in the slice is TCP: not the same port.
    let counts: Vec<_> = v6.iter().map(|service| service.internal.count).collect();
    assert_eq!(counts, [1, 0, 1]);
    assert_eq!(v6[0].index, v6[2].index, "NodePort and ClusterIP of one port");
    assert_eq!(ports(&kernel.v4).len(), 3);
}

#[test]
fn what_finds_no_room_gets_it_when_there_is_some() {
    let tight = Capacity { slots: 2, ..SMALL };
    let (mut kernel, now) = (KernelState::default(), Instant::now());
    let mut reconciler = reconciler(&kernel, tight);
    let endpoints = |hosts: &[u8]| json!(hosts.iter().map(|host| ready(&format!("10.0.0.{host}"))).collect::<Vec<_>>());
    let services = ["a", "b"].map(|name| service(name, json!({"clusterIP": format!("10.96.0.{}", name.len())})));
    let [a, mut b] = services;
    b.spec.as_mut().unwrap().cluster_ip = Some("10.96.0.9".into());
    tell(
        &mut reconciler,
        lists(vec![a, b], vec![slice("a", "a", &endpoints(&[1, 2])), slice("b", "b", &endpoints(&[3, 4]))]),
    );
    let (plan, overflows) = reconciler.plan(now);
    kernel.carry_out(&plan);
    assert_eq!(overflows.len(), 1, "{overflows:?}");
    assert_eq!(ports(&kernel.v4).len(), 1);
    let gone = ObjectName { namespace: "test".into(), name: "a".into() };
    reconciler.absorb(Event::Services(Change::Delete(gone)));
    settle(&mut reconciler, &mut kernel, now);
    settle(&mut reconciler, &mut kernel, now + GRACE);
    assert_equal(&kernel, reconciler.tables());
}

#[test]
fn services_that_come_while_others_go_do_not_need_more_room_than_there_is() {
    let tight = Capacity { services: 6, ..SMALL };
    let (mut kernel, mut now) = (KernelState::default(), Instant::now());
    let mut reconciler = reconciler(&kernel, tight);
    let three_frontends = |name: &str, net: &str| {
        let at = |host: u8| format!("{net}.{host}");
        service(name, json!({"clusterIP": at(1), "externalIPs": [at(2), at(3)]}))
    };
    for (name, net) in [("b", "10.96.1"), ("c", "10.96.2"), ("a", "10.96.0")] {
        tell(&mut reconciler, lists(vec![three_frontends(name, net)], vec![]));
        for _ in 0..2 {
            let (plan, _) = reconciler.plan(now);
            for step in plan.v4 {
                kernel.carry_out(&Plan { v4: vec![step], ..Plan::default() });
                assert!(kernel.v4.services.len() <= 6, "more than there is room for");
            }
            now += GRACE;
        }
        assert_equal(&kernel, reconciler.tables());
    }
}

#[test]
fn services_that_never_found_room_take_no_number_with_them() {
    let tight = Capacity { services: 4, slots: 1, ..SMALL };
    let (mut kernel, mut now) = (KernelState::default(), Instant::now());
    let mut reconciler = reconciler(&kernel, tight);
    let endpoints = json!([ready("10.0.0.1"), ready("10.0.0.2")]);
    for name in ["a", "b", "c", "d", "e"] {
        let service = service(name, json!({"clusterIP": "10.96.0.1"}));
        tell(&mut reconciler, lists(vec![service], vec![slice(name, name, &endpoints)]));
        let (plan, overflows) = reconciler.plan(now);
        kernel.carry_out(&plan);
        assert_eq!(overflows.len(), 1, "two endpoints do not fit into one slot");
        now += GRACE;
    }
    tell(&mut reconciler, lists(vec![service("f", json!({"clusterIP": "10.96.0.1"}))], vec![]));
    settle(&mut reconciler, &mut kernel, now);
    assert_equal(&kernel, reconciler.tables());
}

#[test]
fn the_api_server_keeps_its_last_endpoints_until_it_has_others() {
    let in_default = |mut object: EndpointSlice| {
        object.metadata.namespace = Some("default".into());
        object
    };
    let api_server = |name: &str, endpoints: &Value| in_default(slice(name, "kubernetes", endpoints));
    let mut kubernetes = service("kubernetes", json!({"clusterIP": "10.96.0.1"}));
    kubernetes.metadata.namespace = Some("default".into());
    let first = api_server("first", &json!([ready("10.0.0.1")]));
    let empty = api_server("first", &json!([]));
    let other = api_server("other", &json!([ready("10.0.0.2")]));
    let gone = || Change::Delete(ObjectName { namespace: "default".into(), name: "first".into() });
    let apply = |slice: &EndpointSlice| Change::Apply(Box::new(slice.clone()));
    let steps = [
        ("emptied", apply(&empty), vec![1]),
        ("deleted", gone(), vec![1]),
        ("in no list", Change::Replace(vec![]), vec![1]),
        ("back as it was", apply(&first), vec![1]),
        ("beside another", apply(&other), vec![1, 2]),
        ("deleted beside another, too", gone(), vec![2]),
        ("replaced by an empty list", Change::Replace(vec![]), vec![2]),
        ("followed by another", apply(&first), vec![1]),
        ("joined", apply(&other), vec![1, 2]),
        ("deleted beside another", gone(), vec![2]),
        ("replaced in a list", Change::Replace(vec![first.clone()]), vec![1]),
    ];
    let mut kernel = KernelState::default();
    let mut reconciler = reconciler(&kernel, SMALL);
    tell(&mut reconciler, lists(vec![kubernetes], vec![first.clone()]));
    for (name, change, hosts) in steps {
        reconciler.absorb(Event::EndpointSlices(change));
        settle(&mut reconciler, &mut kernel, Instant::now());
        assert_equal(&kernel, reconciler.tables());
        let service = ports(&kernel.v4)[0];
        let backends = backends(&kernel.v4, &kernel.slots, service.internal);
        let found: Vec<u8> = backends.iter().map(|backend| backend.addr.octets[3]).collect();
        assert_eq!(found, hosts, "{name}");
    }
}

/// Two ports of a Service lead to one address, and only one of them is ready there.
#[test]
fn an_endpoint_that_serves_one_port_is_served_whatever_another_port_says_of_it() {
    let ports = json!([{"name": "http", "port": 80}, {"name": "dns", "port": 53}]);
    let of_port = |name: &str, port: &str, conditions: Value| {
        let mut slice = slice(name, "web", &json!([{"addresses": ["10.0.0.1"], "conditions": conditions}]));
        slice.ports.as_mut().unwrap()[0].name = Some(port.into());
        slice
    };
    let slices = vec![
        of_port("a", "http", json!({"ready": true, "terminating": true})),
        of_port("b", "dns", json!({"ready": false, "serving": false})),
    ];
    let mut kernel = KernelState::default();
    let mut reconciler = reconciler(&kernel, SMALL);
    tell(&mut reconciler, lists(vec![service("web", json!({"clusterIP": "10.96.0.1", "ports": ports}))], slices));
    settle(&mut reconciler, &mut kernel, Instant::now());
    let counts: Vec<u32> = self::ports(&kernel.v4).iter().map(|service| service.internal.count).collect();
    assert_eq!(counts, [0, 1], "53, then 80");
    assert_eq!(kernel.v4.backends[1].state, BackendState::Serving);
}

#[test]
fn hints_for_this_zone_count_once_the_node_is_known() {
    let hinted = |address: &str, zone: &str| json!({"addresses": [address], "hints": {"forZones": [{"name": zone}]}});
    let endpoints = json!([hinted("10.0.0.1", "a"), hinted("10.0.0.2", "b")]);
    let mut kernel = KernelState::default();
    let mut reconciler = reconciler(&kernel, SMALL);
    let web = service("web", json!({"clusterIP": "10.96.0.1"}));
    tell(&mut reconciler, lists(vec![web], vec![slice("web-1", "web", &endpoints)]));
    settle(&mut reconciler, &mut kernel, Instant::now());
    let count = |kernel: &KernelState| ports(&kernel.v4)[0].internal.count;
    assert_eq!(count(&kernel), 2);
    let node: Node = object(json!({"metadata": {"name": "here", "labels": {"topology.kubernetes.io/zone": "a"}}}));
    reconciler.absorb(Event::Nodes(Change::Apply(Box::new(node))));
    settle(&mut reconciler, &mut kernel, Instant::now());
    assert_eq!(count(&kernel), 1);
}
