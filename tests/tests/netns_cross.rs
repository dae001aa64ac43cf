//! Between the families, end to end: real sockets that have one of them reach pods that have the other, by a NodePort and by an
//! address of a load balancer.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tests::{
    lab::{
        Between, LabOptions, Node, UplinkMode,
        address::{self, Family},
        agent::AgentOptions,
        cluster::Cluster,
        manifest::{Service, write_documents},
    },
    patience::wait_until,
    traffic::{Answer, Ask, Protocol, Target},
};

const SOON: Duration = Duration::from_secs(20);
const MIB: u64 = 1 << 20;
const UPLINKS: [[UplinkMode; 2]; 2] = [[UplinkMode::Xdp, UplinkMode::Tc], [UplinkMode::Tc, UplinkMode::Xdp]];

fn other(family: Family) -> Family {
    if family == Family::V4 { Family::V6 } else { Family::V4 }
}

/// A Service that has addresses and endpoints of one family, and asks for clients of the other.
struct Single {
    service: Service,
    home: Family,
    host: u8,
}

impl Single {
    fn new(home: Family, host: u8, pods: &[&'static str]) -> Self {
        Self { service: Service::new(&format!("single-{host}"), host, pods), home, host }
    }

    fn write(&self, cluster: &Cluster) -> Result<()> {
        let mut documents = self.service.documents();
        documents.retain(|document| document["addressType"].as_str().is_none_or(|name| name == self.home.name()));
        let service = documents.first_mut().context("no Service")?;
        let (address, balancer) = (self.service.cluster_ips.of(self.home), address::of_balancer(self.host));
        service["metadata"]["annotations"] = json!({"service.sluice.dev/nat46x64": "true"});
        service["spec"]["clusterIP"] = json!(address);
        service["spec"]["clusterIPs"] = json!([address]);
        service["spec"]["ipFamilies"] = json!([self.home.name()]);
        service["spec"]["ipFamilyPolicy"] = Value::from("SingleStack");
        service["status"]["loadBalancer"]["ingress"] = json!([{"ip": balancer.v4}, {"ip": balancer.v6}]);
        write_documents(cluster.source(), &format!("{}.yaml", self.service.name), &documents)
    }

    /// Its NodePort at a node, for clients of the other family.
    fn at(&self, node: &Node, protocol: Protocol) -> Target {
        self.service.at_node(node.addresses(), other(self.home), protocol)
    }

    fn balancer(&self, protocol: Protocol) -> Target {
        let address = address::of_balancer(self.host).of(other(self.home));
        Target { address: (address, self.service.port).into(), protocol }
    }
}

fn options() -> AgentOptions {
    AgentOptions { more: vec!["--nat46x64".into()], ..AgentOptions::default() }
}

/// Services of each family, whose only pod is one or the other node's, each with a way to its load balancer's addresses.
fn start(options: LabOptions) -> Result<(Cluster, Vec<Single>)> {
    let cluster = Cluster::start(options, self::options(), &[])?;
    let places = [(Family::V4, 41, "a1"), (Family::V4, 42, "b1"), (Family::V6, 43, "a1"), (Family::V6, 44, "b1")];
    let singles: Vec<_> = places.into_iter().map(|(home, host, pod)| Single::new(home, host, &[pod])).collect();
    let (client, via) = (cluster.lab.client.namespace(), cluster.lab.nodes[0].addresses());
    for single in &singles {
        let balancer = address::of_balancer(single.host);
        client.ip(&format!("route add {} via {}\nroute add {} via {}", balancer.v4, via.v4, balancer.v6, via.v6))?;
        single.write(&cluster)?;
    }
    for single in &singles {
        for node in &cluster.lab.nodes {
            wait_until_served(&cluster, single.at(node, Protocol::Tcp))?;
        }
    }
    Ok((cluster, singles))
}

fn wait_until_served(cluster: &Cluster, target: Target) -> Result<()> {
    wait_until(&format!("{target} to be served"), SOON, || cluster.lab.client.ask(Ask::new(target)).ok().map(drop))
}

/// The client heard from whom it asked, and the pod from an address of its own family.
fn check(answer: &Answer, single: &Single, target: Target) -> Result<()> {
    let pod = single.service.pods.first().copied();
    ensure!(Some(answer.pod.as_str()) == pod && answer.from == target.address, "{target}: {answer:?}");
    ensure!(Family::of(answer.peer.ip()) == single.home, "{target}: {answer:?}");
    Ok(())
}

/// Everything a client can do with each Service.
fn use_all(cluster: &Cluster, singles: &[Single]) -> Result<()> {
    let client = &cluster.lab.client;
    for single in singles {
        for protocol in Protocol::ALL {
            let at_nodes = cluster.lab.nodes.iter().map(|node| single.at(node, protocol));
            for target in at_nodes.chain([single.balancer(protocol)]) {
                for answer in client.ask_times(Ask::new(target), 5)? {
                    check(&answer.with_context(|| target.to_string())?, single, target)?;
                }
            }
        }
        for target in [single.at(&cluster.lab.nodes[0], Protocol::Tcp), single.balancer(Protocol::Tcp)] {
            let report = client.transfer(Ask::new(target), MIB).with_context(|| target.to_string())?;
            assert_eq!(
                (Some(report.pod.as_str()), report.bytes),
                (single.service.pods.first().copied(), MIB),
                "{target}"
            );
        }
    }
    Ok(())
}

#[test]
fn a_client_of_one_family_reaches_pods_of_the_other() -> Result<()> {
    for uplinks in UPLINKS {
        let (cluster, singles) = start(LabOptions { uplinks, ..LabOptions::default() })?;
        use_all(&cluster, &singles)?;
    }
    Ok(())
}

#[test]
fn pods_behind_an_overlay_are_reached_as_well() -> Result<()> {
    let (cluster, singles) = start(LabOptions { between: Between::Overlay, ..LabOptions::default() })?;
    use_all(&cluster, &singles)
}

/// A pod of the node asks by the node's own address, of the family that the Service has not.
#[test]
fn pods_reach_them_too() -> Result<()> {
    let (cluster, singles) = start(LabOptions::default())?;
    for (name, node) in [("client-a", 0), ("client-b", 1)] {
        for single in &singles {
            for protocol in Protocol::ALL {
                let target = single.at(&cluster.lab.nodes[node], protocol);
                let answer = cluster.lab.place(name)?.ask(Ask::new(target)).with_context(|| target.to_string())?;
                check(&answer, single, target)?;
            }
        }
    }
    Ok(())
}

#[test]
fn an_open_connection_goes_on_without_an_agent_and_with_the_next_one() -> Result<()> {
    let (cluster, singles) = start(LabOptions::default())?;
    for single in &singles {
        let target = single.at(&cluster.lab.nodes[0], Protocol::Tcp);
        let open = cluster.lab.client.open(Ask::new(target))?;
        check(&open.ask()?, single, target)?;
        cluster.lab.nodes.iter().for_each(Node::kill_agent);
        check(&open.ask()?, single, target)?;
        check(&cluster.lab.client.ask(Ask::new(target))?, single, target)?;
        cluster.restart_agents()?;
        check(&open.ask()?, single, target)?;
        open.close()?;
    }
    Ok(())
}

#[test]
fn without_the_flag_nobody_crosses_and_the_agent_says_why() -> Result<()> {
    let cluster = Cluster::start(LabOptions::default(), AgentOptions::default(), &[])?;
    let single = Single::new(Family::V4, 41, &["a1"]);
    single.write(&cluster)?;
    let [node, _] = &cluster.lab.nodes;
    let native = single.service.at_node(node.addresses(), single.home, Protocol::Tcp);
    wait_until_served(&cluster, native)?;
    node.agent()?.wait_for_line("lab/single-41: annotation service.sluice.dev/nat46x64 has no effect", SOON)?;
    assert!(cluster.lab.client.ask(Ask::new(single.at(node, Protocol::Tcp))).is_err(), "there is nobody at the port");
    Ok(())
}
