//! Rows written down by hand, so that a mistake of the oracle's does not become the measure.

use std::collections::BTreeMap;

use tests::{lab::address::Family, traffic::Protocol};

use crate::{
    case::Case,
    fixture::Destination,
    oracle::{Client, Expected, Settings, Situation},
    table::{LOCAL_BACKENDS, MASQUERADE_ALL, USUAL, fixtures},
};

/// Setting, client, destination, number of the Service, what is to come of it over IPv4 and TCP.
type Row = (Settings, Client, Destination, u8, &'static str);

const POD: Client = Client::Pod("client-a");
const NODE: Client = Client::Node("node-a");
const OUTSIDE: Client = Client::Outside("node-a");
const OTHER_POD: Client = Client::Pod("client-b");
const NODE_PORT: Destination = Destination::NodePort("node-a");

/// 10 to 20 have policy Cluster, 30 to 40 policy Local: a1; b1; both; a1 not ready; a1 draining; b1 draining; both
/// draining; a1 not ready and b1 draining; both ending; neither ready; none.
const ROWS: &[Row] = &[
    (USUAL, POD, Destination::ClusterIp, 12, "a1 sees 10.244.1.100, b1 sees 10.244.1.100"),
    (USUAL, POD, NODE_PORT, 12, "a1 sees 10.244.1.100, b1 sees 192.0.2.11"),
    (USUAL, NODE, Destination::ClusterIp, 12, "a1 sees 192.0.2.11, b1 sees 192.0.2.11"),
    (USUAL, OUTSIDE, Destination::ClusterIp, 12, "a1 sees 192.0.2.11, b1 sees 192.0.2.11"),
    (USUAL, OUTSIDE, Destination::Balancer, 12, "a1 sees 192.0.2.100, b1 sees 192.0.2.11"),
    (USUAL, OTHER_POD, NODE_PORT, 12, "a1 sees 10.244.2.100, b1 sees 192.0.2.11"),
    (USUAL, POD, Destination::ClusterIp, 13, "b1 sees 10.244.1.100"),
    (USUAL, POD, Destination::ClusterIp, 15, "a1 sees 10.244.1.100"),
    (USUAL, OUTSIDE, NODE_PORT, 16, "a1 sees 192.0.2.100, b1 sees 192.0.2.11"),
    (USUAL, POD, Destination::ClusterIp, 18, "REJECT"),
    (USUAL, OUTSIDE, NODE_PORT, 19, "REJECT"),
    (USUAL, NODE, Destination::External, 20, "REJECT"),
    (USUAL, POD, Destination::ClusterIp, 31, "DROP"),
    (USUAL, NODE, Destination::ClusterIp, 33, "DROP"),
    (USUAL, POD, Destination::ClusterIp, 34, "a1 sees 10.244.1.100"),
    (USUAL, OUTSIDE, Destination::Balancer, 31, "DROP"),
    (USUAL, OUTSIDE, Destination::Balancer, 32, "a1 sees 192.0.2.100"),
    (USUAL, OUTSIDE, Destination::Balancer, 40, "REJECT"),
    (USUAL, OTHER_POD, NODE_PORT, 31, "DROP"),
    (USUAL, POD, Destination::Balancer, 31, "b1 sees 10.244.1.100"),
    (USUAL, NODE, Destination::Balancer, 31, "b1 sees 192.0.2.11"),
    (USUAL, POD, NODE_PORT, 32, "a1 sees 10.244.1.100, b1 sees 10.244.1.100"),
    (USUAL, OUTSIDE, NODE_PORT, 37, "DROP"),
    (USUAL, POD, Destination::ClusterIp, 70, "a1 sees 10.244.1.100"),
    (USUAL, POD, Destination::ClusterIp, 71, "b1 sees 10.244.1.100"),
    (USUAL, OUTSIDE, Destination::Balancer, 85, "a1 sees 192.0.2.100, b1 sees 192.0.2.11"),
    (USUAL, POD, Destination::Balancer, 85, "DROP"),
    (USUAL, POD, NODE_PORT, 85, "a1 sees 10.244.1.100, b1 sees 192.0.2.11"),
    (USUAL, POD, NODE_PORT, 86, "DROP"),
    (USUAL, Client::Outside("node-b"), Destination::Balancer, 85, "DROP"),
    (USUAL, POD, Destination::UndefinedPort, 12, "REJECT"),
    (USUAL, POD, Destination::Unallocated, 12, "DROP"),
    (USUAL, POD, Destination::Balancer, 105, "wire sees 10.244.1.100"),
    (USUAL, Client::Pod("a1"), NODE_PORT, 10, "a1 sees 192.0.2.11"),
    (MASQUERADE_ALL, POD, Destination::ClusterIp, 12, "a1 sees 192.0.2.11, b1 sees 192.0.2.11"),
    (LOCAL_BACKENDS, POD, NODE_PORT, 12, "a1 sees 192.0.2.11, b1 sees 192.0.2.11"),
    (LOCAL_BACKENDS, OUTSIDE, NODE_PORT, 12, "a1 sees 192.0.2.11, b1 sees 192.0.2.11"),
    (LOCAL_BACKENDS, OUTSIDE, NODE_PORT, 32, "a1 sees 192.0.2.100"),
    (LOCAL_BACKENDS, NODE, Destination::Localhost, 12, "a1 sees 192.0.2.11, b1 sees 192.0.2.11"),
];

/// The rows as cases, each with what the oracle would have said.
pub(crate) fn cases() -> Vec<(Case, Expected)> {
    let services = fixtures();
    let case = |&(settings, client, destination, number, expected): &Row| {
        let service = services.iter().find(|service| service.number == number);
        let service = service.expect("a row names a Service by its number");
        let situation =
            Situation { client, destination, service, family: Family::V4, protocol: Protocol::Tcp, settings };
        let case = Case::of(&situation);
        let (name, said) = (format!("by hand: {}", case.name), case.expected().clone());
        (case.literally(name, parse(expected)), said)
    };
    ROWS.iter().map(case).collect()
}

fn parse(text: &'static str) -> Expected {
    let answer = |part: &'static str| {
        let (pod, whom) = part.split_once(" sees ")?;
        Some((pod, [whom.parse().ok()?].into()))
    };
    match text {
        "REJECT" => Expected::Reject,
        "DROP" => Expected::Drop,
        _ => {
            let answers: Option<BTreeMap<_, _>> = text.split(", ").map(answer).collect();
            Expected::Answers(answers.expect("a row says who sees whom"))
        }
    }
}
