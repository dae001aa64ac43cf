//! What is written into the maps, and read back.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use proxy_common::{
    addr::{Ipv4, Ipv6, Port, Protocol},
    backend::{Backend, BackendState},
    flow::{Direction, Flow, NextHop, Output, Rewrite},
    node::{Cidr, ServiceCidrs, local},
    service::{Frontend, Range, Service},
    tuple::{Stage, Tuple},
};
use proxy_userspace::{
    dataplane::NodeSettings,
    desired::Prefix,
    diff::{KernelState, Plan, Step},
};
use tests::patience::patience;

use crate::fixture::Node;

fn v4(third: u8, fourth: u8) -> Ipv4 {
    Ipv4 { octets: [10, 96, third, fourth] }
}

/// One range, of IPv4.
fn service_cidrs() -> ServiceCidrs {
    let mut cidrs = ServiceCidrs::NONE;
    cidrs.v4[0] = Cidr { addr: v4(0, 0), mask: Ipv4 { octets: [255, 255, 0, 0] } };
    cidrs
}

/// A Service with one backend, and the node's address.
pub(crate) fn small_plan() -> Plan {
    let backend = Backend {
        addr: Ipv4 { octets: [10, 244, 1, 2] },
        node: Ipv4::default(),
        port: Port::new(8080),
        state: BackendState::Serving,
        is_local: 1,
        generation: 1,
    };
    let range = Range { first: 3, count: 1 };
    let service = Service { index: 1, internal: range, external: range, ..Service::default() };
    Plan {
        v4: vec![
            Step::PutLocalAddr(Ipv4 { octets: [192, 0, 2, 1] }, local::NODE_PORTS),
            Step::PutBackend(1, backend),
            Step::PutSlots(3, vec![1]),
            Step::PutSource(1, Prefix { addr: Ipv4 { octets: [198, 51, 100, 0] }, bits: 24 }),
            Step::PutService(Frontend::new(v4(0, 10), Port::new(80), Protocol::Tcp), service),
            Step::PutService(Frontend::new(Ipv4::default(), Port::new(30_080), Protocol::Tcp), service),
        ],
        v6: vec![
            Step::PutSource(2, Prefix { addr: Ipv6 { octets: [0x20; 16] }, bits: 128 }),
            Step::PutSource(2, Prefix { addr: Ipv6::default(), bits: 0 }),
            Step::PutLocalAddr(Ipv6 { octets: [0x20; 16] }, 0),
        ],
        service_cidrs: Some(service_cidrs()),
        ..Plan::default()
    }
}

#[test]
fn ranges_of_clients_and_of_cluster_ips_are_read_back_as_they_were_written() -> Result<()> {
    let node = Node::new()?;
    node.start(|dataplane, _| {
        assert_eq!(dataplane.read()?.service_cidrs, ServiceCidrs::NONE, "zeros would hold every address");
        dataplane.apply(&small_plan())?;
        let mut kernel = KernelState::default();
        kernel.carry_out(&small_plan());
        let state = dataplane.read()?;
        assert_eq!((&state.v4.sources, &state.v6.sources), (&kernel.v4.sources, &kernel.v6.sources));
        assert_eq!(state.service_cidrs, kernel.service_cidrs);
        let removal = |&(service, prefix): &(u32, Prefix<Ipv6>)| Step::RemoveSource(service, prefix);
        let v6 = kernel.v6.sources.iter().map(removal).collect();
        dataplane.apply(&Plan { v6, service_cidrs: Some(ServiceCidrs::NONE), ..Plan::default() })?;
        let state = dataplane.read()?;
        assert_eq!((state.v4.sources.len(), state.v6.sources.len()), (1, 0));
        assert_eq!(state.service_cidrs, ServiceCidrs::NONE);
        Ok(())
    })
}

#[test]
fn an_address_is_in_the_filters_once_it_is_written_and_until_it_is_pruned() -> Result<()> {
    let node = Node::new()?;
    node.start(|dataplane, _| {
        dataplane.apply(&small_plan())?;
        dataplane.put_node(&NodeSettings {
            masquerade_v4: Ipv4 { octets: [192, 0, 2, 77] },
            masquerade_v6: Ipv6::default(),
            further: vec!["192.0.2.78".parse()?],
            node_ports: 30_000..=32_767,
            source_ports: 61_000..=65_535,
            cross_ports: 60_000..=60_999,
            masquerade_all: false,
            masquerade_local_backends: true,
        })?;
        let filter = |map, address| node.filter(map, address);
        let (frontend, backend) = (v4(0, 10), Ipv4 { octets: [10, 244, 1, 2] });
        let (local, masquerade) = (Ipv4 { octets: [192, 0, 2, 1] }, Ipv4 { octets: [192, 0, 2, 77] });
        let further = Ipv4 { octets: [192, 0, 2, 78] };
        for address in [frontend, local, masquerade, further] {
            assert!(filter("INBOUND", address)?, "{address}");
        }
        assert!(filter("OUTBOUND", backend)? && !filter("OUTBOUND", frontend)? && !filter("INBOUND", backend)?);
        assert!(!filter("INBOUND", Ipv4::default())?, "a NodePort's frontend has no address");

        let free = Backend { state: BackendState::Free, ..Backend::default() };
        let gone = Frontend::new(frontend, Port::new(80), Protocol::Tcp);
        dataplane.apply(&Plan { v4: vec![Step::RemoveService(gone), Step::PutBackend(1, free)], ..Plan::default() })?;
        assert!(filter("INBOUND", frontend)?, "bits stay until they are pruned");
        dataplane.prune_filters()?;
        assert!(!filter("INBOUND", frontend)? && !filter("OUTBOUND", backend)?);
        assert!(filter("INBOUND", local)? && filter("INBOUND", masquerade)?);
        Ok(())
    })
}

#[test]
fn pruning_keeps_what_a_live_flow_needs() -> Result<()> {
    let node = Node::new()?;
    let (client, frontend, pod) = (Ipv4 { octets: [10, 244, 1, 9] }, v4(0, 20), Ipv4 { octets: [10, 244, 1, 3] });
    let (sport, port, dport) = (Port::new(40_000), Port::new(80), Port::new(8080));
    node.start(|dataplane, _| {
        let original = Tuple::new(client, frontend, sport, port, Protocol::Tcp, Stage::FromPod);
        let reply = Tuple::new(pod, client, dport, sport, Protocol::Tcp, Stage::ToPod);
        let rewrite = Rewrite { saddr: client, daddr: pod, sport, dport, ..Rewrite::default() };
        let flow = Flow {
            rewrite,
            next_hop: NextHop::default(),
            backend: 1,
            backend_generation: 1,
            service: 1,
            last_seen: 0,
            output: Output::Stack,
            twin_output: Output::Stack,
            twin_stage: Stage::ToPod,
            direction: Direction::Original,
            state: 0,
            eager: 0,
            packets: 0,
            bytes: 0,
        };
        let map = aya::maps::MapData::from_pin(node.pin("maps/FLOWS_V4"))?;
        let mut flows: aya::maps::HashMap<_, Tuple<Ipv4>, Flow<Ipv4>> = aya::maps::Map::LruHashMap(map).try_into()?;
        flows.insert(original, flow, 0)?;
        dataplane.prune_filters()?;
        assert!(node.filter("INBOUND", frontend)? && node.filter("OUTBOUND", pod)?);

        flows.remove(&original)?;
        flows.insert(reply, Flow { direction: Direction::Reply, ..flow }, 0)?;
        dataplane.prune_filters()?;
        assert!(!node.filter("INBOUND", frontend)? && node.filter("OUTBOUND", pod)?);

        flows.remove(&reply)?;
        dataplane.prune_filters()?;
        assert!(!node.filter("OUTBOUND", pod)?);
        Ok(())
    })
}

#[test]
fn ten_thousand_services_are_written_and_read_back_the_same() -> Result<()> {
    const SERVICES: u32 = 10_000;
    const ENDPOINTS: u32 = 10;
    let node = Node::new()?;
    let (mut backends, mut slots, mut services) = (Vec::new(), Vec::new(), Vec::new());
    for index in 0..SERVICES {
        let first = index * ENDPOINTS;
        let ids: Vec<u32> = (first + 1..=first + ENDPOINTS).collect();
        for &id in &ids {
            let addr = Ipv4 { octets: (0x0af4_0000 + id).to_be_bytes() };
            let backend = Backend {
                addr,
                port: Port::new(8080),
                state: BackendState::Serving,
                generation: 1,
                ..Backend::default()
            };
            backends.push(Step::PutBackend(id, backend));
        }
        slots.push(Step::PutSlots(first, ids));
        let range = Range { first, count: ENDPOINTS };
        let frontend = Frontend::new(v4((index >> 8) as u8, index as u8), Port::new(80), Protocol::Tcp);
        services.push(Step::PutService(
            frontend,
            Service { index, internal: range, external: range, ..Service::default() },
        ));
    }
    let removals = services.iter().map(|step| match step {
        Step::PutService(frontend, _) => Step::RemoveService(*frontend),
        other => other.clone(),
    });
    let removal = Plan { v4: removals.collect(), ..Plan::default() };
    let plan = Plan { v4: [backends, slots, services].concat(), ..Plan::default() };
    node.start(|dataplane, _| {
        let start = Instant::now();
        dataplane.apply(&plan)?;
        let written = start.elapsed();
        let start = Instant::now();
        let state = dataplane.read()?;
        println!("written in {written:?}, read in {:?}", start.elapsed());
        assert!(written < patience(Duration::from_secs(2)), "{written:?}");
        assert_eq!(state.v4.services.len(), SERVICES as usize);
        assert_eq!(state.v4.backends.len(), (SERVICES * ENDPOINTS + 1) as usize);
        assert_eq!(state.slots, (1..=SERVICES * ENDPOINTS).collect::<Vec<_>>());
        for step in &plan.v4 {
            match step {
                Step::PutService(frontend, service) => assert_eq!(state.v4.services.get(frontend), Some(service)),
                Step::PutBackend(id, backend) => assert_eq!(state.v4.backends.get(*id as usize), Some(backend)),
                _ => {}
            }
        }
        dataplane.apply(&removal)?;
        dataplane.apply(&removal).context("removing what is gone")?;
        assert!(dataplane.read()?.v4.services.is_empty());
        Ok(())
    })
}

#[test]
fn a_full_map_is_named_with_its_size() -> Result<()> {
    let mut node = Node::new()?;
    node.options.sizes.insert("SERVICES_V4".into(), 4);
    node.start(|dataplane, _| {
        let step =
            |index: u8| Step::PutService(Frontend::new(v4(0, index), Port::new(80), Protocol::Tcp), Service::default());
        let error = dataplane.apply(&Plan { v4: (0..8).map(step).collect(), ..Plan::default() }).unwrap_err();
        assert_eq!(error.to_string(), "map SERVICES_V4 is full: it holds 4 entries");
        assert_eq!(dataplane.read()?.v4.services.len(), 4);
        Ok(())
    })
}
