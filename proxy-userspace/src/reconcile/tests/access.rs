//! Who may use a frontend and on which terms: kinds of frontends, affinity, ranges of clients, undefined ports.

use std::time::Duration;

use proxy_common::{
    addr::{Ipv4, Port, Protocol::Tcp},
    node::ServiceCidrs,
    service::{
        Frontend,
        flag::{AFFINITY, EXTERNAL, SOURCE_KEPT, SOURCE_RANGES},
    },
};

use super::*;

const CLUSTER_IP: [u8; 4] = [10, 96, 0, 1];
const NODE_PORT: [u8; 4] = [0; 4];
const EXTERNAL_IP: [u8; 4] = [203, 0, 113, 1];
const BALANCER_IP: [u8; 4] = [203, 0, 113, 2];

fn at(address: [u8; 4]) -> Frontend<Ipv4> {
    let port = if address == NODE_PORT { 30_080 } else { 80 };
    Frontend::new(Ipv4 { octets: address }, Port::new(port), Tcp)
}

/// A Service with every kind of frontend.
fn of_every_kind(mut spec: Value, annotations: &Value) -> Service {
    spec["clusterIP"] = json!("10.96.0.1");
    spec["type"] = json!("LoadBalancer");
    spec["externalIPs"] = json!(["203.0.113.1"]);
    spec["ports"] = json!([{"port": 80, "nodePort": 30_080}]);
    object(json!({
        "metadata": {"namespace": "test", "name": "web", "uid": "web", "annotations": annotations},
        "spec": spec,
        "status": {"loadBalancer": {"ingress": [{"ip": "203.0.113.2"}]}},
    }))
}

/// An agent and its kernel.
struct Agent {
    reconciler: Reconciler,
    kernel: KernelState,
}

impl Agent {
    fn new(service: Service) -> Self {
        let kernel = KernelState::default();
        let mut agent = Self { reconciler: reconciler(&kernel, SMALL), kernel };
        tell(&mut agent.reconciler, lists(vec![service], vec![]));
        agent.settle();
        agent
    }

    fn learn(&mut self, service: Service) -> Plan {
        self.reconciler.absorb(Event::Services(Change::Apply(Box::new(service))));
        self.settle()
    }

    fn settle(&mut self) -> Plan {
        let plan = settle(&mut self.reconciler, &mut self.kernel, Instant::now());
        assert_equal(&self.kernel, self.reconciler.tables());
        plan
    }

    fn flags(&self, address: [u8; 4]) -> u8 {
        self.kernel.v4.services[&at(address)].flags
    }

    /// The ranges of the Service port's clients.
    fn sources(&self) -> Vec<String> {
        self.kernel.v4.sources.iter().map(|(_, prefix)| format!("{}/{}", prefix.addr, prefix.bits)).collect()
    }
}

/// A name, a `spec`, annotations, and the flags of every kind of frontend.
type Case = (&'static str, Value, Value, [u8; 4]);

#[test]
fn every_kind_of_frontend_bears_the_flags_of_its_kind() {
    let ranges = json!({"loadBalancerSourceRanges": ["192.0.2.0/24"]});
    let restricted = EXTERNAL | SOURCE_RANGES;
    let cases: [Case; 6] = [
        ("plain", json!({}), json!({}), [0, EXTERNAL, EXTERNAL, EXTERNAL]),
        (
            "external Local",
            json!({"externalTrafficPolicy": "Local"}),
            json!({}),
            [0, EXTERNAL | SOURCE_KEPT, EXTERNAL | SOURCE_KEPT, EXTERNAL | SOURCE_KEPT],
        ),
        ("internal Local", json!({"internalTrafficPolicy": "Local"}), json!({}), [0, EXTERNAL, EXTERNAL, EXTERNAL]),
        (
            "affinity",
            json!({"sessionAffinity": "ClientIP"}),
            json!({}),
            [AFFINITY, EXTERNAL | AFFINITY, EXTERNAL | AFFINITY, EXTERNAL | AFFINITY],
        ),
        ("source ranges", ranges.clone(), json!({}), [0, EXTERNAL, EXTERNAL, restricted]),
        (
            "source ranges for all",
            ranges,
            json!({"service.sluice.dev/source-ranges-scope": "all"}),
            [0, restricted, restricted, restricted],
        ),
    ];
    for (name, spec, annotations, flags) in cases {
        let agent = Agent::new(of_every_kind(spec, &annotations));
        let found = [CLUSTER_IP, NODE_PORT, EXTERNAL_IP, BALANCER_IP].map(|address| agent.flags(address));
        assert_eq!(found, flags, "{name}");
    }
}

#[test]
fn the_time_of_affinity_is_that_of_the_service() {
    let config = json!({"clientIP": {"timeoutSeconds": 60}});
    let mut agent =
        Agent::new(of_every_kind(json!({"sessionAffinity": "ClientIP", "sessionAffinityConfig": config}), &json!({})));
    assert_eq!(agent.kernel.v4.services[&at(NODE_PORT)].affinity_seconds, 60);
    agent.learn(of_every_kind(json!({}), &json!({})));
    let service = agent.kernel.v4.services[&at(NODE_PORT)];
    assert_eq!((service.affinity_seconds, service.flags & AFFINITY), (0, 0));
}

#[test]
fn ports_that_nobody_defined_are_rejected_on_an_active_cluster_ip_only() {
    let agent = Agent::new(of_every_kind(json!({}), &json!({})));
    let whole: Vec<_> = agent.kernel.v4.services.iter().filter(|(frontend, _)| frontend.port.number() == 0).collect();
    let expected = [(CLUSTER_IP, 0), (EXTERNAL_IP, EXTERNAL), (BALANCER_IP, EXTERNAL)];
    assert_eq!(whole.len(), expected.len(), "one for each address, and none for node ports");
    for (address, flags) in expected {
        let service = agent.kernel.v4.services[&Frontend::whole(Ipv4 { octets: address })];
        assert_eq!((service.internal.count, service.external.count, service.flags, service.index), (0, 0, flags, 0));
        assert_eq!((service.internal_empty, service.external_empty), (Reject, Reject));
    }
    assert!(agent.kernel.v6.services.is_empty());
}

#[test]
fn ranges_of_clients_come_before_the_frontend_that_asks_for_them_and_go_after_it() {
    let with = |ranges: Value| of_every_kind(json!({"loadBalancerSourceRanges": ranges}), &json!({}));
    let mut agent = Agent::new(with(json!([])));
    assert!(agent.sources().is_empty());
    // `settle` looks at each step that no restricted frontend is without its ranges.
    agent.learn(with(json!(["192.0.2.0/24", "198.51.100.0/24"])));
    assert_eq!(agent.sources(), ["192.0.2.0/24", "198.51.100.0/24"]);
    agent.learn(with(json!(["198.51.100.0/24", "10.0.0.0/8"])));
    assert_eq!(agent.sources(), ["10.0.0.0/8", "198.51.100.0/24"]);
    agent.learn(with(json!(["nonsense"])));
    assert!(agent.sources().is_empty() && agent.flags(BALANCER_IP) & SOURCE_RANGES != 0, "nobody may");
    agent.learn(with(json!(["10.0.0.0/8"])));
    agent.learn(with(json!(["10.0.0.0/8", "0.0.0.0/0"])));
    assert!(agent.sources().is_empty() && agent.flags(BALANCER_IP) & SOURCE_RANGES == 0, "everybody may");
}

#[test]
fn ranges_of_clients_survive_a_restart_and_leave_with_their_service() {
    let restricted = of_every_kind(json!({"loadBalancerSourceRanges": ["192.0.2.0/24"]}), &json!({}));
    let mut agent = Agent::new(restricted.clone());
    let name = ObjectName::of(&restricted.metadata);
    agent.reconciler = reconciler(&agent.kernel, SMALL);
    tell(&mut agent.reconciler, lists(vec![restricted], vec![]));
    assert!(agent.settle().is_empty());
    agent.reconciler.absorb(Event::Services(Change::Delete(name)));
    agent.settle();
    assert!(agent.sources().is_empty() && agent.kernel.v4.services.is_empty());
}

#[test]
fn ranges_that_no_frontend_needs_are_removed_by_a_new_agent() {
    let mut agent = Agent::new(of_every_kind(json!({}), &json!({})));
    agent.kernel.v4.sources.insert((9, crate::desired::Prefix { addr: Ipv4::default(), bits: 0 }));
    agent.reconciler = reconciler(&agent.kernel, SMALL);
    tell(&mut agent.reconciler, lists(vec![], vec![]));
    agent.settle();
    assert!(agent.sources().is_empty());
}

#[test]
fn ranges_that_find_no_room_keep_their_frontend_closed_and_harm_no_other() {
    let ranges: Vec<String> = (0..100).map(|net| format!("10.{net}.0.0/16")).collect();
    let restricted = of_every_kind(json!({"loadBalancerSourceRanges": ranges}), &json!({}));
    let mut reconciler = reconciler(&KernelState::default(), SMALL);
    tell(&mut reconciler, lists(vec![restricted], vec![]));
    let mut kernel = KernelState::default();
    let (plan, overflows) = reconciler.plan(Instant::now());
    kernel.carry_out(&plan);
    assert_eq!(overflows.len(), 1, "{overflows:?}");
    assert!(!kernel.v4.services.contains_key(&at(BALANCER_IP)) && kernel.v4.services.contains_key(&at(EXTERNAL_IP)));
    assert!(kernel.v4.sources.is_empty());
}

/// The entry that could not be changed leads to an endpoint that has left, which is refused, and not to whoever comes next.
#[test]
fn a_frontend_that_could_not_be_changed_never_leads_to_another_services_endpoints() {
    let ranges: Vec<String> = (0..100).map(|net| format!("10.{net}.0.0/16")).collect();
    let restricted = |ranges: &[String]| of_every_kind(json!({"loadBalancerSourceRanges": ranges}), &json!({}));
    let mut agent = Agent::new(restricted(&ranges[..1]));
    let endpoints = |hosts: &[u8]| {
        let endpoints: Vec<Value> = hosts.iter().map(|host| json!({"addresses": [format!("10.0.0.{host}")]})).collect();
        slice("web-1", "web", &json!(endpoints))
    };
    let tell = |agent: &mut Agent, slice: EndpointSlice| {
        agent.reconciler.absorb(Event::EndpointSlices(Change::Apply(Box::new(slice))));
    };
    let now = Instant::now();
    let settle_at = |agent: &mut Agent, seconds: u64| {
        let (plan, overflows) = agent.reconciler.plan(now + Duration::from_secs(seconds));
        agent.kernel.carry_out(&plan);
        overflows.len()
    };
    tell(&mut agent, endpoints(&[1, 2]));
    assert_eq!(settle_at(&mut agent, 0), 0);
    let behind = |agent: &Agent| {
        let range = agent.kernel.v4.services[&at(BALANCER_IP)].external;
        let slots = agent.kernel.slots[range.first as usize..].iter().take(range.count as usize);
        slots.map(|id| agent.kernel.v4.backends[*id as usize].addr.octets).collect::<Vec<_>>()
    };
    assert_eq!(behind(&agent), [[10, 0, 0, 1], [10, 0, 0, 2]]);

    agent.reconciler.absorb(Event::Services(Change::Apply(Box::new(restricted(&ranges)))));
    tell(&mut agent, endpoints(&[1]));
    assert!(settle_at(&mut agent, 0) > 0);
    assert!([6, 12, 18].into_iter().all(|seconds| settle_at(&mut agent, seconds) > 0));
    tell(&mut agent, slice("other-1", "other", &json!([{"addresses": ["10.0.0.77"]}, {"addresses": ["10.0.0.78"]}])));
    settle_at(&mut agent, 18);
    assert!(agent.kernel.v4.backends.iter().any(|backend| backend.addr.octets == [10, 0, 0, 77]));
    assert_eq!(behind(&agent), [[10, 0, 0, 1], [10, 0, 0, 2]]);
}

/// Trap 18: a load balancer that turns from an address of the cluster's into a proxy of its own must see every packet
/// itself, at once.
#[test]
fn an_address_whose_balancer_becomes_a_proxy_is_no_frontend_any_more() {
    let mut service = of_every_kind(json!({}), &json!({}));
    let mut agent = Agent::new(service.clone());
    assert!(agent.kernel.v4.services.contains_key(&at(BALANCER_IP)));
    let ingress = service.status.as_mut().unwrap().load_balancer.as_mut().unwrap().ingress.as_mut().unwrap();
    ingress[0].ip_mode = Some("Proxy".into());
    let plan = agent.learn(service);
    let whole = Frontend::whole(Ipv4 { octets: BALANCER_IP });
    assert_eq!(plan.v4, [whole, at(BALANCER_IP)].map(crate::diff::Step::RemoveService));
}

/// A node with one address.
fn network(address: &str) -> NodeNetwork {
    NodeNetwork {
        links: vec![Link { ifindex: 2, name: "eth0".into(), has_default_route: true, ..Link::default() }],
        addresses: vec![LinkAddress {
            ifindex: 2,
            net: address.parse().unwrap(),
            is_global: true,
            is_secondary: false,
            is_usable: true,
            is_deprecated: false,
        }],
    }
}

/// As node-local-dns does it, with the address of the cluster's DNS at a device of its own.
#[test]
fn a_cluster_ip_that_is_at_a_device_of_the_node_is_left_to_the_node() {
    let whole = Frontend::whole(Ipv4 { octets: CLUSTER_IP });
    let mut agent = Agent::new(of_every_kind(json!({}), &json!({})));
    let served: Vec<_> = agent.kernel.v4.services.keys().copied().collect();
    assert!(served.contains(&at(CLUSTER_IP)) && served.contains(&whole));
    agent.reconciler.absorb_network(network("10.96.0.1/32"));
    agent.settle();
    let left: Vec<_> = served.iter().copied().filter(|frontend| ![at(CLUSTER_IP), whole].contains(frontend)).collect();
    assert_eq!(agent.kernel.v4.services.keys().copied().collect::<Vec<_>>(), left);
    agent.reconciler.absorb_network(network("192.0.2.9/24"));
    agent.settle();
    assert_eq!(agent.kernel.v4.services.keys().copied().collect::<Vec<_>>(), served);
}

#[test]
fn a_node_port_that_the_programs_do_not_look_for_is_told() {
    let mut agent = Agent::new(of_every_kind(json!({}), &json!({})));
    assert!(agent.kernel.v4.services.contains_key(&at(NODE_PORT)) && agent.reconciler.take_defects().is_empty());
    let settings = Settings { name: "here".into(), node_ports: Some(20_000..=29_999), ..Settings::default() };
    agent.reconciler = Reconciler::new(settings, SMALL);
    agent.reconciler.adopt(agent.kernel.clone(), Instant::now());
    agent.reconciler.absorb_network(network("192.0.2.9/24"));
    tell(&mut agent.reconciler, lists(vec![of_every_kind(json!({}), &json!({}))], vec![]));
    agent.settle();
    assert!(
        !agent.kernel.v4.services.contains_key(&at(NODE_PORT))
            && agent.kernel.v4.services.contains_key(&at(CLUSTER_IP))
    );
    let told: Vec<String> = agent.reconciler.take_defects().iter().map(ToString::to_string).collect();
    assert!(told[0].contains("30080 is not in 20000-29999"), "{told:?}");
}

#[test]
fn a_node_that_may_use_a_restricted_address_may_bear_it_too() {
    let mut agent = Agent::new(of_every_kind(json!({"loadBalancerSourceRanges": ["192.0.2.0/24"]}), &json!({})));
    for (address, sources) in
        [("192.0.2.9/24", vec!["192.0.2.0/24", "203.0.113.2/32"]), ("198.51.100.9/24", vec!["192.0.2.0/24"])]
    {
        agent.reconciler.absorb_network(network(address));
        agent.settle();
        assert_eq!(agent.sources(), sources, "{address}");
    }
}

#[test]
fn ranges_of_cluster_ips_are_written_when_they_are_known_and_kept_until_then() {
    let cidr = |range: &str| -> Event {
        let cidr = object(json!({"metadata": {"name": "kubernetes"}, "spec": {"cidrs": [range]}}));
        Event::ServiceCidrs(Change::Replace(vec![cidr]))
    };
    let mut agent = Agent::new(of_every_kind(json!({}), &json!({})));
    assert_eq!(agent.kernel.service_cidrs, ServiceCidrs::NONE);
    agent.reconciler.absorb(cidr("10.96.0.0/12"));
    let plan = agent.settle();
    assert_eq!(plan.len(), 1);
    let first = agent.kernel.service_cidrs.v4[0];
    assert_eq!((first.addr.octets, first.mask.octets), ([10, 96, 0, 0], [255, 240, 0, 0]));
    assert_eq!(agent.kernel.service_cidrs.v4[1..], ServiceCidrs::NONE.v4[1..]);
    assert_eq!(agent.kernel.service_cidrs.v6, ServiceCidrs::NONE.v6);

    agent.reconciler = reconciler(&agent.kernel, SMALL);
    tell(&mut agent.reconciler, lists(vec![of_every_kind(json!({}), &json!({}))], vec![]));
    assert!(agent.settle().is_empty(), "a new agent that has not heard of them leaves them");
    agent.reconciler.absorb(Event::ServiceCidrs(Change::Replace(vec![])));
    agent.settle();
    assert_eq!(agent.kernel.service_cidrs, ServiceCidrs::NONE);
}
