//! Scenario 36: `loadBalancerSourceRanges` with traffic. The clients that a Service is for come and go while their flows live; what
//! the maps say of it is `scenarios_object`'s.

use std::{net::SocketAddr, slice::from_ref, time::Duration};

use anyhow::{Context as _, Result, ensure};
use proxy_common::outcome::{Hook, Outcome};
use serde_json::json;
use tests::{
    lab::{
        LabOptions, Node,
        address::{Family, external, of_balancer},
        agent::AgentOptions,
        changed::{balance, write_changed},
        cluster::Cluster,
        manifest::Service,
    },
    patience::{patience, wait_until},
    traffic::{
        Ask, Failure, Protocol, Target,
        place::{Activity, Place},
    },
};

const USUAL: Duration = Duration::from_secs(10);

/// How long one waits who expects nothing.
const MOMENT: Duration = Duration::from_millis(300);

const HOST: u8 = 31;

/// Where the client outside is, in one list.
const CLIENTS: [&str; 2] = ["192.0.2.100/32", "2001:db8::100/128"];
const PODS: [&str; 2] = ["10.244.0.0/16", "fd00:10:244::/48"];

struct Scene {
    cluster: Cluster,
    service: Service,
}

impl Scene {
    /// The client is led to the addresses of the Service by XDP over IPv4, and by TC over IPv6.
    fn start() -> Result<Self> {
        let service = Service::new("web", HOST, &["a1", "b1"]);
        let cluster = Cluster::start(LabOptions::default(), AgentOptions::default(), from_ref(&service))?;
        let ([a, b], [vip, external]) = (&cluster.lab.nodes, [of_balancer(HOST), external(HOST)]);
        let (via_v4, via_v6) = (a.addresses().v4, b.addresses().v6);
        let routes = [vip, external]
            .map(|to| format!("route add {}/32 via {via_v4}\nroute add {}/128 via {via_v6}", to.v4, to.v6));
        cluster.lab.client.namespace().ip(&routes.join("\n"))?;
        Ok(Self { cluster, service })
    }

    fn client(&self) -> &Place {
        &self.cluster.lab.client
    }

    /// By whom the client's packets come in.
    fn node(&self, family: Family) -> (&Node, Hook) {
        let [a, b] = &self.cluster.lab.nodes;
        if family == Family::V4 { (a, Hook::UplinkXdp) } else { (b, Hook::UplinkIn) }
    }

    /// The address of the balancer, to which the ranges apply.
    fn vip(&self, family: Family, protocol: Protocol) -> Target {
        Target { address: SocketAddr::new(of_balancer(HOST).of(family), self.service.port), protocol }
    }

    /// The Service's other ways in.
    fn besides(&self, family: Family, protocol: Protocol) -> [Target; 2] {
        let external = SocketAddr::new(external(HOST).of(family), self.service.port);
        let (node, _) = self.node(family);
        [Target { address: external, protocol }, self.service.at_node(node.addresses(), family, protocol)]
    }

    /// Writes the Service, and waits until the client outside is served at the balancer's address, or is not, by family.
    fn restrict(&self, ranges: &[&str], to_all: bool, is_served: [bool; 2]) -> Result<()> {
        let scope = if to_all { "all" } else { "balancer" };
        write_changed(self.cluster.source(), &self.service, |object| {
            balance(object, HOST);
            let addresses = external(HOST);
            object["spec"]["externalIPs"] = json!([addresses.v4, addresses.v6]);
            object["spec"]["loadBalancerSourceRanges"] = json!(ranges);
            if to_all {
                object["metadata"]["annotations"] = json!({ "service.sluice.dev/source-ranges-scope": scope });
            }
        })?;
        for (family, is_served) in Family::ALL.into_iter().zip(is_served) {
            for protocol in Protocol::ALL {
                let mut targets = vec![self.vip(family, protocol)];
                if to_all {
                    targets.extend(self.besides(family, protocol));
                }
                for target in targets {
                    wait_until(&format!("{ranges:?} for {scope} to hold at {target}"), USUAL, || {
                        (self.is_served(self.client(), target).ok()? == is_served).then_some(())
                    })?;
                }
            }
        }
        Ok(())
    }

    /// Whether somebody is answered; who is not hears nothing.
    fn is_served(&self, place: &Place, target: Target) -> Result<bool> {
        let answer = place.ask_times(Ask::new(target).within(patience(MOMENT)), 1)?.pop().context("no answer")?;
        match answer {
            Ok(answer) => {
                ensure!(
                    self.service.pods.contains(&answer.pod.as_str()) && answer.from == target.address,
                    "{answer:?}"
                );
                Ok(true)
            }
            Err(Failure::TimedOut) => Ok(false),
            Err(other) => anyhow::bail!("{} to {target}: {other}", place.name()),
        }
    }

    fn dropped(&self, family: Family) -> Result<u64> {
        let (node, hook) = self.node(family);
        node.counted(hook, Outcome::DropSource)
    }
}

/// Every family and protocol.
fn transports() -> impl Iterator<Item = (Family, Protocol)> {
    Family::ALL.into_iter().flat_map(|family| Protocol::ALL.map(|protocol| (family, protocol)))
}

/// A flow, and the pod that it is with.
fn open(place: &Place, target: Target) -> Result<(String, Activity<'_>)> {
    let flow = place.open(Ask::new(target))?;
    Ok((flow.ask()?.pod, flow))
}

#[test]
fn scenario_36_a_client_that_is_no_longer_meant_keeps_its_flows_and_gets_no_new_ones() -> Result<()> {
    let scene = Scene::start()?;
    let client = scene.client();
    scene.restrict(&CLIENTS, false, [true, true])?;
    let flows: Vec<_> =
        transports().map(|(family, protocol)| open(client, scene.vip(family, protocol))).collect::<Result<_>>()?;

    scene.restrict(&PODS, false, [false, false])?;
    for (pod, flow) in &flows {
        for _ in 0..5 {
            assert_eq!(&flow.ask().context("a flow from before")?.pod, pod);
        }
    }
    for (family, protocol) in transports() {
        let target = scene.vip(family, protocol);
        // Neither the first packet nor those after it.
        let before = scene.dropped(family)?;
        match protocol {
            Protocol::Tcp => ensure!(!scene.is_served(client, target)?, "{target}"),
            Protocol::Udp => {
                let socket = client.open(Ask::new(target).within(patience(MOMENT)))?;
                for number in 0..3 {
                    assert_eq!(socket.try_ask()?, Err(Failure::TimedOut), "datagram {number} to {target}");
                }
                assert_eq!(scene.dropped(family)?, before + 3, "each datagram to {target}");
            }
        }
        ensure!(scene.dropped(family)? > before, "{target}: not counted");
        for target in scene.besides(family, protocol) {
            ensure!(scene.is_served(client, target)?, "{target} is not the balancer's");
        }
        ensure!(scene.is_served(scene.cluster.lab.place("client-a")?, scene.vip(family, protocol))?, "pods are meant");
    }

    scene.restrict(&CLIENTS, false, [true, true])?;
    for (pod, flow) in &flows {
        assert_eq!(&flow.ask().context("after all")?.pod, pod);
    }
    Ok(())
}

#[test]
fn scenario_36_each_family_goes_by_its_own_ranges_and_by_annotation_so_do_the_other_ways_in() -> Result<()> {
    let scene = Scene::start()?;
    scene.restrict(&["192.0.2.0/24", "2001:db8:9999::/48"], false, [true, false])?;
    scene.restrict(&["203.0.113.0/24", "2001:db8::/64"], false, [false, true])?;
    // As with kube-proxy: a family that no range is of is not restricted.
    scene.restrict(&["2001:db8::/64"], false, [true, true])?;
    scene.restrict(&["198.51.100.0/24"], false, [false, true])?;
    scene.restrict(&PODS, true, [false, false])?;
    scene.restrict(&CLIENTS, true, [true, true])?;
    scene.restrict(&[], true, [true, true])?;
    Ok(())
}
