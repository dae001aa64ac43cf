//! What clients see while Services change. A story is a Service in one state after the other; in each of them, what the
//! oracle says must become true.

use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use tests::{lab::address::Family, patience::wait_until, traffic::Protocol};

use crate::{
    case::Case,
    fixture::{Destination, Endpoint, Fixture, IpMode, Policy, State},
    ground::Ground,
    oracle::{Client, Situation},
    table::{ALL, USUAL, Way},
};

/// A story of its own, with a Service of its own.
pub(crate) struct Change {
    /// Unique, as those of cases.
    pub(crate) name: &'static str,
    pub(crate) run: fn(&mut Ground) -> Result<()>,
}

pub(crate) fn changes() -> Vec<Change> {
    let change = |name, run| Change { name, run };
    vec![
        change("the last endpoint drains, ends and goes", the_last_endpoint_goes),
        change("a balancer's address leaves with ipMode=Proxy and comes back", a_balancer_takes_over),
        change("externalTrafficPolicy becomes Local and Cluster again", the_policy_changes),
        change("source ranges come and go", source_ranges_change),
        change("an address is no Service's before it is one's, and afterwards", an_address_is_given_and_taken),
        change("a client with affinity stays with its backend at every frontend", affinity_is_shared_by_frontends),
        change("affinity does not hold to a backend that is not ready", affinity_ends_with_readiness),
        change("affinity does not hold to a backend outside the policy", affinity_keeps_to_the_policy),
    ]
}

/// As long as a change may take on a busy machine; usually it is milliseconds.
const PATIENCE: Duration = Duration::from_secs(5);

const POD: Client = Client::Pod("client-a");
const NODE: Client = Client::Node("node-a");
const OUTSIDE: Client = Client::Outside("node-a");
const NODE_PORT: Destination = Destination::NodePort("node-a");

/// Trap 6: the endpoints that drain last go on serving.
fn the_last_endpoint_goes(ground: &mut Ground) -> Result<()> {
    let states = [State::Ready, State::Draining, State::Ending].map(|state| vec![Endpoint::new("b1", state)]);
    let states = states.into_iter().chain([vec![]]).map(|endpoints| Fixture::new(110, Policy::Cluster, &endpoints));
    tell(ground, states, &[(POD, Destination::ClusterIp), (NODE, Destination::ClusterIp), (OUTSIDE, NODE_PORT)])
}

/// Trap 18: the frontend has really left. Twice, as one packet rarely shows what the next does.
fn a_balancer_takes_over(ground: &mut Ground) -> Result<()> {
    let service = Fixture::new(111, Policy::Cluster, &[Endpoint::ready("a1")]);
    let states = [IpMode::Vip, IpMode::Proxy, IpMode::Vip, IpMode::Proxy, IpMode::Vip]
        .map(|ip_mode| Fixture { ip_mode, ..service.clone() });
    tell(ground, states, &[POD, NODE, OUTSIDE].map(|client| (client, Destination::Balancer)))
}

fn the_policy_changes(ground: &mut Ground) -> Result<()> {
    let policies = [Policy::Cluster, Policy::Local, Policy::Cluster];
    let states = policies.map(|policy| Fixture::new(112, policy, &[Endpoint::ready("b1")]));
    tell(ground, states, &[(POD, NODE_PORT), (OUTSIDE, NODE_PORT), (OUTSIDE, Destination::Balancer)])
}

fn source_ranges_change(ground: &mut Ground) -> Result<()> {
    let service = Fixture::new(113, Policy::Cluster, &[Endpoint::ready("a1")]);
    let clients = vec!["192.0.2.100/32", "2001:db8::100/128"];
    let pods = vec!["10.244.0.0/16", "fd00:10:244::/48"];
    let states = [vec![], clients, pods, vec![]].map(|source_ranges| Fixture { source_ranges, ..service.clone() });
    tell(ground, states, &[(POD, Destination::Balancer), (OUTSIDE, Destination::Balancer)])
}

/// Trap 22: packets that come before the Service do not leave the node, nor do those that come after it.
fn an_address_is_given_and_taken(ground: &mut Ground) -> Result<()> {
    let service = Fixture::new(114, Policy::Cluster, &[Endpoint::ready("b1")]);
    let ways = [POD, NODE, OUTSIDE].map(|client| (client, Destination::ClusterIp));
    let absent = Fixture { is_absent: true, ..service.clone() };
    tell(ground, [absent.clone(), service, absent], &ways)
}

/// Section 9: one client, one Service port, one backend.
fn affinity_is_shared_by_frontends(ground: &mut Ground) -> Result<()> {
    let service = sticky(115, &["a1", "a2", "b1", "b2"]);
    service.write(ground.source())?;
    for client in [POD, NODE, OUTSIDE] {
        for (family, protocol) in ALL {
            let ways = [Destination::ClusterIp, NODE_PORT, Destination::Balancer, Destination::External];
            let ways = ways.map(|destination| (client, destination));
            let mut first = String::new();
            for way in ways {
                first = wait_for_anyone(ground, &service, way, (family, protocol))?;
            }
            for way in ways {
                stays_with(ground, &service, way, (family, protocol), &first)?;
            }
        }
    }
    Ok(())
}

/// Trap 23: a client leaves an endpoint that is not ready, and does not come back to it.
fn affinity_ends_with_readiness(ground: &mut Ground) -> Result<()> {
    let service = sticky(116, &["a1", "a2", "b1"]);
    for (family, protocol) in ALL {
        service.write(ground.source())?;
        let way = (POD, Destination::ClusterIp);
        let first = wait_for_anyone(ground, &service, way, (family, protocol))?;
        stays_with(ground, &service, way, (family, protocol), &first)?;
        without(&service, &first).write(ground.source())?;
        let second = wait_for(ground, &service, way, (family, protocol), |pod| pod != first)?;
        stays_with(ground, &service, way, (family, protocol), &second)?;
        service.write(ground.source())?;
        stays_with(ground, &service, way, (family, protocol), &second)?;
    }
    Ok(())
}

/// Trap 23: a backend on another node is none for a client whose traffic stays on its own.
fn affinity_keeps_to_the_policy(ground: &mut Ground) -> Result<()> {
    let service = Fixture { internal: Policy::Local, ..sticky(117, &["a1", "b1"]) };
    for transport in ALL {
        without(&service, "a1").write(ground.source())?;
        wait_for(ground, &service, (POD, NODE_PORT), transport, |pod| pod == "b1")?;
        service.write(ground.source())?;
        wait_for(ground, &service, (POD, Destination::ClusterIp), transport, |pod| pod == "a1")?;
        stays_with(ground, &service, (POD, Destination::ClusterIp), transport, "a1")?;
    }
    Ok(())
}

fn sticky(number: u8, pods: &[&'static str]) -> Fixture {
    let endpoints: Vec<_> = pods.iter().copied().map(Endpoint::ready).collect();
    Fixture { has_affinity: true, ..Fixture::new(number, Policy::Cluster, &endpoints) }
}

/// The same with that pod not ready.
fn without(service: &Fixture, pod: &str) -> Fixture {
    let mut service = service.clone();
    service.endpoints.iter_mut().filter(|endpoint| endpoint.pod == pod).for_each(|endpoint| {
        endpoint.state = State::NotReady;
    });
    service
}

/// Puts the Service into each state and waits until everybody sees it as the oracle says.
fn tell(ground: &mut Ground, states: impl IntoIterator<Item = Fixture>, ways: &[Way]) -> Result<()> {
    for (number, service) in states.into_iter().enumerate() {
        service.write(ground.source())?;
        let situations = ways.iter().flat_map(|&(client, destination)| {
            let service = &service;
            ALL.map(|(family, protocol)| Situation { client, destination, service, family, protocol, settings: USUAL })
        });
        let cases: Vec<_> = situations.map(|situation| Case::of(&situation)).collect();
        become_true(ground, &cases).with_context(|| format!("state {} of the Service", number + 1))?;
    }
    Ok(())
}

fn become_true(ground: &mut Ground, cases: &[Case]) -> Result<()> {
    let mut complaint = None;
    let waited = wait_until("the oracle's word to become true", PATIENCE, || {
        let asked = cases.iter().collect::<Vec<_>>();
        complaint = match ground.ask(&asked) {
            Ok(findings) => cases.iter().zip(&findings).find_map(|(case, found)| case.judge(found).err()),
            Err(error) => Some(format!("{error:#}")),
        };
        complaint.is_none().then_some(())
    });
    match complaint {
        Some(complaint) => bail!("{complaint}"),
        None => waited,
    }
}

/// Family and protocol.
type Transport = (Family, Protocol);

/// Asks until somebody answers whom `is_right` accepts.
fn wait_for(
    ground: &mut Ground,
    service: &Fixture,
    way: Way,
    transport: Transport,
    is_right: impl Fn(&str) -> bool,
) -> Result<String> {
    let target = way.1.target(service, transport.0, transport.1);
    wait_until(&format!("the right answer for {} at {target}", way.0.place()), PATIENCE, || {
        let pods = ground.hear(way.0, target, 1).ok()?;
        pods.into_iter().next().filter(|pod| is_right(pod))
    })
}

fn wait_for_anyone(ground: &mut Ground, service: &Fixture, way: Way, transport: Transport) -> Result<String> {
    wait_for(ground, service, way, transport, |_| true)
}

/// With three other backends, twenty answers of one are no accident.
fn stays_with(ground: &mut Ground, service: &Fixture, way: Way, transport: Transport, pod: &str) -> Result<()> {
    let target = way.1.target(service, transport.0, transport.1);
    let heard = ground.hear(way.0, target, 20)?;
    let client = way.0.place();
    ensure!(heard.iter().all(|other| other == pod), "{client} belongs to {pod}, but {heard:?} answer it at {target}");
    Ok(())
}
